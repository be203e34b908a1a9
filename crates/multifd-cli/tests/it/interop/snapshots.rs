//! A QEMU machine through this process's memory: from a file that a QEMU wrote, into one that a QEMU loads, without a
//! connection in between.

use std::{fs::File, path::Path, sync::Arc};

use multifd::{
    SendOptions, Sender,
    channel::Stop,
    live::{DeviceInfo, DeviceSection, Guest, MigrateOptions, Migration, RunState},
    ram::{Mapping, Memory, NeverDirty, RamBlock, RamBlocks},
};
use multifd_testkit::qemu::{Error, PATIENCE, Qemu};
use qemu_stream::mapped_ram::{Capture, CaptureOptions, MappedRamFile, Restore};

use crate::kit::{
    Program, file_uri, first_difference, folder, machine, memory, migrate, path, runs_on, source,
    stored_memory,
};

struct AtRest;

impl Guest for AtRest {
    fn devices(&self) -> Vec<DeviceInfo> {
        Vec::new()
    }
    fn run_state(&mut self) -> RunState {
        RunState::Running
    }
    fn stop(&mut self) -> std::io::Result<()> {
        Ok(())
    }
    fn save(&mut self) -> std::io::Result<Vec<DeviceSection>> {
        Ok(Vec::new())
    }
    fn resume(&mut self) {}
}

/// Loads the machine in `from` into memory, and writes it to `to`.
fn through_memory(from: &Path, to: &Path) {
    let file = MappedRamFile::open(File::open(from).unwrap(), 0).unwrap();
    let blocks = file.blocks().entries().iter().map(|entry| {
        let memory = Memory::Mapped(Mapping::anonymous(entry.used_length).unwrap());
        RamBlock::new(entry.name.clone(), entry.used_length, file.blocks().page_size(), memory).unwrap()
    });
    let blocks = Arc::new(RamBlocks::new(blocks.collect()).unwrap());
    let stop = Stop::new();
    Restore::new(&file).channels(3).run(&blocks, &Stop::new()).unwrap();

    let new = File::options().read(true).write(true).create_new(true).open(to).unwrap();
    let mut capture = Capture::of_machine(new, &file, &CaptureOptions::new().durable(true)).unwrap();
    let mut sender = Sender::new(SendOptions::new().channels(4), blocks.clone(), stop.clone()).unwrap();
    sender.set_up_into(capture.blocks().clone()).unwrap();
    let migration = Migration::new(MigrateOptions::new(), sender).expect("options");
    migration.run(&mut capture, &mut NeverDirty, &mut AtRest).unwrap();
}

/// QEMU 10.0 loads it over this number of channels, and its guest checks all of its memory.
fn loads(
    file: &Path,
    machine_type: &str,
    channels: u8,
    before: &[u8],
    from: &multifd_testkit::qemu::Vm,
) -> Result<(), Error> {
    let Some(new) = Qemu::v10_0() else { return Ok(()) };
    assert_eq!(first_difference(before, &stored_memory(file)), None, "page, source and file");
    let mut to = machine(&new, machine_type).incoming().start()?;
    to.set_capabilities(&[("mapped-ram", true)])?;
    to.set_multifd_channels(channels)?;
    to.migrate_incoming(&file_uri(file))?;
    to.wait_migration("completed", PATIENCE)?;
    assert_eq!(first_difference(before, &memory(&mut to)?), None, "page, source and destination");
    to.cont()?;
    runs_on(from, &mut to)
}

fn file_of_10_0_goes_through_memory(machine_type: &str, channels: u8) -> Result<(), Error> {
    let Some(qemu) = Qemu::v10_0() else { return Ok(()) };
    let folder = folder();
    let (theirs, ours) = (path(&folder, "theirs"), path(&folder, "ours"));
    let mut from = source(machine(&qemu, machine_type))?;
    from.stop()?;
    let before = memory(&mut from)?;
    from.set_capabilities(&[("mapped-ram", true)])?;
    from.set_multifd_channels(channels)?;
    migrate(&mut from, &file_uri(&theirs))?;
    through_memory(&theirs, &ours);
    loads(&ours, machine_type, channels, &before, &from)
}

#[test]
fn machine_of_10_0_goes_through_memory_and_is_loaded_by_10_0() {
    file_of_10_0_goes_through_memory("pc-q35-10.0", 3).unwrap();
}

#[test]
fn machine_of_10_0_on_machine_7_2_goes_through_memory_without_channels_of_qemu() {
    file_of_10_0_goes_through_memory("pc-q35-7.2", 0).unwrap();
}

/// QEMU 7.2 does not write such files, so it is received.
#[test]
fn machine_of_7_2_goes_through_memory_and_is_loaded_by_10_0() {
    fn through(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let (received, ours) = (path(&folder, "received"), path(&folder, "ours"));
        let mut from = source(machine(qemu, "pc-q35-7.2"))?;
        from.stop()?;
        let before = memory(&mut from)?;
        from.set_multifd_channels(2)?;
        let (receive, address) = Program::receive(&[], "tcp:127.0.0.1:0", &received);
        migrate(&mut from, &address)?;
        receive.done();
        through_memory(&received, &ours);
        loads(&ours, "pc-q35-7.2", 2, &before, &from)
    }
    let Some(qemu) = Qemu::v7_2() else { return };
    through(&qemu).unwrap();
}
