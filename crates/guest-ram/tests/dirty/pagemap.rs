//! The kernel's logs of a process's own memory: no writer marks, and every write is found.
//!
//! UNSAFETY: memory is mapped again over a block's, which no writer touches meanwhile.
#![expect(unsafe_code, reason = "memory is mapped anew")]

use std::{
    error::Error,
    fs::File,
    io::{self, ErrorKind},
    os::unix::{fs::FileExt, process::CommandExt},
    process::Command,
    ptr::NonNull,
    sync::{Arc, RwLock},
};

use guest_ram::{
    Access, BlockIndex, DirtyBitmaps, DirtyLog, DirtyPages, Mapping, Memory, MergedLog, PageBitmap,
    PageIndex, PageSize, PagemapLog, RamBlock, RamBlocks, SoftDirtyLog,
};
use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    mm::{MapFlags, ProtFlags, mmap_anonymous},
};

use super::{Forgetful, MILLION, by_two_threads, first_word, follow, word};
use crate::kit;

/// A log of `blocks`; `None` if the kernel does not support it.
fn log(blocks: &Arc<RamBlocks>) -> Option<PagemapLog> {
    match PagemapLog::start(blocks.clone()) {
        Ok(log) => Some(log),
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            multifd_testkit::lacks(&error.to_string());
            None
        }
        Err(error) => panic!("{error}: {:?}", error.source()),
    }
}

fn private() -> Arc<RamBlocks> {
    kit::fresh(PageSize::KIB_4, &[("a", 4096 << 12), ("b", 101 << 12)])
}

fn shared(file: &File, pages: u64) -> Arc<RamBlocks> {
    let memory = Mapping::of_file(file, 0, pages << 12, Access::ReadWrite).expect("mapped");
    let block = RamBlock::new(kit::name("ram"), pages << 12, PageSize::KIB_4, Memory::Mapped(memory));
    Arc::new(RamBlocks::new(vec![block.expect("a block")]).expect("one"))
}

fn memfd(flags: MemfdFlags, len: u64) -> File {
    let file = memfd_create("ram", MemfdFlags::CLOEXEC | flags).expect("a memfd");
    ftruncate(&file, len).expect("sized");
    file.into()
}

/// Writes [`word`] to the first bytes of a page.
fn write(blocks: &RamBlocks, block: BlockIndex, page: PageIndex, round: u64) {
    let block = blocks.block(block).expect("there");
    let Memory::Mapped(mapping) = block.memory() else { panic!("in memory") };
    mapping.slice(block.offset_of(page).expect("there").0, 8).expect("inside").copy_from(&word(round));
}

fn taken(log: &mut dyn DirtyLog, blocks: &RamBlocks, block: usize) -> Vec<u64> {
    let into = PageBitmap::new(blocks.block(BlockIndex(block)).expect("there").pages());
    log.take(BlockIndex(block), &mut DirtyPages::new(&into)).expect("taken");
    (0..into.pages()).filter(|page| into.contains(PageIndex(*page))).collect()
}

fn followed(blocks: &Arc<RamBlocks>, writes: u64) -> Option<super::Found> {
    let mut log = log(blocks)?;
    Some(follow(&mut log, blocks, writes, |round| {
        by_two_threads(blocks, |block, page| write(blocks, block, page, round));
    }))
}

#[test]
fn a_million_writes_to_private_memory_are_found_though_nobody_marks() {
    if let Some(found) = followed(&private(), MILLION) {
        found.assert_whole();
    }
}

/// Memory that the kernel may then have in huge pages, which it splits.
#[test]
fn a_million_writes_to_memory_that_was_written_before_are_found() {
    let blocks = private();
    by_two_threads(&blocks, |block, page| write(&blocks, block, page, 0));
    if let Some(found) = followed(&blocks, MILLION) {
        found.assert_whole();
    }
}

#[test]
fn a_million_writes_to_a_memfd_are_found() {
    if let Some(found) = followed(&shared(&memfd(MemfdFlags::empty(), 4096 << 12), 4096), MILLION) {
        found.assert_whole();
    }
}

#[test]
fn writes_to_a_file_on_a_disk_are_found() {
    let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).expect("a file");
    file.set_len(4096 << 12).expect("sized");
    if let Some(found) = followed(&shared(&file, 4096), 100_000) {
        assert_eq!(found.lost, 0, "{found:?}");
    }
}

