//! The single connection of a command, to real QEMUs and from them.

use std::path::Path;

use multifd_testkit::qemu::{Error, PATIENCE, Qemu};

use crate::kit::{
    Ended, Program, first_difference, folder, machine, memory, migrate, path, run, runs_on, source,
    stored_memory,
};

const LOCAL: &str = "tcp:127.0.0.1:0";

fn received(options: &[&str], listen: &str, file: &Path) -> Ended {
    let (receive, address) = Program::receive(options, listen, file);
    assert_eq!(address, listen);
    receive.done()
}

fn sent(options: &[&str], file: &Path, address: &str) -> Ended {
    let file = file.display().to_string();
    let always = ["send", "--multifd-channels", "0"];
    run([&always, options, &[&file, address]].concat())
}

/// A stopped guest goes through four files: QEMU's command, ours, ours again, QEMU's.
fn through_commands(qemu: &Qemu) -> Result<(), Error> {
    let folder = folder();
    let [first, second, kept] = ["first", "second", "kept"].map(|name| path(&folder, name));
    let mut from = source(machine(qemu, &qemu.machine()))?;
    from.stop()?;
    let before = memory(&mut from)?;
    migrate(&mut from, &format!("exec:cat >{}", first.display()))?;
    received(&[], &format!("exec:cat {}", first.display()), &kept);
    assert_eq!(first_difference(&before, &stored_memory(&kept)), None, "page, source and file");
    let ended = sent(&[], &kept, &format!("exec:cat >{}", second.display()));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let mut to = machine(qemu, &qemu.machine()).incoming().start()?;
    to.migrate_incoming(&format!("exec:cat {}", second.display()))?;
    to.wait_migration("completed", PATIENCE)?;
    assert_eq!(first_difference(&before, &memory(&mut to)?), None, "page, source and destination");
    to.cont()?;
    runs_on(&from, &mut to)
}

#[test]
fn stopped_guest_goes_through_commands_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    through_commands(&qemu).unwrap();
}

#[test]
fn stopped_guest_goes_through_commands_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    through_commands(&qemu).unwrap();
}

/// A command that is connected to this port, in both directions.
fn bridge(address: &str) -> String {
    let port = address.rsplit(':').next().expect("a port");
    format!("exec:bash -c 'exec 3<>/dev/tcp/127.0.0.1/{port}; cat <&3 & cat >&3'")
}

fn with_return_path(qemu: &Qemu) -> Result<(), Error> {
    let folder = folder();
    let file = path(&folder, "kept");
    let mut from = source(machine(qemu, &qemu.machine()))?;
    from.set_capabilities(&[("return-path", true)])?;
    let (receive, address) = Program::receive(&[], LOCAL, &file);
    migrate(&mut from, &bridge(&address))?;
    receive.done();
    let mut to = machine(qemu, &qemu.machine()).incoming().start()?;
    let address = to.migrate_incoming(LOCAL)?;
    let ended = sent(&["--return-path", "on"], &file, &bridge(&address));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    to.wait_migration("completed", PATIENCE)?;
    runs_on(&from, &mut to)
}

#[test]
fn commands_carry_the_return_path_both_ways_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    with_return_path(&qemu).unwrap();
}

#[test]
fn commands_carry_the_return_path_both_ways_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    with_return_path(&qemu).unwrap();
}

/// The options are QEMU's, so each end accepts the other's address.
#[test]
fn addresses_with_options_are_understood_by_both() {
    fn moves(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let file = path(&folder, "kept");
        let mut from = source(machine(qemu, &qemu.machine()))?;
        from.set_multifd_channels(2)?;
        let (receive, address) = Program::receive(&[], "tcp::0,ipv4=on,ipv6=off", &file);
        assert!(address.starts_with("tcp:0.0.0.0:") && address.ends_with(",ipv4=on,ipv6=off"), "{address}");
        migrate(&mut from, &address.replace("0.0.0.0", "127.0.0.1"))?;
        receive.done();
        let mut to = machine(qemu, &qemu.machine()).incoming().start()?;
        to.set_multifd_channels(2)?;
        let address = to.migrate_incoming("tcp:localhost:0,ipv4=on,keep-alive=on")?;
        let file = file.display().to_string();
        let ended = run(["send", &file, &format!("{address},ipv4=on,keep-alive=on,user-timeout=30")]);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        to.wait_migration("completed", PATIENCE)?;
        runs_on(&from, &mut to)
    }
    let Some(qemu) = Qemu::v10_0() else { return };
    moves(&qemu).unwrap();
}
