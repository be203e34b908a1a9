//! `multifd receive`: its output, the file, and what it refuses at once.

use std::{
    fs,
    io::Write,
    net::{TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    path::Path,
    time::Duration,
};

use multifd_testkit::{
    bad_source::{On, Script, Shape, Target},
    qemu::{Error, PATIENCE, Qemu},
};
use qemu_stream::mapped_ram::MappedRamFile;
use serde_json::{Value, json};

use crate::kit::{
    Program, as_stdin, assert_left, captured, fast, feed, folder, machine, multifd, multifd_in, path, run,
    source, stored_block, stored_memory,
};

const LOCAL: &str = "tcp:127.0.0.1:0";
const MIB: u64 = 1 << 20;
/// The time limit of an error that does not depend on a peer.
const SOON: Duration = Duration::from_secs(8);

#[test]
fn first_line_says_where_it_listens() {
    let folder = folder();
    let (receive, address) = Program::receive(&[], LOCAL, &path(&folder, "machine"));
    let port: u16 = address.strip_prefix("tcp:127.0.0.1:").expect("its form").parse().expect("a port");
    assert_ne!(port, 0);
    drop(receive);
}

#[test]
fn file_is_equal_and_its_owners_alone() {
    let folder = folder();
    let (from, file) = (captured(&folder, 8 * MIB), path(&folder, "machine"));
    let (receive, address) = Program::receive(&[], LOCAL, &file);
    feed(&[], &from, &address).done();
    let ended = receive.done();
    assert_eq!(stored_memory(&file), stored_memory(&from));
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(ended.stdout.is_empty(), "{ended:?}");
    assert!(ended.stderr.contains(&format!("received {}", file.display())), "{ended:?}");
    assert_left(&folder, &["captured", "machine"]);
}

#[test]
fn quiet_says_nothing_but_where_it_listens() {
    let folder = folder();
    let from = captured(&folder, 8 * MIB);
    let (receive, address) = Program::receive(&["--quiet"], LOCAL, &path(&folder, "machine"));
    let sent = feed(&["--quiet"], &from, &address).done();
    assert_eq!((sent.stdout.as_str(), sent.stderr.as_str()), ("", ""));
    let ended = receive.done();
    assert_eq!((ended.stdout, ended.stderr), (String::new(), format!("listening on {address}\n")));
}

#[test]
fn json_is_one_object_on_one_line_named_as_in_query_migrate() {
    let folder = folder();
    let from = captured(&folder, 8 * MIB);
    let (receive, address) = Program::receive(&["--json"], LOCAL, &path(&folder, "machine"));
    let sent = feed(&["--json", "--multifd-channels", "3"], &from, &address).done().json();
    let ended = receive.done();
    assert_eq!(ended.stderr, format!("listening on {address}\n"));
    let received = ended.json();

    assert_eq!(received["status"], json!("completed"));
    assert!(received["total-time"].is_u64(), "{received}");
    let ram = &received["ram"];
    assert_eq!(ram["total"], json!(8 * MIB));
    assert_eq!(ram["normal"], json!(2048));
    assert_eq!(ram["normal-bytes"], json!(8 * MIB));
    assert_eq!(ram["duplicate"], json!(0));
    assert_eq!(ram["page-size"], json!(4096));
    assert_eq!(ram["remaining"], json!(0));
    assert!(ram["mbps"].is_f64() && ram["pages-per-second"].is_u64(), "{received}");
    // The other end has received what one end has sent.
    assert_eq!(received["channels"], sent["channels"]);
    for field in ["multifd-bytes", "transferred"] {
        assert_eq!(ram[field], sent["ram"][field], "{field}: {received} {sent}");
    }
    let sum = |field: &str| -> u64 {
        let channels = received["channels"].as_array().expect("channels");
        channels.iter().map(|channel| channel[field].as_u64().expect("a number")).sum()
    };
    assert_eq!(json!(sum("bytes")), ram["multifd-bytes"]);
    assert_eq!(sum("pages"), 2048);
    for field in ["downtime", "setup-time", "total-time"] {
        assert!(sent[field].is_u64(), "{field}: {sent}");
    }
}

#[test]
fn existing_file_is_refused_before_anything_is_done() {
    let folder = folder();
    let file = path(&folder, "machine");
    fs::write(&file, "precious").unwrap();
    let ended = run([Path::new("receive"), Path::new(LOCAL), &file]);
    ended.assert_failed(1, &["cannot create", &file.display().to_string(), "because: ", "--force"]);
    assert!(!ended.stderr.contains("listening"), "{ended:?}");
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    assert_left(&folder, &["machine"]);
}

#[test]
fn file_that_appears_meanwhile_is_left_alone() {
    let folder = folder();
    let (from, file) = (captured(&folder, MIB), path(&folder, "machine"));
    let (receive, address) = Program::receive(&[], LOCAL, &file);
    fs::write(&file, "precious").unwrap();
    let sent = feed(&[], &from, &address).end();
    receive.end().assert_failed(1, &[&file.display().to_string()]);
    sent.assert_failed(1, &[]);
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    assert_left(&folder, &["captured", "machine"]);
}

#[test]
fn force_replaces_a_file() {
    let folder = folder();
    let (from, file) = (captured(&folder, MIB), path(&folder, "machine"));
    fs::write(&file, "old").unwrap();
    let (receive, address) = Program::receive(&["--force"], LOCAL, &file);
    feed(&[], &from, &address).done();
    receive.done();
    assert_eq!(stored_memory(&file), stored_memory(&from));
    assert_left(&folder, &["captured", "machine"]);
}

#[test]
fn force_keeps_the_old_file_when_the_migration_fails() {
    let folder = folder();
    let (from, file) = (captured(&folder, 64 * MIB), path(&folder, "machine"));
    fs::write(&file, "old").unwrap();
    let (receive, address) = Program::receive(&["--force"], LOCAL, &file);
    let send = feed(&["--max-bandwidth", "2M"], &from, &address);
    send.next_line();
    drop(send);
    receive.end_within(SOON).assert_failed(1, &["because: "]);
    assert_eq!(fs::read(&file).unwrap(), b"old");
    assert_left(&folder, &["captured", "machine"]);
}

#[test]
fn folder_that_is_missing_is_an_error() {
    let folder = folder();
    let file = folder.path().join("missing/machine");
    let ended = run([Path::new("receive"), Path::new(LOCAL), &file]);
    ended.assert_failed(1, &["cannot create", &file.display().to_string(), "because: "]);
}

#[test]
fn folder_that_may_not_be_written_is_an_error() {
    let folder = folder();
    let file = path(&folder, "machine");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o500)).unwrap();
    // The superuser may write there; nobody may write in this folder.
    let file = if rustix::process::geteuid().is_root() { "/proc/machine".into() } else { file };
    let ended = run([Path::new("receive"), Path::new(LOCAL), &file]);
    ended.assert_failed(1, &["cannot create", &file.display().to_string(), "because: "]);
    assert_left(&folder, &[]);
}

