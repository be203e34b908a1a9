//! Compares all pages of the files of a machine with their digests, or adds digests to a file that has none.
//!
//! ```text
//! each file: N threads: next group of 512 pages ── its runs of present pages, read in pieces ── digests ── compared or recorded
//! ```
//!
//! Reading ends at the first damage everywhere else; here all of it is read, to name every damaged page.

use std::{
    fs::File,
    io,
    num::NonZero,
    sync::{Mutex, PoisonError, atomic::AtomicU64},
};

use multifd::{
    Error, Result,
    channel::Stop,
    ram::{BlockIndex, BlockName, BlockOffset, PageDigests, PageIndex, RamBlock, RamBlocks},
};

use super::{
    ChainFile, ReadPath, StoredMachine,
    access::direct,
    appendix::{self, Digested},
    pieces::{each_piece, unread},
};

/// Reads all pages of a machine, in all of its files.
#[derive(Clone, Debug)]
#[must_use]
pub struct Verify<'a> {
    machine: &'a StoredMachine,
    threads: NonZero<u8>,
    direct_io: bool,
}

/// A run of pages that cannot be trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// Which of the [files](StoredMachine::files), from 0.
    pub file: usize,
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
    /// Whether all of them were compared with digests. Pages of a file that has none can only be read.
    pub compared: bool,
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
    pub fn new(machine: &'a StoredMachine) -> Self {
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
    /// If a file has [no digests](ChainFile::has_digests), or `stop` has cancelled it.
    pub fn run(&self, read: &AtomicU64, stop: &Stop) -> Result<Verification> {
        match self.machine.files().iter().all(ChainFile::has_digests) {
            true => self.read(read, stop),
            false => Err(Error::other("verify the file", "it has no digests")),
        }
    }

    /// Does the same, but of a file without digests it only reads all pages: [`Verification::compared`] is `false` then.
    ///
    /// # Errors
    /// If `stop` has cancelled it.
    pub fn read(&self, read: &AtomicU64, stop: &Stop) -> Result<Verification> {
        let mut all = Verification { compared: true, ..Verification::default() };
        for (number, file) in self.machine.files().iter().enumerate() {
            let places = (0..file.places().len()).map(BlockIndex);
            let digests: Option<Vec<_>> = places.map(|index| file.digests_of(index)).collect();
            all.compared &= digests.is_some();
            let found = Mutex::new((0, Vec::new()));
            let blocks = self.blocks(file)?;
            all.pages += each_piece(&blocks, self.threads, (read, stop), |index, block, first, bytes| {
                let digests = digests.as_ref().and_then(|digests| digests.get(index.0));
                let bad = differences(block, digests, first, bytes);
                if !bad.is_empty() {
                    let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                    found.0 += bad.len() as u64;
                    found.1.extend(bad.into_iter().map(|(page, why)| (index, page, why)));
                    bound(&mut found.1);
                }
                Ok(())
            })?;
            let (damaged_pages, pages) = found.into_inner().unwrap_or_else(PoisonError::into_inner);
            all.damaged_pages += damaged_pages;
            all.damage.extend(damage((number, file), pages));
            all.damage.truncate(Verification::MOST_DAMAGE);
        }
        Ok(all)
    }

    /// Adds digests to `file`, which is the machine's file, open for writing, and [`about`](StoredMachine::about) if there is
    /// some. The contents of the pages are taken to be right.
    ///
    /// # Errors
    /// If the file has digests already, or [other bytes](ChainFile::trailing_bytes) after the machine; if a page cannot be
    /// read, the system cannot write, or `stop` has cancelled it.
    pub fn add(&self, file: &File, about: Option<&str>, read: &AtomicU64, stop: &Stop) -> Result<()> {
        let refused = |why: &'static str| Err(Error::other("add digests to the file", why));
        let machine = self.machine.newest();
        if machine.has_digests() || machine.is_delta() {
            return refused("it has digests already");
        }
        if machine.trailing_bytes() > 0 {
            return refused("other data follows the machine, and would be overwritten");
        }
        let blocks = self.blocks(machine)?;
        let digests: Vec<_> =
            blocks.iter().map(|(_, block)| PageDigests::new(block.pages(), block.page_size())).collect();
        each_piece(&blocks, self.threads, (read, stop), |index, block, first, bytes| {
            let bytes = bytes.map_err(|error| unread(block, first, error))?;
            if let Some(digests) = digests.get(index.0) {
                digests.note(first, bytes);
            }
            Ok(())
        })?;
        let digested = Digested { blocks: &blocks, digests: digests.iter().collect() };
        let about = about.or(machine.about());
        let (stream, places) = (machine.stream(), machine.places());
        let written = appendix::write(file, stream, places, Some(&digested), about, None);
        written.map_err(|error| Error::other("write the digests", error))?;
        file.sync_all().map_err(|error| Error::io("write the digests to the disk", error))
    }

    fn blocks(&self, file: &ChainFile) -> Result<RamBlocks> {
        if self.machine.stream().is_some() {
            // The scratch file has only a part of them.
            return self.machine.ram_blocks(|_, _| ReadPath::Cached);
        }
        let direct = if self.direct_io { direct(file.file()) } else { None };
        file.own_blocks(&direct.map_or(ReadPath::Cached, ReadPath::Direct))
    }
}

/// Joins neighbouring pages that have the same fault.
fn damage(
    (number, file): (usize, &ChainFile),
    mut pages: Vec<(BlockIndex, PageIndex, String)>,
) -> Vec<Damage> {
    pages.sort();
    let mut damage: Vec<Damage> = Vec::new();
    for (index, page, why) in pages {
        let (Some(entry), Some(place)) = (file.blocks().entries().get(index.0), file.place(index)) else {
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
                file: number,
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

/// The pages of a piece that cannot be trusted, and why.
fn differences(
    block: &RamBlock,
    digests: Option<&PageDigests>,
    first: PageIndex,
    bytes: io::Result<&[u8]>,
) -> Vec<(PageIndex, String)> {
    let bytes = match bytes {
        Ok(bytes) => bytes,
        Err(error) => return vec![(first, error.to_string())],
    };
    let Some(digests) = digests else { return Vec::new() };
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

const DIFFERS: &str = "it differs from its digest";
/// The number of damaged pages that are remembered.
const MOST_PAGES: usize = 1 << 20;
