//! `--control` and `multifd ctl`: another process asks for the numbers of a run, cancels it, and changes its limits.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::{
        fs::{FileTypeExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::Path,
    time::{Duration, Instant},
};

use multifd_testkit::qemu::PATIENCE;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::kit::{Ended, Program, assert_left, captured, feed, folder, path, run};

const LOCAL: &str = "tcp:127.0.0.1:0";
const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(12);

fn ctl(socket: &Path, command: &[&str]) -> Ended {
    run([&["ctl", socket.to_str().unwrap()], command].concat())
}

fn status(socket: &Path) -> Value {
    let ended = ctl(socket, &["status", "--json"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    ended.json()
}

/// Waits until the run has this status.
fn wait_status(socket: &Path, expected: &str) -> Value {
    let begun = Instant::now();
    loop {
        if socket.exists() {
            let found = status(socket);
            if found["status"] == expected {
                return found;
            }
            assert!(begun.elapsed() < PATIENCE, "{expected}: {found}");
        }
        assert!(begun.elapsed() < PATIENCE, "no socket");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A client of QMP.
struct Client {
    to: UnixStream,
    from: BufReader<UnixStream>,
}

impl Client {
    fn connect(socket: &Path) -> Self {
        let to = UnixStream::connect(socket).unwrap();
        to.set_read_timeout(Some(PATIENCE)).unwrap();
        let from = BufReader::new(to.try_clone().unwrap());
        Self { to, from }
    }

    /// The next line; `None` at the end.
    fn line(&mut self) -> Option<Value> {
        let mut line = String::new();
        (self.from.read_line(&mut line).expect("a line in time") > 0)
            .then(|| serde_json::from_str(&line).expect("JSON"))
    }

    fn execute(&mut self, request: &str) -> Value {
        self.to.write_all(request.as_bytes()).unwrap();
        self.line().expect("a reply")
    }
}

#[test]
fn socket_speaks_qmp_is_private_and_ends_with_its_run() {
    let folder = folder();
    let socket = path(&folder, "control");
    // One that a killed run has left.
    drop(UnixListener::bind(&socket).unwrap());
    let options = ["--control", socket.to_str().unwrap()];
    let (receive, _) = Program::receive(&options, LOCAL, &path(&folder, "machine"));
    let found = fs::symlink_metadata(&socket).unwrap();
    assert!(found.file_type().is_socket() && found.permissions().mode() & 0o777 == 0o600, "{found:?}");
    let mut client = Client::connect(&socket);
    let greeting = client.line().expect("a greeting");
    assert!(greeting["QMP"]["version"]["qemu"]["major"].is_u64(), "{greeting}");
    let early = client.execute("{\"execute\": \"query-migrate\"}\n");
    assert_eq!(early["error"]["class"], "CommandNotFound", "{early}");
    assert_eq!(client.execute("{\"execute\": \"qmp_capabilities\"}\n"), json!({ "return": {} }));
    let reply = client.execute("{\"execute\": \"query-migrate\", \"id\": \"x\"}");
    assert_eq!((&reply["return"]["status"], &reply["id"]), (&json!("none"), &json!("x")), "{reply}");
    let destination = r#"{"execute": "migrate-set-parameters", "arguments": {"max-bandwidth": 1}}"#;
    let refused = client.execute(destination);
    assert!(refused["error"]["desc"].as_str().unwrap().contains("this is the destination"), "{refused}");

    let second = run(["receive", options[0], options[1], LOCAL, path(&folder, "other").to_str().unwrap()]);
    second.assert_failed(1, &["cannot listen at the control socket ", "because: "]);
    assert!(socket.exists(), "it belongs to the first run");

    assert_eq!(client.execute("{\"execute\": \"migrate_cancel\"}"), json!({ "return": {} }));
    let ended = receive.end_within(SOON);
    ended.assert_failed(130, &["migrate_cancel at the control socket", "cancelled"]);
    assert_eq!(client.line(), None);
    assert_left(&folder, &[]);
    ctl(&socket, &["status"]).assert_failed(1, &["cannot connect to the control socket ", "--control"]);
}

#[test]
fn run_is_shown_slowed_down_hurried_and_cancelled_by_ctl() {
    let folder = folder();
    let from = captured(&folder, 64 * MIB);
    let (here, there) = (path(&folder, "here"), path(&folder, "there"));
    let to = path(&folder, "machine");
    let receive = || Program::receive(&["--control", there.to_str().unwrap()], LOCAL, &to);
    let slow = ["--max-bandwidth", "1M", "--control", here.to_str().unwrap()];

    let (receiving, address) = receive();
    let send = feed(&slow, &from, &address);
    let report = wait_status(&here, "active");
    assert_eq!(report["ram"]["total"], json!(64 * MIB), "{report}");
    let received = wait_status(&there, "active");
    assert!(received["ram"]["transferred"].as_u64() < Some(64 * MIB), "{received}");
    let text = ctl(&here, &["status"]);
    assert!(
        text.stdout.starts_with("active: pass 1, ") && text.stdout.contains("left of 64.00 MiB"),
        "{text:?}"
    );
    let downtime = ctl(&here, &["set", "downtime-limit=1s"]);
    downtime
        .assert_failed(1, &["refused migrate-set-parameters", "because: the guest in a file does not run"]);
    ctl(&there, &["set", "max-bandwidth=1M"]).assert_failed(1, &["this is the destination"]);
    ctl(&here, &["set", "max-bandwidth=fast"]).assert_failed(2, &["expected a rate"]);
    // It would take a minute.
    let set = ctl(&here, &["set", "max-bandwidth=0"]);
    assert_eq!((set.code, &*set.stdout), (Some(0), ""), "{set:?}");
    let begun = Instant::now();
    send.end_within(SOON);
    receiving.done();
    assert!(begun.elapsed() < SOON);
    assert_left(&folder, &["captured", "machine"]);
    fs::remove_file(&to).unwrap();

    let (receiving, address) = receive();
    let send = feed(&slow, &from, &address);
    wait_status(&here, "active");
    assert_eq!(ctl(&here, &["cancel"]).code, Some(0));
    send.end_within(SOON).assert_failed(130, &["migrate_cancel at the control socket"]);
    receiving.end_within(SOON).assert_failed(1, &["the migration from "]);
    assert_left(&folder, &["captured"]);
}

/// A forgotten connection must not prevent a cancel.
#[test]
fn client_that_says_nothing_makes_room_for_another_one() {
    let folder = folder();
    let socket = path(&folder, "control");
    let options = ["--control", socket.to_str().unwrap()];
    let (receive, _) = Program::receive(&options, LOCAL, &path(&folder, "machine"));
    let mut silent = Client::connect(&socket);
    assert!(silent.line().is_some(), "a greeting");
    assert_eq!(status(&socket)["status"], "none");
    assert_eq!(silent.line(), None);
    // Nobody waits, so this one may be silent for as long as it wants.
    let mut alone = Client::connect(&socket);
    assert!(alone.line().is_some());
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(alone.execute("{\"execute\": \"qmp_capabilities\"}"), json!({ "return": {} }));
    alone.to.write_all(&vec![b'['; 1 << 20]).unwrap_or_default();
    let refused = alone.line().expect("a reply");
    assert_eq!(refused["error"]["class"], "GenericError", "{refused}");
    receive.signal(Signal::INT);
    assert_eq!(receive.end_within(SOON).code, Some(130));
    assert!(!socket.exists());
}

#[test]
fn control_socket_at_the_path_of_a_file_is_refused_and_the_file_stays() {
    let folder = folder();
    let from = captured(&folder, MIB);
    let ended = run(["send", "--control", from.to_str().unwrap(), from.to_str().unwrap(), "unix:/no/such"]);
    ended.assert_failed(1, &["cannot listen at the control socket "]);
    assert!(fs::metadata(&from).unwrap().len() > MIB);
}
