//! `multifd demo`: a migration between two processes.
//!
//! ```text
//! guest.rs: memory, and threads that write to it ══ channels and QEMU's main stream, on loopback ══▶ destination.rs
//!           stopped at the switchover; a hash ◀───────────────── compared ─────────────────────── a hash
//! ```
//!
//! The destination is this program in a second process. It prints its address, then what it got.

mod destination;
mod guest;
mod proceed;

use std::{
    io::{BufRead, BufReader},
    process::{Child, ChildStdout, Command, Stdio},
    sync::Arc,
};

pub(crate) use destination::destination;
use guest::DemoGuest;
use indicatif::BinaryBytes;
use multifd::{
    Error, SendOptions,
    channel::{Address, Stop},
    error::Usage,
    live::{MigrateOptions, Progress, ZeroPageDetection},
    ram::{BlockName, Mapping, Memory, PageIndex, PageSize, RamBlock, RamBlocks},
};
use qemu_stream::{
    format::{Configuration, MachineType},
    source::{Source, SourceOptions},
};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use crate::{
    args::{DemoArgs, ProgressArg},
    combinations, interrupt,
    output::{
        display::{Display, Shown},
        outcome::{Failure, While},
        outlet::{print_json, print_lines, say},
        progress::Look,
        report::{BeyondRam, Report},
    },
};

/// The message of the destination when it has everything.
#[derive(Serialize, Deserialize)]
struct Arrived {
    hash: String,
    /// Bytes that the guest's device section brought: how often it had written.
    rounds: u64,
    beyond_ram: u64,
}

pub(crate) fn run(args: &DemoArgs) -> Result<(), Failure> {
    combinations::of_demo(args).map_err(|refused| Failure::Usage(refused.into()))?;
    let size = ram_size(args.size)?;
    let stop = Stop::new();
    interrupt::cancels(&stop)?;
    let blocks = Arc::new(RamBlocks::new(vec![block(size)?])?);
    let source = source(args, &blocks, &stop).map_err(Failure::of)?;
    if !args.json {
        say(&format!(
            "the guest fills {} of RAM, then writes {}/s",
            BinaryBytes(size),
            BinaryBytes(args.dirty_rate)
        ));
    }
    let mut guest = DemoGuest::boot(blocks.clone(), args.dirty_rate, &stop)?;
    let (destination, mut lines) = start_destination()?;
    let address = lines.next_line()?.parse::<Address>()?;
    if args.converge.pause_before_switchover {
        proceed::proceed_at_a_line(source.control())?;
    }
    let progress = source.progress();
    let display = {
        let mode = if args.json { ProgressArg::None } else { ProgressArg::Auto };
        Display::start("demo", mode, Arc::new(Migrating(progress.clone())))
    };
    let mut log = guest.dirty_log()?;
    let sent = source.migrate(address, &mut log, &mut guest);
    drop(display);
    let info = match sent {
        Ok(info) => info,
        Err(error) => {
            if args.json {
                print_json(&Report::of_source(&progress.info()).failed(&error))?;
            }
            return Err(Failure::of(error));
        }
    };
    let source = BeyondRam { source: guest::peak_beyond(&blocks)?, destination: 0 };
    let here = hash(&blocks)?;
    let arrived: Arrived = serde_json::from_str(&lines.next_line()?)?;
    destination.wait()?;
    let equal = arrived.hash == here && arrived.rounds == guest.rounds();
    let mut report = Report::of_source(&info);
    report.ram_equal = Some(equal);
    report.memory_beyond_ram = Some(BeyondRam { destination: arrived.beyond_ram, ..source });
    if args.json {
        print_json(&report)?;
    } else {
        let done = format!("migrated over {} channels", args.multifd_channels);
        let mut lines = report.lines(&done);
        lines.extend(match equal {
            true => vec![format!("RAM is equal: {here} on both sides")],
            false => vec![
                format!("RAM is DIFFERENT: source {here}"),
                format!("             destination {}", arrived.hash),
            ],
        });
        print_lines(&lines)?;
    }
    if equal {
        Ok(())
    } else {
        Err(While::new("the guest was not migrated correctly", "RAM differs between source and destination")
            .into())
    }
}

