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
    stored::{Form, Open, Opened},
};

/// The result, as JSON.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Outcome {
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    form: Option<String>,
    total_time: u64,
    page_size: u64,
    pages: u64,
    /// Whether the pages were compared with digests.
    compared: bool,
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
    let opened = Instant::now();
    let file = Open::new(&stop).quiet(true).pages(Pages::Count).machine(&args.file)?;
    if !file.form().is_in_place() {
        return foreign(args, &file, opened);
    }
    if !args.add && !file.has_digests() && *file.form() == Form::MappedRam {
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
        verify.read(&read, &stop).map_err(Failure::of).map(Some)
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

/// Reports what was found in a form that has no digests and no place for them. It was read to its end when it was opened, because
/// only that shows whether it is complete.
fn foreign(args: &VerifyArgs, file: &Opened, start: Instant) -> Result<(), Failure> {
    if args.add {
        let why = format!(
            "it is {}, which has no place for digests; this makes a file that has them: multifd merge FILE NEW",
            file.form()
        );
        return Err(While::new(format!("cannot add digests to {}", args.file), why).into());
    }
    let page_size = file.blocks().page_size().bytes() as u64;
    let pages = present(file).map_err(|error| args.file.unreadable(error))? / page_size;
    if args.output.json {
        print_json(&Outcome {
            status: COMPLETE,
            form: Some(file.form().to_string()),
            total_time: millis(start.elapsed()),
            page_size,
            pages,
            compared: false,
            damaged_pages: 0,
            files: 1,
            damage: Vec::new(),
        })?;
    } else if !args.output.quiet {
        let devices = file.devices().sections().len() + file.devices().live().len();
        say(&format!(
            "{} is complete: {}, {} pages with data ({}), {devices} devices",
            args.file,
            file.form(),
            HumanCount(pages),
            BinaryBytes(pages * page_size),
        ));
        if let Some(by) = file.form().compressor() {
            say(&format!("{} has compared it with the checksums that it has", by.name()));
        }
        not_compared(file.form(), "multifd merge FILE NEW makes a file that has them");
    }
    Ok(())
}

/// What could not be checked.
fn not_compared(form: &Form, remedy: &str) {
    say(&format!(
        "not compared: {form} has no digests, so a page that has changed since it was written is not noticed; {remedy}"
    ));
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

fn report(args: &VerifyArgs, file: &Opened, found: &Verification, start: Instant) -> Result<(), Failure> {
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
            status: match found.damaged_pages {
                0 if found.compared => "intact",
                0 => COMPLETE,
                _ => "damaged",
            },
            form: (*file.form() != Form::MappedRam).then(|| file.form().to_string()),
            total_time: millis(time),
            page_size,
            pages: found.pages,
            compared: found.compared,
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
            "{}{bases} is {}: {} pages ({}) in {:.1} s, {}/s",
            args.file,
            if found.compared { "intact" } else { COMPLETE },
            HumanCount(found.pages),
            BinaryBytes(bytes),
            time.as_secs_f64(),
            BinaryBytes(rate(bytes, time))
        ));
        if !found.compared {
            not_compared(file.form(), "multifd verify --add adds digests of what it contains now");
        }
    }
    Ok(())
}

/// Nothing is missing, and nothing could be compared.
const COMPLETE: &str = "complete";
