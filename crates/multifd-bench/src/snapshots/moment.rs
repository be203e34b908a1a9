//! Captures of one moment: how long the guest is stopped, and how much slower it is while it is copied.
//!
//! ```text
//! guest runs ── prepare ── [ pause ] ── copied while it runs ── guest runs
//!      └── pages written in a second: before, and while it is copied
//! ```

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
    sync::Arc,
    thread::sleep,
    time::{Duration, Instant},
};

use multifd::ram::{CopierOptions, PageIndex, RamBlocks};
use qemu_stream::{
    format::{Configuration, MachineType},
    mapped_ram::{Capture, CaptureOptions, MomentCapture},
};

use super::{
    args::SnapshotsArgs,
    guest::{Load, Writing},
    memory::{Kind, Ram, block, enough},
    table::{Row, Table, median, time},
};
use crate::{Result, free};

const LOADS: [Load; 5] = [Load::Idle, Load::Rate(50), Load::Rate(200), Load::Rate(800), Load::Within(64)];

pub(super) fn measure(args: &SnapshotsArgs, table: &mut Table) -> Result<()> {
    let folder = tempfile::tempdir_in(&args.folder)?;
    let path = folder.path().join("machine");
    for kind in Kind::ALL {
        for bytes in args.ram.iter().map(|ram| ram << 20) {
            let size = format!("{} MiB, {}", bytes >> 20, kind.name());
            // The file of an early end, or of the least size.
            let ram = enough(bytes + args.least()).and_then(|()| {
                free::warm(if kind != Kind::Huge { bytes + args.least() } else { args.least() })?;
                Ram::filled(kind, bytes)
            });
            let ram = match ram {
                Ok(ram) => ram,
                Err(error) => {
                    table.add(Row::new("pause", &size).without(&error.to_string()));
                    continue;
                }
            };
            for load in LOADS {
                pause(args, table, &ram, &path, (&size, load))?;
            }
            if bytes == args.least() {
                for load in LOADS.into_iter().filter(|load| *load != Load::Idle) {
                    slow_down(args, table, &ram, &path, (&size, load))?;
                    beside_a_copy(args, table, &ram, &path, (&size, load))?;
                }
            }
        }
    }
    Ok(())
}

/// Captures that are ended as soon as the guest runs again.
fn pause(
    args: &SnapshotsArgs,
    table: &mut Table,
    ram: &Ram,
    path: &Path,
    (size, load): (&str, Load),
) -> Result<()> {
    let (mut pauses, mut prepared, mut held) = (Vec::new(), Vec::new(), Vec::new());
    let mut guest = Writing::start(&ram.blocks, load)?;
    for _ in 0..args.rounds {
        sleep(SETTLE);
        let begun = Instant::now();
        let capture = begin(args, &ram.blocks, path, &mut guest)?;
        prepared.push(begun.elapsed().saturating_sub(capture.pause()));
        pauses.push(capture.pause());
        held.push(capture.copier().stats().held);
    }
    fs::remove_file(path)?;
    let most = pauses.iter().max().copied().unwrap_or_default();
    let note = format!(
        "longest {}; {} pages were protected again; {} of preparation while the guest runs",
        time(most),
        median(held),
        time(median(prepared))
    );
    let row = Row::new("pause", &format!("{size}, guest {load}"));
    let found = median(pauses);
    let row = if load == Load::Idle { row.at_most(found, IDLE) } else { row.time(found) };
    table.add(row.note(note));
    Ok(())
}

