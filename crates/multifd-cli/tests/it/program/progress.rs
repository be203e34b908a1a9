//! What the program shows while it runs, and in its reports: each number and each state is true.

use std::{
    net::TcpListener,
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    time::{Duration, Instant},
};

use multifd_testkit::qemu::{Error, PATIENCE, Qemu, Vm};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::kit::{Program, captured, fast, feed, folder, machine, migrate, multifd, path, run, slow, source};

const LOCAL: &str = "tcp:127.0.0.1:0";
const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(12);

/// The next line on standard error with these words, and those before it.
fn line_with(program: &Program, words: &str) -> (String, Vec<String>) {
    let (mut before, begun) = (Vec::new(), Instant::now());
    loop {
        let line = program.next_line();
        if line.contains(words) {
            return (line, before);
        }
        before.push(line);
        assert!(begun.elapsed() < PATIENCE, "no line with {words:?}: {before:?}");
    }
}

/// Regression: it showed `100 %, 0 B/s`, and the report of its failure said that nothing remained.
#[test]
fn source_that_cannot_connect_shows_that_it_connects_and_reports_that_all_remains() {
    let folder = folder();
    let (from, socket) = (captured(&folder, MIB), path(&folder, "socket"));
    let listener = UnixListener::bind(&socket).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _first = UnixStream::connect(&socket).unwrap();
    let address = format!("unix:{}", socket.display());
    let send = feed(&["--connect-timeout", "3"], &from, &address);
    let line = send.next_line();
    assert!(line.contains("Z send: connecting (") && line.ends_with(" s)"), "{line}");
    let ended = send.end_within(SOON);
    assert!(!ended.stderr.contains('%'), "{ended:?}");

    let ended = feed(&["--connect-timeout", "1", "--json"], &from, &address).end_within(SOON);
    let report = ended.json();
    assert_eq!(report["status"], json!("failed"));
    let ram = &report["ram"];
    assert_eq!((&ram["total"], &ram["remaining"]), (&json!(MIB), &json!(MIB)), "{report}");
    assert_eq!((&ram["transferred"], &ram["normal"]), (&json!(0), &json!(0)), "{report}");
}

/// Regression: every number of the report was 0. Only the source knows what it would send again.
#[test]
fn report_of_a_failed_receive_has_what_arrived_and_nothing_that_it_cannot_know() {
    let folder = folder();
    let from = captured(&folder, 64 * MIB);
    for channels in ["2", "0"] {
        let (receive, address) = Program::receive(&["--json"], LOCAL, &path(&folder, "machine"));
        let options = ["--max-bandwidth", "8M", "--multifd-channels", channels];
        let send = feed(&options, &from, &address);
        line_with(&send, "left");
        drop(send);
        let report = receive.end_within(SOON).json();
        assert_eq!(report["status"], json!("failed"));
        let ram = &report["ram"];
        let number = |name: &str| ram[name].as_u64().unwrap_or_else(|| panic!("{name}: {report}"));
        assert_eq!((number("total"), number("page-size")), (64 * MIB, 4096));
        assert!(number("normal") > 0 && number("normal-bytes") == number("normal") * 4096, "{report}");
        assert!(number("transferred") >= number("normal-bytes"), "{report}");
        assert_eq!(number("transferred"), number("multifd-bytes") + number("precopy-bytes"));
        assert_eq!(ram.get("remaining"), None, "{report}");
        assert_eq!(report["channels"].as_array().map(Vec::len), Some(channels.parse().unwrap()));
    }
}

/// Regression: bytes of main were counted after a pass, so a source without channels showed `0 B/s` for all of it.
#[test]
fn both_sides_show_what_moves_without_channels() {
    let folder = folder();
    let from = captured(&folder, 64 * MIB);
    let (receive, address) = Program::receive(&["--progress", "plain=1"], LOCAL, &path(&folder, "machine"));
    let options = ["--progress", "plain=1", "--max-bandwidth", "8M", "--multifd-channels", "0"];
    let send = feed(&options, &from, &address);
    line_with(&send, "pass 1, ");
    let sent = send.next_line();
    assert!(sent.contains("MiB/s") && sent.contains(" %, pass 1, "), "{sent}");
    line_with(&receive, "pass 1, ");
    let received = receive.next_line();
    assert!(received.contains("MiB received, the guest has 64.00 MiB"), "{received}");
    assert!(received.contains("MiB/s"), "{received}");
    drop(send);
    drop(receive);
}

