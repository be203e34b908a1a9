//! The log of kernels that only have soft-dirty bits: cleared for the whole process at once, set by the first write.
//!
//! ```text
//! writers paused:  pagemap, bit 55 of each page ─▶ held ; "4" ─▶ clear_refs
//! writers running:       held ─▶ into
//! ```
//!
//! Reading the bits and clearing them are two steps. A write between the two would be lost silently, and the kernel
//! offers no way to close that gap. So the writers are paused for both steps.
//!
//! A kernel that was built without the bits has the same files and reports no error: every bit is always clear. So the
//! bits are tested before they are trusted, in a page of our own and in the first and the last page of each block. The
//! test of each block also detects huge pages, which have no such bits. Shared memory is refused, because its bits are
//! lost when the kernel reclaims such a page under memory pressure; it is recognised by its own bit in the page table.
//!
//! UNSAFETY: to test the bits, a byte of a page is overwritten with its own value, in one atomic step.
#![expect(unsafe_code, reason = "a byte of guest memory is written with itself")]

use std::{
    fmt,
    fs::{File, OpenOptions},
    hint, io,
    io::Write,
    ops::Range,
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use zerocopy::IntoBytes;

use super::{Refused, addresses};
use crate::{
    BlockIndex, DirtyLog, DirtyPages, GuestSlice, Mapping, PageBitmap, PageIndex, RamBlock, RamBlocks,
    dirty::{mark, sole_reader::SoleReader},
    memory::residency::PAGEMAP,
};

/// The dirty log of what is written through this process's page table, for kernels before 6.7 that have
/// `CONFIG_MEM_SOFT_DIRTY`: the fall-back of [`PagemapLog`](super::PagemapLog), whose documentation has an example.
///
/// It supports only private anonymous memory. It pauses the writers for every take: for the time to read 8 bytes for
/// each page of all blocks and to clear the bits of the whole process.
///
/// The bits belong to the process, so there can be only one such log at a time.
///
/// **Warning:** nothing else may clear them, in this process or from outside (a checkpoint by CRIU does, and any write
/// to `/proc/PID/clear_refs`): pages that were written before are then not sent again, without an error.
pub struct SoftDirtyLog<W> {
    bits: Bits,
    writers: W,
    blocks: Arc<RamBlocks>,
    /// For each block: the addresses of its pages, if it has writable ones, and the bits that were read or put back.
    watched: Vec<(Option<Range<u64>>, PageBitmap)>,
    _sole_reader: SoleReader,
}

impl<W: FnMut(&mut dyn FnMut())> SoftDirtyLog<W> {
    /// Tests the bits and clears them. Writers may run.
    ///
    /// For each take, `writers` is called in the thread of the take. It must pause all writers, call the function it is
    /// given, and resume the writers. It must also wait for system calls and devices that are about to write.
    ///
    /// Blocks in a file, ignored blocks and blocks that are mapped for reading only are never dirty.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] if the kernel has no such bits, or none for the memory of a block; the error
    /// names the block. [`io::ErrorKind::ResourceBusy`] if there is such a log already; [`io::ErrorKind::InvalidInput`]
    /// if a block starts inside a page of the host.
    pub fn start(blocks: Arc<RamBlocks>, writers: W) -> io::Result<Self> {
        let sole_reader = sole_reader()?;
        let mut bits = Bits::open()?;
        let mut watched = Vec::with_capacity(blocks.len());
        for (_, block) in blocks.iter() {
            watched.push((addresses(block)?, PageBitmap::new(block.pages())));
        }
        bits.try_out(&blocks)?;
        Ok(Self { bits, writers, blocks, watched, _sole_reader: sole_reader })
    }

    /// Moves the bits of all blocks into `held`, because clearing the bits of one block clears those of all.
    fn sweep(&mut self) -> io::Result<()> {
        let (bits, watched, page_size) = (&mut self.bits, &self.watched, self.blocks.page_size());
        let mut swept = None;
        (self.writers)(&mut || {
            swept.get_or_insert_with(|| {
                for (range, held) in watched {
                    if let Some(range) = range {
                        bits.read(range, SOFT_DIRTY, |run| mark(held, page_size, run))?;
                    }
                }
                bits.clear()
            });
        });
        swept.unwrap_or_else(|| {
            Err(io::Error::other("the writers could not be stopped while the soft-dirty bits were read"))
        })
    }
}

impl<W: FnMut(&mut dyn FnMut())> DirtyLog for SoftDirtyLog<W> {
    fn begin(&mut self, blocks: &RamBlocks) -> io::Result<()> {
        self.blocks.identity().check(blocks)
    }

    fn take(&mut self, block: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()> {
        self.sweep()?;
        into.take_from(&self.watched[block.0].1);
        Ok(())
    }

    fn put_back(&mut self, block: BlockIndex, from: &PageBitmap) {
        self.watched[block.0].1.merge(from.words());
    }
}

impl<W> fmt::Debug for SoftDirtyLog<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SoftDirtyLog").field("blocks", &self.blocks).finish_non_exhaustive()
    }
}

