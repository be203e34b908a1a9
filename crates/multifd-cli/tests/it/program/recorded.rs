//! `multifd record` and `replay` without QEMU.

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::process::Signal;
use serde_json::json;
use tempfile::TempDir;

use crate::kit::{Program, captured, feed, folder, multifd, path, run, stored_memory};

const LOCAL: &str = "tcp:127.0.0.1:0";

fn record(options: &[&str], target: &str, out: &Path) -> Program {
    Program::start(multifd(["record"]).args(options).args([LOCAL, target]).arg(out))
}

/// A target that is not a QEMU, and a source that has connected to it through the recorder.
fn pair(out: &Path) -> (Program, TcpStream, TcpStream) {
    let target = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = format!("tcp:{}", target.local_addr().expect("its address"));
    let recorder = record(&[], &address, out);
    let listening = recorder.listening();
    let source = TcpStream::connect(listening.trim_start_matches("tcp:")).expect("connected");
    let (destination, _) = target.accept().expect("passed on");
    for stream in [&source, &destination] {
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a limit");
    }
    (recorder, source, destination)
}

fn read(stream: &mut TcpStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).expect("read");
    bytes
}

/// A machine in a file, sent over two channels through the recorder. Returns the recording, and the bytes of RAM.
pub(super) fn recording_of_two_channels(folder: &TempDir) -> (PathBuf, u64) {
    let bytes = 2 << 20;
    let file = captured(folder, bytes);
    let (out, received) = (path(folder, "recording"), path(folder, "received"));
    let (receive, address) = Program::receive(&["--quiet"], LOCAL, &received);
    let recorder = record(&["--json"], &address, &out);
    feed(&["--multifd-channels", "2"], &file, &recorder.listening()).done();
    receive.done();
    recorder.done();
    (out, bytes)
}

#[test]
fn machine_in_a_file_is_sent_through_the_recorder_and_replayed() {
    let folder = folder();
    let file = captured(&folder, 8 << 20);
    let (out, first, second) = (path(&folder, "recording"), path(&folder, "first"), path(&folder, "second"));
    let (receive, address) = Program::receive(&["--quiet"], LOCAL, &first);
    let recorder = record(&["--json"], &address, &out);
    feed(&["--multifd-channels", "2"], &file, &recorder.listening()).done();
    receive.done();
    let summary = recorder.done().json();
    assert_eq!(summary["connections"], json!(3), "{summary}");
    assert_eq!(summary["file-bytes"].as_u64(), fs::metadata(&out).ok().map(|found| found.len()));
    assert!(stored_memory(&file) == stored_memory(&first));

    let (receive, address) = Program::receive(&["--quiet"], LOCAL, &second);
    Program::start(multifd(["replay", "--fast"]).arg(&out).arg(&address)).done();
    receive.done();
    assert!(stored_memory(&file) == stored_memory(&second));

    // It is read as the machine that has arrived.
    let third = path(&folder, "third");
    let (receive, address) = Program::receive(&["--quiet"], LOCAL, &third);
    let sent = feed(&["--multifd-channels", "2"], &out, &address).done();
    assert!(sent.stderr.contains("recording is a recording of a migration"), "{sent:?}");
    receive.done();
    assert!(stored_memory(&file) == stored_memory(&third));
    let verified = run(["verify".as_ref(), out.as_os_str()]);
    assert!(verified.code == Some(0) && verified.stderr.contains("is complete"), "{verified:?}");
    let extracted = path(&folder, "extracted");
    let words = ["inspect", "--extract", "pc.ram"].map(AsRef::as_ref);
    let ended = run(words.into_iter().chain([out.as_os_str(), extracted.as_os_str()]));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(fs::read(&extracted).expect("pages") == stored_memory(&file));
    let picture = path(&folder, "picture.svg");
    let drawn = run(["inspect".as_ref(), "--svg".as_ref(), picture.as_os_str(), out.as_os_str()]);
    assert_eq!(drawn.code, Some(0), "{drawn:?}");
    assert!(fs::read_to_string(&picture).expect("a picture").contains(">channel 1</text>"));
    run(["inspect".as_ref(), "--svg".as_ref(), picture.as_os_str(), file.as_os_str()])
        .assert_failed(1, &["--svg needs a recording"]);
}

