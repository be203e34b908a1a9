//! Peers that differ: in version, in number of channels, in transport, in options.

use std::{path::Path, time::Duration};

use multifd_testkit::qemu::{Error, PATIENCE, Qemu, Vm, VmBuilder};
use serde_json::{Value, json};

use crate::kit::{
    Ended, Program, file_uri, first_difference, folder, machine, memory, migrate, migrate_live, multifd,
    path, run, runs_on, send, source, stored_memory,
};

/// Receives a running guest from `from` over `channels`, in many passes.
fn capture(from: &mut Vm, channels: u8, options: &[&str], listen: &str, file: &Path) -> Result<Ended, Error> {
    from.set_multifd_channels(channels)?;
    let (receive, address) = Program::receive(&[&["--json"], options].concat(), listen, file);
    migrate_live(from, &address, 3)?;
    Ok(receive.done())
}

/// Sends it on to a machine that is started here.
fn restore(to: VmBuilder, channels: u8, options: &[&str], listen: &str, file: &Path) -> Result<Vm, Error> {
    let mut to = to.incoming().start()?;
    to.set_multifd_channels(channels)?;
    let channels = channels.to_string();
    send(&[&["--multifd-channels", &channels], options].concat(), file, &mut to, listen)?;
    Ok(to)
}

/// A running guest moves from one to the other.
fn moves(from: VmBuilder, to: VmBuilder, channels: (u8, u8), listen: (&str, &str)) -> Result<(), Error> {
    let folder = folder();
    let file = path(&folder, "machine");
    let mut from = source(from)?;
    capture(&mut from, channels.0, &[], listen.0, &file)?;
    let mut to = restore(to, channels.1, &[], listen.1, &file)?;
    runs_on(&from, &mut to)
}

const LOCAL: &str = "tcp:127.0.0.1:0";
const OLD: &str = "pc-q35-7.2";
const NEW: &str = "pc-q35-10.0";

#[test]
fn guest_of_7_2_runs_on_in_10_0_and_back_again_in_7_2() {
    fn there_and_back(old: &Qemu, new: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let (first, second) = (path(&folder, "first"), path(&folder, "second"));
        let mut start = source(machine(old, OLD))?;
        capture(&mut start, 2, &[], LOCAL, &first)?;
        let mut between = restore(machine(new, OLD), 2, &[], LOCAL, &first)?;
        runs_on(&start, &mut between)?;
        capture(&mut between, 4, &[], LOCAL, &second)?;
        let mut end = restore(machine(old, OLD), 4, &[], LOCAL, &second)?;
        runs_on(&between, &mut end)
    }
    let Some([old, new]) = Qemu::both() else { return };
    there_and_back(&old, &new).unwrap();
}

#[test]
fn guest_of_10_0_on_machine_7_2_runs_on_in_7_2() {
    let Some([old, new]) = Qemu::both() else { return };
    moves(machine(&new, OLD), machine(&old, OLD), (8, 2), (LOCAL, LOCAL)).unwrap();
}

/// A stopped guest, whose memory is compared on its path.
fn moves_at_rest(from: VmBuilder, to: VmBuilder, channels: u8) -> Result<(), Error> {
    let folder = folder();
    let file = path(&folder, "machine");
    let mut from = source(from)?;
    from.stop()?;
    let before = memory(&mut from)?;
    from.set_multifd_channels(channels)?;
    let (receive, address) = Program::receive(&[], LOCAL, &file);
    migrate(&mut from, &address)?;
    receive.done();
    assert_eq!(first_difference(&before, &stored_memory(&file)), None, "page, source and file");
    let mut to = restore(to, channels, &[], LOCAL, &file)?;
    assert_eq!(first_difference(&before, &memory(&mut to)?), None, "page, source and destination");
    to.cont()?;
    runs_on(&from, &mut to)
}

#[test]
fn stopped_guest_of_7_2_goes_to_10_0() {
    let Some([old, new]) = Qemu::both() else { return };
    moves_at_rest(machine(&old, OLD), machine(&new, OLD), 2).unwrap();
}

#[test]
fn stopped_guest_of_10_0_goes_to_7_2() {
    let Some([old, new]) = Qemu::both() else { return };
    moves_at_rest(machine(&new, OLD), machine(&old, OLD), 2).unwrap();
}

#[test]
fn stopped_guest_moves_with_multifd_off_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    moves_at_rest(machine(&qemu, OLD), machine(&qemu, OLD), 0).unwrap();
}

#[test]
fn stopped_guest_moves_with_multifd_off_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    moves_at_rest(machine(&qemu, NEW), machine(&qemu, NEW), 0).unwrap();
}

