//! Every QEMU, machine type, number of channels, with and without return path, running and stopped.

use multifd_testkit::{guest::Guest, qemu::Qemu};

use crate::kit::{Folder, Way, assert_stored, capture, restore, start};

/// Captures a guest from one QEMU and restores it in another.
fn there_and_back(from: &Qemu, to: &Qemu, way: &Way) {
    let (guest, folder) = (Guest::new(), Folder::new());
    let file = folder.path("guest");
    {
        let mut source = start(from, way, &guest, false);
        let exact = way.channels.to_string();
        let flags: &[&str] = if way.channels == 2 { &["--multifd-channels", &exact] } else { &[] };
        capture(&mut source, way, "tcp:127.0.0.1:0", &file, flags);
        if way.passes == 0 {
            assert_stored(&mut source, &file);
        }
    }
    assert_eq!(folder.contents(), ["guest"], "nothing else is left");
    restore(to, way, &guest, &file, "tcp:127.0.0.1:0");
}

fn every_way(from: &Qemu, to: &Qemu, machine: &'static str, passes: u64) {
    for channels in [1, 2, 4, 8] {
        for return_path in [true, false] {
            there_and_back(from, to, &Way { channels, return_path, passes, ..Way::new(machine) });
        }
    }
}

#[test]
fn stopped_guest_of_7_2_on_pc_q35_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    every_way(&qemu, &qemu, "pc-q35-7.2", 0);
}

#[test]
fn running_guest_of_7_2_on_pc_q35_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    every_way(&qemu, &qemu, "pc-q35-7.2", 4);
}

#[test]
fn stopped_guest_of_10_0_on_pc_q35_7_2() {
    let Some(qemu) = Qemu::v10_0() else { return };
    every_way(&qemu, &qemu, "pc-q35-7.2", 0);
}

#[test]
fn running_guest_of_10_0_on_pc_q35_7_2() {
    let Some(qemu) = Qemu::v10_0() else { return };
    every_way(&qemu, &qemu, "pc-q35-7.2", 4);
}

#[test]
fn stopped_guest_of_10_0_on_pc_q35_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    every_way(&qemu, &qemu, "pc-q35-10.0", 0);
}

#[test]
fn running_guest_of_10_0_on_pc_q35_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    every_way(&qemu, &qemu, "pc-q35-10.0", 4);
}

#[test]
fn guest_of_7_2_goes_on_in_10_0_and_back() {
    let Some([old, new]) = Qemu::both() else { return };
    for passes in [0, 4] {
        let way = Way { passes, ..Way::new("pc-q35-7.2") };
        there_and_back(&old, &new, &way);
        there_and_back(&new, &old, &way);
    }
}