/// A folder in which no file can be created.
#[test]
fn temporary_name_is_in_no_message() {
    let ended = run(["receive", LOCAL, "/proc/machine"]);
    ended.assert_failed(1, &["cannot create /proc/machine", "cannot create a file in folder /proc"]);
    assert!(!ended.stderr.contains("at path") && !ended.stderr.contains("/proc/."), "{ended:?}");
}

/// Regression: `an error after the stop … cancelled` was in the log of a good run.
#[test]
fn log_of_a_good_run_has_no_error() {
    let folder = folder();
    let (from, file) = (captured(&folder, MIB), path(&folder, "machine"));
    let debug = |arguments: &[&str], paths: [&Path; 2]| {
        let mut command = multifd(arguments);
        command.args(paths).env("MULTIFD_LOG", "debug");
        command
    };
    let receive = Program::start(&mut debug(&["receive"], [Path::new(LOCAL), &file]));
    let (listening, _) = line_with(&receive, "listening on ");
    let address = listening.strip_prefix("listening on ").expect("its form").to_owned();
    let sent = Program::start(&mut debug(&["send"], [&from, Path::new(&address)])).done();
    for ended in [sent, receive.done()] {
        assert!(ended.stderr.contains("DEBUG"), "{ended:?}");
        for words in ["cancel", "after the stop", "the migration stops"] {
            assert!(!ended.stderr.contains(words), "{words:?} in {}", ended.stderr);
        }
    }
}

/// Regression: an expected time at 0 B/s was shown until the stall timeout.
#[test]
fn destination_that_never_accepts_data_gives_a_hint_soon() {
    let folder = folder();
    let from = captured(&folder, 64 * MIB);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", listener.local_addr().unwrap());
    let (send, begun) = (feed(&["--multifd-channels", "3"], &from, &address), Instant::now());
    let (hint, _) = line_with(&send, "accepts no data");
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    for words in
        ["send: ", "multifd-channels 3", "multifd-compression none", "TLS off", "machine type pc-q35-10.0"]
    {
        assert!(hint.contains(words), "expected {words:?}: {hint}");
    }
    send.signal(Signal::INT);
    let ended = send.end_within(SOON);
    assert_eq!(ended.stderr.matches("accepts no data").count(), 1, "{ended:?}");
}

/// It waits for its other channels, without limit.
#[test]
fn qemu_with_more_channels_gives_the_hint_soon() {
    fn hinted(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let from = captured(&folder, 64 * MIB);
        let mut to = machine(qemu, &qemu.machine()).incoming().start()?;
        to.set_multifd_channels(4)?;
        let address = to.migrate_incoming(LOCAL)?;
        let (send, begun) = (feed(&[], &from, &address), Instant::now());
        let (hint, before) = line_with(&send, "accepts no data");
        assert!(hint.contains("multifd-channels 2") && begun.elapsed() < SOON, "{hint}: {before:?}");
        Ok(())
    }
    for qemu in [Qemu::v7_2(), Qemu::v10_0()].into_iter().flatten() {
        hinted(&qemu).unwrap();
    }
}

/// What `receive` shows of a source that makes at least this many passes, and the source's number of passes.
fn shown(mut from: Vm, least: u64) -> Result<(String, u64), Error> {
    let folder = folder();
    from.set_capabilities(&[("return-path", true)])?;
    slow(&mut from)?;
    let options = ["--progress", "plain=1"];
    let (receive, address) = Program::receive(&options, LOCAL, &path(&folder, "machine"));
    from.migrate(&address)?;
    from.wait_passes(least, PATIENCE)?;
    // Lines from before these passes may not have been read yet.
    let begun = Instant::now();
    while passes(&receive.next_line()).into_iter().all(|pass| pass < 2) {
        assert!(begun.elapsed() < PATIENCE, "no line about a second pass");
    }
    fast(&mut from)?;
    let told = from.wait_migration("completed", PATIENCE)?;
    let ended = receive.done();
    Ok((ended.stderr, told["ram"]["dirty-sync-count"].as_u64().expect("a number")))
}

/// The passes in these lines.
fn passes(lines: &str) -> Vec<u64> {
    let numbers = lines.lines().filter_map(|line| Some(line.split_once("Z receive: pass ")?.1));
    numbers.map(|rest| rest.split_once(',').expect("its form").0.parse().expect("a number")).collect()
}

