//! Processes with unusual signal settings: one in which a write to a closed connection raises a signal that ends it, as
//! in an embedder that is not a Rust program; one that ignores the ends of its children; one that waits for all of
//! them. The process is this test binary, started again.
//!
//! UNSAFETY: signals get their default or are ignored, which runs no code of ours.
#![expect(unsafe_code, reason = "sets what is done with signals")]

use std::{
    io::{self, Read, Write},
    net::TcpListener,
    os::unix::net::UnixListener,
    process::Command,
};

use multifd::{
    channel::{Address, Connect, ExitStatusUnknown, Listener, Stream},
    error::Usage,
};
use rustix::process::WaitOptions;

use crate::kit::context;

#[test]
fn connection_that_is_closed_is_an_error_and_no_signal() {
    in_a_process("signals::process_that_a_signal_would_end");
}

/// Regression: a command that had received everything and had succeeded counted as failed, and the guest ran at both
/// ends.
#[test]
fn command_is_not_started_where_its_end_would_not_be_known() {
    in_a_process("signals::process_that_ignores_the_ends_of_its_children");
}

#[test]
fn command_that_another_part_has_reaped_is_told_by_its_descriptor_or_as_unknown() {
    in_a_process("signals::process_that_reaps_all_children");
}

fn in_a_process(test: &str) {
    let mut process = Command::new(std::env::current_exe().expect("this program"));
    process.args(["--exact", test, "--include-ignored"]);
    let ended = process.env(TOLD, "1").output().expect("started");
    assert!(ended.status.success(), "{ended:?}");
}

fn connect(address: &str) -> Stream {
    let address = address.parse::<Address>().expect("an address");
    Stream::new(address.connect(&context()).expect("connected"), &context())
}

/// Writes until that fails.
fn fails(mut stream: Stream) -> io::Error {
    loop {
        if let Err(error) = stream.write_all(&[0; 1 << 16]) {
            // The next write goes to a connection that is known to be closed.
            return stream.write_all(&[0]).expect_err(&error.to_string());
        }
    }
}

/// Not a separate test: the one above starts it.
#[test]
#[ignore = "the other process of a test"]
fn process_that_a_signal_would_end() {
    if std::env::var_os(TOLD).is_none() {
        return;
    }
    // SAFETY: the number is a signal's, and its default is no handler.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };

    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let stream = connect(&format!("tcp:{}", listener.local_addr().expect("an address")));
    drop(listener.accept().expect("accepted"));
    assert_eq!(fails(stream).kind(), io::ErrorKind::BrokenPipe);

    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).expect("bound");
    let stream = connect(&format!("unix:{}", path.display()));
    let (mut peer, _) = listener.accept().expect("accepted");
    // No bytes are left unread in its socket, so it is closed normally.
    peer.set_nonblocking(true).expect("set");
    assert!(peer.read(&mut [0]).is_err());
    drop(peer);
    assert_eq!(fails(stream).kind(), io::ErrorKind::BrokenPipe);

    let error = fails(connect("exec:exit 3"));
    assert!(error.to_string().contains('3'), "{error}");
}

/// Not a separate test.
#[test]
#[ignore = "the other process of a test"]
fn process_that_ignores_the_ends_of_its_children() {
    if std::env::var_os(TOLD).is_none() {
        return;
    }
    let command: Address = "exec:true".parse().expect("an address");
    assert_eq!((command.check_connect(), command.check_listen()), (Ok(()), Ok(())));
    // SAFETY: the number is a signal's, and to ignore it installs no handler.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    assert_eq!(command.check_connect(), Err(Usage::ChildrenIgnored));
    assert_eq!(command.check_listen(), Err(Usage::ChildrenIgnored));
    let refused = command.connect(&context()).map(drop).expect_err("refused");
    assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    assert!(refused.to_string().contains("ignores SIGCHLD"), "{refused}");
    assert!(Listener::bind(&command).map(drop).expect_err("refused").to_string().contains("SIGCHLD"));
}

/// Not a separate test. Whether the system still reports the status depends on its version.
#[test]
#[ignore = "the other process of a test"]
fn process_that_reaps_all_children() {
    if std::env::var_os(TOLD).is_none() {
        return;
    }
    for (command, expected) in [("exec:cat >/dev/null", 0), ("exec:cat >/dev/null; exit 3", 3)] {
        let mut stream = connect(command);
        stream.close_write().expect("said");
        rustix::process::wait(WaitOptions::empty()).expect("a child").expect("reaped");
        match (stream.finish(), expected) {
            (Ok(()), 0) => {}
            (Err(error), 3) if error.to_string().contains("exit status 3") => {}
            (Err(error), _) => {
                let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<ExitStatusUnknown>());
                assert!(inner.is_some(), "{error}");
            }
            (Ok(()), _) => panic!("a command that has failed counts as done"),
        }
    }
}

const TOLD: &str = "MULTIFD_TEST_SIGNALS";
