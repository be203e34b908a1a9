//! A connection between `send` and `receive` breaks, by a proxy between the processes.

use std::{net::SocketAddr, path::Path};

use multifd_testkit::proxy::Proxy;
use serde_json::json;

use crate::kit::{Ended, Program, assert_left, captured, feed, folder, path, run, stored_memory};

const MIB: u64 = 1 << 20;
const LOCAL: &str = "tcp:127.0.0.1:0";
const FLAG: &str = "--channels-may-break";

/// Sends a file through a proxy that breaks connection `number` in its first pages.
fn through(number: usize, receive: &[&str], send: &[&str], from: &Path, file: &Path) -> (Ended, Ended) {
    let (receive, address) = Program::receive(receive, LOCAL, file);
    let target: SocketAddr = address.strip_prefix("tcp:").expect("its form").parse().expect("an address");
    let proxy = Proxy::breaking(target, number, if number == 0 { 100 } else { 300_000 }).expect("a proxy");
    let send = [&["--json", "--multifd-channels", "3", "--max-bandwidth", "16M"], send].concat();
    let sent = feed(&send, from, &format!("tcp:{}", proxy.address())).end();
    let received = receive.end();
    assert!(proxy.has_broken(), "connection {number} has not broken: {sent:?} {received:?}");
    (sent, received)
}

#[test]
fn file_arrives_although_a_connection_breaks_and_both_sides_name_the_channel() {
    let folder = folder();
    let from = captured(&folder, 16 * MIB);
    let file = path(&folder, "arrived");
    for number in 1..=3 {
        let (sent, received) = through(number, &["--force", FLAG], &[FLAG], &from, &file);
        assert_eq!((sent.code, received.code), (Some(0), Some(0)), "{number}: {sent:?} {received:?}");
        assert!(stored_memory(&file) == stored_memory(&from), "{number}: another guest");
        let lost = &sent.json()["lost-channels"];
        assert_eq!(lost.as_array().map(Vec::len), Some(1), "{sent:?}");
        let log = format!("a channel is broken; the migration continues without it channel={}", lost[0]);
        for ended in [&sent, &received] {
            assert!(ended.stderr.contains(&log), "{number}, expected {log:?}: {ended:?}");
        }
        let verified = run([Path::new("verify"), &file]);
        assert_eq!(verified.code, Some(0), "{verified:?}");
    }
}

#[test]
fn connection_that_breaks_ends_the_migration_unless_both_sides_agree() {
    let folder = folder();
    let from = captured(&folder, 16 * MIB);
    let file = path(&folder, "arrived");
    for (number, there, here) in
        [(2, &[][..], &[][..]), (2, &[FLAG], &[]), (2, &[], &[FLAG]), (0, &[FLAG], &[FLAG])]
    {
        let (sent, received) = through(number, there, here, &from, &file);
        let not_agreed = "the destination has not agreed to continue without a channel that breaks";
        assert_eq!(sent.stderr.contains(not_agreed), here != there && !here.is_empty(), "{sent:?}");
        sent.assert_failed(1, &["the file is unchanged"]);
        received.assert_failed(1, &["the migration from"]);
        assert_left(&folder, &["captured"]);
    }
}

#[test]
fn report_of_a_migration_that_lost_nothing_names_no_channel() {
    let folder = folder();
    let from = captured(&folder, MIB);
    let (receive, address) = Program::receive(&[FLAG], LOCAL, &path(&folder, "arrived"));
    let sent = feed(&["--json", FLAG], &from, &address).done().json();
    receive.done();
    assert_eq!((&sent["status"], &sent["lost-channels"]), (&json!("completed"), &json!(null)), "{sent}");
}

#[test]
fn flag_is_refused_where_no_channel_may_break() {
    let folder = folder();
    let from = captured(&folder, MIB);
    let from = from.to_str().expect("text");
    for (options, why) in [
        (&["--postcopy-ram"][..], "--retry and --resume"),
        (&["--multifd-channels", "1"], "less than two channels"),
        (&["--multifd-channels", "0"], "less than two channels"),
        (&["--return-path", "off"], "--return-path off"),
        (&["--sync-mode", "legacy"], "sync mode"),
    ] {
        let arguments = [&["send", FLAG][..], options, &[from, "tcp:127.0.0.1:1"]].concat();
        run(arguments).assert_failed(2, &[why]);
    }
}
