//! The machine in a recording is given to another QEMU; and recordings of TLS, which have none.

use std::path::Path;

use multifd_testkit::{
    certificates::write_both,
    qemu::{Error, PATIENCE, Qemu, Vm},
};
use serde_json::json;

use super::{
    journey::with_tls,
    operated::controlled,
    recorded::{inspected, record, steps},
};
use crate::kit::{
    Program, first_difference, folder, leave, machine, memory, migrate_live, multifd, path, run, runs_on,
    send, source,
};

const LOCAL: &str = "tcp:127.0.0.1:0";

/// Compares the memory of a machine that arrived as its source left it; then it runs on.
fn assert_is(before: &[u8], from: &Vm, to: &mut Vm) -> Result<(), Error> {
    assert_eq!(to.run_state()?, "paused");
    assert_eq!(first_difference(before, &memory(to)?), None, "page, source and destination");
    to.cont()?;
    runs_on(from, to)
}

/// A machine that was stopped before it left, so that its memory is the same everywhere.
fn is_given_on(qemu: &Qemu, channels: u8) -> Result<(), Error> {
    let folder = folder();
    let (out, qmp) = (path(&folder, "recording"), path(&folder, "qmp"));
    let mut from = source(machine(qemu, &qemu.machine()))?;
    let mut to = machine(qemu, &qemu.machine()).incoming().start()?;
    for vm in [&mut from, &mut to] {
        vm.set_multifd_channels(channels)?;
    }
    let (recorder, address) = record(LOCAL, &to.migrate_incoming(LOCAL)?, &out);
    let before = leave(&mut from, &address, None)?;
    to.wait_migration("completed", PATIENCE)?;
    assert_eq!(recorder.done().json()["connections"], json!(channels + 1));
    assert_is(&before, &from, &mut to)?;
    drop(to);

    // The way on may differ from the recorded one.
    for channels in [0, 3] {
        let count = channels.to_string();
        let options = ["--multifd-channels", &count];
        let mut sent = machine(qemu, &qemu.machine()).incoming().start()?;
        sent.set_multifd_channels(channels)?;
        send(&options, &out, &mut sent, LOCAL)?;
        assert_is(&before, &from, &mut sent)?;
        drop(sent);

        let mut restored = controlled(machine(qemu, &qemu.machine()), &qmp).incoming().start()?;
        let mut restore = multifd(["restore", "--paused"]);
        Program::start(restore.args(options).arg(&out).arg(&qmp)).done();
        assert_is(&before, &from, &mut restored)?;
        drop(restored);
        std::fs::remove_file(&qmp).expect("its socket");
    }
    Ok(())
}

#[test]
fn machine_in_a_recording_over_channels_is_sent_and_restored() {
    let Some(qemus) = Qemu::both() else { return };
    qemus.iter().for_each(|qemu| is_given_on(qemu, 2).unwrap());
}

#[test]
fn machine_in_a_recording_of_a_single_stream_is_sent_and_restored() {
    let Some(qemus) = Qemu::both() else { return };
    qemus.iter().for_each(|qemu| is_given_on(qemu, 0).unwrap());
}

/// The migration passes, and its time line has sizes and times. There is nothing else in the recording, and every verb that needs more
/// says so.
fn is_opaque(qemu: &Qemu, channels: u8) -> Result<(), Error> {
    let folder = folder();
    write_both(folder.path()).expect("certificates");
    let out = path(&folder, "recording");
    let mut from = source(with_tls(machine(qemu, &qemu.machine()), folder.path(), "client"))?;
    let mut to = with_tls(machine(qemu, &qemu.machine()), folder.path(), "server").incoming().start()?;
    for vm in [&mut from, &mut to] {
        vm.set_multifd_channels(channels)?;
        vm.set_parameters(json!({ "tls-creds": "tls0" }))?;
    }
    let target = to.migrate_incoming(LOCAL)?;
    let (recorder, address) = record(LOCAL, &target, &out);
    let told = migrate_live(&mut from, &address, 3)?;
    runs_on(&from, &mut to)?;
    recorder.done();

    let found = inspected(&out);
    assert_eq!(found["complete"], json!(true), "{found}");
    assert_eq!(steps(&found), [""; 0], "{found}");
    assert!(found["downtime"].is_null(), "{found}");
    let connections = found["connections"].as_array().expect("connections");
    assert_eq!(connections.len(), usize::from(channels) + 1, "{found}");
    let mut carried = 0;
    for (number, connection) in connections.iter().enumerate() {
        assert_eq!(connection["name"], format!("TLS {number}"), "{found}");
        assert!(connection["packets"].is_null(), "{found}");
        for side in ["source", "destination"] {
            let flow = &connection[side];
            assert!(flow["bytes"].as_u64() > Some(500) && flow["last-ms"].as_f64() > Some(0.0), "{found}");
        }
        carried += connection["source"]["bytes"].as_u64().expect("a number");
    }
    assert!(carried > told["ram"]["normal-bytes"].as_u64().expect("a number"), "{carried}: {told}");
    let lines = run(["inspect".as_ref(), out.as_os_str()]);
    assert!(lines.code == Some(0) && lines.stdout.contains("\nTLS 0 "), "{lines:?}");
    // Nothing of the guest is in the clear.
    let bytes = std::fs::read(&out).expect("the recording");
    assert!(!bytes.windows(6).any(|window| window == b"pc.ram"), "a name of a block can be read");

    let other = path(&folder, "other");
    let recording = out.to_str().expect("text");
    let named = ["recording", "an encrypted migration (TLS)", "multifd inspect shows what passed"];
    run(["send", recording, &target]).assert_failed(1, &named);
    run(["replay", recording, &target]).assert_failed(1, &named);
    run([Path::new("merge"), &out, &other]).assert_failed(1, &named);
    run([Path::new("verify"), &out]).assert_failed(1, &named);
    assert!(!other.exists());
    Ok(())
}

#[test]
fn recording_of_a_migration_over_tls_is_opaque_and_refused_by_name() {
    let Some(qemus) = Qemu::both() else { return };
    for qemu in &qemus {
        is_opaque(qemu, 2).unwrap();
        is_opaque(qemu, 0).unwrap();
    }
}
