//! A machine after an offset of a file, `file:PATH,offset=N`: the data before it is kept.

use std::{
    ffi::OsStr,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::kit::{
    Ended, Program, assert_left, captured, feed, file_uri_at, folder, machine_in, path, run, stored_memory,
    stored_memory_at,
};

const LOCAL: &str = "tcp:127.0.0.1:0";
const MIB: u64 = 1 << 20;
/// On no border of anything.
const OFFSET: u64 = 5001;

/// A file with some data.
fn container(folder: &TempDir, bytes: u64) -> PathBuf {
    let path = path(folder, "container");
    fs::write(&path, head(bytes)).unwrap();
    path
}

fn head(bytes: u64) -> Vec<u8> {
    (0..bytes).map(|byte| (byte % 251) as u8 + 1).collect()
}

/// `multifd receive` into the container, after the offset.
fn receive(options: &[&str], container: &Path) -> (Program, String) {
    Program::receive(options, LOCAL, Path::new(&file_uri_at(container, OFFSET)))
}

/// Moves a machine into the container; returns the machine's own file.
fn moved(folder: &TempDir, options: &[&str], container: &Path) -> (PathBuf, Ended) {
    let from = captured(folder, 4 * MIB);
    let (receive, address) = receive(options, container);
    feed(&[], &from, &address).done();
    (from, receive.done())
}

/// The data before the offset.
fn kept(container: &Path) -> Vec<u8> {
    fs::read(container).unwrap()[..usize::try_from(OFFSET).unwrap()].to_vec()
}

#[test]
fn machine_is_kept_behind_the_offset_and_the_head_before_it() {
    let folder = folder();
    let container = container(&folder, OFFSET);
    let (from, ended) = moved(&folder, &[], &container);
    assert!(ended.stderr.contains("container at offset 0x1389: 4.00 MiB of RAM"), "{ended:?}");
    assert_eq!(kept(&container), head(OFFSET));
    assert!(stored_memory_at(&container, OFFSET) == stored_memory(&from), "equal RAM");
    assert_eq!(fs::metadata(&container).unwrap().permissions().mode() & 0o777, 0o600);
    assert_left(&folder, &["captured", "container"]);

    // It is sent on, and its RAM arrives unchanged.
    let (receive, address) = Program::receive(&[], LOCAL, &path(&folder, "again"));
    feed(&[], Path::new(&file_uri_at(&container, OFFSET)), &address).done();
    receive.done();
    assert!(stored_memory(&path(&folder, "again")) == stored_memory(&from), "equal RAM");
    let (uri, out) = (file_uri_at(&container, OFFSET), path(&folder, "out"));
    let arguments = ["inspect", "--extract", "pc.ram", &uri].map(OsStr::new);
    assert_eq!(run(arguments.into_iter().chain([out.as_os_str()])).code, Some(0));
    assert!(fs::read(&out).unwrap() == stored_memory(&from), "equal RAM");
    let told = run(["inspect", "--json", &uri]).json();
    assert_eq!(told["blocks"][0]["pages"], 1024);
}

/// Its pages begin at boundaries that suit direct I/O, wherever the stream begins.
#[test]
fn container_is_the_same_to_the_byte_past_the_page_cache_and_through_it() {
    let folder = folder();
    let from = captured(&folder, 4 * MIB);
    let containers = [("cached", &[][..]), ("direct", &["--direct-io"])].map(|(name, options)| {
        let container = path(&folder, name);
        fs::write(&container, head(OFFSET)).unwrap();
        let (receive, address) = receive(options, &container);
        feed(&["--multifd-channels", "3"], &from, &address).done();
        let ended = receive.done();
        assert!(!ended.stderr.contains("direct-io"), "{ended:?}");
        container
    });
    let [cached, direct] = containers.each_ref().map(|container| machine_in(container));
    assert!(cached == direct, "head, RAM, bitmaps and devices");

    let (receive, address) = Program::receive(&["--direct-io"], LOCAL, &path(&folder, "again"));
    let sent = feed(&["--direct-io"], Path::new(&file_uri_at(&containers[1], OFFSET)), &address).done();
    receive.done();
    assert!(!sent.stderr.contains("direct-io"), "{sent:?}");
    assert!(stored_memory(&path(&folder, "again")) == stored_memory(&from), "equal RAM");
}

#[test]
fn container_that_is_missing_or_short_is_zero_up_to_the_offset() {
    let folder = folder();
    let missing = path(&folder, "container");
    let (from, _) = moved(&folder, &[], &missing);
    assert!(kept(&missing).iter().all(|byte| *byte == 0));
    assert!(stored_memory_at(&missing, OFFSET) == stored_memory(&from), "equal RAM");
    fs::remove_file(&missing).unwrap();
    fs::remove_file(&from).unwrap();

    let short = container(&folder, 100);
    moved(&folder, &[], &short);
    let kept = kept(&short);
    assert!(kept[..100] == head(100) && kept[100..].iter().all(|byte| *byte == 0), "{kept:?}");
}

#[test]
fn bytes_behind_the_offset_are_replaced_with_force_alone() {
    let folder = folder();
    let container = container(&folder, OFFSET + 16);
    let ended = run(["receive", LOCAL, &file_uri_at(&container, OFFSET)]);
    ended.assert_failed(1, &["cannot create", "the file has 0x10 bytes after offset 0x1389", "--force"]);
    assert_eq!(fs::read(&container).unwrap(), head(OFFSET + 16));
    let (from, _) = moved(&folder, &["--force"], &container);
    assert_eq!(kept(&container), head(OFFSET));
    assert!(stored_memory_at(&container, OFFSET) == stored_memory(&from), "equal RAM");
}

#[test]
fn container_stays_as_it_was_when_the_migration_fails() {
    let folder = folder();
    let (from, container) = (captured(&folder, 64 * MIB), container(&folder, 2 * OFFSET));
    let (receive, address) = receive(&["--force"], &container);
    let sending = feed(&["--max-bandwidth", "2M"], &from, &address);
    sending.next_line();
    sending.signal(Signal::KILL);
    receive.end().assert_failed(1, &["because: "]);
    assert_eq!(fs::read(&container).unwrap(), head(2 * OFFSET));
    assert_left(&folder, &["captured", "container"]);
}

#[test]
fn container_that_is_changed_meanwhile_is_left_alone() {
    let folder = folder();
    let (from, container) = (captured(&folder, MIB), container(&folder, OFFSET));
    let (receive, address) = receive(&[], &container);
    fs::write(&container, "newer").unwrap();
    let sent = feed(&[], &from, &address).end();
    receive.end().assert_failed(
        1,
        &["cannot give the file its name", "another program changed the file during the migration"],
    );
    sent.assert_failed(1, &[]);
    assert_eq!(fs::read(&container).unwrap(), b"newer");
    assert_left(&folder, &["captured", "container"]);
}

#[test]
fn link_to_a_container_stays_a_link() {
    let (here, elsewhere) = (folder(), folder());
    let container = container(&elsewhere, OFFSET);
    let link = path(&here, "link");
    symlink(&container, &link).unwrap();
    moved(&here, &[], &link);
    assert!(link.symlink_metadata().unwrap().is_symlink());
    assert_eq!(kept(&container), head(OFFSET));
    assert_left(&elsewhere, &["container"]);
}

#[test]
fn offset_that_is_none_is_refused() {
    for arguments in
        [&["receive", LOCAL, "file:vm,offset=1,offset=2"][..], &["send", "file:vm,offset=-1", LOCAL]]
    {
        run(arguments).assert_failed(2, &["expected an offset in bytes like 0x1000, 4096 or 4K"]);
    }
    run(["receive", LOCAL, "file:"]).assert_failed(2, &["expected file:PATH"]);
}

#[test]
fn machine_is_looked_for_at_the_offset_alone() {
    let folder = folder();
    let file = captured(&folder, MIB);
    for offset in [1, 4096, 1 << 40, i64::MAX as u64] {
        run(["inspect", &file_uri_at(&file, offset)]).assert_failed(1, &["cannot read", "because: "]);
    }
}
