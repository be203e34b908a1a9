//! `multifd send`, and its results.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    os::unix::fs::FileExt,
    path::Path,
    time::{Duration, Instant},
};

use multifd::ram::BlockIndex;
use multifd_testkit::{
    certificates::write_both,
    qemu::{Error, PATIENCE, Qemu, Vm},
};
use qemu_stream::mapped_ram::MappedRamFile;
use rustix::process::Signal;
use serde_json::json;
use tempfile::TempDir;

use crate::kit::{
    Program, as_stdin, assert_left, captured, feed, folder, machine, multifd, path, run, stored_memory,
};

const LOCAL: &str = "tcp:127.0.0.1:0";
const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(8);

#[test]
fn progress_and_report_go_to_standard_error() {
    let folder = folder();
    let (from, file) = (captured(&folder, 4 * MIB), path(&folder, "machine"));
    let (receive, address) = Program::receive(&[], LOCAL, &file);
    let ended = feed(&["--max-bandwidth", "2M"], &from, &address).done();
    receive.done();
    assert!(ended.stdout.is_empty(), "{ended:?}");
    let first = ended.stderr.lines().find(|line| !line.contains("has no UUID")).unwrap_or_default();
    assert!(first.contains("Z send: ") && first.contains(" %, pass 1, "), "{ended:?}");
    let last = format!("sent {} to {address}", from.display());
    assert!(ended.stderr.contains(&last) && ended.stderr.contains("channel 1"), "{ended:?}");
}

#[test]
fn max_bandwidth_is_honoured() {
    let folder = folder();
    let from = captured(&folder, 4 * MIB);
    let (receive, address) = Program::receive(&[], LOCAL, &path(&folder, "machine"));
    let start = Instant::now();
    let sent = feed(&["--json", "--max-bandwidth", "2M"], &from, &address).done().json();
    let took = start.elapsed();
    receive.done();
    assert!(took > Duration::from_millis(1500) && took < Duration::from_secs(6), "{took:?}: {sent}");
}

#[test]
fn file_that_is_missing_is_an_error() {
    let folder = folder();
    let file = path(&folder, "missing");
    let ended = run([Path::new("send"), &file, Path::new("tcp:127.0.0.1:1")]);
    ended.assert_failed(1, &["cannot read", &file.display().to_string(), "because: "]);
}

#[test]
fn file_that_is_something_else_is_an_error() {
    let folder = folder();
    let file = path(&folder, "something");
    let long = "# something else\n".repeat(1000);
    for contents in ["", "Q", "QEVM", "QEVM\0\0\0\x03", "QEVM\0\0\0\x02\x07", &long] {
        fs::write(&file, contents).unwrap();
        let ended = run([Path::new("send"), &file, Path::new("tcp:127.0.0.1:1")]);
        ended.assert_failed(1, &["cannot read", &file.display().to_string(), "because: "]);
    }
    let ended = run([Path::new("send"), folder.path(), Path::new("tcp:127.0.0.1:1")]);
    ended.assert_failed(1, &["cannot read", "because: "]);
}

#[test]
fn file_that_is_cut_is_an_error_wherever_it_is_cut() {
    let folder = folder();
    let file = captured(&folder, MIB);
    let whole = fs::metadata(&file).unwrap().len();
    let open = fs::OpenOptions::new().write(true).open(&file).unwrap();
    for length in [whole - 1, whole - 200, 2 * MIB - 1, MIB, 200, 100, 20] {
        open.set_len(length).unwrap();
        let ended = run([Path::new("send"), &file, Path::new("tcp:127.0.0.1:1")]);
        ended.assert_failed(1, &["cannot read", &file.display().to_string(), "because: "]);
    }
}

