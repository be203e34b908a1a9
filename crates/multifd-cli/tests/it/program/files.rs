//! Every file on the command line, in every place, is looked at before it is used: a FIFO, a socket, a device or a folder
//! in its place is an error that says what it is. Nothing waits for the other end of a FIFO.

use std::{
    fs::{self, File},
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    time::Duration,
};

use multifd_testkit::certificates::write_both;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tempfile::TempDir;

use crate::kit::{Program, captured, folder, multifd, path};

/// Nothing here waits for anything.
const SOON: Duration = Duration::from_secs(8);

/// What can be in the place of a file, with its name in errors.
fn others(folder: &TempDir) -> Vec<(PathBuf, &'static str)> {
    let [fifo, socket, inner] = ["fifo", "socket", "inner"].map(|name| path(folder, name));
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a FIFO");
    // The file stays when the listener is gone.
    drop(UnixListener::bind(&socket).expect("a socket"));
    fs::create_dir(&inner).expect("a folder");
    vec![
        (fifo, "a FIFO"),
        (socket, "a socket"),
        (inner, "a folder"),
        ("/dev/null".into(), "a character device"),
        ("/dev/zero".into(), "a character device"),
    ]
}

#[track_caller]
fn assert_refused(arguments: &[&str], code: i32, told: &[&str]) {
    let ended = Program::start(&mut multifd(arguments)).end_within(SOON);
    ended.assert_failed(code, told);
}

fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}

#[test]
fn file_to_read_that_is_no_regular_file_is_refused_by_its_kind() {
    let folder = folder();
    let out = path(&folder, "out");
    for (other, kind) in others(&folder) {
        let told = [&format!("it is {kind}, expected a regular file: ")[..], text(&other)];
        let at = format!("file:{},offset=0x1000", text(&other));
        assert_refused(&["send", text(&other), "tcp:127.0.0.1:1"], 1, &told);
        assert_refused(&["send", &at, "tcp:127.0.0.1:1"], 1, &told);
        assert_refused(&["inspect", text(&other)], 1, &told);
        assert_refused(&["inspect", "--json", text(&other)], 1, &told);
        assert_refused(&["inspect", "--extract", "pc.ram", text(&other), text(&out)], 1, &told);
    }
    // A link to one, and a FIFO on standard input.
    std::os::unix::fs::symlink(path(&folder, "fifo"), path(&folder, "link")).expect("a link");
    assert_refused(&["send", text(&path(&folder, "link")), "tcp:127.0.0.1:1"], 1, &["it is a FIFO"]);
    let (reader, _writer) = std::io::pipe().expect("a pipe");
    let mut command = multifd(["inspect", "/dev/stdin"]);
    command.stdin(reader);
    Program::start(&mut command)
        .end_within(SOON)
        .assert_failed(1, &["it is a FIFO, expected a regular file"]);
}

#[test]
fn file_to_write_that_is_no_regular_file_is_refused_by_its_kind() {
    let folder = folder();
    let from = captured(&folder, 1 << 20);
    for (other, kind) in others(&folder) {
        let told =
            [&format!("is not a regular file: it is {kind}; use the path of a new file")[..], text(&other)];
        let at = format!("file:{},offset=0x1000", text(&other));
        for force in [&[][..], &["--force"]] {
            let receive = |file| [&["receive"], force, &["tcp:127.0.0.1:0", file]].concat();
            assert_refused(&receive(text(&other)), 1, &told);
            assert_refused(&receive(&at), 1, &told);
            let extract = [&["inspect"], force, &["--extract", "pc.ram", text(&from), text(&other)]].concat();
            assert_refused(&extract, 1, &told);
        }
        if kind != "a folder" {
            let inside = other.join("machine");
            assert_refused(&["receive", "tcp:127.0.0.1:0", text(&inside)], 1, &["Not a directory"]);
        }
    }
}

