//! The file has QEMU's format: QEMU 10.0 loads what we write, and we send what it writes.

use std::{
    fs,
    path::{Path, PathBuf},
};

use multifd_testkit::qemu::{Error, PATIENCE, Qemu, Vm};

use crate::kit::{
    Program, file_uri, file_uri_at, first_difference, folder, machine, memory, migrate, migrate_live, path,
    run, runs_on, send, source, stored_memory, stored_memory_at,
};

/// A machine of 10.0 that reads or writes files with fixed places, over this number of channels; 0 is none.
fn for_files(vm: &mut Vm, channels: u8) -> Result<(), Error> {
    vm.set_capabilities(&[("mapped-ram", true)])?;
    vm.set_multifd_channels(channels)
}

/// We write, QEMU 10.0 loads.
fn ours_is_loaded(from: &Qemu, machine_type: &str, channels: u8) -> Result<(), Error> {
    let Some(new) = Qemu::v10_0() else { return Ok(()) };
    let folder = folder();
    let file = path(&folder, "machine");
    let mut from = source(machine(from, machine_type))?;
    from.set_multifd_channels(2)?;
    let (receive, address) = Program::receive(&[], "tcp:127.0.0.1:0", &file);
    migrate_live(&mut from, &address, 3)?;
    receive.done();

    let mut to = machine(&new, machine_type).incoming().start()?;
    for_files(&mut to, channels)?;
    to.migrate_incoming(&file_uri(&file))?;
    to.wait_migration("completed", PATIENCE)?;
    runs_on(&from, &mut to)
}

#[test]
fn our_file_of_7_2_is_loaded_by_10_0() {
    let Some(qemu) = Qemu::v7_2() else { return };
    ours_is_loaded(&qemu, "pc-q35-7.2", 0).unwrap();
}

#[test]
fn our_file_of_7_2_is_loaded_by_10_0_over_channels() {
    let Some(qemu) = Qemu::v7_2() else { return };
    ours_is_loaded(&qemu, "pc-q35-7.2", 3).unwrap();
}

#[test]
fn our_file_of_10_0_is_loaded_by_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    ours_is_loaded(&qemu, "pc-q35-10.0", 0).unwrap();
}

#[test]
fn our_file_of_10_0_is_loaded_by_10_0_over_channels() {
    let Some(qemu) = Qemu::v10_0() else { return };
    ours_is_loaded(&qemu, "pc-q35-10.0", 3).unwrap();
}

#[test]
fn our_file_of_10_0_on_machine_7_2_is_loaded_by_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    ours_is_loaded(&qemu, "pc-q35-7.2", 0).unwrap();
}

/// QEMU 10.0 writes, we send.
fn theirs_is_sent(machine_type: &str, live: bool, writing: u8, to: &Qemu, sending: u8) -> Result<(), Error> {
    let Some(new) = Qemu::v10_0() else { return Ok(()) };
    let folder = folder();
    let file = path(&folder, "machine");
    let mut from = source(machine(&new, machine_type))?;
    for_files(&mut from, writing)?;
    let before = if live {
        migrate_live(&mut from, &file_uri(&file), 3)?;
        None
    } else {
        from.stop()?;
        let before = memory(&mut from)?;
        migrate(&mut from, &file_uri(&file))?;
        Some(before)
    };

    let mut to = machine(to, machine_type).incoming().start()?;
    to.set_multifd_channels(sending)?;
    send(&["--multifd-channels", &sending.to_string()], &file, &mut to, "tcp:127.0.0.1:0")?;
    if let Some(before) = before {
        assert_eq!(first_difference(&before, &stored_memory(&file)), None, "page, source and file");
        assert_eq!(first_difference(&before, &memory(&mut to)?), None, "page, source and destination");
        to.cont()?;
    }
    runs_on(&from, &mut to)
}

#[test]
fn file_of_a_running_10_0_is_sent() {
    let Some(qemu) = Qemu::v10_0() else { return };
    theirs_is_sent("pc-q35-10.0", true, 0, &qemu, 2).unwrap();
}

#[test]
fn file_that_a_running_10_0_wrote_over_channels_is_sent() {
    let Some(qemu) = Qemu::v10_0() else { return };
    theirs_is_sent("pc-q35-10.0", true, 3, &qemu, 4).unwrap();
}

#[test]
fn file_of_a_stopped_10_0_is_sent() {
    let Some(qemu) = Qemu::v10_0() else { return };
    theirs_is_sent("pc-q35-10.0", false, 0, &qemu, 3).unwrap();
}

#[test]
fn file_that_a_stopped_10_0_wrote_over_channels_is_sent() {
    let Some(qemu) = Qemu::v10_0() else { return };
    theirs_is_sent("pc-q35-10.0", false, 2, &qemu, 2).unwrap();
}

#[test]
fn file_of_10_0_is_sent_without_channels() {
    let Some(qemu) = Qemu::v10_0() else { return };
    theirs_is_sent("pc-q35-10.0", true, 0, &qemu, 0).unwrap();
}

