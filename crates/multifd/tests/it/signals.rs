//! A process in which a write to a closed connection would be a signal, and the signal the end: an embedder that is no Rust
//! program. The process is this binary again.
//!
//! UNSAFETY: a signal gets its default, which runs no code of ours.
#![expect(unsafe_code, reason = "a signal gets its default")]

use std::{
    io::{self, Read, Write},
    net::TcpListener,
    os::unix::net::UnixListener,
    process::Command,
};

use multifd::channel::{Address, Connect, Stop, Stream};

use crate::kit::TIMEOUT;

#[test]
fn connection_that_is_closed_is_an_error_and_no_signal() {
    let mut process = Command::new(std::env::current_exe().expect("this program"));
    process.args(["--exact", "signals::process_that_a_signal_would_end", "--include-ignored"]);
    let ended = process.env(TOLD, "1").output().expect("started");
    assert!(ended.status.success(), "{ended:?}");
}

fn connect(address: &str) -> Stream {
    let address = address.parse::<Address>().expect("an address");
    Stream::new(address.connect(&Stop::new(), TIMEOUT).expect("connected"))
}

/// Writes until that fails.
fn fails(mut stream: Stream) -> io::Error {
    loop {
        if let Err(error) = stream.write_all(&[0; 1 << 16]) {
            // The next one is of a connection that is known to be closed.
            return stream.write_all(&[0]).expect_err(&error.to_string());
        }
    }
}

/// Not a test of its own: the one above starts it.
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
    // Nothing is left unread in its socket, so it is closed in order.
    peer.set_nonblocking(true).expect("set");
    assert!(peer.read(&mut [0]).is_err());
    drop(peer);
    assert_eq!(fails(stream).kind(), io::ErrorKind::BrokenPipe);

    let error = fails(connect("exec:exit 3"));
    assert!(error.to_string().contains('3'), "{error}");
}

const TOLD: &str = "MULTIFD_TEST_SIGNALS";
