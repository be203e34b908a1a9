//! The limits of a wait for a source and of a whole run: each ends the program, with an error that names the limit, and
//! nothing is left.

use std::{
    net::TcpStream,
    time::{Duration, Instant},
};

use multifd_testkit::certificates;
use rustix::process::Signal;
use serde_json::Value;

use crate::kit::{Program, assert_left, captured, feed, folder, multifd, path, run};

const LOCAL: &str = "tcp:127.0.0.1:0";
const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(12);

/// The flags of a verb that take a time.
fn times(verb: &str) -> Vec<String> {
    let help = run([verb, "--help"]).stdout;
    let flags = help.lines().filter_map(|line| line.trim_start().strip_suffix(" <TIME>"));
    flags.map(str::to_owned).collect()
}

#[test]
fn every_flag_that_takes_a_time_takes_it_in_every_form() {
    let mut flags = 0;
    for verb in ["receive", "send", "capture", "restore", "demo"] {
        for flag in times(verb) {
            flags += 1;
            for time in ["90", "500ms", "1.5s", "2m", "0.5h"] {
                let ended = run([verb, &format!("{flag}={time}"), "--help"]);
                assert_eq!(ended.code, Some(0), "{verb} {flag} {time}: {ended:?}");
            }
            let refused = run([verb, &format!("{flag}=2 days"), "--help"]);
            refused.assert_failed(2, &["(500ms, 90s, 2m, 1.5h), found \"2 days\""]);
        }
        assert!(times(verb).contains(&"--stall-timeout".to_owned()), "{verb}");
    }
    assert!(flags > 12, "{flags}");
    let long = run(["receive", "--accept-timeout=1.5h", "--timeout=36h", "--help"]);
    assert_eq!(long.code, Some(0), "{long:?}");
}

/// It waited without limit, with and without connections that are no source.
#[test]
fn source_that_does_not_connect_is_waited_for_within_the_limit() {
    for silent in [false, true] {
        let folder = folder();
        let (receive, address) =
            Program::receive(&["--accept-timeout", "2"], LOCAL, &path(&folder, "machine"));
        let begun = Instant::now();
        let connection =
            silent.then(|| TcpStream::connect(address.strip_prefix("tcp:").expect("its form")).unwrap());
        let ended = receive.end_within(SOON);
        assert!(begun.elapsed() > Duration::from_secs(1), "{:?}", begun.elapsed());
        ended.assert_failed(
            1,
            &["no migration into ", "because: no source has connected within 2 s: check that the migration"],
        );
        assert_left(&folder, &[]);
        drop(connection);
    }
    let ended = run(["receive", "--json", "--accept-timeout", "100ms", LOCAL, "machine"]);
    assert_eq!(ended.json()["status"], "failed", "{ended:?}");
}

#[test]
fn source_that_connects_within_the_limit_may_take_longer() {
    let folder = folder();
    let from = captured(&folder, 4 * MIB);
    let (receive, address) = Program::receive(&["--accept-timeout", "1"], LOCAL, &path(&folder, "machine"));
    feed(&["--max-bandwidth", "2M"], &from, &address).done();
    receive.done();
}

/// A source that TLS refuses was waited for without limit.
#[test]
fn refused_sources_end_the_wait_at_their_limit_and_not_before() {
    let folder = folder();
    let from = captured(&folder, MIB);
    certificates::write_both(folder.path()).unwrap();
    let creds = folder.path().to_str().unwrap();
    let file = path(&folder, "machine");
    let options = ["--tls-creds", creds, "--max-refused", "2"];
    let plain = |address: &str| {
        let ended = feed(&["--multifd-channels", "0"], &from, address).end();
        assert_eq!(ended.code, Some(1), "{ended:?}");
    };
    let (receive, address) = Program::receive(&options, LOCAL, &file);
    plain(&address);
    let encrypted = ["--tls-creds", creds, "--tls-hostname", "localhost"];
    feed(&encrypted, &from, &address).done();
    receive.done();

    std::fs::remove_file(&file).unwrap();
    let (receive, address) = Program::receive(&options, LOCAL, &file);
    plain(&address);
    plain(&address);
    let told = ["2 connections were refused (max-refused)", "check TLS", "connection from 127.0.0.1:", "TLS"];
    receive.end_within(SOON).assert_failed(1, &told);
    assert!(!file.exists());
}

#[test]
fn run_is_cancelled_at_its_limit_at_either_end() {
    let folder = folder();
    let (from, file) = (captured(&folder, 64 * MIB), path(&folder, "machine"));
    let over = "because: the whole run was not complete after 2 s, which is its limit (--timeout)";
    let limit = ["--timeout", "2"];
    let (receive, _) = Program::receive(&limit, LOCAL, &file);
    receive.end_within(SOON).assert_failed(1, &[over]);

    let (receive, address) = Program::receive(&limit, LOCAL, &file);
    let send = feed(&["--max-bandwidth", "1M"], &from, &address);
    receive.end_within(SOON).assert_failed(1, &["the migration from 127.0.0.1:", over]);
    send.end_within(SOON).assert_failed(1, &["the whole run was not complete after 2 s"]);

    let (receive, address) = Program::receive(&[], LOCAL, &file);
    let send = feed(&["--max-bandwidth", "1M", "--timeout", "2"], &from, &address);
    send.end_within(SOON).assert_failed(1, &["the migration of ", over]);
    receive.end_within(SOON).assert_failed(1, &["the migration from 127.0.0.1:"]);
    assert_left(&folder, &["captured"]);
}

/// It showed nothing before a source connected, and that it waits for days belongs into the log once.
#[test]
fn receive_shows_once_that_it_waits_for_a_source() {
    let folder = folder();
    let from = captured(&folder, MIB);
    let options = ["--progress", "plain=100ms"];
    let (receive, address) = Program::receive(&options, LOCAL, &path(&folder, "machine"));
    let line = receive.next_line();
    assert!(line.ends_with("Z receive: waiting for a source"), "{line}");
    std::thread::sleep(Duration::from_millis(500));
    feed(&["--max-bandwidth", "1M"], &from, &address).done();
    let ended = receive.done();
    assert_eq!(ended.stderr.matches("waiting").count(), 1, "{ended:?}");
    assert!(ended.stderr.contains("received, the guest has 1.00 MiB"), "{ended:?}");

    let mut command = multifd(["receive", "--progress", "json", LOCAL]);
    let receive = Program::start(command.arg(path(&folder, "other")));
    receive.listening();
    std::thread::sleep(Duration::from_millis(1500));
    receive.signal(Signal::INT);
    let ended = receive.end();
    let status: Value = ended.json()["status"].clone();
    assert_eq!((status, ended.code), ("none".into(), Some(130)), "{ended:?}");
}
