//! Compares all pages of a file with their digests, or adds digests to a file that has none.
//!
//! ```text
//! N threads: next group of 512 pages ── its runs of present pages, read in pieces ── digests ── compared or recorded
//! ```
//!
//! Reading ends at the first damage everywhere else; here all of it is read, to name every damaged page.

use std::{
    fs::File,
    io,
    num::NonZero,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use multifd::{
    Error, Result,
    channel::Stop,
    ram::{
        AlignedBuffer, BlockIndex, BlockName, BlockOffset, PageDigests, PageIndex, RamBlock, RamBlocks, runs,
    },
};

use super::{
    MappedRamFile, ReadPath,
    appendix::{self, Digested},
    capture::direct,
};

/// Reads all pages of a machine in a file.
#[derive(Clone, Debug)]
#[must_use]
pub struct Verify<'a> {
    machine: &'a MappedRamFile,
    threads: NonZero<u8>,
    direct_io: bool,
}

/// A run of pages that cannot be trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The name of the block.
    pub block: BlockName,
    /// The offset of the first page in the block.
    pub offset: BlockOffset,
    /// The position of the first page in the file.
    pub position: u64,
    /// The number of bytes, whole pages.
    pub length: u64,
    /// What is wrong with the first page: it differs from its digest, or the system's error.
    pub why: String,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Verification {
    /// The number of pages that were read. Pages that are zero are not in the file.
    pub pages: u64,
    /// The number of pages that cannot be trusted.
    pub damaged_pages: u64,
    /// The first [`MOST_DAMAGE`](Self::MOST_DAMAGE) runs of pages that cannot be trusted, in the order of the file.
    pub damage: Vec<Damage>,
}

impl Verification {
    /// The greatest number of runs that are listed.
    pub const MOST_DAMAGE: usize = 1000;
}

impl<'a> Verify<'a> {
    /// Creates a verification with two threads, through the page cache.
    pub fn new(machine: &'a MappedRamFile) -> Self {
        Self { machine, threads: NonZero::<u8>::MIN.saturating_add(1), direct_io: false }
    }

    /// The number of threads that read. Default 2.
    pub fn threads(mut self, threads: NonZero<u8>) -> Self {
        self.threads = threads;
        self
    }

    /// Bypasses the page cache, so that the disk itself is read. Default off.
    pub fn direct_io(mut self, on: bool) -> Self {
        self.direct_io = on;
        self
    }

    /// Compares all pages with their digests. `read` counts the bytes of pages that were read. Damage is no error.
    ///
    /// # Errors
    /// If the file has [no digests](MappedRamFile::has_digests), or `stop` has cancelled it.
    pub fn run(&self, read: &AtomicU64, stop: &Stop) -> Result<Verification> {
        let places = (0..self.machine.places().len()).map(BlockIndex);
        let digests: Option<Vec<_>> = places.map(|index| self.machine.digests_of(index)).collect();
        let digests = digests.ok_or_else(|| Error::other("verify the file", "it has no digests"))?;
        let found = Mutex::new((0, Vec::new()));
        let pages = self.each_piece(read, stop, |index, block, first, bytes| {
            let Some(digests) = digests.get(index.0) else { return };
            let bad = differences(block, digests, first, bytes);
            if !bad.is_empty() {
                let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                found.0 += bad.len() as u64;
                found.1.extend(bad.into_iter().map(|(page, why)| (index, page, why)));
                bound(&mut found.1);
            }
        })?;
        let (damaged_pages, pages_found) = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(Verification { pages, damaged_pages, damage: self.damage(pages_found) })
    }

