//! `multifd demo`: two processes, and proof that nothing was lost.

use std::{
    io::{PipeWriter, Write},
    time::Duration,
};

use rustix::process::{Pid, Signal};
use serde_json::{Value, json};

use crate::kit::{Program, multifd, run};

fn demo(arguments: &[&str]) -> Value {
    let ended = run([&["demo", "--json"], arguments].concat());
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{ended:?}");
    ended.json()
}

fn assert_whole(report: &Value, channels: u64, size: u64) {
    assert_eq!(report["ram-equal"], json!(true), "{report}");
    assert_eq!(report["status"], json!("completed"), "{report}");
    assert_eq!(report["ram"]["total"], json!(size), "{report}");
    let listed = report["channels"].as_array().expect("channels");
    let ids: Vec<u64> = listed.iter().filter_map(|channel| channel["id"].as_u64()).collect();
    assert_eq!(ids, (0..channels).collect::<Vec<_>>(), "{report}");
    let bytes: u64 = listed.iter().filter_map(|channel| channel["bytes"].as_u64()).sum();
    assert_eq!(json!(bytes), report["ram"]["multifd-bytes"], "{report}");
    for field in ["total-time", "downtime", "setup-time"] {
        assert!(report[field].is_u64(), "{field}: {report}");
    }
    assert!(report["ram"]["dirty-sync-count"].as_u64() >= Some(2), "{report}");
}

#[test]
fn ram_is_equal_after_a_demo_over_1_channel() {
    assert_whole(&demo(&["--size", "64M", "--channels", "1"]), 1, 64 << 20);
}

#[test]
fn ram_is_equal_after_a_demo_over_8_channels() {
    assert_whole(&demo(&["--size", "64M", "--channels", "8"]), 8, 64 << 20);
}

#[test]
fn ram_is_equal_after_a_demo_over_255_channels() {
    assert_whole(&demo(&["--size", "16M", "--channels", "255"]), 255, 16 << 20);
}

#[test]
fn ram_is_equal_after_a_demo_with_every_method() {
    for options in [["zlib", "--multifd-zlib-level", "6"], ["zstd", "--multifd-zstd-level", "0"]] {
        // No more than an unoptimised build can compress in this time.
        let report =
            demo(&[&["--size", "32M", "--dirty-rate", "2M", "--multifd-compression"], &options[..]].concat());
        assert_whole(&report, 4, 32 << 20);
    }
}

#[test]
fn ram_is_equal_when_the_guest_does_not_write() {
    assert_whole(&demo(&["--size", "16M", "--dirty-rate", "0"]), 4, 16 << 20);
}

#[test]
fn ram_is_equal_in_every_mode_of_zero_pages() {
    for mode in ["none", "legacy", "multifd", "auto"] {
        let report = demo(&["--size", "32M", "--zero-page-detection", mode]);
        assert_whole(&report, 4, 32 << 20);
        assert_eq!(report["ram"]["duplicate"].as_u64() > Some(0), mode != "none", "{mode}: {report}");
    }
}

/// Far more than any machine can write.
#[test]
fn ram_is_equal_when_the_guest_writes_without_a_pause() {
    assert_whole(&demo(&["--size", "16M", "--dirty-rate", "1T"]), 4, 16 << 20);
}

#[test]
fn least_demo_is_a_demo() {
    let report = demo(&["--size", "1"]);
    assert_eq!(report["ram-equal"], json!(true), "{report}");
}

