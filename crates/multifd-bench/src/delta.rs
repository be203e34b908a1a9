//! What a capture costs that stores only what changed, beside a whole one: time, bytes on the disk, and reading it.
//!
//! ```text
//! RAM, filled ── whole capture ── 1 % of the pages written ── delta by a dirty log, delta by digests ── merge, restore
//! ```
//!
//! The guest does not run: the times are those of the copy. Files are in the page cache (`--folder` on a disk) or in memory.

use std::{
    fs::{self, File},
    io,
    num::NonZero,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, Instant},
};

use clap::Args;
use multifd::{
    SendOptions, Sender,
    channel::Stop,
    live::Migration,
    ram::{
        BlockIndex, BlockName, DirtyBitmaps, DirtyLog, KeptLog, Mapping, Memory, NeverDirty, PageIndex,
        PageSize, RamBlock, RamBlocks,
    },
};
use qemu_stream::{
    format::{Configuration, MachineType},
    mapped_ram::{Base, Capture, CaptureOptions, Captured, Merge, Restore, StoredMachine},
};

use crate::{
    Result,
    engine::{Stopped, one_pass},
};

#[derive(Debug, Args)]
pub(crate) struct DeltaArgs {
    /// Not used: the library is measured
    #[arg(long, hide = true)]
    program: Option<PathBuf>,
    /// RAM in MiB
    #[arg(long, default_value_t = 1024)]
    memory: u64,
    /// Pages that are written between two captures, in thousandths
    #[arg(long, default_value_t = 10)]
    written: u64,
    /// How often everything is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Number of channels
    #[arg(long, default_value_t = 2)]
    channels: u8,
    /// Where the files are written
    #[arg(long, default_value = "/dev/shm")]
    folder: PathBuf,
}

impl DeltaArgs {
    /// One page of a hundred is written.
    pub(crate) fn of(memory: u64, rounds: usize, folder: PathBuf) -> Self {
        Self { program: None, memory, written: 10, rounds, channels: 2, folder }
    }
}

/// What is measured, in the order of the table.
pub(crate) const ROWS: [&str; 7] = [
    "whole, with digests",
    "whole, without digests",
    "delta, by a dirty log",
    "delta, by digests of the base",
    "merge of the delta with its base",
    "restore of the whole",
    "restore of the delta with its base",
];

/// Measures, and prints a table.
pub(crate) fn run(args: &DeltaArgs) -> Result<()> {
    print(args, &measure(args)?);
    Ok(())
}

/// The medians, in the order of [`ROWS`]: times, and bytes on the disk.
pub(crate) fn measure(args: &DeltaArgs) -> Result<Vec<(Duration, u64)>> {
    let folder = tempfile::tempdir_in(&args.folder)?;
    let path = |name: &str| folder.path().join(name);
    let blocks = memory(args.memory << 20)?;
    let block = blocks.block(BlockIndex(0))?;
    (0..block.pages()).try_for_each(|page| write(block, page, page))?;
    let writes = DirtyBitmaps::new(&blocks);
    let mut log = KeptLog::new(writes.reader()?);
    let mut rows: Vec<Vec<(Duration, u64)>> = vec![Vec::new(); ROWS.len()];
    let mut seed = 1_u64;
    for round in 0..args.rounds as u64 {
        let copy = |name: &str, base: Option<&Base>, log: &mut dyn DirtyLog, digests: bool| {
            let start = Instant::now();
            let captured = capture(&blocks, &path(name), base, log, digests, args.channels)?;
            Ok::<_, crate::Error>(((start.elapsed(), on_disk(&path(name))?), captured))
        };
        rows[1].push(copy("plain", None, &mut NeverDirty, false)?.0);
        let (whole, captured) = copy("whole", None, &mut log, true)?;
        rows[0].push(whole);
        for _ in 0..block.pages() * args.written / 1000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let page = (seed >> 20) % block.pages();
            write(block, page, seed ^ round)?;
            writes.mark(BlockIndex(0), PageIndex(page));
        }
        let open = |name: &str| Ok::<_, crate::Error>(StoredMachine::open(&path(name), 0)?);
        let captured = captured.ok_or("a capture with digests has a root")?;
        let base = Base::new(&open("whole")?, "whole")?;
        rows[3].push(copy("by digests", Some(&base), &mut NeverDirty, true)?.0);
        rows[2].push(copy("by log", Some(&base.with_log(&captured)?), &mut log, true)?.0);

        let start = Instant::now();
        let merged = Arc::new(
            File::options().read(true).write(true).create(true).truncate(true).open(path("merged"))?,
        );
        let threads = NonZero::new(args.channels).unwrap_or(NonZero::<u8>::MIN);
        Merge::new(&open("by log")?).threads(threads).run(&merged, None, &AtomicU64::new(0), &Stop::new())?;
        rows[4].push((start.elapsed(), on_disk(&path("merged"))?));
        // The first one of a round finds cold memory and is not counted.
        for (row, name) in [(None, "whole"), (Some(5), "whole"), (Some(6), "by log")] {
            let start = Instant::now();
            let machine = open(name)?;
            let fresh = memory(args.memory << 20)?;
            Restore::new(&machine).channels(args.channels).run(&fresh, &Stop::new())?;
            let time = start.elapsed();
            if let Some(row) = row.and_then(|row| rows.get_mut::<usize>(row)) {
                row.push((time, 0));
            }
            if name == "by log" && !same(block, fresh.block(BlockIndex(0))?) {
                return Err("the restored delta differs from the RAM".into());
            }
        }
        for name in ["plain", "whole", "by digests", "by log", "merged"] {
            fs::remove_file(path(name))?;
        }
    }
    let median = |mut row: Vec<(Duration, u64)>| {
        row.sort();
        row.get(row.len() / 2).copied().unwrap_or_default()
    };
    Ok(rows.into_iter().map(median).collect())
}

