//! Zero pages in each mode, from and to real QEMUs.

use multifd_testkit::qemu::Qemu;

use super::journey::{Journey, assert_mode};

const OLD: &str = "pc-q35-7.2";
const NEW: &str = "pc-q35-10.0";

/// A guest leaves with its source in one mode and continues with `send` in another, which is `expected`.
fn moves(journey: Journey, (there, back): (Option<&'static str>, &'static str), expected: &str) {
    let journey = Journey { zero_there: there, zero_back: back, ..journey };
    let reports = journey.take().unwrap();
    assert_mode(&reports.received, there.unwrap_or("legacy"));
    assert_mode(&reports.sent, journey.mode_back(expected));
}

/// Every mode of a 10.0, stopped and running, and every mode of ours.
fn every_mode(machine_type: &'static str, live: bool) {
    let Some(qemu) = Qemu::v10_0() else { return };
    for (there, back) in
        [("none", "legacy"), ("legacy", "multifd"), ("multifd", "none"), ("multifd", "legacy")]
    {
        moves(Journey { live, ..Journey::new(&qemu, machine_type) }, (Some(there), back), back);
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
fn auto_is_multifd_for_a_machine_that_only_newer_qemus_have() {
    let Some(qemu) = Qemu::v10_0() else { return };
    moves(Journey::new(&qemu, NEW), (Some("legacy"), "auto"), "multifd");
}

#[test]
fn auto_is_legacy_for_a_machine_that_older_qemus_have_too() {
    let Some([old, new]) = Qemu::both() else { return };
    let ends = [(new.clone(), OLD), (old, OLD)];
    moves(Journey { ends, ..Journey::new(&new, OLD) }, (Some("multifd"), "auto"), "legacy");
}

#[test]
fn guest_of_7_2_moves_in_the_modes_that_it_understands() {
    let Some(qemu) = Qemu::v7_2() else { return };
    for back in ["legacy", "none"] {
        moves(Journey::new(&qemu, OLD), (None, back), back);
    }
}
