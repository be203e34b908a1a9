//! `multifd verify`: compares a file with its digests, or adds digests to a file that has none.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::AsRawFd,
    sync::{Arc, atomic::AtomicU64},
    time::Instant,
};

use indicatif::{BinaryBytes, HumanCount};
use multifd::channel::Stop;
use qemu_stream::{
    mapped_ram::{ChainFile, Damage, StoredMachine, Verification, Verify},
    stored::Pages,
};
use serde::Serialize;

use super::reading::Reading;
use crate::{
    args::VerifyArgs,
    interrupt,
    output::{
        display::Display,
        outcome::{Failure, While},
        outlet::{print_json, print_lines, say, shown},
        report::{millis, rate},
    },
    stored::Open,
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
    files: usize,
    damage: Vec<Run>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Run {
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<String>,
    block: String,
    offset: u64,
    length: u64,
    position: u64,
    why: String,
}

pub(crate) fn run(args: &VerifyArgs) -> Result<(), Failure> {
    let stop = Stop::new();
    interrupt::cancels(&stop)?;
    let file = Open::new(&stop).quiet(true).pages(Pages::Count).machine(&args.file)?;
    if !file.form().is_in_place() {
        let why = format!(
            "it is {}, which has no digests and no place for them; this makes a file that has them: multifd merge FILE NEW",
            file.form()
        );
        return Err(While::new(format!("cannot compare {} with its digests", args.file), why).into());
    }
    if !args.add && !file.has_digests() {
        let why = "it has none: QEMU wrote it, or an older version of this program; multifd verify --add adds digests of its \
                   present contents";
        return Err(While::new(format!("cannot compare {} with its digests", args.file), why).into());
    }
    let start = Instant::now();
    let read = Arc::new(AtomicU64::new(0));
    let display = {
        let total = present(&file).map_err(|error| args.file.unreadable(error))?;
        let shown = Reading { read: read.clone(), total, start, status: "verifying" };
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

/// The number of bytes of pages in all files.
fn present(file: &StoredMachine) -> Result<u64, qemu_stream::Error> {
    let page_size = file.blocks().page_size().bytes() as u64;
    let bytes_of = |file: &ChainFile| -> Result<u64, qemu_stream::Error> {
        file.blocks().iter().map(|(index, _)| Ok(file.bitmap(index)?.count() * page_size)).sum()
    };
    file.files().iter().map(bytes_of).sum()
}

fn add(
    args: &VerifyArgs,
    file: &StoredMachine,
    verify: &Verify<'_>,
    read: &AtomicU64,
    stop: &Stop,
) -> Result<(), Failure> {
    let failed = |error: io::Error| While::new(format!("cannot write {}", args.file), error);
    let writable = writable(file.newest().file()).map_err(failed)?;
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
    file: &StoredMachine,
    found: &Verification,
    start: Instant,
) -> Result<(), Failure> {
    let page_size = file.blocks().page_size().bytes() as u64;
    let time = start.elapsed();
    // The only file is known.
    let name_of = |run: &Damage| {
        let file = file.files().get(run.file).filter(|_| file.files().len() > 1)?;
        Some(shown(file.path()))
    };
    if args.output.json {
        let damage = found.damage.iter().map(|run| Run {
            file: name_of(run),
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
            files: file.files().len(),
            damage: damage.collect(),
        })?;
    } else {
        let lines = found.damage.iter().map(|run| {
            let file = name_of(run).map(|file| format!("{file}: ")).unwrap_or_default();
            format!(
                "damaged: {file}block {:?}, offset {:#x}, {} (file offset {:#x}): {}",
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
        let bases = match file.files().len() {
            1 => String::new(),
            files => format!(" with its bases, {files} files"),
        };
        say(&format!(
            "{}{bases} is intact: {} pages ({}) in {:.1} s, {}/s",
            args.file,
            HumanCount(found.pages),
            BinaryBytes(bytes),
            time.as_secs_f64(),
            BinaryBytes(rate(bytes, time))
        ));
    }
    Ok(())
}
