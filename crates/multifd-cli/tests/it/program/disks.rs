//! Disks that are full, and folders that are not writable: the reason is printed, and nothing is left.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use multifd_testkit::{certificates::write_both, lacks};

use crate::kit::{Ended, Program, assert_left, captured, feed, folder, multifd_in, path, stored_memory};

const LOCAL: &str = "tcp:127.0.0.1:0";
const MIB: u64 = 1 << 20;
/// The time limit of an error that does not depend on a peer.
const SOON: Duration = Duration::from_secs(8);
/// A file system with less space than a machine needs.
const SMALL: &str = "-t tmpfs -o size=8M none";

/// The program with its own file system, mounted with these words, and then a script. `None` if only the superuser may
/// do that.
pub(super) fn mounted(words: &str, mount: &Path, arguments: &[&str], then: &str) -> Option<Command> {
    let namespace = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--kill-child"];
    let allowed = Command::new(namespace[0]).args(&namespace[1..]).arg("true").stderr(Stdio::null()).status();
    if !allowed.is_ok_and(|status| status.success()) {
        lacks("no user namespace to mount a file system in");
        return None;
    }
    let script = format!("mount {words} {} && \"$0\" \"$@\" {then}; exit", mount.display());
    Some(multifd_in(&namespace, &script, arguments))
}

/// Receives `from` into the small file system, and returns the result and what was left there.
fn without_room(from: &Path, target: &str, receive: &[&str], send: &[&str]) -> Option<(Ended, String)> {
    let folder = folder();
    let (mount, list) = (path(&folder, "mount"), path(&folder, "list"));
    fs::create_dir(&mount).unwrap();
    let then = format!("; code=$?; ls -A {} >{}; (exit $code)", mount.display(), list.display());
    let target = target.replace("MOUNT", mount.to_str().unwrap());
    let arguments = [&["receive"], receive, &[LOCAL, &target]].concat();
    let receive = Program::start(&mut mounted(SMALL, &mount, &arguments, &then)?);
    let sent = feed(send, from, &receive.listening()).end_within(SOON);
    sent.assert_failed(1, &["the migration of ", "because: "]);
    let ended = receive.end_within(SOON);
    ended.assert_failed(1, &[&format!("into {}", mount.join("machine").display())]);
    Some((ended, fs::read_to_string(list).unwrap()))
}

const FULL: &[&str] = &[
    " may become full: ",
    "the guest has 32.00 MiB of RAM",
    "because: ",
    "write block \"pc.ram\" at offset 0x",
    "No space left on device",
];

#[test]
fn full_disk_is_an_error_that_names_file_block_and_offset() {
    let folder = folder();
    let from = captured(&folder, 32 * MIB);
    for target in ["MOUNT/machine", "file:MOUNT/machine,offset=4097"] {
        for receive in [&[][..], &["--direct-io"]] {
            for send in [
                &[][..],
                &["--multifd-channels", "0"],
                &["--multifd-channels", "7", "--direct-io"],
                // While the source has something to send, it is informed only by the connection's end.
                &["--return-path", "off"],
                &["--return-path", "off", "--multifd-channels", "0"],
            ] {
                let Some((ended, left)) = without_room(&from, target, receive, send) else { return };
                ended.assert_failed(1, FULL);
                assert_eq!(left, "", "{target}, {receive:?}, {send:?}");
            }
        }
    }
}

#[test]
fn full_disk_is_an_error_with_packed_and_encrypted_pages() {
    let (folder, tls) = (folder(), folder());
    write_both(tls.path()).unwrap();
    let from = captured(&folder, 32 * MIB);
    let creds = ["--tls-creds", tls.path().to_str().unwrap()];
    let zstd = ["--multifd-compression", "zstd"];
    let zlib = ["--multifd-compression", "zlib"];
    let named = [&creds[..], &["--tls-hostname", "localhost"]].concat();
    for (receive, send) in [
        (&[][..], &zlib[..]),
        (&["--direct-io"], &zstd),
        (&creds, &named),
        (&[&creds[..], &["--direct-io"]].concat(), &[&named[..], &zstd].concat()),
    ] {
        let Some((ended, left)) = without_room(&from, "MOUNT/machine", receive, send) else { return };
        ended.assert_failed(1, FULL);
        assert_eq!(left, "", "{receive:?}, {send:?}");
    }
}

#[test]
fn block_that_the_disk_has_no_room_for_is_an_error_that_names_the_offset() {
    let folder = folder();
    let (from, mount, list) = (captured(&folder, 32 * MIB), path(&folder, "mount"), path(&folder, "list"));
    fs::create_dir(&mount).unwrap();
    let then = format!("; code=$?; ls -A {} >{}; (exit $code)", mount.display(), list.display());
    let out = mount.join("out").display().to_string();
    let arguments = ["inspect", "--extract", "pc.ram", from.to_str().unwrap(), &out];
    let Some(mut command) = mounted(SMALL, &mount, &arguments, &then) else { return };
    let ended = Program::start(&mut command).end_within(SOON);
    let told = format!("cannot extract block pc.ram into {out}");
    ended.assert_failed(1, &[&told, "cannot copy the block at offset 0x", "No space left on device"]);
    assert_eq!(fs::read_to_string(list).unwrap(), "");
}

#[test]
fn file_system_that_is_read_only_is_an_error_before_anything_is_done() {
    let folder = folder();
    let (from, mount) = (captured(&folder, MIB), path(&folder, "mount"));
    fs::create_dir(&mount).unwrap();
    let (from, out) = (from.to_str().unwrap(), mount.join("out").display().to_string());
    let container = format!("file:{out},offset=4096");
    for arguments in [
        &["receive", LOCAL, &out][..],
        &["receive", LOCAL, &container],
        &["receive", "--direct-io", "--force", LOCAL, &out],
        &["inspect", "--extract", "pc.ram", from, &out],
    ] {
        let Some(mut command) = mounted("-t tmpfs -o ro none", &mount, arguments, "") else { return };
        let ended = Program::start(&mut command).end_within(SOON);
        ended.assert_failed(1, &[&format!("cannot create {out}"), "Read-only file system"]);
        assert!(!ended.stderr.contains("listening"), "{ended:?}");
    }
}

/// Nothing is written to it, with direct I/O or without.
#[test]
fn file_on_a_read_only_file_system_is_sent_and_extracted() {
    let (disk, folder) = (folder(), folder());
    let (from, mount, file) = (captured(&disk, 4 * MIB), path(&folder, "mount"), path(&folder, "machine"));
    fs::create_dir(&mount).unwrap();
    let words = format!("--bind -o ro {}", disk.path().display());
    let inside = mount.join("captured").display().to_string();
    for options in [&[][..], &["--direct-io"], &["--multifd-channels", "0"]] {
        let (receive, address) = Program::receive(&["--force"], LOCAL, &file);
        let arguments = [&["send"], options, &[&inside, &address]].concat();
        let Some(mut command) = mounted(&words, &mount, &arguments, "") else { return };
        Program::start(&mut command).done();
        receive.done();
        assert!(stored_memory(&file) == stored_memory(&from), "equal RAM, {options:?}");
    }
    let out = path(&folder, "out");
    let arguments = ["inspect", "--extract", "pc.ram", &inside, out.to_str().unwrap()];
    let Some(mut command) = mounted(&words, &mount, &arguments, "") else { return };
    Program::start(&mut command).done();
    assert!(fs::read(&out).unwrap() == stored_memory(&from), "the RAM and nothing else");
    assert_left(&disk, &["captured"]);
}
