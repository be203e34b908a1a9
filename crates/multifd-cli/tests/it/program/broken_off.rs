//! `multifd receive` of an interrupted migration: the reason is printed, nothing is left, and the guest continues where
//! it was.

use std::{fs, time::Duration};

use multifd_testkit::qemu::{Error, PATIENCE, Qemu, Vm};
use rustix::process::Signal;
use serde_json::json;
use tempfile::TempDir;

use crate::kit::{
    Ended, Program, assert_left, captured, fast, feed, folder, machine, migrate, path, slow, source,
};

const LOCAL: &str = "tcp:127.0.0.1:0";
const MIB: u64 = 1 << 20;
/// The time limit of an error that does not depend on a peer.
const SOON: Duration = Duration::from_secs(8);

fn interrupted_while_it_listens(signal: Signal) {
    let folder = folder();
    let (receive, _) = Program::receive(&[], LOCAL, &path(&folder, "machine"));
    receive.signal(signal);
    receive.end_within(SOON).assert_failed(130, &["interrupted"]);
    assert_left(&folder, &[]);
}

#[test]
fn interrupt_while_it_listens_leaves_nothing() {
    interrupted_while_it_listens(Signal::INT);
}

#[test]
fn termination_while_it_listens_leaves_nothing() {
    interrupted_while_it_listens(Signal::TERM);
}

#[test]
fn interrupt_while_it_listens_is_told_as_json() {
    let folder = folder();
    let (receive, _) = Program::receive(&["--json"], LOCAL, &path(&folder, "machine"));
    receive.signal(Signal::INT);
    let ended = receive.end_within(SOON);
    ended.assert_failed(130, &["interrupted"]);
    assert_eq!(ended.json()["status"], json!("cancelled"));
}

#[test]
fn interrupt_leaves_no_socket_behind() {
    let folder = folder();
    let listen = format!("unix:{}", path(&folder, "socket").display());
    let (receive, _) = Program::receive(&[], &listen, &path(&folder, "machine"));
    receive.signal(Signal::INT);
    receive.end_within(SOON).assert_failed(130, &["interrupted"]);
    assert_left(&folder, &[]);
}

/// A source in the middle of a migration that does not complete.
fn in_the_middle(qemu: &Qemu, folder: &TempDir, options: &[&str]) -> Result<(Vm, Program), Error> {
    let mut from = source(machine(qemu, &qemu.machine()))?;
    from.set_capabilities(&[("return-path", true)])?;
    from.set_multifd_channels(2)?;
    slow(&mut from)?;
    let (receive, address) = Program::receive(options, LOCAL, &path(folder, "machine"));
    from.migrate(&address)?;
    from.wait_passes(2, PATIENCE)?;
    Ok((from, receive))
}

/// Asserts that the guest was not disturbed.
fn runs_on_here(from: &mut Vm) -> Result<(), Error> {
    from.wait_run_state("running", PATIENCE)?;
    let at = from.round()?.unwrap_or_default();
    from.wait_round(at + 3, PATIENCE).map(drop)
}

fn interrupted_in_the_middle(qemu: &Qemu) -> Result<(), Error> {
    let folder = folder();
    let (mut from, receive) = in_the_middle(qemu, &folder, &["--json"])?;
    receive.signal(Signal::INT);
    let ended = receive.end_within(SOON);
    ended.assert_failed(130, &["interrupted"]);
    assert_eq!(ended.json()["status"], json!("cancelled"));
    assert_left(&folder, &[]);
    from.wait_migration("failed", PATIENCE)?;
    runs_on_here(&mut from)
}

#[test]
fn interrupt_in_the_middle_leaves_nothing_and_the_guest_runs_on_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    interrupted_in_the_middle(&qemu).unwrap();
}

#[test]
fn interrupt_in_the_middle_leaves_nothing_and_the_guest_runs_on_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    interrupted_in_the_middle(&qemu).unwrap();
}

fn cancelled_at_the_source(qemu: &Qemu) -> Result<(), Error> {
    let folder = folder();
    let (mut from, receive) = in_the_middle(qemu, &folder, &["--json"])?;
    from.execute("migrate_cancel", json!({}))?;
    let ended = receive.end_within(SOON);
    ended.assert_failed(1, &["multifd: ", "because: "]);
    let told = ended.json();
    assert_eq!(told["status"], json!("failed"));
    assert!(told["error-desc"].is_string(), "{told}");
    assert_left(&folder, &[]);
    from.wait_migration("cancelled", PATIENCE)?;
    runs_on_here(&mut from)
}

