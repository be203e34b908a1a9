//! Service managers: sockets that they pass, and what they are told. The protocols are systemd's; systemd itself is not needed.

use std::{
    fs,
    io::ErrorKind,
    net::TcpListener,
    os::{fd::AsRawFd, unix::net::UnixDatagram},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use multifd_testkit::{lacks, qemu::PATIENCE};
use rustix::{
    io::{FdFlags, fcntl_setfd},
    process::Signal,
};
use tempfile::TempDir;

use super::many::addresses;
use crate::kit::{Program, as_stdin, assert_left, captured, feed, folder, path, stored_memory};

/// A listening socket, and its address.
fn socket() -> (TcpListener, String) {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", socket.local_addr().unwrap());
    (socket, address)
}

/// The program with these sockets as descriptors 3, 4 and so on, as systemd starts it.
fn activated(sockets: &[TcpListener], arguments: &[&str]) -> Command {
    let mut redirections = String::new();
    for (socket, at) in sockets.iter().zip(3..) {
        // The shell inherits it under its number here. Descriptors of tests are greater than those that systemd passes.
        let high = rustix::io::fcntl_dupfd_cloexec(socket, 64).unwrap();
        fcntl_setfd(&high, FdFlags::empty()).unwrap();
        redirections += &format!("{at}<&{0} {0}<&- ", high.as_raw_fd());
        // It stays open until the test's process ends: the program has its own.
        std::mem::forget(high);
    }
    let script =
        format!("exec {redirections}; export LISTEN_PID=$$ LISTEN_FDS={}; exec \"$0\" \"$@\"", sockets.len());
    let mut command = Command::new("bash");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_multifd")]).args(arguments).env_remove("MULTIFD_LOG");
    command.stdin(std::process::Stdio::null());
    command
}

#[test]
fn sockets_that_were_passed_are_listened_at_by_a_job_each() {
    let (from, dir) = (folder(), folder());
    let file = captured(&from, 1 << 20);
    let (sockets, at): (Vec<_>, Vec<_>) = [socket(), socket()].into_iter().unzip();
    let dir_text = dir.path().to_str().unwrap();
    let arguments = ["receive", "--dir", dir_text, "--name", "{number}", "systemd"];
    let receive = Program::start(&mut activated(&sockets, &arguments));
    assert_eq!(addresses(&receive, 2), ["fd:3", "fd:4"]);
    for address in at.iter().rev().chain(&at) {
        feed(&[], &file, address).done();
    }
    receive.signal(Signal::TERM);
    receive.done();
    assert_left(&dir, &["1", "2", "3", "4"]);
    assert_eq!(stored_memory(&path(&dir, "4")), stored_memory(&file));
    drop(sockets);
}

#[test]
fn one_socket_that_was_passed_is_enough_for_one_machine() {
    let (from, dir) = (folder(), folder());
    let (file, to) = (captured(&from, 1 << 20), path(&dir, "machine"));
    let (socket, address) = socket();
    let arguments = ["receive", "systemd", to.to_str().unwrap()];
    let receive = Program::start(&mut activated(&[socket], &arguments));
    assert_eq!(receive.listening(), "systemd");
    feed(&[], &file, &address).done();
    receive.done();
    assert_eq!(stored_memory(&to), stored_memory(&file));
}

#[test]
fn sockets_that_do_not_fit_are_refused_with_the_reason() {
    let dir = folder();
    let to = path(&dir, "machine");
    let ended = crate::kit::run(["receive", "systemd", to.to_str().unwrap()]);
    ended.assert_failed(1, &["cannot listen at systemd", "no sockets were passed"]);
    let sockets = [socket().0, socket().0];
    let ended = Program::start(&mut activated(&sockets, &["receive", "systemd", to.to_str().unwrap()])).end();
    ended.assert_failed(2, &["2 sockets were passed, expected one; more need --dir"]);
    let arguments = ["receive", "--dir", dir.path().to_str().unwrap(), "--jobs", "3", "systemd"];
    let ended = Program::start(&mut activated(&sockets, &arguments)).end();
    ended.assert_failed(2, &["2 sockets were passed; leave --jobs out"]);
    // Sockets for another process, as a child of a service inherits them.
    let mut command = crate::kit::multifd(["receive", "systemd", to.to_str().unwrap()]);
    let command = command.env("LISTEN_PID", "1").env("LISTEN_FDS", "1").stdin(as_stdin(socket().0));
    Program::start(command).end().assert_failed(1, &["no sockets were passed"]);
    assert_left(&dir, &[]);
}

/// Reads datagrams until one contains the text.
fn wait_told(manager: &UnixDatagram, told: &mut Vec<String>, text: &str) {
    manager.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let start = Instant::now();
    let mut bytes = [0; 4096];
    while !told.iter().any(|line| line.contains(text)) {
        assert!(start.elapsed() < PATIENCE, "expected {text:?}, found {told:?}");
        match manager.recv(&mut bytes) {
            Ok(length) => told.push(String::from_utf8(bytes[..length].to_vec()).unwrap()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn service_manager_is_told_what_happens() {
    let (from, dir, run) = (folder(), folder(), folder());
    let file = captured(&from, 1 << 20);
    let manager = UnixDatagram::bind(path(&run, "notify")).unwrap();
    let mut command = crate::kit::multifd(["receive", "--dir"]);
    command
        .arg(dir.path())
        .args(["--jobs", "2", "tcp:127.0.0.1:0"])
        .env("NOTIFY_SOCKET", path(&run, "notify"));
    let receive = Program::start(&mut command);
    let mut told = Vec::new();
    wait_told(&manager, &mut told, "READY=1");
    // The message comes after it listens.
    let address = addresses(&receive, 2).remove(0);
    wait_told(&manager, &mut told, "STATUS=0 of 2 jobs receive a machine; 0 received, 0 failed");
    feed(&[], &file, &address).done();
    wait_told(&manager, &mut told, "STATUS=1 of 2 jobs receive a machine; 0 received, 0 failed");
    wait_told(&manager, &mut told, "STATUS=0 of 2 jobs receive a machine; 1 received, 0 failed");
    assert!(!told.concat().contains("STOPPING"), "{told:?}");
    receive.signal(Signal::TERM);
    wait_told(&manager, &mut told, "STOPPING=1");
    receive.done();
}

#[test]
fn service_manager_that_is_gone_does_not_end_the_migration() {
    let (from, dir) = (folder(), folder());
    let (file, to) = (captured(&from, 1 << 20), path(&dir, "machine"));
    let mut command = crate::kit::multifd(["receive", "tcp:127.0.0.1:0"]);
    let receive = Program::start(command.arg(&to).env("NOTIFY_SOCKET", path(&dir, "gone")));
    feed(&[], &file, &receive.listening()).done();
    let ended = receive.done();
    assert!(ended.stderr.contains("the service manager cannot be informed"), "{ended:?}");
}

/// The units of the package, with the program of this build.
fn units(into: &TempDir) {
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../systemd");
    for unit in fs::read_dir(units).expect("the units") {
        let unit = unit.unwrap();
        let text = fs::read_to_string(unit.path()).unwrap();
        let text = text.replace("/usr/bin/multifd", env!("CARGO_BIN_EXE_multifd"));
        // A template can only be verified as an instance.
        let name = unit.file_name().into_string().unwrap().replace('@', "@4444");
        fs::write(path(into, &name), text).unwrap();
    }
}

#[test]
fn units_are_valid() {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        return lacks("systemd-analyze is not installed: the units are not verified");
    }
    let folder = folder();
    units(&folder);
    let names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|unit| unit.unwrap().path()).collect();
    assert_eq!(names.len(), 4, "{names:?}");
    let mut command = Command::new("systemd-analyze");
    // The manual pages are not installed here. Units of the system that are broken are not ours.
    command.args(["verify", "--man=no"]).args(&names);
    command.env("SYSTEMD_UNIT_PATH", format!("{}:", folder.path().display()));
    let ended = command.output().expect("systemd-analyze");
    let text = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success() && !text.contains("multifd-"), "{text}");
}

/// The command line of the service, with a socket as its socket unit passes it.
#[test]
fn service_of_the_package_receives() {
    let (from, dir, all) = (folder(), folder(), folder());
    units(&all);
    let service = fs::read_to_string(path(&all, "multifd-receive@4444.service")).unwrap();
    let line = service.lines().find_map(|line| line.strip_prefix("ExecStart=")).expect("a command");
    let line = line.replace("/var/lib/multifd", dir.path().to_str().unwrap());
    let words: Vec<&str> = line.split(' ').collect();
    assert_eq!(words[0], env!("CARGO_BIN_EXE_multifd"));
    let (socket, address) = socket();
    let receive = Program::start(&mut activated(&[socket], &words[1..]));
    assert_eq!(addresses(&receive, 1), ["fd:3"]);
    feed(&["--uuid", "00112233-4455-6677-8899-aabbccddeeff"], &captured(&from, 1 << 20), &address).done();
    receive.signal(Signal::TERM);
    receive.done();
    let names: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let [name] = &names[..] else { panic!("one file: {names:?}") };
    assert!(name.starts_with("00112233-4455-6677-8899-aabbccddeeff-20") && name.ends_with("Z.ram"), "{name}");
}