/// Whole captures.
fn slow_down(
    args: &SnapshotsArgs,
    table: &mut Table,
    ram: &Ram,
    path: &Path,
    (size, load): (&str, Load),
) -> Result<()> {
    let (mut slower, mut times, mut p99, mut first) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut guest = Writing::start(&ram.blocks, load)?;
    let mut before = 0.0;
    for _ in 0..args.rounds {
        sleep(SETTLE);
        before = pace(&guest, || sleep(BEFORE)).1;
        let mut capture = begin(args, &ram.blocks, path, &mut guest)?;
        let begun = Instant::now();
        let (stats, during) = pace(&guest, || capture.finish(None));
        let stats = stats?;
        times.push(begun.elapsed());
        first.push(stats.first);
        p99.push(stats.p99.unwrap_or_default());
        slower.push(lost(before, during));
        fs::remove_file(path)?;
    }
    let note = format!(
        "{:.0} MB/s before; {} of copying; {} pages were copied for the guest, 99 % of them within {}",
        before * 4096.0 / 1e6,
        time(median(times)),
        median(first),
        time(median(p99)),
    );
    let row = Row::new("slow-down while it is copied", &format!("{size}, guest {load}"));
    table.add(row.percent(median(slower) as f64 / 1e4, 20.0).note(note));
    Ok(())
}

/// What the same guest loses to a thread that only copies its memory to a file, without protection: to another use of the processors,
/// of their caches and of the memory. No capture can cost less.
fn beside_a_copy(
    args: &SnapshotsArgs,
    table: &mut Table,
    ram: &Ram,
    path: &Path,
    (size, load): (&str, Load),
) -> Result<()> {
    let (mut slower, mut times) = (Vec::new(), Vec::new());
    let guest = Writing::start(&ram.blocks, load)?;
    for _ in 0..args.rounds {
        sleep(SETTLE);
        let before = pace(&guest, || sleep(BEFORE)).1;
        let mut file = File::create(path)?;
        let begun = Instant::now();
        let (copied, during) = pace(&guest, || copy(&ram.blocks, &mut file));
        copied?;
        times.push(begun.elapsed());
        slower.push(lost(before, during));
        fs::remove_file(path)?;
    }
    let row = Row::new("slow-down beside a plain copy", &format!("{size}, guest {load}"));
    let note = format!("{} of copying, by one thread, without protection", time(median(times)));
    table.add(row.share(median(slower) as f64 / 1e4).note(note));
    Ok(())
}

/// Does something, and how many pages the guest has written in a second meanwhile.
fn pace<T>(guest: &Writing, meanwhile: impl FnOnce() -> T) -> (T, f64) {
    let (begun, written) = (Instant::now(), guest.written());
    let done = meanwhile();
    (done, (guest.written() - written) as f64 / begun.elapsed().as_secs_f64())
}

/// What a guest has lost, in tenths of a per mille, because a median needs an order.
#[expect(clippy::cast_possible_truncation, reason = "a few thousands")]
fn lost(before: f64, during: f64) -> i64 {
    ((1.0 - during / before) * 1e4) as i64
}

fn copy(blocks: &RamBlocks, file: &mut File) -> Result<()> {
    let block = block(blocks);
    let (mut bytes, page) = (vec![0; PIECE], blocks.page_size().bytes());
    for first in (0..block.pages()).step_by(PIECE / page) {
        for (number, page) in (first..).zip(bytes.chunks_exact_mut(page)) {
            block.load(PageIndex(number), page)?;
        }
        file.write_all(&bytes)?;
    }
    Ok(())
}

fn begin(
    args: &SnapshotsArgs,
    blocks: &Arc<RamBlocks>,
    path: &Path,
    guest: &mut Writing,
) -> Result<MomentCapture> {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
    let configuration = Configuration::new(MachineType::new("multifd-bench")?);
    let capture = Capture::of_guest(file, configuration, blocks, &CaptureOptions::new())?;
    let mut options = CopierOptions::new().sole_writer(true);
    if let Some(threads) = args.threads {
        options = options.threads(threads);
    }
    Ok(capture.at_moment(blocks, guest, options)?)
}

/// The longest pause that is wanted, of a guest that does not write.
const IDLE: Duration = Duration::from_millis(3);
/// As much as the library copies at once.
const PIECE: usize = 256 << 10;
/// How long a guest is measured before a capture.
const BEFORE: Duration = Duration::from_millis(500);
const SETTLE: Duration = Duration::from_millis(200);
