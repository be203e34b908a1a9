//! Peers that are alive and do nothing: the program ends, and prints what to check.

use std::{
    net::TcpListener,
    os::unix::net::{UnixListener, UnixStream},
    time::{Duration, Instant},
};

use multifd_testkit::{
    bad_destination::{BadDestination, Plan, Reads, Then},
    bad_source::{On, Script, Shape, Target},
    certificates,
    guest::Guest,
    qemu::{Error, PATIENCE, Qemu},
    silent::Silent,
};
use rustix::process::{Pid, Signal};
use serde_json::json;

use crate::kit::{
    Program, assert_left, captured, fast, feed, folder, machine, migrate, path, runs_on, send, slow, source,
};

const LOCAL: &str = "tcp:127.0.0.1:0";
const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(12);

/// A listener without a program that accepts: its system accepts connections, and then bytes until it is full.
#[test]
fn destination_that_takes_nothing_is_given_up() {
    let folder = folder();
    let from = captured(&folder, 64 * MIB);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", listener.local_addr().unwrap());
    for channels in ["2", "0"] {
        let options = ["--stall-timeout", "1", "--multifd-channels", channels];
        let ended = feed(&options, &from, &address).end_within(SOON);
        ended.assert_failed(1, &["because: ", "the other side has accepted no data for 1 s"]);
    }
}

/// After the handshake it reads nothing.
#[test]
fn destination_that_takes_nothing_over_tls_is_given_up() {
    let folder = folder();
    let from = captured(&folder, 64 * MIB);
    certificates::write_both(folder.path()).unwrap();
    let creds = folder.path().to_str().unwrap();
    for channels in ["2", "0"] {
        let silent = Silent::start(Some(folder.path())).unwrap();
        let options = ["--stall-timeout", "1", "--tls-creds", creds, "--multifd-channels", channels];
        let ended = feed(&options, &from, &silent.address()).end_within(SOON);
        ended.assert_failed(1, &["because: ", "the other side has accepted no data for 1 s"]);
    }
}

/// Its queue has room for one connection, which is taken already.
#[test]
fn destination_that_takes_no_connection_is_given_up() {
    let folder = folder();
    let (from, socket) = (captured(&folder, MIB), path(&folder, "socket"));
    let listener = UnixListener::bind(&socket).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _first = UnixStream::connect(&socket).unwrap();
    let address = format!("unix:{}", socket.display());
    let ended = feed(&["--connect-timeout", "1"], &from, &address).end_within(SOON);
    ended.assert_failed(1, &["because: connect to unix:", "timed out"]);
}

#[test]
fn destination_that_says_nothing_is_given_up() {
    let folder = folder();
    let from = captured(&folder, MIB);
    let destination = BadDestination::start(Plan { says: Vec::new(), ..Plan::default() }).unwrap();
    let address = format!("tcp:{}", destination.address());
    let ended = feed(&["--end-timeout", "1"], &from, &address).end_within(SOON);
    ended
        .assert_failed(1, &["because: return path: offset 0x8: nothing arrived in time", "multifd-channels"]);
}

#[test]
fn destination_that_is_slow_is_waited_for() {
    let folder = folder();
    let from = captured(&folder, MIB);
    let slow = (Reads::Slowly(20 << 10), Then::Close);
    let destination = BadDestination::start(Plan { channels: slow, ..Plan::default() }).unwrap();
    let address = format!("tcp:{}", destination.address());
    feed(&["--stall-timeout", "1", "--end-timeout", "5"], &from, &address).done();
}

#[test]
fn source_that_stops_within_a_section_is_given_up_and_nothing_is_left() {
    let folder = folder();
    let (receive, address) = Program::receive(&["--stall-timeout", "1"], LOCAL, &path(&folder, "machine"));
    let target = Target::Tcp(address.strip_prefix("tcp:").unwrap().parse().unwrap());
    let heard = Script::whole(Shape::default()).cut(On::Main, "devices", 0, 20, None).play(&target).unwrap();
    let ended = receive.end_within(SOON);
    ended.assert_failed(1, &["the migration from 127.0.0.1:", "nothing arrived in time", "query-migrate"]);
    assert_left(&folder, &[]);
    drop(heard);
}

/// It would wait for the others without limit, and so would `send`.
#[test]
fn qemu_that_expects_more_channels_is_given_up() {
    fn given_up(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let from = captured(&folder, MIB);
        let mut to = machine(qemu, &qemu.machine()).incoming().start()?;
        to.set_multifd_channels(4)?;
        let address = to.migrate_incoming(LOCAL)?;
        // Whether its few pages fit into the system's buffers of two connections decides which limit applies.
        let limits = ["--multifd-channels", "2", "--end-timeout", "1", "--stall-timeout", "1"];
        let ended = feed(&limits, &from, &address).end_within(SOON);
        ended.assert_failed(1, &["because: ", "multifd-channels"]);
        Ok(())
    }
    for qemu in [Qemu::v7_2(), Qemu::v10_0()].into_iter().flatten() {
        given_up(&qemu).unwrap();
    }
}

/// A source that pauses before the switchover sends nothing for as long as its user wants.
#[test]
fn source_that_pauses_between_passes_is_waited_for() {
    fn waited_for(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let mut from = source(machine(qemu, &qemu.machine()))?;
        from.set_capabilities(&[("return-path", true), ("pause-before-switchover", true)])?;
        from.set_multifd_channels(2)?;
        fast(&mut from)?;
        let options = ["--stall-timeout", "1"];
        let (receive, address) = Program::receive(&options, LOCAL, &path(&folder, "machine"));
        from.migrate(&address)?;
        from.wait_migration("pre-switchover", PATIENCE)?;
        std::thread::sleep(Duration::from_secs(3));
        from.execute("migrate-continue", json!({ "state": "pre-switchover" }))?;
        from.wait_migration("completed", PATIENCE)?;
        receive.done();
        Ok(())
    }
    for qemu in [Qemu::v7_2(), Qemu::v10_0()].into_iter().flatten() {
        waited_for(&qemu).unwrap();
    }
}

