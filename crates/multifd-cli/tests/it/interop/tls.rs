//! Sessions with real QEMUs, in both directions, and refusals by either side.

use std::{
    net::TcpListener,
    path::Path,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use multifd::channel::{
    Address, Connect, Context, Stop, Stream,
    tls::{ClientCredentials, TlsConnector},
};
use multifd_testkit::{
    certificates::{Authority, Subject, write_both},
    qemu::{Error, PATIENCE, Qemu, Vm},
};
use rustix::process::Signal;
use serde_json::json;
use tempfile::TempDir;

use super::journey::{Journey, with_tls, with_tls_and};
use crate::kit::{Program, assert_left, fast, feed, first_difference, folder, machine, memory, path, source};

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

/// Where QEMU speaks nothing newer.
#[test]
fn guests_move_over_tls_1_2() {
    both(|qemu| {
        for (live, method) in [(true, "none"), (false, "zstd")] {
            let machine = if qemu.machine().ends_with("7.2") { "pc-q35-7.2" } else { "pc-q35-10.0" };
            let tls_more = ",priority=NORMAL:-VERS-TLS1.3";
            Journey { live, method, tls: true, tls_more, ..Journey::new(qemu, machine) }.take().unwrap();
        }
    });
}

/// A source that is not allowed: it fails, its guest continues, and `receive` prints the reason and continues to wait.
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
        let told = "our ca-cert.pem does not contain its authority";
        source_is_dropped(qemu, theirs.path(), ours.path(), &[], told).unwrap();
    });
}

#[test]
fn source_that_is_not_listed_is_dropped_by_name() {
    both(|qemu| {
        let tls = certificates();
        let told = r#"the source's subject "O=Test,CN=source" is not in the list of tls-authz"#;
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
        assert!(line.contains("the source uses TLS: set tls-creds on this side too"), "{line}");
    });
}

/// The output of `send` for a destination that it refuses, or that refuses it.
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
        let told = ["our ca-cert.pem does not contain its authority"];
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

/// Signed by the authority of a folder that both ends use, and expired.
fn expired(role: &str) -> TempDir {
    let folder = folder();
    write_both(folder.path()).unwrap();
    let authority = Authority::new("Test Authority").unwrap();
    authority.write(folder.path()).unwrap();
    for (each, name, hosts) in [("server", "destination", &["127.0.0.1"][..]), ("client", "source", &[])] {
        let subject = Subject { organisation: "Test", name, hosts, expired: each == role };
        authority.sign(folder.path(), each, &subject).unwrap();
    }
    folder
}

/// QEMU checks its own certificate as we do, unless this is switched off.
const UNCHECKED: &str = ",sanity-check=off";

#[test]
fn destination_whose_time_is_over_is_refused() {
    both(|qemu| {
        let (folder, tls) = (folder(), expired("server"));
        let file = crate::kit::captured(&folder, 4 << 20);
        let builder = with_tls_and(machine(qemu, &qemu.machine()), tls.path(), "server", UNCHECKED);
        let mut to = builder.incoming().start().unwrap();
        to.set_multifd_channels(2).unwrap();
        to.set_parameters(json!({ "tls-creds": "tls0" })).unwrap();
        let address = to.migrate_incoming("tcp:127.0.0.1:0").unwrap();
        let creds = tls.path().to_str().expect("text");
        feed(&["--tls-creds", creds], &file, &address).end().assert_failed(1, &["expired"]);
    });
}

#[test]
fn source_whose_time_is_over_is_dropped_with_the_reason() {
    both(|qemu| {
        let (folder, tls) = (folder(), expired("client"));
        let builder = with_tls_and(machine(qemu, &qemu.machine()), tls.path(), "client", UNCHECKED);
        let mut from = source(builder).unwrap();
        from.set_capabilities(&[("return-path", true)]).unwrap();
        from.set_multifd_channels(2).unwrap();
        from.set_parameters(json!({ "tls-creds": "tls0" })).unwrap();
        let creds = tls.path().to_str().expect("text");
        let (receive, address) =
            Program::receive(&["--tls-creds", creds], "tcp:127.0.0.1:0", &path(&folder, "machine"));
        from.migrate(&address).unwrap();
        from.wait_migration("failed", PATIENCE).unwrap();
        let line = receive.next_line();
        assert!(line.contains("expired"), "{line}");
    });
}