/// With xbzrle, a page that changes again is sent as a difference.
#[test]
fn pages_that_come_as_differences_are_put_together() {
    fn moves(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let file = path(&folder, "machine");
        let mut from = source(machine(qemu, qemu.machine().as_str()))?;
        from.set_capabilities(&[("xbzrle", true)])?;
        from.set_parameters(json!({ "xbzrle-cache-size": 8 << 20 }))?;
        let (receive, address) = Program::receive(&["--json"], LOCAL, &file);
        let told = migrate_live(&mut from, &address, 4)?;
        receive.done();
        assert!(told["xbzrle-cache"]["pages"].as_u64() > Some(0), "{told}");
        let mut to = restore(machine(qemu, qemu.machine().as_str()), 2, &[], LOCAL, &file)?;
        runs_on(&from, &mut to)
    }
    for qemu in [Qemu::v7_2(), Qemu::v10_0()] {
        let Some(qemu) = qemu else { return };
        moves(&qemu).unwrap();
    }
}

#[test]
fn number_of_channels_may_differ_between_capture_and_restore() {
    let Some(qemu) = Qemu::v10_0() else { return };
    moves(machine(&qemu, NEW), machine(&qemu, NEW), (2, 8), (LOCAL, LOCAL)).unwrap();
}

#[test]
fn source_with_multifd_off_is_served_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    moves(machine(&qemu, OLD), machine(&qemu, OLD), (0, 0), (LOCAL, LOCAL)).unwrap();
}

#[test]
fn source_with_multifd_off_is_served_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    moves(machine(&qemu, NEW), machine(&qemu, NEW), (0, 0), (LOCAL, LOCAL)).unwrap();
}

#[test]
fn what_came_without_channels_leaves_over_channels() {
    let Some(qemu) = Qemu::v7_2() else { return };
    moves(machine(&qemu, OLD), machine(&qemu, OLD), (0, 4), (LOCAL, LOCAL)).unwrap();
}

#[test]
fn what_came_over_channels_leaves_without() {
    let Some(qemu) = Qemu::v10_0() else { return };
    moves(machine(&qemu, OLD), machine(&qemu, OLD), (4, 0), (LOCAL, LOCAL)).unwrap();
}

#[test]
fn receive_that_expects_no_channel_serves_a_source_with_multifd_off() {
    fn moves(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let file = path(&folder, "machine");
        let mut from = source(machine(qemu, NEW))?;
        let received = capture(&mut from, 0, &["--multifd-channels", "0"], LOCAL, &file)?.json();
        assert_eq!(received["channels"], json!([]));
        assert_eq!(received["ram"]["multifd-bytes"], json!(0));
        assert!(received["ram"]["normal"].as_u64() > Some(2048), "{received}");
        let mut to = restore(machine(qemu, NEW), 2, &[], LOCAL, &file)?;
        runs_on(&from, &mut to)
    }
    let Some(qemu) = Qemu::v10_0() else { return };
    moves(&qemu).unwrap();
}

fn over_unix_sockets(qemu: &Qemu, machine_type: &str, channels: u8) -> Result<(), Error> {
    let folder = folder();
    let at = |name: &str| format!("unix:{}", path(&folder, name).display());
    let (here, there) = (at("here"), at("there"));
    let from = machine(qemu, machine_type);
    moves(from.clone(), from, (channels, channels), (&here, &there))?;
    assert!(!path(&folder, "here").exists(), "the socket that we made is removed");
    Ok(())
}

#[test]
fn guest_moves_over_unix_sockets_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    over_unix_sockets(&qemu, OLD, 4).unwrap();
}

#[test]
fn guest_moves_over_unix_sockets_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    over_unix_sockets(&qemu, NEW, 4).unwrap();
}

#[test]
fn guest_moves_over_unix_sockets_without_channels() {
    let Some(qemu) = Qemu::v10_0() else { return };
    over_unix_sockets(&qemu, NEW, 0).unwrap();
}

#[test]
fn guest_moves_over_ipv6() {
    let Some(qemu) = Qemu::v10_0() else { return };
    let from = machine(&qemu, NEW);
    moves(from.clone(), from, (2, 2), ("tcp:[::1]:0", "tcp:[::1]:0")).unwrap();
}

const UUID: &str = "00112233-4455-6677-8899-aabbccddeeff";
const OTHER: &str = "ffffffff-4455-6677-8899-aabbccddeeff";

fn inspected(file: &Path) -> Value {
    let ended = run([Path::new("inspect"), Path::new("--json"), file]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    ended.json()
}

/// A machine with a UUID moves from `from` to `to` without options for it.
fn with_uuid(from: VmBuilder, to: VmBuilder, validate: bool) -> Result<(), Error> {
    let folder = folder();
    let file = path(&folder, "machine");
    let mut from = source(from.uuid(UUID))?;
    from.set_capabilities(&[("validate-uuid", validate)])?;
    capture(&mut from, 2, &[], LOCAL, &file)?;
    assert_eq!(inspected(&file)["uuid"], json!(UUID));
    let mut to = restore(to.uuid(UUID), 2, &[], LOCAL, &file)?;
    runs_on(&from, &mut to)
}

#[test]
fn uuid_is_kept_in_the_file_and_sent_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    with_uuid(machine(&qemu, OLD), machine(&qemu, OLD), false).unwrap();
}

