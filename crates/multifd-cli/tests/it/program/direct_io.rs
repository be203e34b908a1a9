//! `--direct-io`: the same bytes, with direct I/O if possible.

use std::{
    fs::{self, File},
    io::IoSliceMut,
    path::{Path, PathBuf},
};

use multifd::ram::BlockIndex;
use qemu_stream::mapped_ram::MappedRamFile;
use rustix::{
    fs::{Advice, fadvise, fstatfs},
    io::{Errno, ReadWriteFlags, preadv2},
};
use tempfile::TempDir;

use super::disks::mounted;
use crate::kit::{Ended, Program, captured, feed, folder, machine_in, path, run, stored_memory};

const LOCAL: &str = "tcp:127.0.0.1:0";
const MIB: u64 = 1 << 20;
const DIRECT: &[&str] = &["--direct-io"];
const CACHED: &[&str] = &[];

/// Captures what a file holds.
fn capture(options: &[&str], from: &Path, to: &Path) -> Ended {
    let (receive, address) = Program::receive(options, LOCAL, to);
    feed(&["--multifd-channels", "3"], from, &address).done();
    receive.done()
}

/// The number of a file's pages of RAM that are in the page cache; `None` if the file system is in memory.
fn resident(file: &Path) -> Option<usize> {
    const TMPFS: i64 = 0x0102_1994;
    let file = MappedRamFile::open(File::open(file).unwrap(), 0).unwrap();
    if fstatfs(file.file()).unwrap().f_type == TMPFS {
        return None;
    }
    // Reading a page that is absent from the cache may make the system read the pages after it, too. This limits it to
    // one page.
    fadvise(file.file(), 0, None, Advice::Random).unwrap();
    let place = file.place(BlockIndex(0)).unwrap();
    let pages = (0..place.pages()).map(|page| place.pages_offset + page * 4096);
    let resident = pages.filter(|at| {
        let mut byte = [0];
        match preadv2(file.file(), &mut [IoSliceMut::new(&mut byte)], *at, ReadWriteFlags::NOWAIT) {
            Ok(count) => count > 0,
            Err(Errno::AGAIN) => false,
            Err(error) => panic!("{error}"),
        }
    });
    Some(resident.count())
}

#[test]
fn capture_past_the_page_cache_is_the_same_to_the_byte_and_leaves_the_cache_alone() {
    let folder = folder();
    let from = captured(&folder, 16 * MIB);
    let (cached, direct) = (path(&folder, "cached"), path(&folder, "direct"));
    capture(CACHED, &from, &cached);
    let ended = capture(DIRECT, &from, &direct);
    assert!(!ended.stderr.contains("direct-io"), "{ended:?}");
    // Before anything reads them.
    if let (Some(by_cache), Some(past_it)) = (resident(&cached), resident(&direct)) {
        assert!(by_cache > 4000 && past_it < 100, "{by_cache} and {past_it} of 4096 pages are in the cache");
    }
    let [cached, direct] = [cached, direct].map(|file| machine_in(&file));
    assert!(cached == direct, "RAM, bitmaps and devices");
}

#[test]
fn file_is_sent_past_the_page_cache() {
    let folder = folder();
    let (from, file) = (captured(&folder, 16 * MIB), path(&folder, "machine"));
    let open = File::open(&from).unwrap();
    open.sync_all().unwrap();
    fadvise(&open, 0, None, Advice::DontNeed).unwrap();
    let (receive, address) = Program::receive(&[], LOCAL, &file);
    let sent = feed(DIRECT, &from, &address).done();
    receive.done();
    assert!(!sent.stderr.contains("direct-io"), "{sent:?}");
    if let Some(pages) = resident(&from) {
        assert!(pages < 100, "{pages} of 4096 pages are in the cache");
    }
    assert!(stored_memory(&file) == stored_memory(&from), "equal RAM");
}

