//! Sessions with real QEMUs, both ways, and what is refused by either side.

use std::{path::Path, time::Duration};

use multifd_testkit::{
    certificates::write_both,
    qemu::{Error, PATIENCE, Qemu},
};
use rustix::process::Signal;
use serde_json::json;
use tempfile::TempDir;

use super::journey::{Journey, with_tls};
use crate::kit::{Program, assert_left, fast, feed, folder, machine, path, source};

fn certificates() -> TempDir {
    let folder = folder();
    write_both(folder.path()).unwrap();
    folder
}

macro_rules! cells {
    ($($name:ident: $qemu:expr, $machine:expr, $channels:expr, $live:expr, $method:expr;)*) => {$(
        #[test]
        fn $name() {
            let Some(qemu) = $qemu else { return };
            let way = Journey {
                channels: $channels,
                live: $live,
                tls: true,
                method: $method,
                ..Journey::new(&qemu, $machine)
            };
            way.take().unwrap();
        }
    )*};
}

cells! {
    running_guest_of_7_2_moves_over_tls: Qemu::v7_2(), "pc-q35-7.2", 4, true, "none";
    stopped_guest_of_7_2_moves_over_tls: Qemu::v7_2(), "pc-q35-7.2", 2, false, "none";
    running_guest_of_10_0_on_machine_7_2_moves_over_tls: Qemu::v10_0(), "pc-q35-7.2", 4, true, "none";
    stopped_guest_of_10_0_on_machine_7_2_moves_over_tls: Qemu::v10_0(), "pc-q35-7.2", 2, false, "none";
    running_guest_of_10_0_moves_over_tls: Qemu::v10_0(), "pc-q35-10.0", 4, true, "none";
    stopped_guest_of_10_0_moves_over_tls: Qemu::v10_0(), "pc-q35-10.0", 2, false, "none";
    guest_of_7_2_moves_over_tls_with_multifd_off: Qemu::v7_2(), "pc-q35-7.2", 0, false, "none";
    guest_of_10_0_moves_over_tls_with_multifd_off: Qemu::v10_0(), "pc-q35-10.0", 0, false, "none";
    guest_of_7_2_moves_over_tls_packed_by_zlib: Qemu::v7_2(), "pc-q35-7.2", 3, false, "zlib";
    guest_of_7_2_moves_over_tls_packed_by_zstd: Qemu::v7_2(), "pc-q35-7.2", 3, true, "zstd";
    guest_of_10_0_moves_over_tls_packed_by_zlib: Qemu::v10_0(), "pc-q35-10.0", 3, true, "zlib";
    guest_of_10_0_moves_over_tls_packed_by_zstd: Qemu::v10_0(), "pc-q35-10.0", 3, false, "zstd";
}

/// A source that may not come: it fails, its guest runs on, and `receive` says why and goes on waiting.
fn source_is_dropped(
    qemu: &Qemu,
    theirs: &Path,
    ours: &Path,
    options: &[&str],
    told: &str,
) -> Result<(), Error> {
    let folder = folder();
    let mut from = source(with_tls(machine(qemu, &qemu.machine()), theirs, "client"))?;
    from.set_capabilities(&[("return-path", true)])?;
    from.set_multifd_channels(2)?;
    from.set_parameters(json!({ "tls-creds": "tls0" }))?;
    fast(&mut from)?;
    let creds = ours.to_str().expect("text");
    let all = [&["--tls-creds", creds], options].concat();
    let (receive, address) = Program::receive(&all, "tcp:127.0.0.1:0", &path(&folder, "machine"));
    from.migrate(&address)?;
    from.wait_migration("failed", PATIENCE)?;
    let line = receive.next_line();
    assert!(line.contains(told), "expected {told:?}: {line}");
    from.wait_run_state("running", PATIENCE)?;
    receive.signal(Signal::TERM);
    assert_eq!(receive.end().code, Some(130));
    assert_left(&folder, &[]);
    Ok(())
}

fn both(test: impl Fn(&Qemu)) {
    for qemu in [Qemu::v7_2(), Qemu::v10_0()].into_iter().flatten() {
        test(&qemu);
    }
}

#[test]
fn source_of_another_authority_is_dropped_with_the_reason() {
    both(|qemu| {
        let (theirs, ours) = (certificates(), certificates());
        let told = "our ca-cert.pem does not know its authority";
        source_is_dropped(qemu, theirs.path(), ours.path(), &[], told).unwrap();
    });
}

#[test]
fn source_that_is_not_listed_is_dropped_by_name() {
    both(|qemu| {
        let tls = certificates();
        let told = r#"the source's subject "CN=source,O=Test" is not in the list of tls-authz"#;
        source_is_dropped(qemu, tls.path(), tls.path(), &["--tls-authz", "CN=somebody"], told).unwrap();
    });
}

#[test]
fn source_without_tls_and_source_with_tls_are_told_apart() {
    both(|qemu| {
        let (folder, tls) = (folder(), certificates());
        let mut from = source(with_tls(machine(qemu, &qemu.machine()), tls.path(), "client")).unwrap();
        from.set_multifd_channels(2).unwrap();
        from.set_parameters(json!({ "tls-creds": "tls0" })).unwrap();
        let (receive, address) = Program::receive(&[], "tcp:127.0.0.1:0", &path(&folder, "machine"));
        from.migrate(&address).unwrap();
        from.wait_migration("failed", PATIENCE).unwrap();
        let line = receive.next_line();
        assert!(line.contains("the source speaks TLS: give tls-creds on this side too"), "{line}");
    });
}

/// What `send` says to a destination that it does not take, or that does not take it.
fn send_is_refused(
    qemu: &Qemu,
    theirs: &Path,
    ours: &Path,
    options: &[&str],
    told: &[&str],
) -> Result<(), Error> {
    let folder = folder();
    let file = crate::kit::captured(&folder, 4 << 20);
    let mut to = with_tls(machine(qemu, &qemu.machine()), theirs, "server").incoming().start()?;
    to.set_multifd_channels(2)?;
    to.set_parameters(json!({ "tls-creds": "tls0" }))?;
    let address = to.migrate_incoming("tcp:127.0.0.1:0")?;
    let creds = ours.to_str().expect("text");
    let all = [&["--tls-creds", creds], options].concat();
    feed(&all, &file, &address).end_within(Duration::from_secs(8)).assert_failed(1, told);
    Ok(())
}

#[test]
fn destination_of_another_authority_is_refused() {
    both(|qemu| {
        let (theirs, ours) = (certificates(), certificates());
        let told = ["our ca-cert.pem does not know its authority"];
        send_is_refused(qemu, theirs.path(), ours.path(), &[], &told).unwrap();
    });
}

#[test]
fn destination_of_another_name_is_refused() {
    both(|qemu| {
        let tls = certificates();
        let told = ["elsewhere.example", "subjectAltName", "tls-hostname"];
        let options = ["--tls-hostname", "elsewhere.example"];
        send_is_refused(qemu, tls.path(), tls.path(), &options, &told).unwrap();
    });
}

#[test]
fn destination_that_wants_a_certificate_gets_none_and_send_says_so() {
    both(|qemu| {
        let (tls, ours) = (certificates(), folder());
        std::fs::copy(tls.path().join("ca-cert.pem"), ours.path().join("ca-cert.pem")).unwrap();
        send_is_refused(qemu, tls.path(), ours.path(), &[], &["client-cert.pem"]).unwrap();
    });
}