/// Regression: a folder that cannot be opened cannot be synced. This was detected only after the machine had arrived.
#[test]
fn folder_that_may_not_be_read_is_an_error_at_once() {
    let folder = folder();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o300)).unwrap();
    let file = path(&folder, "machine").display().to_string();
    // The superuser may read everything, unless this right is removed.
    let launcher = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"];
    let launcher = if rustix::process::geteuid().is_root() { &launcher[..] } else { &[] };
    let ended = Program::start(&mut multifd_in(launcher, "true", &["receive", LOCAL, &file])).end();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
    ended.assert_failed(1, &["cannot create", &file, "because: "]);
    assert!(!ended.stderr.contains("listening"), "{ended:?}");
    assert_left(&folder, &[]);
}

#[test]
fn folder_in_place_of_the_file_is_an_error() {
    let folder = folder();
    let ended = run([Path::new("receive"), Path::new("--force"), Path::new(LOCAL), folder.path()]);
    // At once, not after the machine has arrived.
    ended.assert_failed(1, &["cannot create", &folder.path().display().to_string()]);
    assert_left(&folder, &[]);
}

#[test]
fn address_in_use_is_an_error_and_leaves_nothing() {
    let folder = folder();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", taken.local_addr().unwrap());
    let ended = run([Path::new("receive"), Path::new(&address), &path(&folder, "machine")]);
    ended.assert_failed(1, &["cannot listen at", &address, "because: "]);
    assert_left(&folder, &[]);
}

#[test]
fn strangers_do_not_disturb() {
    let folder = folder();
    let (from, file) = (captured(&folder, MIB), path(&folder, "machine"));
    let (receive, address) = Program::receive(&[], LOCAL, &file);
    let place = address.strip_prefix("tcp:").unwrap();
    drop(TcpStream::connect(place).unwrap());
    let mut browser = TcpStream::connect(place).unwrap();
    browser.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    drop(browser);
    feed(&[], &from, &address).done();
    receive.done();
    assert_eq!(stored_memory(&file), stored_memory(&from));
}

#[test]
fn stream_that_is_none_is_an_error_that_says_what_was_met() {
    let folder = folder();
    let (receive, address) = Program::receive(&[], LOCAL, &path(&folder, "machine"));
    let mut main = TcpStream::connect(address.strip_prefix("tcp:").unwrap()).unwrap();
    main.write_all(b"QEVM\x00\x00\x00\x02\x07").unwrap();
    receive.end_within(SOON).assert_failed(1, &["because: ", "version"]);
    assert_left(&folder, &[]);
}