#[test]
fn packed_pages_of_a_file_are_read_past_the_page_cache() {
    let folder = folder();
    let (from, file) = (captured(&folder, 4 * MIB), path(&folder, "machine"));
    for method in ["zlib", "zstd"] {
        for direct in [DIRECT, CACHED] {
            let (receive, address) = Program::receive(&["--force"], LOCAL, &file);
            feed(&[direct, &["--multifd-compression", method][..]].concat(), &from, &address).done();
            receive.done();
            assert!(stored_memory(&file) == stored_memory(&from), "equal RAM with {method}");
        }
    }
}

/// A file whose pages begin at the boundary of a page and of nothing larger, as others may write it.
fn page_aligned(folder: &TempDir, bytes: u64) -> PathBuf {
    let from = captured(folder, bytes);
    let place = *MappedRamFile::open(File::open(&from).unwrap(), 0).unwrap().place(BlockIndex(0)).unwrap();
    let bitmap_end = place.bitmap_offset + place.bitmap_words() * 8;
    let pages_offset = bitmap_end.next_multiple_of(4096) + 4096;
    let old = fs::read(&from).unwrap();
    let at = |offset: u64| usize::try_from(offset).unwrap();
    let mut new = old[..at(bitmap_end)].to_vec();
    // The last field of the block's header, right before the bitmap.
    new[at(place.bitmap_offset) - 8..at(place.bitmap_offset)].copy_from_slice(&pages_offset.to_be_bytes());
    new.resize(at(pages_offset), 0);
    new.extend(&old[at(place.pages_offset)..]);
    let path = path(folder, "page-aligned");
    fs::write(&path, new).unwrap();
    assert!(stored_memory(&path) == stored_memory(&from), "the same machine");
    path
}

#[test]
fn file_of_others_that_is_aligned_to_pages_alone_is_sent() {
    let folder = folder();
    let (from, file) = (page_aligned(&folder, 8 * MIB), path(&folder, "machine"));
    let (receive, address) = Program::receive(&[], LOCAL, &file);
    feed(DIRECT, &from, &address).done();
    receive.done();
    assert!(stored_memory(&file) == stored_memory(&from), "equal RAM");
}

/// ramfs has no disk for direct I/O.
#[test]
fn file_system_without_direct_io_is_told_once_and_the_page_cache_used() {
    let folder = folder();
    let (from, mount, out) = (captured(&folder, 8 * MIB), path(&folder, "mount"), path(&folder, "out"));
    fs::create_dir(&mount).unwrap();
    let then = format!("&& cp {}/machine {}", mount.display(), out.display());
    let machine = format!("{}/machine", mount.display());
    let arguments = ["receive", "--direct-io", LOCAL, &machine];
    let Some(mut command) = mounted("-t ramfs none", &mount, &arguments, &then) else { return };
    let receive = Program::start(&mut command);
    let told = receive.next_line();
    assert!(
        told.starts_with("direct-io: ") && told.ends_with(": its file system has no direct I/O"),
        "{told}"
    );
    feed(&[], &from, &receive.listening()).done();
    let ended = receive.done();
    assert_eq!(ended.stderr.matches("direct-io").count(), 1, "{ended:?}");
    assert!(stored_memory(&out) == stored_memory(&from), "equal RAM");
}

#[test]
fn pages_over_main_go_through_the_page_cache_which_is_told() {
    let folder = folder();
    let (from, file) = (captured(&folder, MIB), path(&folder, "machine"));
    let (receive, address) = Program::receive(DIRECT, LOCAL, &file);
    let sent = feed(&["--direct-io", "--multifd-channels", "0"], &from, &address).done();
    let received = receive.done();
    for ended in [sent, received] {
        assert!(
            ended.stderr.contains("direct-io: pages on the main connection use the page cache"),
            "{ended:?}"
        );
    }
    assert!(stored_memory(&file) == stored_memory(&from), "equal RAM");
    let refused = run(["inspect", "--direct-io", "machine"]);
    refused.assert_failed(2, &["--direct-io"]);
}