/// Whole pages.
fn ram_size(asked: u64) -> Result<u64, Failure> {
    let whole =
        asked.checked_next_multiple_of(PageSize::KIB_4.bytes() as u64).filter(|size| *size <= MAX_RAM);
    let refused = || Usage::OutOfRange { name: "size", least: 0, most: MAX_RAM, found: asked.into() };
    Ok(whole.ok_or_else(|| Failure::Usage(refused().into()))?.max(MIN_RAM))
}

/// The source with its options, checked before the second process does anything.
fn source(args: &DemoArgs, blocks: &Arc<RamBlocks>, stop: &Stop) -> Result<Source, Error> {
    let detection = args.zero_page_detection.or(ZeroPageDetection::Multifd);
    let migrate = MigrateOptions::new()
        .zero_page_detection(detection)
        .max_bandwidth(Some(args.max_bandwidth))
        .avail_switchover_bandwidth(Some(args.avail_switchover_bandwidth))
        .downtime_limit(args.downtime_limit);
    let send = SendOptions::new().channels(args.multifd_channels).zero_copy_send(args.zero_copy_send);
    let machine = MachineType::new(MACHINE)?;
    let options = SourceOptions::new(Configuration::new(machine))
        .send(args.compression.apply(send))
        .migrate(args.converge.apply(migrate))
        .stall_timeout(args.stall_timeout());
    Source::new(blocks.clone(), options, stop)
}

/// The second process and its output. It is ended if this process ends early.
struct Destination(Child);

struct Lines(BufReader<ChildStdout>);

fn start_destination() -> Result<(Destination, Lines), Failure> {
    let program = std::env::current_exe()?;
    let mut child = Command::new(program)
        .args(["demo-destination", "tcp:127.0.0.1:0"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| While::new("cannot start the destination's process", error))?;
    let out = child
        .stdout
        .take()
        .ok_or_else(|| While::new("cannot read from the destination's process", "it has no output"))?;
    Ok((Destination(child), Lines(BufReader::new(out))))
}

impl Destination {
    fn wait(mut self) -> Result<(), Failure> {
        let status = self.0.wait()?;
        if status.success() {
            Ok(())
        } else {
            Err(While::new("the destination failed", status.to_string()).into())
        }
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        // In most cases it has ended already; then there is nothing to end.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Lines {
    fn next_line(&mut self) -> Result<String, Failure> {
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            return Err(While::new("the destination's process ended", "it did not report its result").into());
        }
        Ok(line.trim_end().to_owned())
    }
}

/// The demo's one block.
fn block(size: u64) -> Result<RamBlock, Failure> {
    let memory =
        Mapping::anonymous(size).map_err(|error| While::new("cannot map the guest's memory", error))?;
    let name = BlockName::new("demo.ram").ok_or_else(|| While::new("cannot name the block", "a bug"))?;
    Ok(RamBlock::new(name, size, PageSize::KIB_4, Memory::Mapped(memory))?)
}

/// A hash over all RAM, from private copies of its pages.
fn hash(blocks: &RamBlocks) -> Result<String, Failure> {
    let (mut hasher, mut page) = (Xxh3::new(), vec![0; blocks.page_size().bytes()]);
    for (_, block) in blocks.iter() {
        for index in (0..block.pages()).map(PageIndex) {
            let slice = block.slice(index, 1).ok_or_else(|| While::new("cannot read RAM", "no such page"))?;
            slice.copy_to(&mut page);
            hasher.update(&page);
        }
    }
    Ok(format!("{:032x}", hasher.digest128()))
}

/// What the display shows.
struct Migrating(Progress);

impl Shown for Migrating {
    fn look(&self) -> Look {
        look(&self.0)
    }

    fn report(&self) -> Report {
        Report::of_source(&self.0.info())
    }
}

fn look(progress: &Progress) -> Look {
    let info = progress.info();
    let dirty = BinaryBytes(info.ram.dirty_pages_rate * info.ram.page_size);
    let note = match (&info.stall, info.cpu_throttle_percentage) {
        (Some(_), _) => "will not converge".to_owned(),
        (None, Some(percent)) => format!("guest throttled {percent} %"),
        // The value is known after one pass.
        (None, None) if info.ram.dirty_sync_count > 1 => format!("dirty {dirty}/s"),
        (None, None) => String::new(),
    };
    Look { note, ..Look::of(progress) }
}

const MACHINE: &str = "multifd-demo";
const MIN_RAM: u64 = 1 << 20;
/// The greatest size that fits into a process.
const MAX_RAM: u64 = 1 << 46;