/// The block ends inside its last huge page.
#[test]
fn writes_to_huge_pages_are_found_up_to_a_block_s_end_inside_one() {
    let file = memfd(MemfdFlags::HUGETLB, 8 << 20);
    let memory = match Mapping::of_file(&file, 0, (6 << 20) + 4096, Access::ReadWrite) {
        Ok(memory) => memory,
        Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => {
            return multifd_testkit::lacks("this machine has no huge pages reserved");
        }
        Err(error) => panic!("{error}"),
    };
    let block = RamBlock::new(kit::name("ram"), (6 << 20) + 4096, PageSize::KIB_4, Memory::Mapped(memory));
    let blocks = Arc::new(RamBlocks::new(vec![block.expect("a block")]).expect("one"));
    {
        let Some(mut log) = log(&blocks) else { return };
        let found = follow(&mut log, &blocks, 100_000, |round| {
            by_two_threads(&blocks, |block, page| write(&blocks, block, page, round));
        });
        assert_eq!(found.lost, 0, "{found:?}");
        write(&blocks, BlockIndex(0), PageIndex(1536), 7);
        assert_eq!(taken(&mut log, &blocks, 0), [1536]);
        write(&blocks, BlockIndex(0), PageIndex(600), 7);
        assert_eq!(taken(&mut log, &blocks, 0), (512..1024).collect::<Vec<_>>());
    }
}

#[test]
fn one_write_lost_behind_the_page_table_is_noticed() {
    let blocks = private();
    let Some(log) = log(&blocks) else { return };
    let mut forgetful = Forgetful { log, which: (MILLION / 2).into() };
    let found = follow(&mut forgetful, &blocks, MILLION, |round| {
        by_two_threads(&blocks, |block, page| write(&blocks, block, page, round));
    });
    assert!(found.writes >= MILLION);
    assert_eq!(found.lost, 1, "{found:?}");
}

/// A device in another process, or one that writes by physical address: here a second mapping of the same memory.
#[test]
fn writes_past_the_page_table_are_found_if_they_are_marked_in_a_merged_log() {
    let file = memfd(MemfdFlags::empty(), 4096 << 12);
    let (blocks, theirs) = (shared(&file, 4096), shared(&file, 4096));
    let Some(mut threads) = log(&blocks) else { return };
    write(&theirs, BlockIndex(0), PageIndex(9), 0);
    assert_eq!(taken(&mut threads, &blocks, 0), NONE, "so it has to be marked");
    let devices = DirtyBitmaps::new(&blocks);
    let mut merged =
        MergedLog::new().with("the threads", threads).with("the devices", devices.reader().expect("alone"));
    let found = follow(&mut merged, &blocks, MILLION, |round| {
        by_two_threads(&blocks, |block, page| {
            if (page.0 + round) % 3 == 0 {
                write(&theirs, block, page, round);
                devices.mark(block, page);
            } else {
                write(&blocks, block, page, round);
            }
        });
    });
    found.assert_whole();
}

/// The kernel itself writes into protected memory, and the log contains it.
#[test]
fn what_a_system_call_writes_is_found() {
    let blocks = private();
    let Some(mut log) = log(&blocks) else { return };
    let file = tempfile::tempfile().expect("a file");
    file.write_all_at(&[7; 3 << 12], 0).expect("written");
    let target = blocks.block(BlockIndex(0)).expect("there").slice(PageIndex(10), 3).expect("there");
    // SAFETY: the slice is writable and as long as passed; nobody else accesses it.
    let read =
        unsafe { libc::pread(std::os::fd::AsRawFd::as_raw_fd(&file), target.as_ptr().cast(), 3 << 12, 0) };
    assert_eq!(read, 3 << 12, "{}", io::Error::last_os_error());
    assert_eq!(taken(&mut log, &blocks, 0), [10, 11, 12]);
    assert_eq!(taken(&mut log, &blocks, 0), NONE);
}

#[test]
fn memory_that_is_only_read_is_not_dirty_touched_before_or_not() {
    for file in [None, Some(memfd(MemfdFlags::empty(), 4096 << 12))] {
        let blocks = file.as_ref().map_or_else(private, |file| shared(file, 4096));
        (0..600).for_each(|page| write(&blocks, BlockIndex(0), PageIndex(page), 1));
        let Some(mut log) = log(&blocks) else { return };
        let block = blocks.block(BlockIndex(0)).expect("there");
        (0..4096)
            .map(PageIndex)
            .for_each(|page| assert_eq!(first_word(block, page) == [0; 8], page.0 >= 600));
        assert_eq!(taken(&mut log, &blocks, 0), NONE);
        write(&blocks, BlockIndex(0), PageIndex(5), 2);
        write(&blocks, BlockIndex(0), PageIndex(4000), 2);
        assert_eq!(taken(&mut log, &blocks, 0), [5, 4000]);
    }
}

