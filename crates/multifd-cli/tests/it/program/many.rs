//! `multifd receive --dir`: one machine after another, several at a time.

use std::{
    fs,
    io::Write,
    net::TcpStream,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::Path,
    time::Duration,
};

use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::kit::{Ended, Program, assert_left, captured, feed, folder, multifd, path, run, stored_memory};

const LOCAL: &str = "tcp:127.0.0.1:0";
const MIB: u64 = 1 << 20;
const ONE: &str = "11111111-1111-1111-1111-111111111111";
const TWO: &str = "22222222-2222-2222-2222-222222222222";

/// The program, and the address of each job.
fn receive(options: &[&str], dir: &TempDir, listen: &str, jobs: usize) -> (Program, Vec<String>) {
    let mut command = multifd(["receive", "--dir"]);
    command.arg(dir.path()).args(["--jobs", &jobs.to_string()]).args(options).arg(listen);
    let program = Program::start(&mut command);
    let addresses = addresses(&program, jobs);
    (program, addresses)
}

/// What the first lines say.
pub(super) fn addresses(program: &Program, jobs: usize) -> Vec<String> {
    let address = |job| {
        let line = program.next_line();
        let address = line.strip_prefix(&format!("job {job}: listening on "));
        address.unwrap_or_else(|| panic!("the address of job {job}, found {line:?}")).to_owned()
    };
    (1..=jobs).map(address).collect()
}

/// Reads lines until one contains all of these texts.
fn wait_line(program: &Program, words: &[&str]) -> String {
    loop {
        let line = program.next_line();
        if words.iter().all(|word| line.contains(word)) {
            return line;
        }
    }
}

fn end(program: Program) -> Ended {
    program.signal(Signal::TERM);
    program.done()
}

