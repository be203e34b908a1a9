//! Guest memory that other processes share, of which the guest uses a part; and memory with parts that nothing may
//! access.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, MetadataExt},
    ptr::NonNull,
    sync::Arc,
};

use multifd::{
    Error, SendOptions,
    live::{MigrateOptions, ZeroPageDetection},
    ram::{
        self, Access, BlockIndex, DirtyLog, DirtyPages, Mapping, Memory, NeverDirty, PageBitmap, PageIndex,
        PageSize, RamBlock, RamBlocks,
    },
};
use rustix::{
    fs::{MemfdFlags, memfd_create},
    mm::{Advice, MprotectFlags, madvise, mprotect},
};

use crate::kit::{StoppedGuest, difference, fresh, migrate, migrate_with, name, write};

const PAGES: u64 = 16 << 10;
const LENGTH: u64 = PAGES << 12;
/// The only pages that the guest has used.
const USED: [u64; 4] = [0, 700, 701, PAGES - 1];

fn memfd(flags: MemfdFlags) -> io::Result<File> {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC | flags)?);
    file.set_len(LENGTH)?;
    Ok(file)
}

fn shared(file: &File, vouch: bool) -> io::Result<Arc<RamBlocks>> {
    let mapping = Mapping::of_file(file, 0, LENGTH, Access::ReadWrite)?;
    let mapping = if vouch { mapping.never_shrinks() } else { mapping };
    let block = RamBlock::new(name("ram"), LENGTH, PageSize::KIB_4, Memory::Mapped(mapping));
    Ok(Arc::new(RamBlocks::new(vec![block.expect("a block")]).expect("one")))
}

/// Pages that are allocated in the file.
fn allocated(file: &File) -> u64 {
    file.metadata().expect("known").blocks() * 512 / 4096
}

/// Pages of a block that are in this process's page table, and so count as its resident memory.
fn resident(blocks: &RamBlocks) -> usize {
    let block = blocks.block(BlockIndex(0)).expect("there");
    let memory = block.slice(PageIndex(0), block.pages()).expect("mapped");
    let mut entries = vec![0; memory.len() / 4096 * 8];
    let pagemap = File::open("/proc/self/pagemap").expect("the page table");
    pagemap.read_exact_at(&mut entries, (memory.as_ptr().addr() / 4096 * 8) as u64).expect("read");
    entries.chunks_exact(8).filter(|entry| entry[7] & 0x80 != 0).count()
}

/// Regression: a memfd of 4 GiB of which 3 MiB were used had 4 GiB after a migration, at both ends.
#[test]
fn sparse_memfd_is_as_sparse_after_a_migration_at_both_ends() {
    for detection in [ZeroPageDetection::Multifd, ZeroPageDetection::Legacy] {
        for (look, vouch, channels) in
            [(true, true, 2), (true, false, 2), (false, true, 2), (false, false, 2), (true, true, 0)]
        {
            let files = [0, 1].map(|_| memfd(MemfdFlags::empty()).expect("a memfd"));
            let [source, destination] = [0, 1].map(|at| shared(&files[at], vouch).expect("mapped"));
            USED.iter().for_each(|page| write(&source, 0, *page, 3));
            let options = MigrateOptions::new().zero_page_detection(detection).look_for_zero_pages(look);
            let guest = &mut StoppedGuest::default();
            let outcome = migrate(&source, &destination, channels, options, &mut NeverDirty, guest);
            let sent = outcome.sent.expect("sent");
            outcome.received.expect("received");
            let what = format!("{detection:?}, look {look}, never shrinks {vouch}, {channels} channels");
            assert_eq!((sent.ram.normal, sent.ram.duplicate), (4, PAGES - 4), "{what}");
            assert_eq!([0, 1].map(|at| allocated(&files[at])), [4, 4], "{what}");
            assert!(resident(&source) <= 4 * 16, "{what}: {} pages", resident(&source));
            assert!(resident(&destination) <= 4 * 16, "{what}: {} pages", resident(&destination));
            assert_eq!(difference(&source, &destination), None, "{what}");
        }
    }
}

/// Without huge pages set aside (`/proc/sys/vm/nr_hugepages`, 20 of 2 MiB) this is listed as skipped.
#[test]
fn sparse_file_of_huge_pages_is_as_sparse_after_a_migration_at_both_ends() {
    const SMALL: u64 = 10 * (2 << 20);
    let both = || -> io::Result<_> {
        let make = || -> io::Result<_> {
            let file = memfd(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)?;
            file.set_len(SMALL)?;
            let mapping = Mapping::of_file(&file, 0, SMALL, Access::ReadWrite)?.never_shrinks();
            let block = RamBlock::new(name("ram"), SMALL, PageSize::KIB_4, Memory::Mapped(mapping));
            Ok((file, Arc::new(RamBlocks::new(vec![block.expect("a block")]).expect("one"))))
        };
        Ok((make()?, make()?))
    };
    let Ok(((from, source), (to, destination))) = both() else {
        multifd_testkit::lacks("20 huge pages of 2 MiB");
        return;
    };
    [0, 5 * 512 + 511].iter().for_each(|page| write(&source, 0, *page, 3));
    let options = MigrateOptions::new().zero_page_detection(ZeroPageDetection::Multifd);
    let outcome = migrate(&source, &destination, 2, options, &mut NeverDirty, &mut StoppedGuest::default());
    outcome.sent.expect("sent");
    outcome.received.expect("received");
    assert_eq!((allocated(&from), allocated(&to)), (1024, 1024));
    assert_eq!(difference(&source, &destination), None);
}

