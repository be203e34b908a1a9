//! Deltas on the command line: `receive --base`, and what the other verbs do with a delta.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Duration,
};

use multifd::ram::BlockIndex;
use qemu_stream::mapped_ram::{MappedRamFile, StoredMachine};
use serde_json::Value;
use tempfile::TempDir;

use super::disks::mounted;
use crate::kit::{Ended, Program, assert_left, captured, feed, folder, path, run, stored_memory};

const LOCAL: &str = "tcp:127.0.0.1:0";
const MIB: u64 = 1 << 20;
const PAGE: usize = 4096;

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Receives `from` into a file of this name.
fn receive(folder: &TempDir, from: &Path, options: &[&str], name: &str) -> (PathBuf, Ended) {
    let file = path(folder, name);
    let (receive, address) = Program::receive(options, LOCAL, &file);
    feed(&["--quiet"], from, &address).done();
    (file, receive.done())
}

/// Fills a page of a file that has no digests.
fn fill(file: &Path, page: u64, byte: u8) {
    let machine = MappedRamFile::open(File::open(file).unwrap(), 0).unwrap();
    let at = machine.place(BlockIndex(0)).unwrap().pages_offset + page * PAGE as u64;
    File::options().write(true).open(file).unwrap().write_all_at(&[byte; PAGE], at).unwrap();
}

fn clear(file: &Path, page: u64) {
    let machine = MappedRamFile::open(File::open(file).unwrap(), 0).unwrap();
    let at = machine.place(BlockIndex(0)).unwrap().bitmap_offset + page / 8;
    let file = File::options().read(true).write(true).open(file).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] & !(1 << (page % 8))], at).unwrap();
}

/// `base`, `one`, a delta of it, and `two`, a delta of that; and the memory of each.
fn chain() -> (TempDir, [PathBuf; 3], [Vec<u8>; 3]) {
    let folder = folder();
    let from = captured(&folder, 4 * MIB);
    let (base, _) = receive(&folder, &from, &[], "base");
    let first = stored_memory(&from);
    fill(&from, 7, 1);
    fill(&from, 900, 1);
    let (one, ended) = receive(&folder, &from, &["--base", text(&base), "--label", "first night"], "one");
    assert!(ended.stderr.contains("2 of 1,024 pages differ from the base"), "{ended:?}");
    let second = stored_memory(&from);
    fill(&from, 7, 2);
    (100..900).for_each(|page| clear(&from, page));
    let (two, _) = receive(&folder, &from, &["--base", text(&one)], "two");
    let third = stored_memory(&from);
    fs::remove_file(from).unwrap();
    (folder, [base, one, two], [first, second, third])
}

fn merge(arguments: &[&str]) -> Ended {
    run(["merge"].iter().chain(arguments))
}

#[test]
fn merged_file_is_whole_and_has_the_machine_of_its_time() {
    let (folder, [base, one, two], memories) = chain();
    let out = path(&folder, "out");
    let ended = merge(&[text(&base), text(&one), text(&two), text(&out)]);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), ""), "{ended:?}");
    assert!(ended.stderr.contains("merged 3 files into "), "{ended:?}");
    assert!(stored_memory(&out) == memories[2]);
    assert_eq!(run(["verify", text(&out)]).code, Some(0));
    merge(&[text(&one), text(&out)]).assert_failed(1, &["it exists; use --force"]);
    // Bases that are not given are found.
    let ended = merge(&["--force", "--json", "--label", "merged", "--direct-io", text(&one), text(&out)]);
    assert_eq!(ended.json()["status"], "completed", "{ended:?}");
    assert!(stored_memory(&out) == memories[1]);
    let told = run(["inspect", "--json", text(&out)]).json();
    assert_eq!((&told["about"]["label"], &told["chain"]), (&Value::from("merged"), &Value::Null));
    // A container.
    let container = path(&folder, "container");
    fs::write(&container, "head").unwrap();
    assert_eq!(merge(&[text(&two), &format!("file:{},offset=4", text(&container))]).code, Some(0));
    assert!(fs::read(&container).unwrap().starts_with(b"headQEVM"));
    assert_left(&folder, &["base", "container", "one", "out", "two"]);
}

