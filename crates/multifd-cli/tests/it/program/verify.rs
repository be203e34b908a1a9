//! `multifd verify`, and what the other verbs do with a file that is damaged.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use multifd::ram::BlockIndex;
use qemu_stream::mapped_ram::MappedRamFile;
use serde_json::json;
use tempfile::TempDir;

use crate::kit::{Ended, Program, assert_left, captured, feed, folder, path, run, stored_memory};

const MIB: u64 = 1 << 20;

/// A machine that `receive` has stored, so that it has digests.
fn stored(folder: &TempDir, options: &[&str]) -> PathBuf {
    let (from, file) = (captured(folder, 4 * MIB), path(folder, "machine"));
    let (receive, address) = Program::receive(options, "tcp:127.0.0.1:0", &file);
    feed(&["--quiet"], &from, &address).done();
    receive.done();
    fs::remove_file(from).unwrap();
    file
}

/// Changes one bit of a page of "pc.ram".
fn damage(file: &Path, page: u64) {
    let at = page_at(file, page) + 99;
    let file = File::options().read(true).write(true).open(file).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

fn page_at(file: &Path, page: u64) -> u64 {
    let machine = MappedRamFile::open_damaged(File::open(file).unwrap(), 0).unwrap();
    machine.place(BlockIndex(0)).unwrap().pages_offset + page * 4096
}

fn verify(options: &[&str], file: &Path) -> Ended {
    run(["verify"].iter().chain(options).map(AsRef::as_ref).chain([file.as_os_str()]))
}

#[test]
fn received_file_is_intact_and_says_what_it_is() {
    let folder = folder();
    let file = stored(&folder, &["--label", "before the upgrade"]);
    let ended = verify(&[], &file);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), ""), "{ended:?}");
    assert!(ended.stderr.contains("machine is intact: "), "{ended:?}");
    let inspected = run(["inspect".as_ref(), file.as_os_str()]);
    for text in ["by multifd receive", "before the upgrade", "digests    of every page", "to restore it:"] {
        assert!(inspected.stdout.contains(text), "{text}: {inspected:?}");
    }
    let contents = run(["inspect".as_ref(), "--json".as_ref(), file.as_os_str()]).json();
    assert_eq!(contents["digests"], true);
    assert_eq!(contents["about"]["label"], "before the upgrade");
    assert_eq!(contents["trailing-bytes"], 0);
    assert_left(&folder, &["machine"]);
}

#[test]
fn flipped_bit_is_found_by_every_verb_that_reads_the_page() {
    let folder = folder();
    let file = stored(&folder, &[]);
    damage(&file, 300);
    let at = page_at(&file, 300);
    let ended = verify(&[], &file);
    ended.assert_failed(1, &["machine is damaged", "1 of ", "use another copy", "--no-verify"]);
    let place =
        format!("damaged: block \"pc.ram\", offset 0x12c000, 4.00 KiB (file offset {at:#x}): it differs");
    assert!(ended.stdout.starts_with(&place), "{ended:?}");
    let found = verify(&["--json"], &file).json();
    assert_eq!((&found["status"], &found["damaged-pages"]), (&json!("damaged"), &json!(1)));
    assert_eq!(found["damage"][0]["offset"], 300 * 4096);

    // send: the destination gets nothing.
    let copy = path(&folder, "copy");
    let (receive, address) = Program::receive(&[], "tcp:127.0.0.1:0", &copy);
    let ended = feed(&["--quiet"], &file, &address).end();
    let told = [r#"block "pc.ram": the page at offset 0x12c000 differs from its digest"#, "--no-verify"];
    ended.assert_failed(1, &told);
    assert_ne!(receive.end().code, Some(0));
    // inspect --extract: no file.
    let out = path(&folder, "out");
    let extract = |option: &[&str]| {
        let words = ["inspect", "--extract", "pc.ram"].iter().chain(option).map(AsRef::as_ref);
        run(words.chain([file.as_os_str(), out.as_os_str()]))
    };
    extract(&[]).assert_failed(1, &["cannot extract", "offset 0x12c000 differs from its digest"]);
    assert_left(&folder, &["machine"]);
    // What is there can be saved.
    assert_eq!(extract(&["--no-verify"]).code, Some(0));
    assert!(fs::read(&out).unwrap() == stored_memory(&file));
    let (receive, address) = Program::receive(&[], "tcp:127.0.0.1:0", &copy);
    feed(&["--quiet", "--no-verify"], &file, &address).done();
    receive.done();
    assert!(stored_memory(&copy) == stored_memory(&file));
}

#[test]
fn damage_of_what_is_not_ram_is_found_when_the_file_is_opened() {
    let folder = folder();
    let file = stored(&folder, &[]);
    let machine = MappedRamFile::open(File::open(&file).unwrap(), 0).unwrap();
    let bitmap = machine.place(BlockIndex(0)).unwrap().bitmap_offset;
    File::options().write(true).open(&file).unwrap().write_all_at(&[0], bitmap).unwrap();
    for verb in ["verify", "inspect"] {
        let ended = run([verb.as_ref(), file.as_os_str()]);
        ended.assert_failed(
            1,
            &["cannot read", "head, bitmaps or devices", "differs from its digest", "--no-verify"],
        );
    }
    assert_eq!(run(["inspect".as_ref(), "--no-verify".as_ref(), file.as_os_str()]).code, Some(0));
}

#[test]
fn file_without_digests_says_so_and_gets_them() {
    let folder = folder();
    let file = captured(&folder, 4 * MIB);
    verify(&[], &file).assert_failed(1, &["cannot compare", "it has none", "multifd verify --add"]);
    let memory = stored_memory(&file);
    let ended = verify(&["--add", "--threads", "1"], &file);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stderr.contains("added digests to"), "{ended:?}");
    assert!(stored_memory(&file) == memory);
    assert_eq!(verify(&["--direct-io", "-q"], &file).code, Some(0));
    verify(&["--add"], &file).assert_failed(1, &["cannot add digests", "it has digests already"]);
    damage(&file, 0);
    verify(&[], &file).assert_failed(1, &["is damaged"]);
}