/// A log that does something at its `at`th take of bits, and reports a page as written.
struct Meanwhile<F> {
    at: usize,
    taken: usize,
    page: u64,
    happens: F,
}

impl<F: FnMut()> DirtyLog for Meanwhile<F> {
    fn begin(&mut self, _: &RamBlocks) -> io::Result<()> {
        Ok(())
    }
    fn take(&mut self, _: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()> {
        self.taken += 1;
        if self.taken == self.at {
            (self.happens)();
            into.add(PageIndex(self.page));
        }
        Ok(())
    }
    fn put_back(&mut self, _: BlockIndex, _: &PageBitmap) {}
}

#[test]
fn page_of_a_hole_that_is_written_after_the_look_arrives() {
    for at in [2, 3] {
        let files = [0, 1].map(|_| memfd(MemfdFlags::empty()).expect("a memfd"));
        let [source, destination] = [0, 1].map(|at| shared(&files[at], true).expect("mapped"));
        write(&source, 0, 5, 1);
        // By another process, through its own mapping.
        let (other, page) = (shared(&files[0], true).expect("mapped"), 900);
        let mut log = Meanwhile { at, taken: 0, page, happens: || write(&other, 0, page, 7) };
        let options = MigrateOptions::new().zero_page_detection(ZeroPageDetection::Multifd);
        let outcome = migrate(&source, &destination, 2, options, &mut log, &mut StoppedGuest::default());
        outcome.sent.expect("sent");
        outcome.received.expect("received");
        assert_eq!(allocated(&files[1]), 2);
        assert_eq!(difference(&source, &destination), None, "take {at}");
    }
}

/// Takes away all rights to `count` pages of a block from `first` on, as for memory that is unplugged.
fn close(blocks: &RamBlocks, first: u64, count: u64, rights: MprotectFlags) {
    let block = blocks.block(BlockIndex(0)).expect("there");
    let slice = block.slice(PageIndex(first), count).expect("there");
    // SAFETY: the range lies within a mapping of the test; nothing accesses it but the engine, which is tested for this.
    #[expect(unsafe_code, reason = "a hole in guest memory")]
    unsafe { mprotect(slice.as_ptr().cast(), slice.len(), rights) }.expect("protected");
}

fn advise(blocks: &RamBlocks, first: u64, count: u64, advice: Advice) {
    let block = blocks.block(BlockIndex(0)).expect("there");
    let slice = block.slice(PageIndex(first), count).expect("there");
    // SAFETY: as above; at most, the pages become zero.
    #[expect(unsafe_code, reason = "guest memory is unplugged, or not to be in huge pages")]
    unsafe { madvise(slice.as_ptr().cast(), slice.len(), advice) }.expect("advised");
}

/// A machine in private memory that the embedder has mapped.
fn foreign() -> Arc<RamBlocks> {
    let ours = Mapping::anonymous(LENGTH).expect("memory");
    let base = ours.slice(0, 0).and_then(|slice| NonNull::new(slice.as_ptr())).expect("not null");
    // SAFETY: the mapping is kept alive, and no reference to its memory is made.
    #[expect(unsafe_code, reason = "memory of an embedder")]
    let mapping = unsafe { Mapping::from_raw(base, usize::try_from(LENGTH).expect("small"), ours) };
    let block = RamBlock::new(name("ram"), LENGTH, PageSize::KIB_4, Memory::Mapped(mapping));
    Arc::new(RamBlocks::new(vec![block.expect("a block")]).expect("one"))
}

fn memories() -> [(&'static str, Arc<RamBlocks>); 3] {
    let file = memfd(MemfdFlags::empty()).expect("a memfd");
    let memories = [
        ("anonymous", fresh(PageSize::KIB_4, &[("ram", LENGTH)])),
        ("foreign", foreign()),
        ("shared", shared(&file, true).expect("mapped")),
    ];
    memories.iter().for_each(|(_, blocks)| advise(blocks, 0, PAGES, Advice::LinuxNoHugepage));
    memories
}

/// Regression: the first look at such a page ended the process by SIGSEGV.
#[test]
fn unplugged_memory_is_sent_as_zero_and_never_accessed_at_either_end() {
    for detection in [ZeroPageDetection::Multifd, ZeroPageDetection::Legacy] {
        for channels in [2, 0] {
            for ((what, source), (_, destination)) in memories().into_iter().zip(memories()) {
                write(&source, 0, 5, 1);
                close(&source, 1000, 600, MprotectFlags::empty());
                close(&destination, 1000, 600, MprotectFlags::empty());
                let options = MigrateOptions::new().zero_page_detection(detection);
                let outcome = migrate(
                    &source,
                    &destination,
                    channels,
                    options,
                    &mut NeverDirty,
                    &mut StoppedGuest::default(),
                );
                let sent = outcome.sent.unwrap_or_else(|error| panic!("{what}: {error}"));
                outcome.received.expect("received");
                assert_eq!(sent.ram.normal, 1, "{what}");
                for blocks in [&source, &destination] {
                    close(blocks, 1000, 600, MprotectFlags::READ | MprotectFlags::WRITE);
                }
                assert_eq!(difference(&source, &destination), None, "{what}");
            }
        }
    }
}

fn refused(error: &Error, offset: u64, len: u64) {
    let mut chain: Vec<String> = vec![error.to_string()];
    let mut at: &dyn std::error::Error = error;
    while let Some(source) = at.source() {
        chain.push(source.to_string());
        at = source;
    }
    let text = chain.join(": ");
    let expected = format!(r#"block "ram": {len:#x} bytes from offset {offset:#x} on are mapped without"#);
    assert!(text.contains(&expected) && text.contains("PROT_NONE"), "{text}");
}

/// What they contain cannot be sent, and must not be lost. With detection none, every page is sent as bytes.
#[test]
fn memory_without_access_that_may_hold_something_is_refused_with_block_and_offset() {
    for detection in [ZeroPageDetection::Multifd, ZeroPageDetection::Legacy, ZeroPageDetection::None] {
        for channels in [2, 0] {
            for (what, source) in memories() {
                write(&source, 0, 1100, 1);
                close(&source, 1000, 600, MprotectFlags::empty());
                let destination = fresh(PageSize::KIB_4, &[("ram", LENGTH)]);
                let options = MigrateOptions::new().zero_page_detection(detection);
                let outcome = migrate(
                    &source,
                    &destination,
                    channels,
                    options,
                    &mut NeverDirty,
                    &mut StoppedGuest::default(),
                );
                let error = outcome.sent.expect_err(what);
                if detection == ZeroPageDetection::None {
                    refused(&error, 1000 << 12, 600 << 12);
                } else {
                    refused(&error, 1100 << 12, 500 << 12);
                }
            }
        }
    }
}

#[test]
fn memory_that_the_guest_unplugs_between_two_passes_is_zero_or_refused() {
    for discards in [true, false] {
        let source = foreign();
        (0..PAGES).step_by(64).for_each(|page| write(&source, 0, page, 1));
        let mut log = Meanwhile {
            at: 3,
            taken: 0,
            page: 1024,
            happens: || {
                if discards {
                    advise(&source, 1024, 512, Advice::LinuxDontNeed);
                }
                close(&source, 1024, 512, MprotectFlags::empty());
            },
        };
        let destination = fresh(PageSize::KIB_4, &[("ram", LENGTH)]);
        let options = MigrateOptions::new().zero_page_detection(ZeroPageDetection::Multifd);
        let outcome = migrate(&source, &destination, 2, options, &mut log, &mut StoppedGuest::default());
        if discards {
            outcome.sent.expect("sent");
            outcome.received.expect("received");
            let block = destination.block(BlockIndex(0)).expect("there");
            assert!(block.slice(PageIndex(1024), 1).expect("there").is_zero());
        } else {
            refused(&outcome.sent.expect_err("refused"), 1024 << 12, 512 << 12);
        }
    }
}

#[test]
fn page_that_arrives_where_the_destination_may_not_write_is_refused_before_it_is_written() {
    for rights in [MprotectFlags::empty(), MprotectFlags::READ] {
        for channels in [2, 0] {
            let source = fresh(PageSize::KIB_4, &[("ram", LENGTH)]);
            write(&source, 0, 1100, 1);
            let (_, destination) = memories().into_iter().nth(1).expect("foreign");
            close(&destination, 1000, 600, rights);
            let options = MigrateOptions::new().zero_page_detection(ZeroPageDetection::Multifd);
            let guest = &mut StoppedGuest::default();
            let send = SendOptions::new().channels(channels.max(1));
            let log = &mut NeverDirty;
            let outcome = migrate_with(&source, &destination, send, channels > 0, options, log, guest);
            let error = outcome.received.expect_err("refused");
            refused(&error, 1000 << 12, 600 << 12);
        }
    }
}

/// Regression: the error named a truncated file, which there was none of.
#[test]
fn fault_of_a_system_call_is_explained_by_what_is_mapped_there() {
    let fault = || io::Error::from(rustix::io::Errno::FAULT);
    let explained = |blocks: &RamBlocks, first| {
        let block = blocks.block(BlockIndex(0)).expect("there");
        block.explain_fault(PageIndex(first), 4, fault())
    };
    let blocks = foreign();
    close(&blocks, 1000, 600, MprotectFlags::empty());
    let error = explained(&blocks, 998);
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<ram::Error>());
    assert!(matches!(inner, Some(ram::Error::Inaccessible { .. })), "{error}");
    assert_eq!(explained(&blocks, 990).raw_os_error(), fault().raw_os_error());
    let file = memfd(MemfdFlags::empty()).expect("a memfd");
    let blocks = shared(&file, false).expect("mapped");
    assert!(explained(&blocks, 5).to_string().contains("cut shorter"));
}