#[test]
fn file_that_exists_is_kept() {
    let folder = folder();
    let out = path(&folder, "recording");
    fs::write(&out, "precious").expect("written");
    record(&[], "tcp:127.0.0.1:1", &out).end().assert_failed(1, &["it exists; --force replaces it"]);
    assert_eq!(fs::read(&out).expect("the file"), b"precious");
}

#[test]
fn half_close_is_passed_on_as_one() {
    let folder = folder();
    let (recorder, mut source, mut destination) = pair(&path(&folder, "recording"));
    source.write_all(b"hello").expect("sent");
    source.shutdown(Shutdown::Write).expect("closed");
    let mut text = String::new();
    destination.read_to_string(&mut text).expect("to the end");
    assert_eq!(text, "hello");
    destination.write_all(b"yes").expect("sent");
    drop(destination);
    text.clear();
    source.read_to_string(&mut text).expect("to the end");
    assert_eq!(text, "yes");
    recorder.done();
}

#[test]
fn end_of_one_process_ends_both_connections() {
    let folder = folder();
    let out = path(&folder, "recording");
    let (recorder, mut source, mut destination) = pair(&out);
    source.write_all(b"hello").expect("sent");
    assert_eq!(read(&mut destination, 5), b"hello");
    destination.write_all(b"never read").expect("sent");
    // Unread bytes make it a reset.
    while source.peek(&mut [0; 16]).expect("arrived") < 10 {}
    drop(source);
    let mut rest = Vec::new();
    // Either is the end of a connection.
    let _ = destination.read_to_end(&mut rest);
    assert_eq!(rest, b"");
    drop(destination);
    recorder.done();
    let ended = run(["inspect".as_ref(), out.as_os_str()]);
    assert!(ended.stdout.contains("broken: "), "{ended:?}");
}

#[test]
fn first_interrupt_ends_the_recording_and_not_the_migration() {
    let folder = folder();
    let out = path(&folder, "recording");
    let (recorder, mut source, mut destination) = pair(&out);
    // Bytes are recorded after they were passed on, and before the next ones are: those of the second may be missing.
    for bytes in [b"one", b"two"] {
        source.write_all(bytes).expect("sent");
        assert_eq!(read(&mut destination, 3), bytes);
    }
    recorder.signal(Signal::INT);
    assert!(recorder.next_line().contains("the migration continues over 1 connections"));
    source.write_all(b"three").expect("sent");
    assert_eq!(read(&mut destination, 5), b"three");
    drop(source);
    drop(destination);
    assert_eq!(recorder.end().code, Some(130));
    let ended = run(["inspect".as_ref(), out.as_os_str()]);
    assert!(ended.stdout.contains("before the migration: it was interrupted"), "{ended:?}");
    assert!([" 3 B ", " 6 B "].iter().any(|bytes| ended.stdout.contains(bytes)), "{ended:?}");
}

#[test]
fn target_that_does_not_listen_ends_the_connection_of_the_source() {
    let folder = folder();
    let unused = TcpListener::bind("127.0.0.1:0").and_then(|port| port.local_addr()).expect("a port");
    let recorder = record(&[], &format!("tcp:{unused}"), &path(&folder, "recording"));
    let address = recorder.listening();
    let mut source = TcpStream::connect(address.trim_start_matches("tcp:")).expect("connected");
    let mut rest = Vec::new();
    let _ = source.read_to_end(&mut rest);
    recorder.end().assert_failed(1, &["cannot pass on the connection"]);
}
