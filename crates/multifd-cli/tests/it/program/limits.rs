//! A process that may not open as many files as it has channels: the limit is reported, and nothing is left.

use rustix::process::Signal;

use crate::kit::{Program, assert_left, captured, feed, folder, multifd_in, path};

const LOCAL: &str = "tcp:127.0.0.1:0";
const MIB: u64 = 1 << 20;
/// More than the program has open besides its channels, and less than it needs for 16 of them.
const LIMITS: [u32; 3] = [16, 18, 20];

fn told(limit: u32) -> [String; 3] {
    [
        format!(
            "because: no descriptors are left: the limit of open files (RLIMIT_NOFILE, `ulimit -n`) is {limit}; "
        ),
        "raise the limit, or use fewer channels (multifd-channels)".into(),
        "Too many open files".into(),
    ]
}

#[test]
fn receive_without_descriptors_for_its_channels_names_the_limit() {
    let folder = folder();
    let from = captured(&folder, 8 * MIB);
    for limit in LIMITS {
        let file = path(&folder, "machine").display().to_string();
        let mut command = multifd_in(&[], &format!("ulimit -n {limit}"), &["receive", LOCAL, &file]);
        let receive = Program::start(&mut command);
        let sent = feed(&["--multifd-channels", "16"], &from, &receive.listening()).end();
        let told = told(limit);
        let told = [&["accept a connection at "][..], &told.each_ref().map(String::as_str)].concat();
        receive.end().assert_failed(1, &told);
        sent.assert_failed(1, &["the migration of ", "because: "]);
        assert_left(&folder, &["captured"]);
    }
}

#[test]
fn send_without_descriptors_for_its_channels_names_the_limit() {
    let folder = folder();
    let from = captured(&folder, 8 * MIB);
    for limit in LIMITS {
        let (receive, address) = Program::receive(&[], LOCAL, &path(&folder, "machine"));
        let arguments = ["send", "--multifd-channels", "16", from.to_str().unwrap(), &address];
        let sent = Program::start(&mut multifd_in(&[], &format!("ulimit -n {limit}"), &arguments)).end();
        let told = told(limit);
        let told =
            [&["because: channel ", "connect to tcp:127.0.0.1:"][..], &told.each_ref().map(String::as_str)];
        sent.assert_failed(1, &told.concat());
        // It may not have noticed that a migration has begun, and waits for one.
        receive.signal(Signal::INT);
        assert!(matches!(receive.end().code, Some(1 | 130)));
        assert_left(&folder, &["captured"]);
    }
}

/// It needs no descriptors for what it does not do.
#[test]
fn as_many_channels_as_there_are_descriptors_for_are_enough() {
    let folder = folder();
    let from = captured(&folder, 8 * MIB);
    let file = path(&folder, "machine").display().to_string();
    let mut command = multifd_in(&[], "ulimit -n 48", &["receive", LOCAL, &file]);
    let receive = Program::start(&mut command);
    let address = receive.listening();
    let arguments = ["send", "--multifd-channels", "16", from.to_str().unwrap(), &address];
    Program::start(&mut multifd_in(&[], "ulimit -n 48", &arguments)).done();
    receive.done();
}
