//! `multifd export`: guest-physical memory in a format that other tools read.
//!
//! ```text
//! PhysicalMemory ─ ranges ─┐
//! devices ─ registers ─────┼─▶ Plan: head, notes, memory, in the order of OUT ─▶ a file with holes, or standard output
//! VMCOREINFO ─ found ──────┘
//! ```
//!
//! Each format is a [`Plan`]: the same plan is written to a file by several threads, and to a pipe from its beginning to its end.

mod described;
mod elf;
mod kdump;
mod note;
mod plan;
mod registers;
mod vmcoreinfo;
mod write;

use std::{path::Path, time::Instant};

use indicatif::BinaryBytes;
use multifd::channel::Stop;
use qemu_stream::{
    physical::PhysicalMemory,
    state::{Devices, StateError},
};

use self::{
    described::Described,
    note::Architecture,
    plan::{Piece, Plan},
    write::Writer,
};
use super::{find::threads, memory::Memory};
use crate::{
    args::{ExportArgs, FormatArg},
    interrupt,
    new_file::NewFile,
    output::{
        outcome::{Failure, While},
        outlet::{self, say, shown},
        report::rate,
    },
    stored::Opened,
};

pub(crate) fn run(args: &ExportArgs) -> Result<(), Failure> {
    let stop = Stop::new();
    interrupt::cancels(&stop)?;
    interrupt::spares_large_files();
    let opened = Memory::open(&args.file, &args.physical, args.quiet, &stop)?;
    let start = Instant::now();
    let plan = plan_of(args, &opened, &stop)?;
    let writer = Writer { memory: &opened.memory, plan: &plan, stop: &stop };
    let whereto = if args.out == Path::new("-") { "standard output".into() } else { shown(&args.out) };
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| -> Failure {
        While::new(format!("cannot export {} into {whereto}", args.file), error).into()
    };
    if args.out == Path::new("-") {
        // Nothing would be left behind, so the end of the process would be no loss either.
        let mut out = outlet::bytes().map_err(|error| failed(error.into()))?;
        let written = writer.stream(&mut out);
        stop.check().map_err(Failure::of)?;
        return match written {
            // The reader has closed it (`| head`), so nobody wants the rest.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            written => written.map_err(|error| failed(error.into())),
        };
    }
    let new = NewFile::create(&args.out, 0, args.force)?;
    let written = writer.file(new.file(), threads(None));
    stop.check().map_err(Failure::of)?;
    let bytes = written.map_err(|error| failed(error.into()))?;
    new.file().sync_all().map_err(|error| failed(error.into()))?;
    stop.check().map_err(Failure::of)?;
    new.name()?;
    if !args.quiet {
        let time = start.elapsed();
        say(&format!(
            "exported {} of RAM, {} of it with data, in {:.1} s, {}/s",
            BinaryBytes(opened.memory.map().total()),
            BinaryBytes(bytes),
            time.as_secs_f64(),
            BinaryBytes(rate(bytes, time))
        ));
    }
    Ok(())
}

fn plan_of<'a>(args: &ExportArgs, opened: &'a Memory, stop: &Stop) -> Result<Plan<'a>, Failure> {
    let memory = &opened.memory;
    match args.format {
        FormatArg::Raw => Ok(raw(memory)),
        FormatArg::Lime => Ok(lime(memory)),
        FormatArg::Elf | FormatArg::Kdump => {
            let (architecture, described) = describe(args, opened, stop)?;
            Ok(match args.format {
                FormatArg::Kdump => kdump::plan(memory, architecture, &described)?,
                _ => elf::plan(memory, architecture, &described.notes)?,
            })
        }
    }
}

/// The processor of a machine, by its type.
fn architecture(machine: &Opened) -> Result<Architecture, Failure> {
    let name = machine.configuration().map(|of| of.machine.to_string()).unwrap_or_default();
    let has_block =
        |name: &str| machine.blocks().entries().iter().any(|entry| entry.name.as_bytes() == name.as_bytes());
    Architecture::of(&name, has_block).ok_or_else(|| {
        let why = format!("the processor of machine type {name:?} is not known: use the format raw or lime");
        While::new("cannot write the head of the file", why).into()
    })
}

/// The registers of the processors, and the kernel's own description of itself.
fn describe(args: &ExportArgs, opened: &Memory, stop: &Stop) -> Result<(Architecture, Described), Failure> {
    let mut architecture = architecture(&opened.machine)?;
    let devices = match Devices::of(opened.machine.devices()) {
        Ok(devices) => Some(devices),
        Err(StateError::NotDescribed) => None,
        Err(error) => return Err(args.file.unreadable(error).into()),
    };
    if architecture == Architecture::Ppc64Le && devices.as_ref().is_some_and(|of| !registers::is_little(of)) {
        architecture = Architecture::Ppc64;
    }
    let mut notes = note::Notes::new(architecture);
    let processors = devices.map_or(0, |devices| registers::add(&devices, architecture, &mut notes));
    if !args.quiet && processors == 0 {
        say("the registers of the processors are not known, so the file has none");
    }
    let found = vmcoreinfo::find(&opened.memory, architecture, stop)?;
    let vmcoreinfo = found.map(|text| notes.add("VMCOREINFO", 0, &text));
    Ok((architecture, Described { notes: notes.into_bytes(), vmcoreinfo, processors }))
}

/// The address space as it is.
fn raw(memory: &PhysicalMemory) -> Plan<'_> {
    let mut plan = Plan::default();
    for range in memory.map().ranges() {
        let gap = range.start.0 - plan.length();
        plan.push(Piece::Zeros(gap));
        plan.push(Piece::Memory(*range));
    }
    plan
}

/// LiME's format: each range after its first and its last address, little-endian.
fn lime(memory: &PhysicalMemory) -> Plan<'_> {
    let mut plan = Plan::default();
    for range in memory.map().ranges() {
        let mut head = note::Bytes::new(true);
        head.u32(LIME_MAGIC);
        head.u32(LIME_VERSION);
        head.u64(range.start.0);
        head.u64(range.last().0);
        head.u64(0);
        plan.push(Piece::Bytes(head.into()));
        plan.push(Piece::Memory(*range));
    }
    plan
}

/// "EMiL" in a file.
const LIME_MAGIC: u32 = 0x4c69_4d45;
const LIME_VERSION: u32 = 1;
