//! The name of a file that is being written is reserved, and a process that is killed leaves nothing half-made.

use std::{fs, os::unix::fs::symlink, path::PathBuf, time::Duration};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::kit::{Program, assert_left, captured, feed, folder, multifd, path, run, stored_memory};

const LOCAL: &str = "tcp:127.0.0.1:0";
const MIB: u64 = 1 << 20;
/// The time limit of an error that does not depend on a peer.
const SOON: Duration = Duration::from_secs(8);

/// `receive` in the middle of a migration: a source without multifd, which sends slowly.
fn in_the_middle(folder: &TempDir, options: &[&str]) -> (Program, Program, PathBuf) {
    let (from, file) = (captured(folder, 64 * MIB), path(folder, "machine"));
    let (receive, address) = Program::receive(&[options, &["--progress=plain=100ms"]].concat(), LOCAL, &file);
    let source = feed(&["-q", "--max-bandwidth", "1M"], &from, &address);
    (receive, source, file)
}

#[test]
fn second_process_that_would_write_the_same_file_fails_at_once() {
    let folder = folder();
    let link = path(&folder, "link");
    symlink(folder.path(), &link).unwrap();
    let file = path(&folder, "machine");
    let (first, _) = Program::receive(&[], LOCAL, &file);
    for (options, same) in [(&[][..], &file), (&["--force"], &link.join("machine"))] {
        let words = [&["receive"], options, &[LOCAL, same.to_str().unwrap()]].concat();
        let told = ["cannot create", &format!("process {} is writing", first.pid().as_raw_pid())];
        run(words).assert_failed(1, &told);
    }
    let (other, _) = Program::receive(&[], LOCAL, &path(&folder, "machine2"));
    for program in [first, other] {
        program.signal(Signal::INT);
        program.end_within(SOON).assert_failed(130, &["interrupted"]);
    }
    assert_left(&folder, &["link"]);
}

/// Sends these signals to `receive` in the middle of a migration. A process that ends by the first one gets the others in vain.
#[track_caller]
fn assert_leaves_nothing(signals: &[Signal]) {
    let folder = folder();
    let (receive, source, _) = in_the_middle(&folder, &[]);
    receive.next_line();
    signals.iter().for_each(|signal| receive.signal(*signal));
    receive.end_within(SOON);
    source.end_within(SOON);
    assert_left(&folder, &["captured"]);
}

#[test]
fn killed_receive_leaves_nothing() {
    assert_leaves_nothing(&[Signal::KILL]);
}

#[test]
fn second_interrupt_leaves_nothing() {
    assert_leaves_nothing(&[Signal::INT, Signal::INT]);
}

/// A file that replaces another has a temporary name, which the next process removes.
#[test]
fn what_a_killed_receive_leaves_of_a_replacement_is_removed_by_the_next() {
    let folder = folder();
    fs::write(path(&folder, "machine"), "old").unwrap();
    let (receive, source, file) = in_the_middle(&folder, &["--force"]);
    receive.next_line();
    receive.signal(Signal::KILL);
    receive.end_within(SOON);
    source.end_within(SOON);
    assert_eq!(fs::read(&file).unwrap(), b"old");
    assert_eq!(
        fs::read_dir(folder.path()).unwrap().count(),
        3,
        "the old file, the source's, and a temporary one"
    );
    let from = path(&folder, "captured");
    let receive = Program::start(multifd(["receive", "--force", LOCAL]).arg(&file));
    let line = receive.next_line();
    assert!(line.contains("which a killed process has left"), "{line}");
    feed(&["-q"], &from, &receive.listening()).done();
    receive.done();
    assert!(stored_memory(&file) == stored_memory(&from));
    assert_left(&folder, &["captured", "machine"]);
}