#[test]
fn destination_that_is_not_there_is_an_error() {
    let folder = folder();
    let file = captured(&folder, MIB);
    // A port that was free a moment ago.
    let address = format!("tcp:{}", TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
    let ended = feed(&["--json"], &file, &address).end_within(SOON);
    ended.assert_failed(1, &[&format!("connect to {address}"), "because: "]);
    assert_eq!(ended.json()["status"], json!("failed"));
    let address = format!("unix:{}", path(&folder, "socket").display());
    let ended = feed(&[], &file, &address).end_within(SOON);
    ended.assert_failed(1, &[&format!("connect to {address}"), "because: "]);
}

#[test]
fn interrupt_in_the_middle_ends_both() {
    let folder = folder();
    let (from, file) = (captured(&folder, 64 * MIB), path(&folder, "machine"));
    let (receive, address) = Program::receive(&[], LOCAL, &file);
    let sending = feed(&["--max-bandwidth", "2M"], &from, &address);
    sending.next_line();
    sending.signal(Signal::INT);
    sending.end_within(SOON).assert_failed(130, &["interrupted"]);
    receive.end_within(SOON).assert_failed(1, &["because: "]);
    assert_left(&folder, &["captured"]);
}

/// Regression: pages were read from the file's mapping to detect zeros, to compress and to encrypt. If the file had
/// been truncated by then, a signal killed the program without a message. A send directly from the mapping failed with
/// a bad address.
fn cut_in_the_middle(receive: &[&str], send: &[&str]) {
    for length in [2 * MIB, 2 * MIB + 100] {
        cut_to(length, receive, send);
    }
}

fn cut_to(length: u64, receive: &[&str], send: &[&str]) {
    let folder = folder();
    let (from, file) = (captured(&folder, 64 * MIB), path(&folder, "machine"));
    let (receive, address) = Program::receive(receive, LOCAL, &file);
    // Counters compress well: 64 MiB become little. It must be far from its end when the file is truncated.
    let sending = feed(&[&["--max-bandwidth", "1M"], send].concat(), &from, &address);
    sending.next_line();
    fs::File::options().write(true).open(&from).unwrap().set_len(length).unwrap();
    let told = [&format!("the migration of {} to {address} failed", from.display()), READ, "made shorter"];
    sending.end_within(PATIENCE).assert_failed(1, &told);
    receive.end_within(SOON).assert_failed(1, &["because: "]);
    assert_left(&folder, &["captured"]);
}

#[test]
fn file_that_is_cut_in_the_middle_is_an_error() {
    cut_in_the_middle(&[], &["--multifd-channels", "2"]);
}

#[test]
fn file_that_is_cut_in_the_middle_is_an_error_without_channels() {
    cut_in_the_middle(&[], &["--multifd-channels", "0"]);
}

#[test]
fn file_that_is_cut_in_the_middle_is_an_error_with_packed_pages() {
    cut_in_the_middle(&[], &["--multifd-compression", "zlib", "--multifd-zlib-level", "0"]);
}

#[test]
fn file_that_is_cut_in_the_middle_is_an_error_with_encrypted_pages() {
    let tls = folder();
    write_both(tls.path()).unwrap();
    let creds = tls.path().to_str().unwrap();
    let send = ["--tls-creds", creds, "--tls-hostname", "localhost"];
    cut_in_the_middle(&["--tls-creds", creds], &send);
    cut_in_the_middle(&["--tls-creds", creds], &[&send[..], &["--direct-io"]].concat());
}

#[test]
fn file_that_is_cut_in_the_middle_is_an_error_past_the_page_cache() {
    cut_in_the_middle(&[], &["--direct-io"]);
    cut_in_the_middle(&[], &["--direct-io", "--multifd-channels", "0"]);
    cut_in_the_middle(&[], &["--direct-io", "--multifd-compression", "zlib", "--multifd-zlib-level", "0"]);
}

const READ: &str = "read block \"pc.ram\" at offset 0x";

/// Regression: a mapping reads as zeros from the end of the file to the end of the page. If that page was the last one,
/// nothing failed, and a broken machine was reported as sent.
fn changed_in_the_middle(change: impl Fn(&fs::File, u64)) {
    for options in [&[][..], &["--multifd-channels", "0"]] {
        let folder = folder();
        let (from, file) = (captured(&folder, 4 * MIB), path(&folder, "machine"));
        let (receive, address) = Program::receive(&[], LOCAL, &file);
        let sending = feed(&[&["--max-bandwidth", "2M"], options].concat(), &from, &address);
        sending.next_line();
        let open = fs::File::options().read(true).write(true).open(&from).unwrap();
        let place = *MappedRamFile::open(open.try_clone().unwrap(), 0).unwrap().place(BlockIndex(0)).unwrap();
        change(&open, place.pages_offset + place.used_length);
        let told = ["the migration of ", &from.display().to_string(), "because: "];
        let ended = sending.end_within(PATIENCE);
        ended.assert_failed(1, &told);
        assert!(
            ended.stderr.contains("changed while it was sent") || ended.stderr.contains(READ),
            "{ended:?}"
        );
        receive.end_within(SOON).assert_failed(1, &["because: "]);
        assert_left(&folder, &["captured"]);
    }
}

#[test]
fn file_that_is_cut_inside_its_last_page_is_an_error() {
    changed_in_the_middle(|file, end| file.set_len(end - 100).unwrap());
}

/// As `cp -p`, `rsync -t` and `touch -r` do: the time of the last modification is as before.
#[test]
fn file_that_is_written_to_with_its_old_time_is_an_error() {
    changed_in_the_middle(|file, end| {
        let before = file.metadata().unwrap().modified().unwrap();
        file.write_all_at(b"x", end - 100).unwrap();
        file.set_modified(before).unwrap();
    });
}

#[test]
fn file_that_is_written_to_meanwhile_is_an_error() {
    changed_in_the_middle(|file, end| file.write_all_at(b"x", end - 100).unwrap());
}

/// A destination that accepts connections and reads nothing.
#[test]
fn interrupt_ends_it_when_the_destination_stands_still() {
    let folder = folder();
    let from = captured(&folder, 64 * MIB);
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", silent.local_addr().unwrap());
    let sending = feed(&["--json"], &from, &address);
    let connections: Vec<TcpStream> = (0..3).map(|_| silent.accept().unwrap().0).collect();
    sending.signal(Signal::INT);
    let ended = sending.end_within(SOON);
    ended.assert_failed(130, &["interrupted"]);
    assert_eq!(ended.json()["status"], json!("cancelled"));
    drop(connections);
}

#[test]
fn destination_that_dies_is_an_error() {
    let folder = folder();
    let (from, file) = (captured(&folder, 64 * MIB), path(&folder, "machine"));
    let (receive, address) = Program::receive(&[], LOCAL, &file);
    let sending = feed(&["--max-bandwidth", "2M"], &from, &address);
    sending.next_line();
    receive.signal(Signal::KILL);
    sending.end_within(SOON).assert_failed(1, &["multifd: ", "because: "]);
}

/// A machine that waits with multifd on over `expected` channels is sent one of `channels`.
fn another_number(qemu: &Qemu, expected: u8, channels: u8) -> Result<(Program, Vm, TempDir), Error> {
    let folder = folder();
    let from = captured(&folder, 32 * MIB);
    let mut to = machine(qemu, "pc-q35-7.2").incoming().start()?;
    to.set_multifd_channels(expected)?;
    let address = to.migrate_incoming(LOCAL)?;
    Ok((feed(&["--multifd-channels", &channels.to_string()], &from, &address), to, folder))
}

fn too_many(qemu: &Qemu) -> Result<(), Error> {
    for (expected, channels) in [(2, 4), (0, 2)] {
        let (sending, _to, _folder) = another_number(qemu, expected, channels)?;
        sending.end_within(SOON).assert_failed(1, &["multifd-channels", "because: "]);
    }
    Ok(())
}

#[test]
fn more_channels_than_the_destination_has_are_an_error_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    too_many(&qemu).unwrap();
}