#[test]
fn listening_socket_is_inherited() {
    let folder = folder();
    let (from, file) = (captured(&folder, MIB), path(&folder, "machine"));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", listener.local_addr().unwrap());
    let mut command = multifd(["receive", "fd:0"]);
    let receive = Program::start(command.arg(&file).stdin(as_stdin(listener)));
    // A command keeps its descriptors for the next process it may start.
    drop(command);
    assert_eq!(receive.listening(), "fd:0");
    feed(&[], &from, &address).done();
    receive.done();
    assert_eq!(stored_memory(&file), stored_memory(&from));
}

#[test]
fn connection_of_a_source_without_channels_is_inherited() {
    fn moves(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let file = path(&folder, "machine");
        let mut from = source(machine(qemu, &qemu.machine()))?;
        from.stop()?;
        fast(&mut from)?;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        from.migrate(&format!("tcp:{}", listener.local_addr().unwrap()))?;
        let (connection, _) = listener.accept().unwrap();
        let mut command = multifd(["receive", "fd:0"]);
        let receive = Program::start(command.arg(&file).stdin(as_stdin(connection)));
        drop(command);
        assert_eq!(receive.listening(), "fd:0");
        from.wait_migration("completed", PATIENCE)?;
        receive.done();
        MappedRamFile::open(fs::File::open(&file).unwrap(), 0).unwrap();
        Ok(())
    }
    let Some(qemu) = Qemu::v10_0() else { return };
    moves(&qemu).unwrap();
}

/// The file is complete; only the report is lost, and that is printed.
#[test]
fn full_standard_output_is_told() {
    let folder = folder();
    let (from, file) = (captured(&folder, MIB), path(&folder, "machine"));
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = multifd(["receive", "--json", LOCAL]);
    let receive = Program::start_with_output(command.arg(&file), full);
    feed(&[], &from, &receive.listening()).done();
    receive.end().assert_failed(1, &["multifd: "]);
    assert_eq!(stored_memory(&file), stored_memory(&from));
}

#[test]
fn report_of_a_failure_is_json_too() {
    let folder = folder();
    let (receive, address) = Program::receive(&["--json"], LOCAL, &path(&folder, "machine"));
    let mut main = TcpStream::connect(address.strip_prefix("tcp:").unwrap()).unwrap();
    main.write_all(b"QEVM\x00\x00\x00\x03").unwrap();
    drop(main);
    let ended = receive.end_within(SOON);
    ended.assert_failed(1, &["because: "]);
    let told: Value = ended.json();
    assert_eq!(told["status"], json!("failed"));
    assert!(told["error-desc"].is_string(), "{told}");
}

#[test]
fn command_is_received_from_and_its_failure_leaves_no_file() {
    let folder = folder();
    let (from, stream, kept) = (captured(&folder, 4 << 20), path(&folder, "stream"), path(&folder, "kept"));
    let to = format!("exec:cat >{}", stream.display());
    feed(&["--multifd-channels", "0"], &from, &to).done();
    let failing = format!("exec:cat {}; exit 3", stream.display());
    let (receive, _) = Program::receive(&[], &failing, &kept);
    receive.end().assert_failed(1, &["the command ended with exit status 3"]);
    let (receive, _) = Program::receive(&[], "exec:exit 3", &kept);
    receive.end().assert_failed(1, &["the command ended with exit status 3"]);
    assert_left(&folder, &["captured", "stream"]);
    let whole = format!("exec:cat {}", stream.display());
    let (receive, address) = Program::receive(&[], &whole, &kept);
    assert_eq!(address, whole);
    receive.done();
    assert_eq!(stored_memory(&kept), stored_memory(&from));
}

/// The pages of a lost channel never arrive. The balloon of a guest looks the same.
#[test]
fn pages_that_never_come_are_refused_or_kept_as_zero_as_is_told() {
    for (options, code) in [(&[][..], 1), (&["--missing-pages", "zero"], 0)] {
        let folder = folder();
        let file = path(&folder, "machine");
        let (receive, address) = Program::receive(options, LOCAL, &file);
        let target = Target::Tcp(address.strip_prefix("tcp:").unwrap().parse().unwrap());
        let script = Script::whole(Shape::default()).drop(On::Channel(1), "pages", 0);
        let _heard = script.play(&target).unwrap();
        let ended = receive.end();
        if code == 0 {
            assert_eq!(ended.code, Some(0), "{ended:?}");
            let pages = stored_block(&file, "pc.ram");
            // 3 arrived later, over the other channel.
            let absent: Vec<usize> =
                (0..16).filter(|page| pages[page * 4096..][..4096].iter().all(|byte| *byte == 0)).collect();
            assert_eq!(absent, [1, 5, 7, 9, 11, 13, 15]);
        } else {
            ended.assert_failed(code, &["7 pages of RAM did not arrive", "\"pc.ram\" at offset 0x1000"]);
            assert_left(&folder, &[]);
        }
    }
}