#[test]
fn delta_is_sent_extracted_verified_and_shown_with_its_bases() {
    let (folder, [base, one, two], memories) = chain();
    for (number, options) in
        [&[][..], &["--multifd-channels", "0"], &["--multifd-compression", "zstd"], &["--direct-io"]]
            .into_iter()
            .enumerate()
    {
        let copy = path(&folder, &format!("copy{number}"));
        let (receive, address) = Program::receive(&[], LOCAL, &copy);
        feed(&[&["--quiet"], options].concat(), &two, &address).done();
        receive.done();
        assert!(stored_memory(&copy) == memories[2], "{options:?}");
        fs::remove_file(copy).unwrap();
    }
    let out = path(&folder, "out");
    for no_verify in [&[][..], &["--no-verify"]] {
        let ended =
            run([&["inspect", "--force", "--extract", "pc.ram"], no_verify, &[text(&two), text(&out)]]
                .concat());
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert!(fs::read(&out).unwrap() == memories[2]);
    }
    let ended = run(["verify", text(&two)]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stderr.contains("two with its bases, 3 files is intact"), "{ended:?}");
    assert_eq!(run(["verify", "--json", text(&two)]).json()["files"], 3);
    let table = run(["inspect", text(&two)]).stdout;
    for (file, told) in [(&two, "pages that differ from"), (&one, "first night"), (&base, "a whole machine")]
    {
        let line = table
            .lines()
            .find(|line| line.contains(&format!("{}: ", text(file))) && line.contains(" on disk"));
        assert!(line.is_some_and(|line| line.contains(told)), "{told}: {table}");
    }
    let told = run(["inspect", "--json", text(&two)]).json();
    let roots: Vec<_> = told["chain"].as_array().unwrap().iter().map(|file| file["root"].clone()).collect();
    let bases: Vec<_> = told["chain"].as_array().unwrap().iter().map(|file| file["base"].clone()).collect();
    assert_eq!(told["root"], roots[0]);
    assert_eq!(bases, [roots[1].clone(), roots[2].clone(), Value::Null]);
    assert_eq!(told["present"], 224 * PAGE);
}

/// Every verb that reads the file, with the reason and the command that helps.
#[test]
fn base_that_is_missing_or_another_one_is_named() {
    let (folder, [base, one, two], memories) = chain();
    let moved = path(&folder, "moved");
    fs::rename(&base, &moved).unwrap();
    let (out, out_text) = (path(&folder, "out"), path(&folder, "out").display().to_string());
    for arguments in [
        &["inspect", text(&two)][..],
        &["verify", text(&two)],
        &["send", text(&two), "tcp:127.0.0.1:1"],
        &["merge", text(&two), &out_text],
        &["receive", "--base", text(&two), LOCAL, &out_text],
        &["inspect", "--extract", "pc.ram", "--no-verify", text(&two), &out_text],
    ] {
        let ended = run(arguments);
        ended.assert_failed(1, &["cannot read ", "the base \"base\" of \"", "one\" cannot be used"]);
        ended.assert_failed(
            1,
            &["it was moved or removed after the delta was written", "multifd merge BASE DELTA NEW"],
        );
    }
    // The base is given by its new name.
    assert_eq!(merge(&[text(&moved), text(&one), text(&two), &out_text]).code, Some(0));
    assert!(stored_memory(&out) == memories[2]);
    fs::remove_file(&out).unwrap();
    // Another machine in its place, and files in the wrong order.
    fs::rename(&two, &base).unwrap();
    run(["verify", text(&one)])
        .assert_failed(1, &["the base \"base\"", "is another file than the delta was written for"]);
    merge(&[text(&one), text(&moved), &out_text])
        .assert_failed(1, &["is a whole machine, so it has no base", "oldest first"]);
    assert!(!out.exists());
}

#[test]
fn damage_of_a_base_is_named_with_its_file() {
    let (folder, [base, one, _], _) = chain();
    fill_any(&base, 30);
    let ended = run(["verify", text(&one)]);
    let told = format!("damaged: {}: block \"pc.ram\", offset 0x1e000", text(&base));
    assert!(ended.stdout.contains(&told), "{ended:?}");
    ended.assert_failed(1, &["one is damaged", "1 of 1,026 pages"]);
    let out = path(&folder, "out");
    merge(&[text(&one), text(&out)])
        .assert_failed(1, &["cannot merge into", "differs from its digest in", "base", "--no-verify"]);
    assert!(!out.exists());
}

