//! Files written and read with direct I/O, by us and by QEMU 10.0, in either order.

use std::{fs::File, path::Path};

use multifd_testkit::qemu::{Error, PATIENCE, Qemu, Vm};
use qemu_stream::mapped_ram::MappedRamFile;
use serde_json::json;

use crate::kit::{
    Program, feed, file_uri, first_difference, folder, machine, machine_in, memory, migrate, migrate_live,
    path, runs_on, send, source, stored_memory,
};

/// A stopped guest is captured with direct I/O. A capture through the page cache is the same: to the last byte when it
/// is of that file; except for the devices, some of which contain the time, when it is of the restored guest.
fn direct_and_cached_captures_are_equal(qemu: &Qemu) -> Result<(), Error> {
    let folder = folder();
    let (direct, cached, again) = (path(&folder, "direct"), path(&folder, "cached"), path(&folder, "again"));
    let mut from = source(machine(qemu, &qemu.machine()))?;
    from.stop()?;
    let before = memory(&mut from)?;
    capture(&mut from, &["--direct-io"], &direct)?;
    assert_eq!(first_difference(&before, &stored_memory(&direct)), None, "page, source and file");
    let (receive, address) = Program::receive(&[], "tcp:127.0.0.1:0", &again);
    feed(&[], &direct, &address).done();
    receive.done();
    assert!(machine_in(&direct) == machine_in(&again), "RAM, bitmaps and devices");

    let mut middle = machine(qemu, &qemu.machine()).incoming().start()?;
    middle.set_multifd_channels(2)?;
    send(&["--direct-io"], &direct, &mut middle, "tcp:127.0.0.1:0")?;
    assert_eq!(first_difference(&before, &memory(&mut middle)?), None, "page, source and restored");
    capture(&mut middle, &[], &cached)?;
    assert!(before_devices(&direct) == before_devices(&cached), "RAM and bitmaps");
    Ok(())
}

fn before_devices(file: &Path) -> Vec<u8> {
    let mut bytes = machine_in(file);
    let devices = MappedRamFile::open(File::open(file).unwrap(), 0).unwrap().devices().as_bytes().len();
    bytes.truncate(bytes.len() - devices);
    bytes
}

fn capture(from: &mut Vm, options: &[&str], file: &Path) -> Result<(), Error> {
    from.set_multifd_channels(2)?;
    let (receive, address) = Program::receive(options, "tcp:127.0.0.1:0", file);
    migrate(from, &address)?;
    let ended = receive.done();
    assert!(!ended.stderr.contains("direct-io"), "{ended:?}");
    Ok(())
}

#[test]
fn stopped_7_2_is_captured_the_same_past_the_page_cache_and_through_it() {
    let Some(qemu) = Qemu::v7_2() else { return };
    direct_and_cached_captures_are_equal(&qemu).unwrap();
}

#[test]
fn stopped_10_0_is_captured_the_same_past_the_page_cache_and_through_it() {
    let Some(qemu) = Qemu::v10_0() else { return };
    direct_and_cached_captures_are_equal(&qemu).unwrap();
}

/// A machine of 10.0 that reads or writes files with direct I/O.
fn directly(vm: &mut Vm) -> Result<(), Error> {
    vm.set_capabilities(&[("mapped-ram", true)])?;
    vm.set_multifd_channels(2)?;
    vm.set_parameters(json!({ "direct-io": true }))
}

#[test]
fn what_we_write_directly_10_0_loads_directly() {
    fn loads(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let file = path(&folder, "machine");
        let mut from = source(machine(qemu, &qemu.machine()))?;
        from.set_multifd_channels(3)?;
        let (receive, address) = Program::receive(&["--direct-io"], "tcp:127.0.0.1:0", &file);
        migrate_live(&mut from, &address, 3)?;
        receive.done();
        let mut to = machine(qemu, &qemu.machine()).incoming().start()?;
        directly(&mut to)?;
        to.migrate_incoming(&file_uri(&file))?;
        to.wait_migration("completed", PATIENCE)?;
        runs_on(&from, &mut to)
    }
    let Some(qemu) = Qemu::v10_0() else { return };
    loads(&qemu).unwrap();
}

#[test]
fn what_10_0_writes_directly_we_send_directly() {
    fn sends(new: &Qemu, old: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let file = path(&folder, "machine");
        let mut from = source(machine(new, &old.machine()))?;
        directly(&mut from)?;
        migrate_live(&mut from, &file_uri(&file), 3)?;
        let mut to = machine(old, &old.machine()).incoming().start()?;
        to.set_multifd_channels(3)?;
        send(&["--direct-io", "--multifd-channels", "3"], &file, &mut to, "tcp:127.0.0.1:0")?;
        runs_on(&from, &mut to)
    }
    let Some([old, new]) = Qemu::both() else { return };
    sends(&new, &old).unwrap();
}
