//! `multifd merge`: makes a whole file of a delta and its bases.

use std::{
    sync::{Arc, atomic::AtomicU64},
    time::Instant,
};

use indicatif::BinaryBytes;
use multifd::channel::Stop;
use qemu_stream::mapped_ram::{FoundFile, Merge, StoredMachine};

use super::reading::Reading;
use crate::{
    about::About,
    args::MergeArgs,
    capture::warn_of_little_room,
    interrupt,
    new_file::NewFile,
    output::{
        display::{Display, Shown},
        outcome::{Failure, While},
        outlet::{print_json, say, shown},
        report::{Report, rate},
    },
    remedy::READS_DAMAGED,
    runs::Run,
    stored::{Open, Opened},
};

pub(crate) fn run(args: &MergeArgs) -> Result<(), Failure> {
    let stop = Stop::new();
    interrupt::cancels(&stop)?;
    interrupt::spares_large_files();
    let newest = args.files.last().map(ToString::to_string).unwrap_or_default();
    let run = Run::start("merge", newest, args.out.to_string(), &args.run, &stop)?;
    let ended = merge(args, &stop, &run);
    run.end(ended)
}

fn merge(args: &MergeArgs, stop: &Stop, run: &Run) -> Result<(), Failure> {
    let opened = open(args, stop)?;
    let machine = &*opened;
    let new = NewFile::create(args.out.path(), args.out.offset(), args.force)?;
    let failed = |error: multifd::Error| {
        if error.is_cancelled() {
            return Failure::Interrupted;
        }
        let damaged =
            if super::send::is_of_damage(&error) { format!("; {READS_DAMAGED}") } else { String::new() };
        While::new(format!("cannot merge into {}{damaged}", args.out), error).into()
    };
    let unwritten = |error: std::io::Error| While::new(format!("cannot complete {}", args.out), error);
    let file = Arc::new(new.file().try_clone().map_err(unwritten)?);
    let total = present(machine).map_err(|error| failed(multifd::Error::other("read a bitmap", error)))?;
    warn_of_little_room(&file, new.target(), total);

    let shown = Arc::new(Reading {
        read: Arc::new(AtomicU64::new(0)),
        total,
        start: Instant::now(),
        status: "merging",
    });
    run.show(shown.clone());
    let display = Display::start("merge", args.output.progress(), shown.clone());
    let merge = Merge::new(machine).threads(args.threads).direct_io(args.direct_io).offset(args.out.offset());
    let about = about(args, machine);
    let merged = merge.run(&file, about.as_deref(), &shown.read, stop).and_then(|end| {
        file.sync_all().map_err(|error| multifd::Error::io("write the file to the disk", error))?;
        stop.check().map(|()| end)
    });
    drop(display);
    let report = shown.report();
    merged.map_err(|error| {
        let report = report.clone().failed(&error);
        run.reported(&report);
        if args.output.json
            && let Err(full) = print_json(&report)
        {
            tracing::error!(error = %full, "cannot print the report");
        }
        failed(error)
    })?;
    new.name()?;
    let report = Report { status: "completed", ..report };
    run.reported(&report);
    if args.output.json {
        print_json(&report)?;
    } else if !args.output.quiet {
        let (time, files) = (shown.start.elapsed(), machine.files().len());
        let files = if files == 1 { "1 file".to_owned() } else { format!("{files} files") };
        say(&format!(
            "merged {files} into {}: {} in {:.1} s, {}/s",
            args.out,
            BinaryBytes(total),
            time.as_secs_f64(),
            BinaryBytes(rate(total, time))
        ));
    }
    Ok(())
}

/// Opens the last file, with the files before it as its bases.
fn open(args: &MergeArgs, stop: &Stop) -> Result<Opened, Failure> {
    let mut rest = args.files.iter().rev();
    let Some(newest) = rest.next() else { return Err(Failure::Usage("expected FILE... OUT".into())) };
    let open = Open::new(stop).quiet(args.output.quiet);
    let machine = open.machine_with(newest, |delta, base| match rest.next() {
        Some(given) => given.found(),
        None => FoundFile::beside(delta.path(), base),
    })?;
    match rest.next() {
        None => Ok(machine),
        Some(older) => {
            let whole = machine.files().last().map(|file| shown(file.path())).unwrap_or_default();
            let why = format!(
                "{whole} is a whole machine, so it has no base: give BASE DELTA... OUT, oldest first"
            );
            Err(While::new(format!("{older} cannot be merged"), why).into())
        }
    }
}

/// The number of bytes of pages that are not known to be zero.
fn present(machine: &StoredMachine) -> Result<u64, qemu_stream::Error> {
    let page_size = machine.blocks().page_size().bytes() as u64;
    machine.blocks().iter().map(|(index, _)| Ok(machine.bitmap(index)?.count() * page_size)).sum()
}

/// What is recorded: about the newest file, and perhaps another label.
fn about(args: &MergeArgs, machine: &StoredMachine) -> Option<String> {
    let label = args.label.clone()?;
    Some(About { label: Some(label), ..About::of(machine) }.encode())
}