#[test]
fn a_page_of_several_host_pages_is_dirty_if_one_of_them_is_and_the_rest_behind_the_last_is_nothing() {
    for page_size in [PageSize::KIB_16, PageSize::KIB_64] {
        let page = page_size.bytes() as u64;
        let length = 5 * page + 4096 + 100;
        let blocks = kit::fresh(page_size, &[("a", length), ("less than a page", 4096), ("b", page)]);
        let Some(mut log) = log(&blocks) else { return };
        let at = |block: usize, offset: u64| {
            let Memory::Mapped(mapping) = blocks.block(BlockIndex(block)).expect("there").memory() else {
                panic!("in memory")
            };
            mapping.slice(offset, 1).expect("inside").copy_from(&[1]);
        };
        at(0, 2 * page + 3 * 4096);
        at(0, 5 * page - 1);
        at(0, 5 * page);
        at(1, 0);
        assert_eq!(taken(&mut log, &blocks, 0), [2, 4], "{page_size}");
        assert_eq!(taken(&mut log, &blocks, 1), NONE, "{page_size}");
        assert_eq!(taken(&mut log, &blocks, 2), NONE, "{page_size}");
        at(2, page - 1);
        assert_eq!(taken(&mut log, &blocks, 2), [0], "{page_size}");
        // The other parts of a page that was taken are still watched.
        at(0, 2 * page);
        assert_eq!(taken(&mut log, &blocks, 0), [2], "{page_size}");
    }
}