/// The same, for a file with digests.
fn fill_any(file: &Path, page: u64) {
    let machine = StoredMachine::open(file, 0).unwrap();
    let at = machine.newest().places()[0].pages_offset + page * PAGE as u64;
    File::options().write(true).open(file).unwrap().write_all_at(&[0xee; 9], at).unwrap();
}

#[test]
fn base_is_never_replaced_by_its_own_delta() {
    let (folder, [base, one, _], _) = chain();
    let from = captured(&folder, 4 * MIB);
    for target in [&base, &one] {
        let before = fs::read(target).unwrap();
        let ended = run(["receive", "--force", "--base", text(&one), LOCAL, text(target)]);
        ended.assert_failed(1, &["cannot use ", "is needed to read the delta that would replace it"]);
        assert!(fs::read(target).unwrap() == before);
    }
    // A file without digests is no base, and many machines have not one base.
    run(["receive", "--base", text(&from), LOCAL, text(&path(&folder, "x"))])
        .assert_failed(1, &["cannot use", "it has no digests"]);
    run(["receive", "--base", text(&base), "--dir", text(folder.path()), LOCAL])
        .assert_failed(2, &["--base"]);
}

#[test]
fn folder_of_a_chain_can_be_moved_and_the_base_can_be_in_another_one() {
    let (folder, [base, one, _], memories) = chain();
    let nights = path(&folder, "nights");
    fs::create_dir(&nights).unwrap();
    let from = captured(&folder, 4 * MIB);
    let (delta, _) = receive(&folder, &from, &["--base", text(&one)], "nights/three");
    let memory = stored_memory(&from);
    let moved = path(&folder, "moved");
    fs::create_dir(&moved).unwrap();
    for file in [&base, &one, &nights] {
        fs::rename(file, moved.join(file.file_name().unwrap())).unwrap();
    }
    assert!(!delta.exists());
    let out = path(&folder, "out");
    let delta = moved.join("nights/three");
    assert_eq!(merge(&[text(&delta), text(&out)]).code, Some(0));
    assert!(stored_memory(&out) == memory && memory == memories[0]);
}

#[test]
fn full_disk_while_merging_is_an_error_that_leaves_nothing() {
    let folder = folder();
    let from = captured(&folder, 32 * MIB);
    let (base, _) = receive(&folder, &from, &[], "base");
    fill(&from, 9, 9);
    let (delta, _) = receive(&folder, &from, &["--base", text(&base)], "delta");
    let (mount, list) = (path(&folder, "mount"), path(&folder, "list"));
    fs::create_dir(&mount).unwrap();
    let then = format!("; code=$?; ls -A {} >{}; (exit $code)", mount.display(), list.display());
    let out = mount.join("out").display().to_string();
    for options in [&[][..], &["--direct-io"]] {
        let arguments = [&["merge"], options, &[text(&delta), &out]].concat();
        let Some(mut command) = mounted("-t tmpfs -o size=8M none", &mount, &arguments, &then) else {
            return;
        };
        let ended = Program::start(&mut command).end_within(Duration::from_secs(20));
        ended.assert_failed(
            1,
            &[" may become full: ", "cannot merge into ", "write block \"pc.ram\" at offset 0x"],
        );
        ended.assert_failed(1, &["No space left on device"]);
        assert_eq!(fs::read_to_string(&list).unwrap(), "");
    }
}

#[test]
fn metrics_of_a_merge_have_its_end() {
    let (folder, [_, _, two], _) = chain();
    let (out, metrics) = (path(&folder, "out"), path(&folder, "merge.prom"));
    assert_eq!(merge(&["--quiet", "--metrics", text(&metrics), text(&two), text(&out)]).code, Some(0));
    let page = fs::read_to_string(metrics).unwrap();
    assert!(page.contains("verb=\"merge\"") && page.ends_with("# EOF\n"), "{page}");
}
