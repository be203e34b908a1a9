//! Promises of `SECURITY.md` about the program that no other test covers.

use std::{fs, net::TcpStream};

use multifd_testkit::certificates::write_both;

use crate::kit::{Program, captured, folder, multifd, path};

const LOCAL: &str = "tcp:127.0.0.1:0";

#[test]
fn receive_listens_at_the_address_typed_and_at_no_other() {
    let folder = folder();
    let (_receive, address) = Program::receive(&[], LOCAL, &path(&folder, "machine"));
    let port: u16 = address.rsplit_once(':').unwrap().1.parse().unwrap();
    for other in ["127.0.0.2", "::1"] {
        let refused = TcpStream::connect((other, port)).expect_err("refused");
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused, "{other}");
    }
    TcpStream::connect(("127.0.0.1", port)).expect("it listens here");
}

/// With the most detailed logs, on both sides: they contain no line of a private key.
#[test]
fn logs_hold_no_private_key() {
    let folder = folder();
    write_both(folder.path()).unwrap();
    let (from, file) = (captured(&folder, 1 << 20), path(&folder, "machine"));
    let traced = |arguments: &[&str]| {
        let mut command = multifd(arguments);
        Program::start(command.env("MULTIFD_LOG", "trace"))
    };
    let creds = folder.path().to_str().unwrap();
    let receive = traced(&["receive", "--tls-creds", creds, LOCAL, file.to_str().unwrap()]);
    let mut line = receive.next_line();
    while !line.starts_with("listening on ") {
        line = receive.next_line();
    }
    let address = line.strip_prefix("listening on ").unwrap();
    let hostname = ["--tls-creds", creds, "--tls-hostname", "localhost"];
    let sent = traced(&[&["send"], &hostname[..], &[from.to_str().unwrap(), address]].concat()).done();
    let received = receive.done();
    for ended in [sent, received] {
        assert!(ended.stderr.contains("TRACE") && ended.stderr.contains("multifd"), "it talks: {ended:?}");
        for key in ["server-key.pem", "client-key.pem"] {
            let key = fs::read_to_string(path(&folder, key)).unwrap();
            let lines: Vec<_> =
                key.lines().filter(|line| line.len() > 16 && !line.starts_with('-')).collect();
            assert!(!lines.is_empty(), "a key has lines");
            assert!(lines.iter().all(|line| !ended.stderr.contains(line)), "a line of a key is in the log");
        }
    }
}