fn print(args: &DeltaArgs, medians: &[(Duration, u64)]) {
    let (whole, bytes) = medians.first().copied().unwrap_or_default();
    println!(
        "{} MiB, {} of 1000 pages written, {} channels, in {}: medians of {} rounds\n",
        args.memory,
        args.written,
        args.channels,
        args.folder.display(),
        args.rounds
    );
    println!("| | Time | of the whole | On disk | of the whole |\n| --- | ---: | ---: | ---: | ---: |");
    for (name, (time, size)) in ROWS.iter().zip(medians) {
        let share = |part: f64, all: f64| {
            if part > 0.0 { format!("{:.1} %", 100.0 * part / all.max(1e-9)) } else { "-".into() }
        };
        let size_of = if *size > 0 { format!("{:.1} MiB", mebibytes(*size)) } else { "-".into() };
        println!(
            "| {name} | {:.1} ms | {} | {size_of} | {} |",
            time.as_secs_f64() * 1e3,
            share(time.as_secs_f64(), whole.as_secs_f64()),
            share(mebibytes(*size), mebibytes(bytes))
        );
    }
}

fn mebibytes(bytes: u64) -> f64 {
    // Exact: sizes are multiples of 512 bytes.
    u32::try_from(bytes >> 10).map_or(f64::MAX, f64::from) / 1024.0
}

fn memory(length: u64) -> Result<Arc<RamBlocks>> {
    let memory = Memory::Mapped(Mapping::anonymous(length)?);
    let block = RamBlock::new(BlockName::new("ram").ok_or("a name")?, length, PageSize::KIB_4, memory)?;
    Ok(Arc::new(RamBlocks::new(vec![block])?))
}

fn write(block: &RamBlock, page: u64, seed: u64) -> io::Result<()> {
    let mut word = seed | 1;
    let bytes: Vec<u8> = (0..512)
        .flat_map(|_| {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            word.to_be_bytes()
        })
        .collect();
    block.store(PageIndex(page), &bytes)
}

fn same(one: &RamBlock, other: &RamBlock) -> bool {
    let (mut a, mut b) = ([0; 4096], [0; 4096]);
    (0..one.pages()).map(PageIndex).all(|page| {
        let loaded = one.load(page, &mut a).and_then(|()| other.load(page, &mut b));
        loaded.is_ok() && a == b
    })
}

fn on_disk(path: &Path) -> io::Result<u64> {
    Ok(fs::metadata(path)?.blocks() * 512)
}

pub(crate) fn capture(
    blocks: &Arc<RamBlocks>,
    path: &Path,
    base: Option<&Base>,
    log: &mut dyn DirtyLog,
    digests: bool,
    channels: u8,
) -> Result<Option<Captured>> {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
    let configuration = Configuration::new(MachineType::new("multifd-bench")?);
    let options = CaptureOptions::new().digests(digests);
    let mut capture = match base {
        None => Capture::of_guest(file, configuration, blocks, &options)?,
        Some(base) => Capture::since(base, file, configuration, blocks, &options)?,
    };
    let mut sender = Sender::new(SendOptions::new().channels(channels), blocks.clone(), Stop::new())?;
    sender.set_up_into(capture.blocks().clone())?;
    Migration::new(one_pass(), sender)?.run(&mut capture, log, &mut Stopped)?;
    Ok(capture.captured().copied())
}
