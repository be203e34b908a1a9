//! Lines with different faults, and the result of a migration over each.

use std::{
    path::PathBuf,
    thread::{scope, sleep},
    time::{Duration, Instant},
};

use multifd_testkit::{
    certificates::write_both,
    rough_network::{Carried, Line, Network},
};
use tempfile::TempDir;

use crate::kit::{Ended, Program, assert_left, captured, folder, multifd_in, path, stored_memory};

const MIB: u64 = 1 << 20;
/// The time limit of a successful end, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(200);
/// A lost host is noticed after at most 120 s, an inactive one after 150 s; with a margin for a busy machine.
const NOTICED: Duration = Duration::from_secs(180);
/// A line that is slow enough to be disconnected in the middle.
const SLOW: u64 = 50_000_000;

/// A machine in a file at near, and both programs running.
struct Move {
    network: Network,
    folder: TempDir,
    from: PathBuf,
    to: PathBuf,
    send: Program,
    receive: Program,
}

impl Move {
    /// `None` if two hosts cannot be created.
    fn start(line: &Line, bytes: u64, tls: bool) -> Option<Self> {
        let network = Network::new(line)?;
        let folder = folder();
        let (from, to) = (captured(&folder, bytes), path(&folder, "machine"));
        let mut options = Vec::new();
        if tls {
            let tls = path(&folder, "tls");
            std::fs::create_dir(&tls).unwrap();
            write_both(&tls).unwrap();
            options = vec!["--tls-creds".to_owned(), tls.display().to_string()];
        }
        let listen = format!("tcp:{}:0", network.far().address());
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let receive = [words(&["receive"]), options.clone(), vec![listen, to.display().to_string()]].concat();
        let receive = start(&network.far().launcher(), &receive);
        let address = receive.listening();
        if tls {
            options.extend(words(&["--tls-hostname", "localhost"]));
        }
        let send =
            [words(&["send", "--multifd-channels", "4"]), options, vec![from.display().to_string(), address]];
        let send = start(&network.near().launcher(), &send.concat());
        Some(Self { network, folder, from, to, send, receive })
    }

    /// Asserts that both succeed and that the file is the same. Returns what the line has done.
    fn arrives(self) -> [Carried; 2] {
        let start = Instant::now();
        let sent = self.send.end_within(PATIENCE);
        let received = self.receive.end_within(PATIENCE);
        assert_eq!((sent.code, received.code), (Some(0), Some(0)), "{sent:?}\n{received:?}");
        assert!(stored_memory(&self.to) == stored_memory(&self.from), "equal RAM");
        let carried = self.network.carried();
        println!("{:.1} s, {carried:?}", start.elapsed().as_secs_f64());
        carried
    }

    /// Waits until it is in the middle, and disconnects the line.
    fn pulled(self) -> Self {
        assert!(self.network.wait_carried(4 * MIB, PATIENCE), "{:?}", self.network.carried());
        self.network.pull();
        self
    }
}

fn start(launcher: &[String], arguments: &[String]) -> Program {
    let launcher: Vec<&str> = launcher.iter().map(String::as_str).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    Program::start(&mut multifd_in(&launcher, "true", &arguments))
}

/// Plain and encrypted; the line must have affected both directions. Returns the duration of each.
fn arrives_over(line: &Line, bytes: u64, did: fn(&Carried) -> u64) -> Option<[Duration; 2]> {
    let took = |tls| {
        let start = Instant::now();
        let carried = Move::start(line, bytes, tls)?.arrives();
        assert!(carried.iter().all(|way| did(way) > 0), "the line was rough: {carried:?}");
        Some(start.elapsed())
    };
    Some([took(false)?, took(true)?])
}

#[test]
fn ram_is_equal_over_a_line_that_loses_one_packet_in_100() {
    arrives_over(&Line { loss: 0.01, ..Line::default() }, 32 * MIB, |way| way.lost);
}

#[test]
fn ram_is_equal_over_a_line_that_loses_one_packet_in_20() {
    arrives_over(&Line { loss: 0.05, ..Line::default() }, 16 * MIB, |way| way.lost);
}

#[test]
fn ram_is_equal_over_a_line_that_takes_50_ms() {
    arrives_over(&Line { delay: Duration::from_millis(50), ..Line::default() }, 32 * MIB, |way| way.packets);
}

#[test]
fn ram_is_equal_over_a_line_that_reorders_one_packet_in_four() {
    let line = Line { delay: Duration::from_millis(5), reordered: 0.25, ..Line::default() };
    arrives_over(&line, 32 * MIB, |way| way.reordered);
}

