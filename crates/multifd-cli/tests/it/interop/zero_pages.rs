//! Zero pages in each mode, from and to real QEMUs: source → `receive` → file → `send` → destination.
//!
//! A stopped guest's memory is compared at the source, in the file and at the destination, as in the matrix.

use multifd_testkit::qemu::{Error, Qemu, VmBuilder};
use serde_json::{Value, json};

use crate::kit::{
    Program, first_difference, folder, leave, machine, memory, path, runs_on, send, source, stored_memory,
};

const LOCAL: &str = "tcp:127.0.0.1:0";
const OLD: &str = "pc-q35-7.2";
const NEW: &str = "pc-q35-10.0";

/// What a side has counted: zero pages in all, and those of them that went over channels.
fn zeros(report: &Value) -> (u64, u64) {
    let count = |name: &str| report["ram"][name].as_u64().expect("a number");
    let listed = report["channels"].as_array().expect("channels");
    let pages: u64 = listed.iter().filter_map(|channel| channel["pages"].as_u64()).sum();
    (count("duplicate"), pages.saturating_sub(count("normal")))
}

/// Zero pages went as `mode` has it.
#[track_caller]
fn assert_mode(report: &Value, mode: &str) {
    let (zero, on_channels) = zeros(report);
    match mode {
        "none" => assert_eq!((zero, on_channels), (0, 0), "{report}"),
        "legacy" => assert!(zero > 0 && on_channels == 0, "{report}"),
        _ => assert!(zero > 0 && on_channels == zero, "{report}"),
    }
}

/// A guest goes from one machine to another: the source in its mode, `None` where it has no such parameter, our
/// `send` in `there`, which is expected to be `expected`.
fn moves(
    (from, to): (VmBuilder, VmBuilder),
    live: bool,
    mode: Option<&str>,
    (there, expected): (&str, &str),
) -> Result<(), Error> {
    let folder = folder();
    let file = path(&folder, "machine");
    let mut from = source(from)?;
    from.set_multifd_channels(3)?;
    if let Some(mode) = mode {
        from.set_parameters(json!({ "zero-page-detection": mode }))?;
    }
    let (receive, address) = Program::receive(&["--json"], LOCAL, &file);
    let before = leave(&mut from, &address, live.then_some(3))?;
    let received = receive.done().json();
    assert_mode(&received, mode.unwrap_or("legacy"));

    let mut to = to.incoming().start()?;
    to.set_multifd_channels(3)?;
    let options = ["--multifd-channels", "3", "--zero-page-detection", there];
    let sent = send(&options, &file, &mut to, LOCAL)?.json();
    if mode == Some("none") {
        // The file has every page; the zero ones among them are not looked for.
        assert_eq!(zeros(&sent), (0, 0), "{sent}");
    } else {
        assert_mode(&sent, expected);
    }
    if !live {
        assert_eq!(first_difference(&before, &stored_memory(&file)), None, "page, source and file");
        assert_eq!(first_difference(&before, &memory(&mut to)?), None, "page, source and destination");
        to.cont()?;
    }
    runs_on(&from, &mut to)
}

/// Every mode of a 10.0, stopped and running, and every mode of ours.
fn every_mode(machine_type: &str, live: bool) {
    let Some(qemu) = Qemu::v10_0() else { return };
    let pair = || (machine(&qemu, machine_type), machine(&qemu, machine_type));
    for (mode, there) in
        [("none", "legacy"), ("legacy", "multifd"), ("multifd", "none"), ("multifd", "legacy")]
    {
        moves(pair(), live, Some(mode), (there, there)).unwrap();
    }
}

#[test]
fn stopped_guest_of_10_0_moves_in_every_mode() {
    every_mode(NEW, false);
}

#[test]
fn stopped_guest_of_10_0_on_machine_7_2_moves_in_every_mode() {
    every_mode(OLD, false);
}

#[test]
fn running_guest_of_10_0_moves_in_every_mode() {
    every_mode(NEW, true);
}

#[test]
#[ignore = "slow: the stopped guest on this machine, and the running one on the newer, take the same way"]
fn running_guest_of_10_0_on_machine_7_2_moves_in_every_mode() {
    every_mode(OLD, true);
}

#[test]
fn auto_is_multifd_for_a_machine_that_only_newer_qemus_have() {
    let Some(qemu) = Qemu::v10_0() else { return };
    moves((machine(&qemu, NEW), machine(&qemu, NEW)), false, Some("legacy"), ("auto", "multifd")).unwrap();
}

#[test]
fn auto_is_legacy_for_a_machine_that_older_qemus_have_too() {
    let Some([old, new]) = Qemu::both() else { return };
    moves((machine(&new, OLD), machine(&old, OLD)), false, Some("multifd"), ("auto", "legacy")).unwrap();
}

#[test]
fn guest_of_7_2_moves_in_the_modes_that_it_understands() {
    let Some(qemu) = Qemu::v7_2() else { return };
    for mode in ["legacy", "none"] {
        moves((machine(&qemu, OLD), machine(&qemu, OLD)), false, None, (mode, mode)).unwrap();
    }
}