/// A destination that allows only one subject.
fn admitting(qemu: &Qemu, folder: &Path, subject: &str) -> Result<(Vm, String), Error> {
    let list = format!("authz-simple,id=authz0,identity={}", subject.replace(',', ",,"));
    let builder = with_tls(machine(qemu, &qemu.machine()), folder, "server").arg("-object").arg(list);
    let mut to = builder.incoming().start()?;
    to.set_multifd_channels(2)?;
    to.set_parameters(json!({ "tls-creds": "tls0", "tls-authz": "authz0" }))?;
    let address = to.migrate_incoming("tcp:127.0.0.1:0")?;
    Ok((to, address))
}

/// The subject in the certificate's order, as in this project.
#[test]
fn destination_admits_us_by_the_subject_that_we_go_by_and_by_no_other() {
    both(|qemu| {
        let (folder, tls) = (folder(), certificates());
        let creds = tls.path().to_str().expect("text");
        let file = path(&folder, "machine");
        let mut from = source(machine(qemu, &qemu.machine())).unwrap();
        from.stop().unwrap();
        let (receive, address) = Program::receive(&[], "tcp:127.0.0.1:0", &file);
        from.set_multifd_channels(2).unwrap();
        fast(&mut from).unwrap();
        from.migrate(&address).unwrap();
        receive.done();
        let (_to, address) = admitting(qemu, tls.path(), "CN=source,O=Test").unwrap();
        let told = ["client-cert.pem", "its own log has the reason"];
        feed(&["--tls-creds", creds], &file, &address).end().assert_failed(1, &told);
        let (mut to, address) = admitting(qemu, tls.path(), "O=Test,CN=source").unwrap();
        feed(&["--tls-creds", creds], &file, &address).done();
        to.wait_migration("completed", PATIENCE).unwrap();
    });
}

/// Accepts plain connections, and forwards their bytes over TLS with keys that change early.
fn relay(credentials: ClientCredentials, to: &str, connections: usize) -> (String, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", listener.local_addr().unwrap());
    let connector = TlsConnector::new(Arc::new(to.parse::<Address>().unwrap()), credentials);
    let relay = thread::spawn(move || {
        let pumps: Vec<_> = (0..connections)
            .map(|_| {
                let (mut plain, _) = listener.accept().unwrap();
                let context = Context::new(&Stop::new()).connect_timeout(PATIENCE);
                let link = connector.connect(&context).unwrap();
                thread::spawn(move || {
                    let mut stream = Stream::new(link, &context);
                    std::io::copy(&mut plain, &mut stream).unwrap();
                    stream.close_write().unwrap();
                })
            })
            .collect();
        pumps.into_iter().for_each(|pump| pump.join().unwrap());
    });
    (address, relay)
}

/// A few times for each channel: gnutls accepts eight changes a second.
#[test]
fn destination_takes_new_keys() {
    both(|qemu| {
        let (folder, tls) = (folder(), certificates());
        let file = path(&folder, "machine");
        let mut from = source(machine(qemu, &qemu.machine())).unwrap();
        from.stop().unwrap();
        let before = memory(&mut from).unwrap();
        let (receive, address) = Program::receive(&[], "tcp:127.0.0.1:0", &file);
        from.set_multifd_channels(2).unwrap();
        fast(&mut from).unwrap();
        from.migrate(&address).unwrap();
        receive.done();
        let mut to =
            with_tls(machine(qemu, &qemu.machine()), tls.path(), "server").incoming().start().unwrap();
        to.set_multifd_channels(2).unwrap();
        to.set_parameters(json!({ "tls-creds": "tls0" })).unwrap();
        let address = to.migrate_incoming("tcp:127.0.0.1:0").unwrap();
        let pages = before.len() / (16 << 10);
        let credentials = ClientCredentials::load(tls.path(), "127.0.0.1").unwrap();
        let credentials = credentials.rekey_after(u64::try_from(pages / 4).unwrap());
        let (address, relay) = relay(credentials, &address, 3);
        // All pages are sent as bytes, so that there is something to carry. The relay forwards only one direction.
        let options = ["--zero-page-detection", "none", "--return-path", "off"];
        feed(&options, &file, &address).done();
        relay.join().unwrap();
        to.wait_migration("completed", PATIENCE).unwrap();
        assert_eq!(first_difference(&before, &memory(&mut to).unwrap()), None);
    });
}