/// Regression: its sections were counted: `pass 65, 0 B/s, 0 B received` after three passes and 700 MiB.
#[test]
fn source_with_multifd_off_shows_its_passes_and_its_bytes() {
    let Some(qemu) = Qemu::v10_0() else { return };
    let (lines, count) = shown(source(machine(&qemu, "pc-q35-10.0")).unwrap(), 3).unwrap();
    let passes = passes(&lines);
    assert!(
        passes.iter().any(|pass| *pass > 1) && passes.iter().all(|pass| *pass <= count),
        "{count}: {lines}"
    );
    assert!(lines.contains("MiB received, the guest has ") && !lines.contains(" 0 B received"), "{lines}");
}

/// Regression: `pass 40` after three passes: a sync point of a channel ends a section in legacy mode.
#[test]
fn source_with_channels_shows_its_passes_in_both_sync_modes() {
    let Some(qemu) = Qemu::v10_0() else { return };
    for machine_type in ["pc-q35-7.2", "pc-q35-10.0"] {
        let mut from = source(machine(&qemu, machine_type)).unwrap();
        from.set_multifd_channels(2).unwrap();
        let (lines, count) = shown(from, 3).unwrap();
        let passes = passes(&lines);
        let (some, true_ones) =
            (passes.iter().any(|pass| *pass > 1), passes.iter().all(|pass| *pass <= count));
        assert!(some && true_ones, "{machine_type}, {count} passes: {lines}");
    }
}

/// Regression: it made passes without limit, and nothing said why (`pass 60,456`).
#[test]
fn source_that_waits_for_a_switchover_ack_gives_a_hint_once() {
    let Some(qemu) = Qemu::v10_0() else { return };
    for channels in [0, 2] {
        let folder = folder();
        let mut from = source(machine(&qemu, "pc-q35-10.0")).unwrap();
        from.set_capabilities(&[("return-path", true), ("switchover-ack", true)]).unwrap();
        from.set_multifd_channels(channels).unwrap();
        fast(&mut from).unwrap();
        let (receive, address) = Program::receive(&[], LOCAL, &path(&folder, "machine"));
        from.migrate(&address).unwrap();
        let (hint, before) = line_with(&receive, "switchover-ack");
        assert!(hint.contains("--switchover-ack") && hint.contains("at the source"), "{hint}: {before:?}");
        from.cancel_migration(PATIENCE).unwrap();
        let ended = receive.end_within(SOON);
        assert_eq!(ended.stderr.matches("with almost no pages").count(), 1, "{ended:?}");
        // A source without the capability, with the same guest.
        from.set_capabilities(&[("switchover-ack", false)]).unwrap();
        let (receive, address) = Program::receive(&[], LOCAL, &path(&folder, "machine"));
        migrate(&mut from, &address).unwrap();
        assert!(!receive.done().stderr.contains("switchover-ack"));
    }
}

/// Each mode, with a transfer that takes some seconds.
#[test]
fn progress_is_shown_as_it_is_asked_for() {
    let folder = folder();
    let from = captured(&folder, 4 * MIB);
    let sent = |name: &str, options: &[&str]| {
        let (receive, address) = Program::receive(&["--quiet"], LOCAL, &path(&folder, name));
        let ended =
            feed(&[&["--max-bandwidth", "2M", "--uuid", UUID], options].concat(), &from, &address).done();
        receive.done();
        ended
    };
    let plain = sent("plain", &["--progress", "plain=500ms"]);
    let lines: Vec<_> = plain.stderr.lines().filter(|line| line.contains("Z send: ")).collect();
    assert!(lines.len() >= 3 && lines.iter().all(|line| line.starts_with("20")), "{plain:?}");
    let seldom = sent("seldom", &[]);
    assert_eq!(seldom.stderr.matches("Z send: ").count(), 1, "one soon, the next after 10 s: {seldom:?}");
    let none = sent("none", &["--progress", "none"]);
    assert!(!none.stderr.contains("send: ") && none.stderr.contains("sent "), "{none:?}");
    assert!(none.stdout.is_empty());

    let objects = sent("objects", &["--progress", "json", "--json"]);
    let all: Vec<Value> =
        objects.stdout.lines().map(|line| serde_json::from_str(line).expect("an object")).collect();
    let statuses: Vec<_> = all.iter().filter_map(|object| object["status"].as_str()).collect();
    assert!(statuses.len() == all.len() && statuses.contains(&"active"), "{objects:?}");
    assert_eq!(statuses.last(), Some(&"completed"), "{objects:?}");
    assert!(all.iter().all(|object| object["ram"]["transferred"].is_u64() && object["channels"].is_array()));

    let refused = run(["send", "--progress", "plain=0", "FILE", "unix:x"]);
    refused.assert_failed(2, &["expected auto, bar, plain, plain=TIME, json or none"]);
}

const UUID: &str = "00112233-4455-6677-8899-aabbccddeeff";