#[test]
fn uuid_is_kept_in_the_file_and_sent_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    with_uuid(machine(&qemu, NEW), machine(&qemu, NEW), false).unwrap();
}

#[test]
fn uuid_that_is_validated_is_kept_and_sent_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    with_uuid(machine(&qemu, OLD), machine(&qemu, OLD), true).unwrap();
}

#[test]
fn uuid_that_is_validated_is_kept_and_sent_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    with_uuid(machine(&qemu, NEW), machine(&qemu, NEW), true).unwrap();
}

#[test]
fn our_file_with_a_uuid_is_loaded_by_10_0() {
    fn loads(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let file = path(&folder, "machine");
        let mut from = source(machine(qemu, NEW).uuid(UUID))?;
        capture(&mut from, 2, &[], LOCAL, &file)?;
        let mut to = machine(qemu, NEW).uuid(UUID).incoming().start()?;
        to.set_capabilities(&[("mapped-ram", true)])?;
        to.migrate_incoming(&file_uri(&file))?;
        to.wait_migration("completed", PATIENCE)?;
        runs_on(&from, &mut to)
    }
    let Some(qemu) = Qemu::v10_0() else { return };
    loads(&qemu).unwrap();
}

/// QEMU's own file does not contain the UUID, so the caller must pass it.
#[test]
fn uuid_of_qemus_own_file_is_taken_from_the_command_line() {
    fn sends(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let file = path(&folder, "machine");
        let mut from = source(machine(qemu, NEW).uuid(UUID))?;
        from.set_capabilities(&[("mapped-ram", true)])?;
        migrate(&mut from, &file_uri(&file))?;
        assert_eq!(inspected(&file).get("uuid"), None);
        let mut to = restore(machine(qemu, NEW).uuid(UUID), 2, &["--uuid", UUID], LOCAL, &file)?;
        runs_on(&from, &mut to)
    }
    let Some(qemu) = Qemu::v10_0() else { return };
    sends(&qemu).unwrap();
}

/// The destination refuses the channels: 7.2 continues to run, 10.0 ends.
fn wrong_uuid_is_refused(qemu: &Qemu, machine_type: &str) -> Result<(), Error> {
    let folder = folder();
    let file = path(&folder, "machine");
    let mut from = source(machine(qemu, machine_type).uuid(UUID))?;
    capture(&mut from, 2, &[], LOCAL, &file)?;
    let mut to = machine(qemu, machine_type).uuid(UUID).incoming().start()?;
    to.set_multifd_channels(2)?;
    let address = to.migrate_incoming(LOCAL)?;
    let mut command = multifd(["send", "--uuid", OTHER]);
    let ended = Program::start(command.arg(&file).arg(address)).end_within(Duration::from_secs(20));
    ended.assert_failed(1, &["multifd: ", "its own log", "UUID", "because: "]);
    Ok(())
}

/// The file contains the machine's UUID, and the destination is a different machine.
#[test]
fn uuid_of_another_machine_fails_at_once() {
    fn fails(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let file = path(&folder, "machine");
        let mut from = source(machine(qemu, NEW).uuid(UUID))?;
        capture(&mut from, 2, &[], LOCAL, &file)?;
        let mut to = machine(qemu, NEW).uuid(OTHER).incoming().start()?;
        to.set_multifd_channels(2)?;
        let address = to.migrate_incoming(LOCAL)?;
        let ended =
            Program::start(multifd(["send"]).arg(&file).arg(address)).end_within(Duration::from_secs(20));
        ended.assert_failed(1, &["multifd: ", "its own log", "UUID", "because: "]);
        Ok(())
    }
    let Some(qemu) = Qemu::v10_0() else { return };
    fails(&qemu).unwrap();
}

#[test]
fn wrong_uuid_fails_at_once_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    wrong_uuid_is_refused(&qemu, OLD).unwrap();
}

#[test]
fn wrong_uuid_fails_at_once_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    wrong_uuid_is_refused(&qemu, NEW).unwrap();
}

#[test]
fn source_that_waits_for_the_switchover_ack_gets_it() {
    let Some(qemu) = Qemu::v10_0() else { return };
    let folder = folder();
    let mut from = source(machine(&qemu, "pc-q35-10.0")).unwrap();
    from.set_capabilities(&[("return-path", true), ("switchover-ack", true)]).unwrap();
    let file = path(&folder, "machine");
    capture(&mut from, 2, &["--switchover-ack"], "tcp:127.0.0.1:0", &file).unwrap();
    let to = machine(&qemu, "pc-q35-10.0");
    let mut to = restore(to, 2, &[], "tcp:127.0.0.1:0", &file).unwrap();
    runs_on(&from, &mut to).unwrap();
}
