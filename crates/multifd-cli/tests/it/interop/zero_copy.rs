//! Zero-copy sends from either source's system, from and to real QEMUs.

use multifd_testkit::qemu::Qemu;

use super::journey::Journey;

/// On one machine the system always copies, and every source reports that.
fn moves(qemu: &Qemu, machine: &'static str, live: bool) {
    let journey = Journey { live, zero_copy: true, zero_back: "none", ..Journey::new(qemu, machine) };
    let sent = journey.take().unwrap().sent;
    let missed = &sent["ram"]["dirty-sync-missed-zero-copy"];
    assert!(missed.as_u64().is_some_and(|missed| missed > 0), "{sent}");
}

/// Not a running one: a 7.2 sends its SYNC before the system has completed its sends, so an older page may arrive
/// later.
#[test]
fn stopped_guest_of_7_2_moves_without_copies() {
    let Some(qemu) = Qemu::v7_2() else { return };
    moves(&qemu, "pc-q35-7.2", false);
}

#[test]
fn stopped_guest_of_10_0_moves_without_copies() {
    let Some(qemu) = Qemu::v10_0() else { return };
    moves(&qemu, "pc-q35-10.0", false);
}

#[test]
fn running_guest_of_10_0_moves_without_copies() {
    let Some(qemu) = Qemu::v10_0() else { return };
    moves(&qemu, "pc-q35-10.0", true);
}

#[test]
fn running_guest_of_10_0_on_machine_7_2_moves_without_copies() {
    let Some(qemu) = Qemu::v10_0() else { return };
    moves(&qemu, "pc-q35-7.2", true);
}