#[test]
fn a_log_that_was_dropped_is_off_and_the_next_begins_anew() {
    let blocks = private();
    for round in 0..2 {
        let Some(mut log) = log(&blocks) else { return };
        assert_eq!(taken(&mut log, &blocks, 0), NONE);
        write(&blocks, BlockIndex(0), PageIndex(3), round);
        let second = PagemapLog::start(blocks.clone()).expect_err("one at a time");
        assert_eq!(second.kind(), ErrorKind::ResourceBusy);
        assert_eq!(second.to_string(), r#"block "a": another userfaultfd watches its memory"#);
        assert_eq!(taken(&mut log, &blocks, 0), [3], "the first is as it was");
        let back = PageBitmap::new(101);
        back.set_run(PageIndex(7), 2);
        log.put_back(BlockIndex(1), &back);
        assert_eq!(taken(&mut log, &blocks, 1), [7, 8]);
        assert_eq!(taken(&mut log, &blocks, 1), NONE);
        drop(log);
        write(&blocks, BlockIndex(1), PageIndex(1), round);
    }
}

/// The second one would share the bit of a host page with the memory before it.
#[test]
fn block_that_starts_inside_a_host_page_is_refused_by_name_and_no_other_stays_protected() {
    let memory = Mapping::anonymous(3 << 12).expect("memory");
    let base = memory.slice(2048, 1).expect("inside").as_ptr();
    let base = NonNull::new(base).expect("not null");
    // SAFETY: what is mapped there is kept, and longer than that.
    let memory = unsafe { Mapping::from_raw(base, 2 << 12, memory) };
    let odd = RamBlock::new(kit::name("odd"), 2 << 12, PageSize::KIB_4, Memory::Mapped(memory));
    let whole = || {
        let memory = Memory::Mapped(Mapping::anonymous(4 << 12).expect("memory"));
        RamBlock::new(kit::name("whole"), 4 << 12, PageSize::KIB_4, memory).expect("a block")
    };
    let blocks = Arc::new(RamBlocks::new(vec![whole(), odd.expect("a block")]).expect("two"));
    if log(&Arc::new(RamBlocks::new(vec![whole()]).expect("one"))).is_none() {
        return;
    }
    for _ in 0..2 {
        let refused = PagemapLog::start(blocks.clone()).expect_err("refused");
        assert_eq!(refused.kind(), ErrorKind::InvalidInput);
        assert!(
            refused.to_string().starts_with(r#"block "odd": expected its memory to start on"#),
            "{refused}"
        );
    }
}

#[test]
fn memory_that_cannot_be_protected_is_refused_by_the_block_s_name() {
    /// `mmap`'s `MAP_DROPPABLE`: memory that the system may reclaim (Linux 6.11).
    const DROPPABLE: u32 = 0x08;
    let flags = MapFlags::from_bits_retain(DROPPABLE);
    // SAFETY: a null hint lets the kernel choose a range that nothing else uses.
    let base =
        unsafe { mmap_anonymous(std::ptr::null_mut(), 4 << 12, ProtFlags::READ | ProtFlags::WRITE, flags) };
    let Ok(base) = base else { return multifd_testkit::lacks("the kernel has no memory that it may drop") };
    let base = NonNull::new(base.cast()).expect("not null");
    // SAFETY: it stays mapped to the end of the program.
    let memory = Memory::Mapped(unsafe { Mapping::from_raw(base, 4 << 12, ()) });
    let block = RamBlock::new(kit::name("cache"), 4 << 12, PageSize::KIB_4, memory).expect("a block");
    let refused = PagemapLog::start(Arc::new(RamBlocks::new(vec![block]).expect("one")));
    let refused = refused.expect_err("refused");
    assert_eq!(refused.to_string(), r#"block "cache": its memory cannot be protected against writing"#);
    assert!(refused.source().is_some());
}

#[test]
fn memory_mapped_anew_under_the_log_fails_the_take_by_name_and_counts_as_written() {
    let blocks = private();
    let Some(mut log) = log(&blocks) else { return };
    let pages = blocks.block(BlockIndex(1)).expect("there").slice(PageIndex(50), 2).expect("there");
    let flags = MapFlags::PRIVATE | MapFlags::FIXED;
    // SAFETY: the range is the block's, nobody is using it, and what is mapped now is as readable and writable as
    // before.
    unsafe { mmap_anonymous(pages.as_ptr().cast(), pages.len(), ProtFlags::READ | ProtFlags::WRITE, flags) }
        .expect("mapped anew");
    let into = PageBitmap::new(101);
    let failed = log.take(BlockIndex(1), &mut DirtyPages::new(&into)).expect_err("not watched any more");
    assert_eq!(failed.kind(), ErrorKind::PermissionDenied);
    assert!(failed.to_string().starts_with(r#"block "b": "#), "{failed}");
    let again = PageBitmap::new(101);
    log.take(BlockIndex(1), &mut DirtyPages::new(&again)).expect_err("still");
    assert_eq!(again.count(), 101);
    write(&blocks, BlockIndex(0), PageIndex(1), 1);
    assert_eq!(taken(&mut log, &blocks, 0), [1], "the others are as they were");
}

/// By default only root may handle faults of the kernel; this log does not need that.
#[test]
fn a_process_without_privileges_finds_its_writes() {
    if !rustix::process::geteuid().is_root() {
        // The other tests cover this case.
        return;
    }
    // This name finds the program even if its folders are not accessible.
    let mut child = Command::new("/proc/self/exe");
    let names = [
        "pagemap::a_million_writes_to_private_memory_are_found_though_nobody_marks",
        "pagemap::what_a_system_call_writes_is_found",
    ];
    child.arg("--exact").args(names).uid(NOBODY).gid(NOBODY).current_dir("/");
    let done = child.output().expect("started");
    let said = String::from_utf8_lossy(&done.stdout);
    assert!(
        done.status.success() && said.contains("2 passed"),
        "{said}\n{}",
        String::from_utf8_lossy(&done.stderr)
    );
}

const NONE: [u64; 0] = [];
const NOBODY: u32 = 65_534;

/// If the kernel has such bits, every write is found, with the writers paused for each take. If not, the log is
/// refused.
#[test]
fn soft_dirty_bits_find_a_million_writes_or_are_refused() {
    let blocks = private();
    let running = RwLock::new(());
    let still = |sweep: &mut dyn FnMut()| {
        let _all = running.write().expect("whole");
        sweep();
    };
    let mut log = match SoftDirtyLog::start(blocks.clone(), still) {
        Ok(log) => log,
        Err(refused) => {
            assert_eq!(refused.kind(), ErrorKind::Unsupported);
            assert_eq!(refused.to_string(), "the kernel has no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)");
            return multifd_testkit::lacks(&refused.to_string());
        }
    };
    assert_eq!(
        SoftDirtyLog::start(blocks.clone(), |sweep: &mut dyn FnMut()| sweep()).expect_err("one").kind(),
        ErrorKind::ResourceBusy
    );
    let found = follow(&mut log, &blocks, MILLION, |round| {
        by_two_threads(&blocks, |block, page| {
            let _one = running.read().expect("whole");
            write(&blocks, block, page, round);
        });
    });
    found.assert_whole();
    let back = PageBitmap::new(101);
    back.set_run(PageIndex(7), 2);
    taken(&mut log, &blocks, 1);
    log.put_back(BlockIndex(1), &back);
    assert_eq!(taken(&mut log, &blocks, 1), [7, 8]);
    drop(log);
    let file = memfd(MemfdFlags::empty(), 4 << 12);
    let refused =
        SoftDirtyLog::start(shared(&file, 4), |sweep: &mut dyn FnMut()| sweep()).expect_err("refused");
    assert_eq!(refused.to_string(), r#"block "ram": the kernel may forget that shared memory was written"#);
}