#[test]
fn text_tells_what_matters() {
    let ended = run(["demo", "--size", "32M", "--channels", "3"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    for words in ["migrated over 3 channels", "downtime ", " ms", "channel 2", "RAM is equal: "] {
        assert!(ended.stdout.contains(words), "expected {words:?}: {ended:?}");
    }
    assert!(ended.stdout.lines().all(|line| line.len() <= 80), "as wide as a terminal: {ended:?}");
    for text in [ended.stdout, ended.stderr] {
        assert!(!text.contains(['\x1b', '\r']), "nothing for terminals where there is none: {text:?}");
    }
}

/// The guest was stopped by a cancel of its own, which the log showed as one of the migration.
#[test]
fn log_of_a_good_run_has_no_cancel() {
    let mut command = multifd(["demo", "--size", "8M", "--dirty-rate", "1M"]);
    let ended = Program::start(command.env("MULTIFD_LOG", "debug")).done();
    assert!(ended.stderr.contains("DEBUG") && !ended.stderr.contains("cancel"), "{ended:?}");
}

#[test]
fn interrupt_ends_it() {
    let mut command = multifd(["demo", "--size", "512M", "--dirty-rate", "1T"]);
    // The first line of the log is the first sign that it is running.
    let program = Program::start(command.env("MULTIFD_LOG", "debug"));
    program.next_line();
    program.signal(Signal::INT);
    program.end_within(Duration::from_secs(8)).assert_failed(130, &["interrupted"]);
}

/// Its second process is stopped by a signal, so it reads nothing more.
#[test]
fn demo_gives_a_second_process_up_that_reads_nothing() {
    let mut command = multifd(["demo", "--size", "512M", "--dirty-rate", "1T", "--stall-timeout", "1"]);
    let program = Program::start(command.env("MULTIFD_LOG", "debug"));
    while !program.next_line().contains("multifd_new_send_channel") {}
    let pid = program.pid().as_raw_nonzero();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("listed");
    let child = children.trim().parse().ok().and_then(Pid::from_raw).expect("one process");
    rustix::process::kill_process(child, Signal::STOP).expect("the process is there");
    let ended = program.end_within(Duration::from_secs(12));
    ended.assert_failed(1, &["the other side has accepted no data for 1 s"]);
}

/// It writes twice as fast as the limit allows to send, so the bandwidth measured in passes would never let it stop.
#[test]
fn guest_held_back_is_stopped_by_what_the_switchover_has_for_bandwidth() {
    let ended = run([
        "demo",
        "--json",
        "--size=32M",
        "--dirty-rate=100M",
        "--max-bandwidth=50M",
        "--avail-switchover-bandwidth=100G",
        "--downtime-limit=100",
        "--multifd-channels=2",
    ]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let told = ended.json();
    assert_eq!(told["ram-equal"], true, "{told}");
    assert!(told["ram"]["dirty-sync-count"].as_u64() <= Some(3), "{told}");
    assert!(told["total-time"].as_u64() >= Some(500), "held back: {told}");
}

/// All of its memory is written to during a pass, and only at a few per cent of its speed does the guest write less
/// than is sent.
const BUSY: [&str; 5] =
    ["--size=16M", "--dirty-rate=400M", "--max-bandwidth=20M", "--multifd-channels=2", "--json"];

#[test]
fn guest_that_writes_faster_than_is_sent_gets_told_what_would_help() {
    let ended = run([&["demo", "--max-passes=4"], &BUSY[..]].concat());
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let told = ended.json();
    assert_eq!(told["status"], "failed", "{told}");
    let text = told["error-desc"].as_str().expect("an error");
    let begin = "not complete after 4 passes (max-passes), so the guest continues at the source: will not converge: dirty ";
    assert!(text.starts_with(begin), "{text}");
    let advice = "; raise max-bandwidth (now 21 MB/s), switch auto-converge on, or allow 0.";
    assert!(text.contains(advice) && text.ends_with(" s of downtime (downtime-limit)"), "{text}");
    // While it ran, and at the end.
    assert!(ended.stderr.contains("the migration will not converge: dirty "), "{ended:?}");
    assert!(ended.stderr.contains(text), "{ended:?}");
}

#[test]
fn guest_that_writes_faster_than_is_sent_converges_when_it_is_held_back() {
    let flags = ["demo", "--auto-converge", "--cpu-throttle-initial=80", "--cpu-throttle-increment=19"];
    // Far more than needed: a hang would be reported as one.
    let ended = run([&flags[..], &["--max-total-time=120"], &BUSY].concat());
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let told = ended.json();
    assert_eq!(told["ram-equal"], true, "{told}");
    assert_eq!(told["cpu-throttle-percentage"], 99, "{told}");
    assert!(told["downtime"].as_u64() < Some(2000), "{told}");
}

#[test]
fn time_that_is_over_ends_a_demo() {
    let ended = run([&["demo", "--max-total-time=2"], &BUSY[..]].concat());
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let told = ended.json();
    let text = told["error-desc"].as_str().expect("an error");
    assert!(
        text.starts_with("not complete after 2.0 s (max-total-time), so the guest continues at the source"),
        "{text}"
    );
}

/// A demo that waits before its switchover, and its standard input.
fn paused() -> (Program, PipeWriter) {
    let (input, keys) = std::io::pipe().expect("a pipe");
    let mut command = multifd(["demo", "--size=16M", "--pause-before-switchover"]);
    let program = Program::start(command.stdin(input));
    while program.next_line() != "the guest is stopped; press Enter to switch over" {}
    (program, keys)
}

#[test]
fn demo_waits_for_a_line_before_the_switchover() {
    let (program, mut keys) = paused();
    keys.write_all(b"\n").expect("written");
    let ended = program.done();
    assert!(ended.stdout.contains("RAM is equal"), "{ended:?}");
}

#[test]
fn interrupt_ends_a_demo_that_waits() {
    let (program, _keys) = paused();
    program.signal(Signal::INT);
    program.end_within(Duration::from_secs(8)).assert_failed(130, &["interrupted"]);
}