/// Regression: a FIFO in place of a certificate made the program wait for a writer.
#[test]
fn certificate_that_is_no_regular_file_is_refused_by_its_kind() {
    let folder = folder();
    let from = captured(&folder, 1 << 20);
    let creds = path(&folder, "creds");
    fs::create_dir(&creds).expect("a folder");
    for (other, kind) in others(&folder) {
        for (file, receives, sends) in [
            ("ca-cert.pem", true, true),
            ("ca-crl.pem", true, true),
            ("server-cert.pem", true, false),
            ("server-key.pem", true, false),
            ("client-cert.pem", false, true),
            ("client-key.pem", false, true),
        ] {
            let place = creds.join(file);
            write_both(&creds).expect("certificates");
            let _ = fs::remove_file(&place);
            std::os::unix::fs::symlink(&other, &place).expect("a link");
            let told = [&format!("it is {kind}, expected a regular file")[..], text(&place)];
            let tls = ["--tls-creds", text(&creds)];
            if receives {
                let to = path(&folder, "machine");
                assert_refused(&[&["receive"], &tls[..], &["tcp:127.0.0.1:0", text(&to)]].concat(), 1, &told);
            }
            if sends {
                assert_refused(&[&["send"], &tls[..], &[text(&from), "tcp:127.0.0.1:1"]].concat(), 1, &told);
            }
            fs::remove_file(&place).expect("removed");
        }
    }
}

/// Regression: a list of revoked certificates that could not be reached counted as none.
#[test]
fn list_of_revoked_certificates_that_cannot_be_opened_is_an_error() {
    let folder = folder();
    write_both(folder.path()).expect("certificates");
    std::os::unix::fs::symlink("gone", path(&folder, "ca-crl.pem")).expect("a link");
    let tls = ["receive", "--tls-creds", text(folder.path()), "tcp:127.0.0.1:0", "no/such/folder/machine"];
    assert_refused(&tls, 1, &["ca-crl.pem", "No such file"]);
}

#[test]
fn path_of_a_unix_socket_that_is_something_else_is_refused_by_its_kind() {
    let folder = folder();
    let from = captured(&folder, 1 << 20);
    let to = path(&folder, "machine");
    for (other, kind) in others(&folder).into_iter().filter(|(_, kind)| *kind != "a socket") {
        let at = format!("unix:{}", text(&other));
        assert_refused(&["send", text(&from), &at], 1, &[&format!("it is {kind}, expected a socket")]);
        let told = format!("it exists and is {kind}, not a socket: remove it, or use another path");
        assert_refused(&["receive", &at, text(&to)], 1, &[&told]);
    }
    let at = format!("unix:{}", text(&from));
    assert_refused(&["receive", &at, text(&to)], 1, &["it exists and is a regular file, not a socket"]);
    let dead = format!("unix:{}", text(&path(&folder, "socket")));
    assert_refused(&["send", text(&from), &dead], 1, &["no process listens at this socket"]);
}

#[test]
fn descriptor_that_is_no_socket_is_refused_by_its_kind() {
    let folder = folder();
    let from = captured(&folder, 1 << 20);
    let to = path(&folder, "machine");
    let (pipe, _writer) = std::io::pipe().expect("a pipe");
    for (input, kind) in [
        (pipe.into(), "a pipe"),
        (File::open(&from).expect("a file").into(), "a regular file"),
        (File::open(folder.path()).expect("a folder").into(), "a folder"),
        (File::open("/dev/null").expect("a device").into(), "a character device"),
    ] {
        let input: std::os::fd::OwnedFd = input;
        for arguments in
            [["receive", "fd:0", text(&to)], ["send", text(&from), "fd:0"]].map(|[verb, one, other]| {
                [verb, if verb == "send" { "--multifd-channels=0" } else { "--quiet" }, one, other]
            })
        {
            let mut command = multifd(arguments);
            command.stdin(input.try_clone().expect("a copy"));
            let ended = Program::start(&mut command).end_within(SOON);
            ended.assert_failed(2, &[&format!("fd:0 is {kind} ("), "expected a "]);
            if arguments[0] == "receive" {
                assert!(
                    ended.stderr.contains("use - as the address to receive from a pipe or a file"),
                    "{ended:?}"
                );
            }
        }
    }
}
