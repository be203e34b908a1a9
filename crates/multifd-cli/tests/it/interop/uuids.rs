//! A destination that was started with `-uuid`, as libvirt starts every guest, and a file without a UUID.

use std::time::Duration;

use multifd_testkit::qemu::{Error, PATIENCE, Qemu};

use crate::kit::{Program, folder, machine, migrate, multifd, path, runs_on, send, source};

const LOCAL: &str = "tcp:127.0.0.1:0";
const UUID: &str = "00112233-4455-6677-8899-aabbccddeeff";
const NO_UUID: &str = "has no UUID. A destination that was started with -uuid";
const SOON: Duration = Duration::from_secs(20);

/// Only channels carry the UUID, so a file that was received without them does not have it. `send` was told by the
/// destination alone, whose process had ended by then.
fn missing_uuid_is_reported_before_anything_is_sent(qemu: &Qemu) -> Result<(), Error> {
    let folder = folder();
    let file = path(&folder, "machine");
    let mut from = source(machine(qemu, &qemu.machine()).uuid(UUID))?;
    let (receive, address) = Program::receive(&[], LOCAL, &file);
    migrate(&mut from, &address)?;
    receive.done();
    let of_uuid = || machine(qemu, &qemu.machine()).uuid(UUID).incoming().start();

    let mut to = of_uuid()?;
    to.set_multifd_channels(2)?;
    let address = to.migrate_incoming(LOCAL)?;
    let ended = Program::start(multifd(["send"]).arg(&file).arg(address)).end_within(SOON);
    ended.assert_failed(1, &["UUID"]);
    let first = ended.stderr.lines().next().unwrap_or_default();
    assert!(first.starts_with("WARNING: ") && first.contains(NO_UUID), "{ended:?}");
    assert!(first.ends_with("--uuid UUID"), "{ended:?}");
    drop(to);

    let mut to = of_uuid()?;
    to.set_multifd_channels(2)?;
    let ended = send(&["--uuid", UUID], &file, &mut to, LOCAL)?;
    assert!(!ended.stderr.contains("UUID"), "{ended:?}");
    runs_on(&from, &mut to)?;
    drop(to);

    // Main does not carry it.
    let mut to = of_uuid()?;
    let ended = send(&["--multifd-channels", "0"], &file, &mut to, LOCAL)?;
    assert!(!ended.stderr.contains("UUID"), "{ended:?}");
    to.wait_run_state("running", PATIENCE)
}

#[test]
fn missing_uuid_is_reported_before_anything_is_sent_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    missing_uuid_is_reported_before_anything_is_sent(&qemu).unwrap();
}

#[test]
fn missing_uuid_is_reported_before_anything_is_sent_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    missing_uuid_is_reported_before_anything_is_sent(&qemu).unwrap();
}

/// A source without `-uuid` and channels is known to have none, and a destination without it accepts the file.
#[test]
fn file_of_a_source_without_uuid_has_a_note_and_is_accepted() {
    fn accepted(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let file = path(&folder, "machine");
        let mut from = source(machine(qemu, &qemu.machine()))?;
        from.set_multifd_channels(2)?;
        let (receive, address) = Program::receive(&[], LOCAL, &file);
        migrate(&mut from, &address)?;
        receive.done();
        let mut to = machine(qemu, &qemu.machine()).incoming().start()?;
        to.set_multifd_channels(2)?;
        let ended = send(&[], &file, &mut to, LOCAL)?;
        assert!(ended.stderr.starts_with("note: ") && ended.stderr.contains(NO_UUID), "{ended:?}");
        runs_on(&from, &mut to)
    }
    let Some(qemu) = Qemu::v10_0() else { return };
    accepted(&qemu).unwrap();
}