/// The two files through which the bits are read and cleared.
#[derive(Debug)]
struct Bits {
    pagemap: File,
    clear_refs: File,
    words: Box<[u64]>,
}

impl Bits {
    fn open() -> io::Result<Self> {
        let failed =
            |path: &'static str| move |error| Refused::because(format!("{path} cannot be opened"), error);
        let pagemap = File::open(PAGEMAP).map_err(failed(PAGEMAP))?;
        let clear_refs = OpenOptions::new().write(true).open(CLEAR_REFS).map_err(failed(CLEAR_REFS))?;
        Ok(Self { pagemap, clear_refs, words: vec![0; WORDS].into() })
    }

    fn clear(&mut self) -> io::Result<()> {
        // A single write is the whole request, so `write_all` is not needed.
        self.clear_refs
            .write_all(b"4")
            .map_err(|error| Refused::because("soft-dirty bits cannot be cleared", error))
    }

    /// Calls `found` with the runs of pages whose entry has one of the bits of `mask`, in bytes from the range's start.
    fn read(&mut self, range: &Range<u64>, mask: u64, mut found: impl FnMut(Range<u64>)) -> io::Result<()> {
        let page = rustix::param::page_size() as u64;
        let count = (range.end - range.start).div_ceil(page);
        let mut at = 0;
        while at < count {
            let words = usize::try_from(count - at).unwrap_or(WORDS).min(WORDS);
            let words = &mut self.words[..words];
            let from = (range.start / page + at) * size_of::<u64>() as u64;
            self.pagemap
                .read_exact_at(words.as_mut_bytes(), from)
                .map_err(|error| Refused::because(format!("{PAGEMAP} cannot be read"), error))?;
            for run in words.chunk_by(|a, b| (a & mask != 0) == (b & mask != 0)) {
                let len = run.len() as u64;
                if run[0] & mask != 0 {
                    found(at * page..(at + len) * page);
                }
                at += len;
            }
        }
        Ok(())
    }

    /// Whether the entry of the page at `slice` has a bit of `mask`.
    fn has(&mut self, slice: GuestSlice<'_>, mask: u64) -> io::Result<bool> {
        let page = rustix::param::page_size() as u64;
        let start = slice.as_ptr().addr() as u64 / page * page;
        let mut found = false;
        self.read(&(start..start + page), mask, |_| found = true)?;
        Ok(found)
    }

    /// Writes to pages after clearing their bits, and checks that the bits are set.
    fn try_out(&mut self, blocks: &RamBlocks) -> io::Result<()> {
        let own = Mapping::anonymous(rustix::param::page_size() as u64)?;
        let own = own.slice(0, 1).ok_or(io::ErrorKind::OutOfMemory)?;
        touch(own);
        self.clear()?;
        let before = self.has(own, SOFT_DIRTY)?;
        touch(own);
        if before || !self.has(own, SOFT_DIRTY)? {
            let why = "the kernel has no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)";
            let found =
                if before { "clearing them does nothing" } else { "a written page has no soft-dirty bit" };
            return Err(Refused::with_kind(io::ErrorKind::Unsupported, why, io::Error::other(found)));
        }
        for (_, block) in blocks.iter() {
            self.try_block(block)?;
        }
        Ok(())
    }

    fn try_block(&mut self, block: &RamBlock) -> io::Result<()> {
        let ends = [Some(0), block.pages().checked_sub(1)].into_iter().flatten().map(PageIndex);
        for page in ends.filter_map(|page| block.slice(page, 1)).filter(GuestSlice::is_writable) {
            touch(page);
            let refused = |why| {
                Refused::with_kind(io::ErrorKind::Unsupported, format!("block {:?}: {why}", block.name()), {
                    io::ErrorKind::Unsupported.into()
                })
            };
            if self.has(page, FILE_OR_SHARED)? {
                return Err(refused("the kernel may forget that shared memory was written"));
            }
            if !self.has(page, SOFT_DIRTY)? {
                return Err(refused("the kernel has no soft-dirty bits for its memory"));
            }
        }
        Ok(())
    }
}