#[test]
fn file_of_10_0_on_machine_7_2_is_sent_to_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    theirs_is_sent("pc-q35-7.2", true, 2, &qemu, 2).unwrap();
}

/// A copy may be longer than its machine. QEMU loads it, and so do we: with noise after it, and without a description with
/// zeros after it.
#[test]
fn file_of_10_0_with_bytes_after_the_machine_is_loaded_by_10_0_and_sent_by_us() {
    fn loaded_and_sent(qemu: &Qemu, option: &str, trailing: &[u8]) -> Result<(), Error> {
        let (folder, machine_type) = (folder(), qemu.machine() + option);
        let file = path(&folder, "machine");
        let mut from = source(machine(qemu, &machine_type))?;
        for_files(&mut from, 0)?;
        from.stop()?;
        let before = memory(&mut from)?;
        migrate(&mut from, &file_uri(&file))?;
        let length = fs::metadata(&file).unwrap().len();
        std::os::unix::fs::FileExt::write_all_at(
            &fs::File::options().write(true).open(&file).unwrap(),
            trailing,
            length,
        )
        .unwrap();

        let mut loads = machine(qemu, &machine_type).incoming().start()?;
        for_files(&mut loads, 0)?;
        loads.migrate_incoming(&file_uri(&file))?;
        loads.wait_migration("completed", PATIENCE)?;
        assert_eq!(first_difference(&before, &memory(&mut loads)?), None, "page, source and 10.0");

        let told = run([Path::new("inspect"), Path::new("--json"), &file]).json();
        assert_eq!(told["trailing-bytes"], trailing.len());
        let mut to = machine(qemu, &machine_type).incoming().start()?;
        to.set_multifd_channels(2)?;
        send(&["--multifd-channels", "2"], &file, &mut to, "tcp:127.0.0.1:0")?;
        assert_eq!(first_difference(&before, &memory(&mut to)?), None, "page, source and destination");
        to.cont()?;
        runs_on(&from, &mut to)
    }
    let Some(qemu) = Qemu::v10_0() else { return };
    loaded_and_sent(&qemu, "", &[0]).unwrap();
    loaded_and_sent(&qemu, "", &[0x5a; 70_000]).unwrap();
    loaded_and_sent(&qemu, ",suppress-vmdesc=on", &[0; 4096]).unwrap();
}

/// Head and machine in one file, both ways: we write and 10.0 loads, then 10.0 writes and we send.
#[test]
fn machine_behind_an_offset_is_loaded_by_10_0_and_sent_by_us() {
    fn both_ways(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let (ours, theirs, ram) = (path(&folder, "ours"), path(&folder, "theirs"), path(&folder, "ram"));
        let (machine_type, head) = (qemu.machine(), vec![0x5a; 0x1234]);
        let offset = head.len() as u64;
        let at = |file: &Path| PathBuf::from(file_uri_at(file, offset));
        for file in [&ours, &theirs] {
            fs::write(file, &head).unwrap();
        }
        let mut from = source(machine(qemu, &machine_type))?;
        from.stop()?;
        let before = memory(&mut from)?;
        from.set_multifd_channels(2)?;
        let (receive, address) = Program::receive(&[], "tcp:127.0.0.1:0", &at(&ours));
        migrate(&mut from, &address)?;
        receive.done();
        // It must run again before it can migrate again.
        let mut middle = machine(qemu, &machine_type).incoming().start()?;
        for_files(&mut middle, 2)?;
        middle.migrate_incoming(&at(&ours).display().to_string())?;
        middle.wait_migration("completed", PATIENCE)?;
        assert_eq!(first_difference(&before, &memory(&mut middle)?), None, "page, source and 10.0");
        middle.cont()?;
        runs_on(&from, &mut middle)?;

        middle.stop()?;
        let before = memory(&mut middle)?;
        migrate(&mut middle, &at(&theirs).display().to_string())?;
        assert_eq!(
            first_difference(&before, &stored_memory_at(&theirs, offset)),
            None,
            "page, 10.0 and file"
        );
        let extract = [Path::new("inspect"), "--extract".as_ref(), "pc.ram".as_ref(), &at(&theirs), &ram];
        assert_eq!(run(extract).code, Some(0));
        assert_eq!(first_difference(&before, &fs::read(&ram).unwrap()), None, "page, 10.0 and extract");
        let mut to = machine(qemu, &machine_type).incoming().start()?;
        to.set_multifd_channels(2)?;
        send(&["--multifd-channels", "2"], &at(&theirs), &mut to, "tcp:127.0.0.1:0")?;
        assert_eq!(first_difference(&before, &memory(&mut to)?), None, "page, 10.0 and destination");
        to.cont()?;
        runs_on(&middle, &mut to)?;
        for file in [&ours, &theirs] {
            assert_eq!(fs::read(file).unwrap()[..head.len()], head);
        }
        Ok(())
    }
    let Some(qemu) = Qemu::v10_0() else { return };
    both_ways(&qemu).unwrap();
}
