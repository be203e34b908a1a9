//! `multifd verify`: compares a file with its digests, or adds digests to a file that has none.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use indicatif::{BinaryBytes, HumanCount};
use multifd::channel::Stop;
use qemu_stream::mapped_ram::{MappedRamFile, Verification, Verify};
use serde::Serialize;

use crate::{
    args::VerifyArgs,
    file_address::Digests,
    interrupt,
    output::{
        display::{Display, Shown},
        outcome::{Failure, While},
        outlet::{print_json, print_lines, say},
        progress::Look,
        report::{Ram, Report, millis, rate},
    },
};

/// The result, as JSON.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Outcome {
    status: &'static str,
    total_time: u64,
    page_size: u64,
    pages: u64,
    damaged_pages: u64,
    damage: Vec<Run>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Run {
    block: String,
    offset: u64,
    length: u64,
    position: u64,
    why: String,
}

pub(crate) fn run(args: &VerifyArgs) -> Result<(), Failure> {
    let stop = Stop::new();
    interrupt::cancels(&stop)?;
    let file = args.file.open(Digests::Compare)?;
    if !args.add && !file.has_digests() {
        let why = "it has none: QEMU wrote it, or an older version of this program; multifd verify --add adds digests of its \
                   present contents";
        return Err(While::new(format!("cannot compare {} with its digests", args.file), why).into());
    }
    let start = Instant::now();
    let read = Arc::new(AtomicU64::new(0));
    let display = {
        let total = present(&file).map_err(|error| args.file.unreadable(error))?;
        let shown = Reading { read: read.clone(), total, start };
        Display::start("verify", args.output.progress(), Arc::new(shown))
    };
    let verify = Verify::new(&file).threads(args.threads).direct_io(args.direct_io);
    let found = if args.add {
        add(args, &file, &verify, &read, &stop).map(|()| None)
    } else {
        verify.run(&read, &stop).map_err(Failure::of).map(Some)
    };
    drop(display);
    match found? {
        None => {
            if !args.output.quiet {
                say(&format!("added digests to {}", args.file));
            }
            Ok(())
        }
        Some(found) => report(args, &file, &found, start),
    }
}

/// The number of bytes of present pages.
fn present(file: &MappedRamFile) -> Result<u64, qemu_stream::Error> {
    let page_size = file.blocks().page_size().bytes() as u64;
    file.blocks().iter().map(|(index, _)| Ok(file.bitmap(index)?.count() * page_size)).sum()
}

fn add(
    args: &VerifyArgs,
    file: &MappedRamFile,
    verify: &Verify<'_>,
    read: &AtomicU64,
    stop: &Stop,
) -> Result<(), Failure> {
    let failed = |error: io::Error| While::new(format!("cannot write {}", args.file), error);
    let writable = writable(file.file()).map_err(failed)?;
    let added = verify.add(&writable, None, read, stop);
    added.map_err(|error| {
        if error.is_cancelled() {
            return Failure::Interrupted;
        }
        While::new(format!("cannot add digests to {}", args.file), error).into()
    })
}

/// The same file, open for writing. The path may lead to another file by now.
fn writable(file: &File) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn report(
    args: &VerifyArgs,
    file: &MappedRamFile,
    found: &Verification,
    start: Instant,
) -> Result<(), Failure> {
    let page_size = file.blocks().page_size().bytes() as u64;
    let time = start.elapsed();
    if args.output.json {
        let damage = found.damage.iter().map(|run| Run {
            block: run.block.to_string(),
            offset: run.offset.0,
            length: run.length,
            position: run.position,
            why: run.why.clone(),
        });
        print_json(&Outcome {
            status: if found.damaged_pages == 0 { "intact" } else { "damaged" },
            total_time: millis(time),
            page_size,
            pages: found.pages,
            damaged_pages: found.damaged_pages,
            damage: damage.collect(),
        })?;
    } else {
        let lines = found.damage.iter().map(|run| {
            format!(
                "damaged: block {:?}, offset {:#x}, {} (file offset {:#x}): {}",
                run.block,
                run.offset.0,
                BinaryBytes(run.length),
                run.position,
                run.why
            )
        });
        print_lines(&lines.collect::<Vec<_>>())?;
    }
    if found.damaged_pages > 0 {
        if found.damage.len() == Verification::MOST_DAMAGE && !args.output.json {
            say(&format!("only the first {} places are listed", Verification::MOST_DAMAGE));
        }
        let (damaged, pages) = (HumanCount(found.damaged_pages), HumanCount(found.pages));
        let why = format!(
            "{damaged} of {pages} pages are not what was written: use another copy of it; --no-verify of send, restore and \
             inspect reads it as it is"
        );
        return Err(While::new(format!("{} is damaged", args.file), why).into());
    }
    if !args.output.quiet && !args.output.json {
        let bytes = found.pages * page_size;
        say(&format!(
            "{} is intact: {} pages ({}) in {:.1} s, {}/s",
            args.file,
            HumanCount(found.pages),
            BinaryBytes(bytes),
            time.as_secs_f64(),
            BinaryBytes(rate(bytes, time))
        ));
    }
    Ok(())
}

/// What the display shows.
struct Reading {
    read: Arc<AtomicU64>,
    total: u64,
    start: Instant,
}

impl Shown for Reading {
    fn look(&self) -> Look {
        let done = self.read.load(Ordering::Relaxed);
        let time = self.start.elapsed();
        let left = self.total.saturating_sub(done);
        // A second shows how fast it is.
        let to_go = (time.as_secs() > 0).then(|| rate(done, time)).filter(|rate| *rate > 0);
        let to_go = to_go.map(|rate| std::time::Duration::from_secs(left / rate));
        let check = "the disk does not answer";
        Look { done, total: self.total, transferred: done, to_go, check, ..Look::default() }
    }

    fn report(&self) -> Report {
        let (time, done) = (self.start.elapsed(), self.read.load(Ordering::Relaxed));
        let ram = Ram {
            total: self.total,
            transferred: done,
            remaining: Some(self.total.saturating_sub(done)),
            ..Ram::default()
        };
        Report { status: "verifying", total_time: millis(time), ram, ..Report::default() }
    }
}