/// Overwrites the first byte with its own value.
fn touch(slice: GuestSlice<'_>) {
    // SAFETY: the slice lies in a mapping that it borrows, is writable, and a byte has no alignment. Other writers may
    // write at the same time and lose nothing: the step is atomic and changes no bit.
    let byte = unsafe { AtomicU8::from_ptr(slice.as_ptr()) };
    // Hides the zero from the compiler, which would turn the step into a read or remove it.
    byte.fetch_or(hint::black_box(0), Ordering::Relaxed);
}

/// The right of the only reader: the bits belong to the process.
fn sole_reader() -> io::Result<SoleReader> {
    SoleReader::of(std::ptr::from_ref(&OF_THE_PROCESS).addr())
}

static OF_THE_PROCESS: u8 = 0;

const CLEAR_REFS: &str = "/proc/self/clear_refs";
/// Entries read at once: 256 KiB, for 128 MiB of pages of 4 KiB.
const WORDS: usize = 1 << 15;

/// Bits of an entry: written since the bits were cleared; a page of a file, or of shared memory.
const SOFT_DIRTY: u64 = 1 << 55;
const FILE_OR_SHARED: u64 = 1 << 61;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockName, Memory, PageSize};

    /// A page is in memory.
    const PRESENT: u64 = 1 << 63;

    fn runs(bits: &mut Bits, range: &Range<u64>, mask: u64) -> Vec<Range<u64>> {
        let mut runs = Vec::new();
        bits.read(range, mask, |run| runs.push(run)).expect("read");
        runs
    }

    /// Every kernel fills in these bits, even one without soft-dirty bits.
    #[test]
    fn pages_whose_entries_have_the_bit_are_given_as_runs_of_bytes() {
        let page = rustix::param::page_size() as u64;
        // More than one read covers.
        let pages = 3 * WORDS as u64 + 5;
        let mapping = Mapping::anonymous(pages * page).expect("memory");
        let all = mapping.slice(0, usize::try_from(pages * page).expect("in memory")).expect("inside");
        // SAFETY: the range belongs to the mapping; the advice changes only what the system provides when a page is
        // touched.
        unsafe { rustix::mm::madvise(all.as_ptr().cast(), all.len(), rustix::mm::Advice::LinuxNoHugepage) }
            .expect("pages one by one");
        let border = WORDS as u64;
        let touched = [0, 3, 4, border - 1, border, 2 * border, pages - 1];
        for at in touched {
            touch(mapping.slice(at * page, 1).expect("inside"));
        }
        let start = all.as_ptr().addr() as u64;
        let mut bits = Bits::open().expect("the files");
        let found: Vec<u64> = runs(&mut bits, &(start..start + pages * page), PRESENT)
            .into_iter()
            .flat_map(|run| run.start / page..run.end / page)
            .collect();
        assert_eq!(found, touched);
        let inner = start + 3 * page..start + 6 * page;
        assert_eq!(runs(&mut bits, &inner, PRESENT), vec![0..2 * page]);
        assert_eq!(runs(&mut bits, &inner, FILE_OR_SHARED), []);
    }

    #[test]
    fn shared_memory_is_told_from_private_memory() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(1 << 20).expect("sized");
        let shared = Mapping::of_file(&file, 0, 1 << 20, crate::Access::ReadWrite).expect("mapped");
        let private = Mapping::anonymous(1 << 20).expect("memory");
        let mut bits = Bits::open().expect("the files");
        for (mapping, expected) in [(&shared, true), (&private, false)] {
            let slice = mapping.slice(4096, 1).expect("inside");
            touch(slice);
            assert_eq!(bits.has(slice, FILE_OR_SHARED).expect("read"), expected);
        }
    }

    #[test]
    fn a_byte_that_is_touched_keeps_its_value() {
        let mapping = Mapping::anonymous(1).expect("memory");
        let slice = mapping.slice(0, 1).expect("inside");
        slice.copy_from(&[0xa5]);
        touch(slice);
        let mut byte = [0];
        slice.copy_to(&mut byte);
        assert_eq!(byte, [0xa5]);
    }

    #[test]
    fn there_is_one_log_at_a_time() {
        let memory = Memory::Mapped(Mapping::anonymous(1 << 20).expect("memory"));
        let name = BlockName::new("b").expect("a name");
        let block = RamBlock::new(name, 1 << 20, PageSize::KIB_4, memory).expect("a block");
        let blocks = Arc::new(RamBlocks::new(vec![block]).expect("one"));
        let sole_reader = sole_reader().expect("no other test of this program has a log");
        let second = SoftDirtyLog::start(blocks, |sweep| sweep()).expect_err("taken");
        assert_eq!(second.kind(), io::ErrorKind::ResourceBusy);
        drop(sole_reader);
    }
}
