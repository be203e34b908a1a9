//! `multifd inspect`: a table for people, an object for programs.

use std::{
    fs::{self, OpenOptions},
    io,
    path::Path,
};

use multifd_testkit::qemu::{Error, Qemu};
use serde_json::{Value, json};

use crate::kit::{Program, captured, file_uri, folder, machine, migrate, multifd, path, run, source};

#[test]
fn table_shows_machine_blocks_and_devices() {
    let folder = folder();
    let ended = run([Path::new("inspect"), &captured(&folder, 1 << 20)]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    let row = |first: &str| {
        let line = ended.stdout.lines().find(|line| line.starts_with(first));
        line.map(|line| line.split_ascii_whitespace().skip(1).collect::<Vec<_>>()).unwrap_or_default()
    };
    assert_eq!(row("machine"), ["pc-q35-10.0"]);
    assert_eq!(row("pc.ram"), ["0x100000", "256", "256"]);
    assert_eq!(row("timer"), ["0x0", "2", "24"]);
}

#[test]
fn json_is_one_object_on_one_line() {
    let folder = folder();
    let mut told = run([Path::new("inspect"), Path::new("--json"), &captured(&folder, 1 << 20)]).json();
    let fields = told.as_object_mut().unwrap();
    assert!(fields.remove("on-disk").unwrap().as_u64().unwrap() >= 1 << 20);
    assert_eq!(fields.remove("restore").unwrap().as_array().unwrap().len(), 2);
    let expected = json!({
        "machine": "pc-q35-10.0",
        "page-size": 4096,
        "blocks": [{
            "name": "pc.ram", "used-length": 1 << 20, "pages": 256, "pages-present": 256, "pages-offset": 1 << 20,
            "ignored": false,
        }],
        "devices": [{ "name": "timer", "instance-id": 0, "version": 2, "size": 24, "early": false }],
        "footers": true,
            "form": "a mapped-ram file",
        "switchover-start": true,
        "described": true,
        "split-by-footers": false,
        "total": 1 << 20,
        "present": 1 << 20,
        "trailing-bytes": 0,
        "digests": false,
        "about": {},
    });
    assert_eq!(told, expected);
}

#[test]
fn bytes_after_the_machine_are_mentioned() {
    let folder = folder();
    let file = captured(&folder, 1 << 20);
    let open = OpenOptions::new().append(true).open(&file);
    io::Write::write_all(&mut open.unwrap(), &[0x5a; 5]).unwrap();
    let ended = run([Path::new("inspect"), &file]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    assert!(ended.stdout.contains("WARNING: 5 bytes after the end of the machine are ignored"), "{ended:?}");
    let told = run([Path::new("inspect"), Path::new("--json"), &file]).json();
    assert_eq!(told["trailing-bytes"], 5);
}

/// The same stopped guest in our file and in QEMU's: the same blocks, the same devices.
#[test]
fn our_file_and_qemus_own_hold_the_same() {
    fn files(qemu: &Qemu) -> Result<(Value, Value), Error> {
        let folder = folder();
        let (ours, theirs) = (path(&folder, "ours"), path(&folder, "theirs"));
        let mut from = source(machine(qemu, &qemu.machine()))?;
        from.stop()?;
        from.set_multifd_channels(2)?;
        let (receive, address) = Program::receive(&[], "tcp:127.0.0.1:0", &ours);
        migrate(&mut from, &address)?;
        receive.done();
        // It must run again before it can migrate again.
        from.cont()?;
        from.stop()?;
        from.set_capabilities(&[("mapped-ram", true)])?;
        migrate(&mut from, &file_uri(&theirs))?;
        let inspected = |file: &Path| {
            let mut told = run([Path::new("inspect"), Path::new("--json"), file]).json();
            let present = told["present"].take();
            // QEMU's file does not contain most of it.
            let fields = told.as_object_mut().expect("an object");
            for of_ours in ["sync-mode", "digests", "root", "about", "on-disk", "restore"] {
                fields.remove(of_ours);
            }
            assert!(present.as_u64() > Some(8 << 20), "{present} in {}", file.display());
            for block in told["blocks"].as_array_mut().expect("blocks") {
                block["pages-present"].take();
            }
            told
        };
        Ok((inspected(&ours), inspected(&theirs)))
    }
    let Some(qemu) = Qemu::v10_0() else { return };
    let (ours, theirs) = files(&qemu).unwrap();
    assert_eq!(ours, theirs);
    assert_eq!(ours["blocks"][0]["name"], json!("pc.ram"));
    assert!(ours["devices"].as_array().expect("devices").len() > 20, "{ours}");
}

#[test]
fn file_that_is_something_else_is_an_error() {
    let folder = folder();
    let file = path(&folder, "something");
    fs::write(&file, "something else").unwrap();
    for arguments in [&["inspect"][..], &["inspect", "--json"]] {
        let ended = Program::start(multifd(arguments).arg(&file)).end();
        ended.assert_failed(1, &["cannot read", &file.display().to_string(), "because: "]);
        assert!(ended.stdout.is_empty(), "{ended:?}");
    }
}

#[test]
fn file_that_is_missing_is_an_error() {
    let folder = folder();
    let file = path(&folder, "missing");
    let ended = run([Path::new("inspect"), &file]);
    ended.assert_failed(1, &["cannot read", &file.display().to_string(), "because: "]);
}

#[test]
fn full_standard_output_is_told() {
    let folder = folder();
    let mut command = multifd(["inspect"]);
    command.arg(captured(&folder, 1 << 20));
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    Program::start_with_output(&mut command, full).end().assert_failed(1, &["multifd: "]);
}

/// As with `| head -0`.
#[test]
fn closed_standard_output_is_no_panic() {
    let folder = folder();
    let mut command = multifd(["inspect"]);
    command.arg(captured(&folder, 1 << 20));
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let ended = Program::start_with_output(&mut command, writer).end();
    assert!(ended.code.is_some() && !ended.stderr.contains("panicked"), "{ended:?}");
}
