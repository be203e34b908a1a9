//! Channels that connect late, from elsewhere, or not at all: a file arrives complete or not at all.

use std::{net::SocketAddr, path::Path, time::Duration};

use multifd_testkit::proxy::Proxy;

use crate::kit::{Ended, Program, assert_left, captured, feed, folder, path, run, stored_memory};

const MIB: u64 = 1 << 20;
const LOCAL: &str = "tcp:127.0.0.1:0";

/// Sends `from` through a proxy that connects channels to the destination after these delays.
fn through(delays: &[u64], options: &[&str], send: &[&str], from: &Path, file: &Path) -> (Ended, Ended) {
    let (receive, address) = Program::receive(options, LOCAL, file);
    let target: SocketAddr = address.strip_prefix("tcp:").expect("its form").parse().expect("an address");
    let delays = delays.iter().copied().map(Duration::from_millis).collect();
    let proxy = Proxy::start(target, delays).expect("a proxy");
    let sent = feed(send, from, &format!("tcp:{}", proxy.address())).end();
    (sent, receive.end())
}

/// Regression: a proxy accepts the connect itself. Main's bytes arrived before it had connected the channels, so the
/// destination counted no or few channels. Pages were lost, and both sides reported success, in 14 of 20 runs.
#[test]
fn behind_a_proxy_that_connects_onwards_late_no_page_is_lost() {
    let folder = folder();
    let from = captured(&folder, MIB);
    let memory = stored_memory(&from);
    for run in 0..20_u64 {
        let file = path(&folder, "arrived");
        let delays = [20 + run * 130 / 19, 20 + run * 37 % 131, 20 + run * 71 % 131, 20 + run * 101 % 131];
        let (sent, received) = through(&delays, &["--force"], &["--multifd-channels", "4"], &from, &file);
        assert_eq!((sent.code, received.code), (Some(0), Some(0)), "{run}: {sent:?} {received:?}");
        assert!(stored_memory(&file) == memory, "{run}: {delays:?}");
    }
}

/// Like a source before this version, and QEMU: without a return path it cannot announce its channels.
#[test]
fn behind_a_proxy_a_source_that_announces_nothing_loses_no_page_either() {
    let folder = folder();
    let from = captured(&folder, MIB);
    let memory = stored_memory(&from);
    let send = ["--multifd-channels", "4", "--return-path", "off"];
    for run in 0..8_u64 {
        let file = path(&folder, "arrived");
        let delays = [20 + run * 18, 20 + run * 37 % 131, 20 + run * 71 % 131, 20 + run * 101 % 131];
        let (_sent, received) = through(&delays, &["--force"], &send, &from, &file);
        if received.code == Some(0) {
            assert!(stored_memory(&file) == memory, "{run}: {delays:?}");
        } else {
            assert_ne!(received.code, Some(2), "{received:?}");
        }
    }
}

#[test]
fn another_number_than_the_source_s_is_refused_at_once_with_both() {
    let folder = folder();
    let (from, file) = (captured(&folder, MIB), path(&folder, "arrived"));
    let (receive, address) = Program::receive(&["--multifd-channels", "2"], LOCAL, &file);
    let sent = feed(&["--multifd-channels", "3"], &from, &address).end();
    receive
        .end_within(Duration::from_secs(8))
        .assert_failed(1, &["the source announced 3 channels, but multifd-channels is 2 on this side"]);
    assert_ne!(sent.code, Some(0), "{sent:?}");
    assert_left(&folder, &["captured"]);
}

#[test]
fn where_channels_may_come_from_is_a_flag() {
    let folder = folder();
    let (from, file) = (captured(&folder, MIB), path(&folder, "arrived"));
    for given in ["main", "any", "127.0.0.1", "10.1.2.3,::ffff:127.0.0.1"] {
        let (receive, address) = Program::receive(&["--force", "--channels-from", given], LOCAL, &file);
        feed(&[], &from, &address).done();
        receive.done();
    }
    let refused = run(["receive", "--channels-from", "somewhere", LOCAL, "never"]);
    refused.assert_failed(2, &["expected channels-from main, any, or IP addresses", "somewhere"]);
}
