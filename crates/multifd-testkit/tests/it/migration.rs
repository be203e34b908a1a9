//! A guest moves from one QEMU to another and finds its memory unchanged: the kit reports success for migrations that
//! are known to work.

use multifd_testkit::guest::Guest;
use multifd_testkit::qemu::{Error, PATIENCE, Qemu};
use serde_json::{Value, json};

/// Moves a running guest and continues it; returns what the source reported.
fn live(from: &Qemu, to: &Qemu, channels: u8, listen: &str) -> Result<Value, Error> {
    live_in_passes(from, to, channels, listen, 2)
}

/// The same, in at least `passes` passes.
fn live_in_passes(from: &Qemu, to: &Qemu, channels: u8, listen: &str, passes: u64) -> Result<Value, Error> {
    let guest = Guest::new();
    let vm = |qemu: &Qemu| qemu.vm().machine(&from.machine()).guest(&guest);
    let mut source = vm(from).start()?;
    let mut destination = vm(to).incoming().start()?;
    for vm in [&mut source, &mut destination] {
        vm.set_multifd_channels(channels)?;
    }
    if passes > 2 {
        // Sending what the guest rewrites in a pass takes longer than the downtime limit, also if the guest gets little time.
        source.set_parameters(json!({ "max-bandwidth": 60_000_000, "downtime-limit": 5 }))?;
    } else {
        source.set_parameters(json!({ "max-bandwidth": 0, "downtime-limit": 2000 }))?;
    }
    let address = destination.migrate_incoming(listen)?;
    source.wait_round(3, PATIENCE)?;

    source.migrate(&address)?;
    source.wait_passes(passes, PATIENCE)?;
    source.set_parameters(json!({ "max-bandwidth": 0, "downtime-limit": 2000 }))?;
    let told = source.wait_migration("completed", PATIENCE)?;
    destination.wait_migration("completed", PATIENCE)?;

    let at = source.round()?.unwrap_or_default();
    // More rounds than needed to check every filled page once.
    destination.wait_round(at + 40, PATIENCE)?;
    Ok(told)
}

#[test]
fn live_guest_moves_over_one_connection_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    live(&qemu, &qemu, 0, "tcp:127.0.0.1:0").unwrap();
}

#[test]
fn live_guest_moves_over_one_connection_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    live(&qemu, &qemu, 0, "tcp:127.0.0.1:0").unwrap();
}

#[test]
fn live_guest_moves_over_four_channels_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    let told = live(&qemu, &qemu, 4, "tcp:127.0.0.1:0").unwrap();
    assert!(told["ram"]["multifd-bytes"].as_u64() > Some(30 << 20), "{told}");
}

#[test]
fn live_guest_moves_over_four_channels_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    let told = live(&qemu, &qemu, 4, "tcp:[::1]:0").unwrap();
    assert!(told["ram"]["multifd-bytes"].as_u64() > Some(30 << 20), "{told}");
}

#[test]
fn live_guest_moves_from_7_2_to_10_0_over_a_unix_socket() {
    let Some([old, new]) = Qemu::both() else { return };
    let folder = tempfile::tempdir().unwrap();
    live(&old, &new, 2, &format!("unix:{}/socket", folder.path().display())).unwrap();
}

#[test]
fn live_guest_moves_in_many_passes_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    let told = live_in_passes(&qemu, &qemu, 2, "tcp:127.0.0.1:0", 8).unwrap();
    assert!(told["ram"]["dirty-sync-count"].as_u64() >= Some(8), "{told}");
}

#[test]
fn live_guest_moves_in_many_passes_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    let told = live_in_passes(&qemu, &qemu, 2, "tcp:127.0.0.1:0", 4).unwrap();
    assert!(told["ram"]["dirty-sync-count"].as_u64() >= Some(4), "{told}");
}