#[test]
fn more_channels_than_the_destination_has_are_an_error_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    too_many(&qemu).unwrap();
}

/// The destination waits for the others silently, and so do we until a user ends it.
#[test]
fn interrupt_ends_it_when_the_destination_waits_for_more_channels() {
    let Some(qemu) = Qemu::v10_0() else { return };
    for (expected, channels) in [(4, 2), (2, 0)] {
        let (sending, _to, _folder) = another_number(&qemu, expected, channels).unwrap();
        sending.next_line();
        sending.signal(Signal::INT);
        sending.end_within(SOON).assert_failed(130, &["interrupted"]);
    }
}

#[test]
fn connection_without_channels_is_inherited() {
    let folder = folder();
    let (from, file) = (captured(&folder, MIB), path(&folder, "machine"));
    let (receive, address) = Program::receive(&[], LOCAL, &file);
    let connection = TcpStream::connect(address.strip_prefix("tcp:").unwrap()).unwrap();
    let mut command = multifd(["send", "--multifd-channels", "0"]);
    let sending = Program::start(command.arg(&from).arg("fd:0").stdin(as_stdin(connection)));
    drop(command);
    sending.done();
    receive.done();
    assert_eq!(stored_memory(&file), stored_memory(&from));
}

#[test]
fn destination_of_another_machine_type_is_an_error() {
    fn refuses(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let from = captured(&folder, MIB);
        let mut to = machine(qemu, "pc-q35-7.2").incoming().start()?;
        to.set_multifd_channels(2)?;
        let address = to.migrate_incoming(LOCAL)?;
        let ended = feed(&[], &from, &address).end_within(SOON);
        ended.assert_failed(1, &["multifd: ", "because: "]);
        to.wait_end(PATIENCE).map(drop)
    }
    for qemu in [Qemu::v7_2(), Qemu::v10_0()] {
        let Some(qemu) = qemu else { return };
        refuses(&qemu).unwrap();
    }
}

#[test]
fn command_that_fails_fails_the_migration_and_is_named() {
    let folder = folder();
    let from = captured(&folder, 4 * MIB);
    for (command, status) in [
        ("exec:exit 3", 3),
        ("exec:cat >/dev/null; exit 4", 4),
        ("exec:/no/such/program 2>/dev/null", 127),
        ("exec:head -c 100 >/dev/null; exit 5", 5),
    ] {
        let ended = feed(&["--multifd-channels", "0"], &from, command).end();
        ended.assert_failed(1, &[&format!("the command ended with exit status {status}")]);
    }
}

#[test]
fn interrupt_ends_the_command() {
    let folder = folder();
    let (from, pid) = (captured(&folder, 16 * MIB), path(&folder, "pid"));
    let command = format!("exec:echo $$ >{}; exec sleep 600", pid.display());
    let program = feed(&["--multifd-channels", "0"], &from, &command);
    let start = Instant::now();
    let process = loop {
        let number = fs::read_to_string(&pid).unwrap_or_default();
        if let Some(number) = number.strip_suffix('\n') {
            break format!("/proc/{number}");
        }
        assert!(start.elapsed() < PATIENCE, "the command starts");
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(fs::exists(&process).unwrap());
    program.signal(Signal::INT);
    assert_eq!(program.end_within(SOON).code, Some(130));
    assert!(!fs::exists(&process).unwrap());
}