#[test]
fn machines_arrive_at_once_and_one_after_another_each_into_a_file_of_its_own() {
    let (from, dir) = (folder(), folder());
    let file = captured(&from, 8 * MIB);
    let (receive, addresses) = receive(&["--name", "{uuid}.ram"], &dir, LOCAL, 3);
    for _ in 0..2 {
        let sends: Vec<_> = addresses
            .iter()
            .zip([&["--uuid", ONE][..], &["--uuid", TWO], &[]])
            .map(|(address, options)| feed(options, &file, address))
            .collect();
        for send in sends {
            send.done();
        }
    }
    let ended = end(receive);
    let names = [ONE, TWO, "no-uuid"].map(|name| [format!("{name}-2.ram"), format!("{name}.ram")]).concat();
    assert_left(&dir, &names.iter().map(String::as_str).collect::<Vec<_>>());
    for name in &names {
        assert_eq!(stored_memory(&path(&dir, name)), stored_memory(&file), "{name}");
        assert_eq!(fs::metadata(path(&dir, name)).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(ended.stderr.contains(&format!("{name}: 8.00 MiB of RAM in")), "{ended:?}");
    }
    for job in 1..=3 {
        let received = format!("job {job}: received {}", dir.path().display());
        assert_eq!(ended.stderr.matches(&received).count(), 2, "{ended:?}");
    }
}

#[test]
fn machine_that_fails_ends_no_job_and_leaves_no_file() {
    let (from, dir) = (folder(), folder());
    let file = captured(&from, MIB);
    let (receive, addresses) = receive(&["--name", "{name}.ram"], &dir, LOCAL, 1);
    let mut main = TcpStream::connect(addresses[0].strip_prefix("tcp:").unwrap()).unwrap();
    main.write_all(b"QEVM\x00\x00\x00\x02\x07").unwrap();
    wait_line(
        &receive,
        &["job 1: failed (1): the migration from ", "failed: the stream from the source is invalid"],
    );
    wait_line(&receive, &["job 1:   because: ", "version"]);
    drop(main);
    // A channel without a main, a stranger, and a source that is killed.
    drop(TcpStream::connect(addresses[0].strip_prefix("tcp:").unwrap()).unwrap());
    let killed = feed(&["--max-bandwidth", "100K"], &file, &addresses[0]);
    killed.next_line();
    drop(killed);
    wait_line(&receive, &["job 1: failed (1)"]);
    feed(&[], &file, &addresses[0]).done();
    end(receive);
    assert_left(&dir, &["machine-3.ram"]);
    assert_eq!(stored_memory(&path(&dir, "machine-3.ram")), stored_memory(&file));
}

#[test]
fn first_signal_lets_what_runs_complete_and_takes_nothing_new() {
    let (from, dir) = (folder(), folder());
    let file = captured(&from, 8 * MIB);
    let (receive, addresses) = receive(&["--name", "{number}", "--progress", "plain=50ms"], &dir, LOCAL, 2);
    let slow = feed(&["--max-bandwidth", "4M"], &file, &addresses[0]);
    wait_line(&receive, &["job 1: ", "the guest has 8.00 MiB"]);
    receive.signal(Signal::INT);
    // The address of the other job closes.
    let other = addresses[1].strip_prefix("tcp:").unwrap();
    while TcpStream::connect(other).is_ok() {
        std::thread::sleep(Duration::from_millis(10));
    }
    slow.done();
    receive.done();
    assert_left(&dir, &["1"]);
    assert_eq!(stored_memory(&path(&dir, "1")), stored_memory(&file));
}

#[test]
fn second_signal_cancels_what_runs_and_the_source_keeps_its_guest() {
    let (from, dir) = (folder(), folder());
    let file = captured(&from, 8 * MIB);
    let (receive, addresses) = receive(&["--progress", "plain=50ms"], &dir, LOCAL, 2);
    let slow = feed(&["--max-bandwidth", "100K"], &file, &addresses[1]);
    wait_line(&receive, &["job 2: ", "the guest has 8.00 MiB"]);
    receive.signal(Signal::TERM);
    receive.signal(Signal::INT);
    let ended = receive.end();
    ended.assert_failed(130, &["job 2: failed (130): interrupted", "multifd: interrupted"]);
    slow.end().assert_failed(1, &[]);
    assert_left(&dir, &[]);
}

#[test]
fn programs_get_an_object_for_each_machine_with_its_job_and_file() {
    let (from, dir) = (folder(), folder());
    let file = captured(&from, MIB);
    let (receive, addresses) = receive(&["--json", "--name", "{number}.ram"], &dir, LOCAL, 2);
    feed(&[], &file, &addresses[1]).done();
    let mut main = TcpStream::connect(addresses[0].strip_prefix("tcp:").unwrap()).unwrap();
    main.write_all(b"QEVM\x00\x00\x00\x02\x07").unwrap();
    wait_line(&receive, &["job 1: failed (1)"]);
    let ended = end(receive);
    let objects: Vec<Value> =
        ended.stdout.lines().map(|line| serde_json::from_str(line).expect("an object")).collect();
    let [received, failed] = &objects[..] else { panic!("two objects: {ended:?}") };
    let at = path(&dir, "1.ram").display().to_string();
    assert_eq!((&received["job"], &received["file"]), (&json!(2), &json!(at)), "{received}");
    assert_eq!(received["status"], json!("completed"));
    assert_eq!((&failed["job"], &failed["status"]), (&json!(1), &json!("failed")), "{failed}");
}

/// What the library logs comes from threads of its own.
#[test]
fn warnings_of_the_libraries_name_their_job() {
    let dir = folder();
    let (receive, addresses) = receive(&[], &dir, LOCAL, 2);
    let mut browser = TcpStream::connect(addresses[1].strip_prefix("tcp:").unwrap()).unwrap();
    browser.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    drop(browser);
    wait_line(&receive, &["WARN", "receive{job=2}", "neither main nor a channel"]);
    end(receive);
    assert_left(&dir, &[]);
}

#[test]
fn unix_sockets_have_the_number_of_their_job_and_are_removed() {
    let (from, dir, sockets) = (folder(), folder(), folder());
    let file = captured(&from, MIB);
    let listen = format!("unix:{}", path(&sockets, "{job}.sock").display());
    let (receive, addresses) = receive(&["--name", "{number}"], &dir, &listen, 2);
    assert_left(&sockets, &["1.sock", "2.sock"]);
    for address in &addresses {
        feed(&[], &file, address).done();
    }
    end(receive);
    assert_left(&sockets, &[]);
    assert_left(&dir, &["1", "2"]);
}

#[test]
fn name_that_exists_is_never_replaced() {
    let (from, dir) = (folder(), folder());
    let file = captured(&from, MIB);
    fs::write(path(&dir, "vm.ram"), "precious").unwrap();
    let (receive, addresses) = receive(&["--name", "vm.ram"], &dir, LOCAL, 1);
    feed(&[], &file, &addresses[0]).done();
    end(receive);
    assert_left(&dir, &["vm-2.ram", "vm.ram"]);
    assert_eq!(fs::read(path(&dir, "vm.ram")).unwrap(), b"precious");
    assert_eq!(stored_memory(&path(&dir, "vm-2.ram")), stored_memory(&file));
}

#[test]
fn folder_that_disappears_fails_its_machine_alone() {
    let (from, dir) = (folder(), folder());
    let file = captured(&from, MIB);
    let inner = path(&dir, "inner");
    fs::create_dir(&inner).unwrap();
    let mut command = multifd(["receive", "--name", "{number}", "--dir"]);
    let receive = Program::start(command.arg(&inner).arg(LOCAL));
    let address = addresses(&receive, 1).remove(0);
    fs::remove_dir(&inner).unwrap();
    feed(&[], &file, &address).end().assert_failed(1, &[]);
    wait_line(&receive, &["job 1: failed (1)"]);
    fs::create_dir(&inner).unwrap();
    feed(&[], &file, &address).done();
    end(receive);
    assert_eq!(stored_memory(&inner.join("2")), stored_memory(&file));
}

#[test]
fn combinations_that_cannot_be_are_wrong_usage() {
    let dir = folder();
    let at = dir.path().as_os_str();
    let file = path(&dir, "file");
    let all: [(&[&[u8]], &str); 9] = [
        (&[b"--dir", at.as_bytes(), b"tcp::0", file.as_os_str().as_bytes()], "cannot be used with"),
        (&[b"--dir", at.as_bytes(), b"--force", b"tcp::0"], "cannot be used with"),
        (&[b"--jobs", b"2", b"tcp::0", file.as_os_str().as_bytes()], "--dir <DIR>"),
        (&[b"tcp::0"], "<FILE>"),
        (&[b"--dir", at.as_bytes(), b"--jobs", b"0", b"tcp::0"], "from 1 to 256"),
        (&[b"--dir", at.as_bytes(), b"--jobs", b"2", b"unix:/run/a.sock"], "write {job} into the path"),
        (&[b"--dir", at.as_bytes(), b"exec:true"], "it is one connection"),
        (&[b"--dir", at.as_bytes(), b"-"], "it is one connection"),
        (&[b"--dir", at.as_bytes(), b"--name", b"../{name}", b"tcp::0"], "cannot be the name of a file"),
    ];
    for (words, why) in all {
        let words = words.iter().map(|word| std::ffi::OsStr::from_bytes(word));
        let ended = run([std::ffi::OsStr::new("receive")].into_iter().chain(words));
        ended.assert_failed(2, &[why]);
    }
    let missing = Path::new("/nonexistent");
    let ended = run([Path::new("receive"), Path::new("--dir"), missing, Path::new("tcp::0")]);
    ended.assert_failed(1, &["cannot open folder /nonexistent", "because: "]);
    assert_left(&dir, &[]);
}