/// A process that is stopped in the first pass: nothing was noticed, because a source may pause between two sections.
fn frozen_source_is_given_up(qemu: &Qemu, channels: u8) -> Result<(), Error> {
    let folder = folder();
    // QEMU 7.2 sends some 4 MiB/s over channels with this limit.
    let large = Guest::new().working_set(512).filled(24_576);
    let mut from = source(qemu.vm().machine(&qemu.machine()).memory(160 * MIB).guest(&large))?;
    from.set_capabilities(&[("return-path", true)])?;
    from.set_multifd_channels(channels)?;
    from.set_parameters(json!({ "max-bandwidth": 100_000 }))?;
    let options = ["--stall-timeout", "2"];
    let (receive, address) = Program::receive(&options, LOCAL, &path(&folder, "machine"));
    from.migrate(&address)?;
    // What the first packets exceed the limit by must not look like its rate.
    std::thread::sleep(Duration::from_secs(3));
    let told = from.query_migrate()?;
    assert!(told["status"] == "active" && told["ram"]["transferred"].as_u64() > Some(MIB / 4), "{told}");
    let pid = Pid::from_raw(i32::try_from(from.pid()).expect("a process id")).expect("a process id");
    rustix::process::kill_process(pid, Signal::STOP).expect("it is there");
    let ended = receive.end_within(SOON);
    rustix::process::kill_process(pid, Signal::CONT).expect("it is there");
    ended.assert_failed(1, &["nothing arrived in time", "query-migrate"]);
    assert_left(&folder, &[]);
    from.wait_migration("failed", PATIENCE)?;
    from.wait_run_state("running", PATIENCE)
}

#[test]
fn source_that_is_frozen_within_a_pass_is_given_up() {
    for qemu in [Qemu::v7_2(), Qemu::v10_0()].into_iter().flatten() {
        for channels in [0, 2] {
            frozen_source_is_given_up(&qemu, channels).unwrap();
        }
    }
}

/// Its guest stays at the source, where it continues as soon as the operator cancels.
#[test]
fn source_that_pauses_for_longer_than_its_own_limit_is_given_up() {
    fn given_up(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let mut from = source(machine(qemu, &qemu.machine()))?;
        from.set_capabilities(&[("return-path", true), ("pause-before-switchover", true)])?;
        from.set_multifd_channels(2)?;
        fast(&mut from)?;
        let options = ["--stall-timeout", "1", "--pause-timeout", "3"];
        let (receive, address) = Program::receive(&options, LOCAL, &path(&folder, "machine"));
        from.migrate(&address)?;
        from.wait_migration("pre-switchover", PATIENCE)?;
        let begun = Instant::now();
        receive
            .end_within(SOON)
            .assert_failed(1, &["nothing arrived in time", "pause-timeout", "cancel the migration there"]);
        assert!(begun.elapsed() > Duration::from_secs(2), "{:?}", begun.elapsed());
        assert_left(&folder, &[]);
        // A QEMU 7.2 that is continued instead may hang.
        from.cancel_migration(PATIENCE)?;
        from.wait_run_state("running", PATIENCE)
    }
    for qemu in [Qemu::v7_2(), Qemu::v10_0()].into_iter().flatten() {
        given_up(&qemu).unwrap();
    }
}

/// From one destination that is cancelled to another, over 16 channels, and on to a QEMU that replaces one that was
/// cancelled as well.
fn second_attempt(qemu: &Qemu) -> Result<(), Error> {
    let folder = folder();
    let file = path(&folder, "machine");
    let mut from = source(machine(qemu, &qemu.machine()))?;
    from.set_capabilities(&[("return-path", true)])?;
    from.set_multifd_channels(16)?;
    slow(&mut from)?;
    let (left, address) = Program::receive(&[], LOCAL, &file);
    from.migrate(&address)?;
    from.wait_passes(2, PATIENCE)?;
    from.cancel_migration(PATIENCE)?;
    left.end_within(SOON).assert_failed(1, &["because: "]);
    assert_left(&folder, &[]);
    fast(&mut from)?;
    let (receive, address) = Program::receive(&[], LOCAL, &file);
    migrate(&mut from, &address)?;
    receive.done();

    let mut left = machine(qemu, &qemu.machine()).incoming().start()?;
    left.set_multifd_channels(16)?;
    let address = left.migrate_incoming(LOCAL)?;
    let sending = feed(&["--multifd-channels", "16", "--max-bandwidth", "1M"], &file, &address);
    sending.next_line();
    sending.signal(Signal::INT);
    sending.end_within(SOON).assert_failed(130, &["interrupted"]);
    drop(left);
    let mut to = machine(qemu, &qemu.machine()).incoming().start()?;
    to.set_multifd_channels(16)?;
    send(&["--multifd-channels", "16"], &file, &mut to, LOCAL)?;
    runs_on(&from, &mut to)
}

#[test]
fn cancelled_at_16_channels_the_next_destination_gets_the_guest_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    second_attempt(&qemu).unwrap();
}

#[test]
fn cancelled_at_16_channels_the_next_destination_gets_the_guest_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    second_attempt(&qemu).unwrap();
}