#[test]
fn ram_is_equal_over_a_line_of_50_mbit_a_second() {
    let took = arrives_over(&Line { rate: Some(SLOW), ..Line::default() }, 16 * MIB, |way| way.packets);
    let least = Duration::from_secs_f64((16 * MIB * 8) as f64 / SLOW as f64);
    assert!(took.iter().flatten().all(|took| *took >= least), "{took:?}");
}

#[test]
fn ram_is_equal_over_a_line_that_is_all_of_this() {
    let line = Line {
        loss: 0.005,
        delay: Duration::from_millis(10),
        reordered: 0.02,
        rate: Some(100_000_000),
        ..Line::default()
    };
    arrives_over(&line, 8 * MIB, |way| way.lost);
}

#[test]
fn ram_is_equal_when_the_line_was_pulled_for_1_s() {
    for tls in [false, true] {
        let line = Line { rate: Some(SLOW), ..Line::default() };
        let Some(moving) = Move::start(&line, 32 * MIB, tls) else { return };
        let moving = moving.pulled();
        sleep(Duration::from_secs(1));
        moving.network.plug();
        let carried = moving.arrives();
        assert!(carried[0].cut > 0, "{carried:?}");
    }
}

/// What either end prints when the line was disconnected for long: no answer from the other host, or the pending step.
const GONE: [&str; 7] = [
    "the host has not answered for ",
    "Connection timed out",
    "the other side has accepted no data for ",
    "nothing arrived in time",
    "nothing was transferred on any connection for ",
    "the source closed the ",
    "stream ends where ",
];

/// Asserts that it has failed because of the other side, and says so.
#[track_caller]
fn assert_gone(ended: &Ended, told: &str) {
    ended.assert_failed(1, &[told, "because: "]);
    assert!(GONE.iter().any(|words| ended.stderr.contains(words)), "expected one of {GONE:?}: {ended:?}");
}

/// Ends both. Returns their results and the time since the line was disconnected.
fn ends_of(send: Program, receive: Program, pulled: Instant) -> [Ended; 2] {
    let end = |program: Program| {
        let ended = program.end_within(NOTICED.saturating_sub(pulled.elapsed()));
        println!(
            "{:.1} s after the line was pulled: {:?} {:?}",
            pulled.elapsed().as_secs_f64(),
            ended.code,
            ended.stderr
        );
        ended
    };
    scope(|threads| {
        let receiving = threads.spawn(|| end(receive));
        [end(send), receiving.join().expect("it ends in time")]
    })
}

/// The programs fail if a host has not answered for 90 s. If the system cannot bound the interval between two attempts
/// of TCP, these come later than that.
fn pulled_for_a_minute(tls: bool) {
    let line = Line { rate: Some(SLOW), ..Line::default() };
    let Some(moving) = Move::start(&line, 32 * MIB, tls) else { return };
    let Move { network, folder, from, to, send, receive } = moving.pulled();
    let pulled = Instant::now();
    let [sent, received] = scope(|threads| {
        threads.spawn(|| {
            sleep(Duration::from_secs(60));
            network.plug();
        });
        ends_of(send, receive, pulled)
    });
    if sent.code == Some(0) {
        assert_eq!(received.code, Some(0), "{received:?}");
        assert!(stored_memory(&to) == stored_memory(&from), "equal RAM");
    } else {
        assert_gone(&sent, "the migration of ");
        assert_gone(&received, "the migration from 10.77.0.1:");
        assert!(!to.exists(), "nothing is left: {folder:?}");
    }
}

#[test]
#[ignore = "slow: a line is pulled for a minute"]
fn line_pulled_for_60_s_is_waited_for_or_told_of_on_both_sides() {
    pulled_for_a_minute(false);
}

#[test]
#[ignore = "slow: a line is pulled for a minute"]
fn line_pulled_for_60_s_is_waited_for_or_told_of_on_both_sides_with_tls() {
    pulled_for_a_minute(true);
}

fn pulled_for_ever(tls: bool) {
    let line = Line { rate: Some(SLOW), ..Line::default() };
    let Some(moving) = Move::start(&line, 32 * MIB, tls) else { return };
    let Move { network, folder, send, receive, .. } = moving.pulled();
    let [sent, received] = ends_of(send, receive, Instant::now());
    assert_gone(&sent, "the migration of ");
    assert_gone(&received, "the migration from 10.77.0.1:");
    assert_left(&folder, if tls { &["captured", "tls"] } else { &["captured"] });
    drop(network);
}

#[test]
#[ignore = "slow: waits for time-outs of the network"]
fn line_pulled_for_ever_is_told_of_on_both_sides() {
    pulled_for_ever(false);
}

#[test]
#[ignore = "slow: waits for time-outs of the network"]
fn line_pulled_for_ever_is_told_of_on_both_sides_with_tls() {
    pulled_for_ever(true);
}