#[test]
fn source_that_cancels_leaves_nothing_and_its_guest_runs_on_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    cancelled_at_the_source(&qemu).unwrap();
}

#[test]
fn source_that_cancels_leaves_nothing_and_its_guest_runs_on_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    cancelled_at_the_source(&qemu).unwrap();
}

/// A guest that was sent once may be sent again.
#[test]
fn source_moves_at_the_second_attempt() {
    fn moves(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let (mut from, receive) = in_the_middle(qemu, &folder, &[])?;
        from.cancel_migration(PATIENCE)?;
        receive.end_within(SOON).assert_failed(1, &[]);
        let (receive, address) = Program::receive(&[], LOCAL, &path(&folder, "machine"));
        migrate(&mut from, &address)?;
        receive.done();
        Ok(())
    }
    let Some(qemu) = Qemu::v10_0() else { return };
    moves(&qemu).unwrap();
}

#[test]
fn source_that_dies_leaves_nothing() {
    fn dies(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let (mut from, receive) = in_the_middle(qemu, &folder, &[])?;
        from.kill()?;
        receive.end_within(SOON).assert_failed(1, &["multifd: ", "because: "]);
        assert_left(&folder, &[]);
        Ok(())
    }
    let Some(qemu) = Qemu::v10_0() else { return };
    dies(&qemu).unwrap();
}

/// A source of 2 channels, or of none, and a different number.
fn wrong_number(channels: u8, expected: &str, told: &[&str]) -> Result<(), Error> {
    let Some(qemu) = Qemu::v10_0() else { return Ok(()) };
    let folder = folder();
    let mut from = source(machine(&qemu, &qemu.machine()))?;
    from.set_capabilities(&[("return-path", true)])?;
    from.set_multifd_channels(channels)?;
    fast(&mut from)?;
    let (receive, address) =
        Program::receive(&["--multifd-channels", expected], LOCAL, &path(&folder, "machine"));
    from.migrate(&address)?;
    receive.end_within(Duration::from_secs(20)).assert_failed(1, told);
    assert_left(&folder, &[]);
    from.wait_migration("failed", PATIENCE)?;
    runs_on_here(&mut from)
}

#[test]
fn fewer_channels_than_expected_are_an_error() {
    wrong_number(2, "3", &["expected 3 channels, 2 connected", "multifd-channels"]).unwrap();
}

#[test]
fn more_channels_than_expected_are_an_error() {
    wrong_number(2, "1", &["channel"]).unwrap();
}

#[test]
fn channels_where_none_are_expected_are_an_error() {
    wrong_number(2, "0", &["channel"]).unwrap();
}

#[test]
fn no_channels_where_some_are_expected_are_an_error() {
    wrong_number(0, "2", &["expected 2 channels, 0 connected", "multifd-channels"]).unwrap();
}

/// Receives from a source that sends everything, and fails because there is no space.
fn without_room(bytes: u64, room: impl FnOnce(u64) -> u64) -> (Ended, TempDir) {
    let folder = folder();
    let from = captured(&folder, bytes);
    let (receive, address) = Program::receive(&[], LOCAL, &path(&folder, "machine"));
    receive.limit_file_size(room(fs::metadata(&from).unwrap().len()));
    let sent = feed(&[], &from, &address).end();
    sent.assert_failed(1, &["because: "]);
    (receive.end_within(SOON), folder)
}

#[test]
fn file_that_may_not_grow_for_its_pages_is_an_error_that_names_it() {
    let (ended, folder) = without_room(8 * MIB, |_| MIB);
    ended.assert_failed(1, &["because: ", &path(&folder, "machine").display().to_string()]);
    assert_left(&folder, &["captured"]);
}

#[test]
fn file_that_may_not_grow_for_its_devices_is_an_error_that_names_it() {
    let (ended, folder) = without_room(8 * MIB, |whole| whole - 1);
    ended.assert_failed(1, &["because: ", &path(&folder, "machine").display().to_string()]);
    assert_left(&folder, &["captured"]);
}