    /// Adds digests to `file`, which is the machine's file, open for writing, and [`about`](MappedRamFile::about) if there is
    /// some. The contents of the pages are taken to be right.
    ///
    /// # Errors
    /// If the file has digests already, or [other bytes](MappedRamFile::trailing_bytes) after the machine; if a page cannot be
    /// read, the system cannot write, or `stop` has cancelled it.
    pub fn add(&self, file: &File, about: Option<&str>, read: &AtomicU64, stop: &Stop) -> Result<()> {
        let refused = |why: &'static str| Err(Error::other("add digests to the file", why));
        if self.machine.has_digests() {
            return refused("it has digests already");
        }
        if self.machine.trailing_bytes() > 0 {
            return refused("other data follows the machine, and would be overwritten");
        }
        let blocks = self.blocks()?;
        let digests: Vec<_> =
            blocks.iter().map(|(_, block)| PageDigests::new(block.pages(), block.page_size())).collect();
        let failed = Mutex::new(None);
        self.each_piece(read, stop, |index, block, first, bytes| match (bytes, digests.get(index.0)) {
            (Ok(bytes), Some(digests)) => digests.note(first, bytes),
            (Ok(_), None) => {}
            (Err(error), _) => {
                let offset = block.offset_of(first).map_or(u64::MAX, |offset| offset.0);
                let error = Error::io(format!("read block {:?} at offset {offset:#x}", block.name()), error);
                failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        })?;
        if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let digested = Digested { blocks: &blocks, digests: digests.iter().collect() };
        let about = about.or(self.machine.about());
        let (stream, places) = (self.machine.stream(), self.machine.places());
        let written = appendix::write(file, stream, places, Some(&digested), about);
        written.map_err(|error| Error::other("write the digests", error))?;
        file.sync_all().map_err(|error| Error::io("write the digests to the disk", error))
    }

    fn blocks(&self) -> Result<RamBlocks> {
        let direct = if self.direct_io { direct(self.machine.file()) } else { None };
        let path = direct.map_or(ReadPath::Cached, ReadPath::Direct);
        self.machine.ram_blocks_in(|_, _| path.clone(), |_| None)
    }

    /// Reads all present pages in pieces and calls `then` with each, in any thread. If a piece cannot be read, its pages are
    /// read one by one. Returns the number of pages.
    fn each_piece(
        &self,
        read: &AtomicU64,
        stop: &Stop,
        then: impl Fn(BlockIndex, &RamBlock, PageIndex, io::Result<&[u8]>) + Sync,
    ) -> Result<u64> {
        let blocks = self.blocks()?;
        let (next, pages) = (AtomicU64::new(0), AtomicU64::new(0));
        let reads = || {
            let mut buffer = AlignedBuffer::new(PIECE);
            // Relaxed: each number is taken once, in whatever order.
            while let Some((index, block, group)) = group_of(&blocks, next.fetch_add(1, Ordering::Relaxed)) {
                stop.check()?;
                for (first, count) in pieces(block, group) {
                    let page = block.page_size().bytes();
                    let length = usize::try_from(count).unwrap_or(usize::MAX).saturating_mul(page);
                    let piece = buffer.get_mut(..length).expect("a piece fits the buffer");
                    match block.load_direct(first, count, piece) {
                        Ok(()) => then(index, block, first, Ok(piece)),
                        Err(_) => {
                            for (at, bytes) in (first.0..).map(PageIndex).zip(piece.chunks_exact_mut(page)) {
                                let loaded = block.load_direct(at, 1, bytes);
                                then(index, block, at, loaded.map(|()| &*bytes));
                            }
                        }
                    }
                    read.fetch_add(length as u64, Ordering::Relaxed);
                    pages.fetch_add(count, Ordering::Relaxed);
                }
            }
            Ok(())
        };
        thread::scope(|threads| {
            let spawn = |number| {
                let builder = thread::Builder::new().name(format!("verify {number}"));
                builder.spawn_scoped(threads, reads).map_err(|error| Error::io("start a thread", error))
            };
            let started: Vec<_> = (0..self.threads.get()).map(spawn).collect();
            let ended = started.into_iter().map(|started| {
                started?.join().unwrap_or_else(|_| Err(Error::other("verify the file", "a thread panicked")))
            });
            // All are waited for; the first error is returned.
            ended.collect::<Vec<_>>().into_iter().collect::<Result<()>>()
        })?;
        Ok(pages.into_inner())
    }

    /// Joins neighbouring pages that have the same fault.
    fn damage(&self, mut pages: Vec<(BlockIndex, PageIndex, String)>) -> Vec<Damage> {
        pages.sort();
        let mut damage: Vec<Damage> = Vec::new();
        for (index, page, why) in pages {
            let (Some(entry), Some(place)) =
                (self.machine.blocks().entries().get(index.0), self.machine.place(index))
            else {
                continue;
            };
            let (size, Some(position)) = (place.page_size.bytes() as u64, place.page_offset(page)) else {
                continue;
            };
            let is_next = |last: &&mut Damage| {
                last.block == entry.name && last.position + last.length == position && last.why == why
            };
            if let Some(last) = damage.last_mut().filter(is_next) {
                last.length += size;
            } else if damage.len() == Verification::MOST_DAMAGE {
                break;
            } else {
                damage.push(Damage {
                    block: entry.name.clone(),
                    offset: BlockOffset(position - place.pages_offset),
                    position,
                    length: size,
                    why,
                });
            }
        }
        damage
    }
}

/// The pages of a piece that cannot be trusted, and why.
fn differences(
    block: &RamBlock,
    digests: &PageDigests,
    first: PageIndex,
    bytes: io::Result<&[u8]>,
) -> Vec<(PageIndex, String)> {
    let bytes = match bytes {
        Ok(bytes) => bytes,
        Err(error) => return vec![(first, error.to_string())],
    };
    let page = block.page_size().bytes();
    let mut bad = Vec::new();
    for (at, bytes) in (first.0..).map(PageIndex).zip(bytes.chunks_exact(page)) {
        match digests.first_difference(at, bytes, |_| true) {
            Ok(None) => {}
            Ok(Some(_)) => bad.push((at, DIFFERS.to_owned())),
            Err(error) => bad.push((at, error.to_string())),
        }
    }
    bad
}

/// Drops the last pages if there are more than can ever be listed.
fn bound(found: &mut Vec<(BlockIndex, PageIndex, String)>) {
    if found.len() > MOST_PAGES {
        found.sort();
        found.truncate(MOST_PAGES / 2);
    }
}

/// The group with this number among the groups of all blocks.
fn group_of(blocks: &RamBlocks, mut number: u64) -> Option<(BlockIndex, &RamBlock, u64)> {
    for (index, block) in blocks.iter() {
        let groups = block.pages().div_ceil(PageDigests::GROUP_PAGES);
        if number < groups {
            return Some((index, block, number));
        }
        number -= groups;
    }
    None
}

/// The runs of present pages in a group, in pieces that fit the buffer.
fn pieces(block: &RamBlock, group: u64) -> impl Iterator<Item = (PageIndex, u64)> {
    let most = (PIECE / block.page_size().bytes()).max(1) as u64;
    let words = PageDigests::GROUP_PAGES / 64;
    let mut joined: Vec<(PageIndex, u64)> = Vec::new();
    for word in group * words..(group + 1) * words {
        let Ok(word) = usize::try_from(word) else { continue };
        for (first, count) in runs(word, block.present_word(word)) {
            match joined.last_mut() {
                Some((start, length)) if start.0 + *length == first.0 && *length + count <= most => {
                    *length += count;
                }
                _ => joined.push((first, count)),
            }
        }
    }
    joined.into_iter()
}

const DIFFERS: &str = "it differs from its digest";
/// The number of bytes that are read at once: what stays in a processor's cache until its digest is made. It is a multiple of
/// 64 pages.
const PIECE: usize = 512 << 10;
/// The number of damaged pages that are remembered.
const MOST_PAGES: usize = 1 << 20;
