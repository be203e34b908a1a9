//! Dirty logs: a pass takes its dirty bits from one of them.
//!
//! | The writer | The log |
//! |---|---|
//! | marks the pages itself | [`DirtyBitmaps`] |
//! | is a vCPU of `/dev/kvm` | `KvmDirtyLog`, `KvmDirtyRings` (feature `kvm`) |
//! | is a thread of this process, or the kernel for one | `PagemapLog`, `SoftDirtyLog` (feature `pagemap`) |
//! | goes through `vm-memory` | `AtomicBitmapLog` (feature `vm-memory`) |
//! | several of these | [`MergedLog`] |
//! | does not run | [`NeverDirty`] |
//!
//! A [`KeptLog`] keeps one of them from one capture to the next.

mod bitmaps;
#[cfg(any(feature = "kvm", feature = "vm-memory"))]
mod coarse;
mod kept;
#[cfg(feature = "kvm")]
mod kvm;
mod log_mark;
mod mark;
mod merged;
#[cfg(feature = "pagemap")]
mod pagemap;
mod sole_reader;
#[cfg(feature = "vm-memory")]
mod vm_memory;

use std::io;

pub use bitmaps::{DirtyBitmaps, DirtyReader, NeverDirty};
pub use kept::KeptLog;
#[cfg(feature = "kvm")]
pub use kvm::{KvmDirtyLog, KvmDirtyRings, KvmProtect, KvmRingError, KvmRingLog, KvmRingSize};
pub use log_mark::LogMark;
pub(crate) use mark::mark;
pub use merged::MergedLog;
#[cfg(feature = "pagemap")]
pub use pagemap::{PagemapLog, SoftDirtyLog};
#[cfg(feature = "vm-memory")]
pub use vm_memory::{AtomicBitmapLog, RegionBitmap};

use crate::{BlockIndex, PageBitmap, PageIndex, RamBlocks};

/// The log of pages that the guest has written.
///
/// A migration sends every page once, and afterwards the pages in the log. It reads the log before every pass, with the
/// guest running, and once more after the guest has stopped.
///
/// A log that slows down the guest, such as the kernel's, starts when it is made and ends when it is dropped. Make it
/// for one migration, before the migration starts. The first pass sends what was written before the log was made.
///
/// An error or a panic in a call ends the migration like any other error: the guest continues on the source.
pub trait DirtyLog {
    /// Called once when a migration of `blocks` begins, before the first [`take`](DirtyLog::take), with the guest
    /// running.
    ///
    /// # Errors
    /// If the log was made for other blocks, or another reader uses it; the migration then fails.
    fn begin(&mut self, blocks: &RamBlocks) -> io::Result<()>;

    /// The *bitmap sync*: adds to `into` all pages of `block` written since the last take, and clears them in the log
    /// in the same step. A write during the call must be found by this call or the next.
    ///
    /// # Errors
    /// If the log cannot be read; the migration then fails.
    fn take(&mut self, block: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()>;

    /// Puts back bits that were taken, after the migration failed or was cancelled: no destination has these pages.
    /// Also called after an error of [`take`](DirtyLog::take).
    fn put_back(&mut self, block: BlockIndex, from: &PageBitmap);

    /// Called when the guest is stopped, all dirty bits were taken, and none is set: everything up to now is in this
    /// migration. A log that is [kept](KeptLog) returns a mark for the next migration. Default `None`: the log is used for one
    /// migration.
    fn mark(&mut self) -> Option<LogMark> {
        None
    }

    /// Adds to `into` the pages of `block` that were taken since `mark`. Called after [`begin`](DirtyLog::begin), before the
    /// first take, if only what was written since the mark is wanted.
    ///
    /// # Errors
    /// If the log does not know this, as by default; the migration then fails.
    fn since(&mut self, mark: LogMark, block: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()> {
        let _ = (mark, block, into);
        let why = "the dirty log is not one that was kept since the base was captured (KeptLog)";
        Err(io::Error::new(io::ErrorKind::Unsupported, why))
    }
}

/// Pages of one block that a [`DirtyLog`] has found. Pages can be added but not removed: most pages are already present
/// when the log is read for the first time.
#[derive(Debug)]
pub struct DirtyPages<'a>(&'a PageBitmap);

impl<'a> DirtyPages<'a> {
    /// Creates a collector that adds pages to `pages`.
    pub fn new(pages: &'a PageBitmap) -> Self {
        Self(pages)
    }

    /// The number of pages of the block.
    pub fn pages(&self) -> u64 {
        self.0.pages()
    }

    /// Adds a page.
    ///
    /// # Panics
    /// If the block has no such page.
    pub fn add(&mut self, page: PageIndex) {
        self.0.set(page);
    }

    /// Adds `count` pages from `first` on.
    ///
    /// # Panics
    /// If the block has no such pages.
    pub fn add_run(&mut self, first: PageIndex, count: u64) {
        self.0.set_run(first, count);
    }

    /// Adds the pages whose bits are set in `words`, from the first page on, least significant bit first. Bits beyond the
    /// last page are ignored.
    pub fn add_words(&mut self, words: impl IntoIterator<Item = u64>) {
        self.0.merge(words);
    }

    /// Adds the pages whose bits are set in word number `word`.
    pub(crate) fn bits_of_word(&mut self, word: usize, bits: u64) {
        self.0.merge_at(word, [bits]);
    }

    /// Takes all bits out of `from` and adds their pages.
    ///
    /// # Panics
    /// If `from` has a different number of pages.
    pub fn take_from(&mut self, from: &PageBitmap) {
        from.take(self.0);
    }

    #[cfg(any(feature = "kvm", feature = "vm-memory", feature = "pagemap"))]
    pub(crate) fn bits(&self) -> &PageBitmap {
        self.0
    }
}

impl<L: DirtyLog + ?Sized> DirtyLog for &mut L {
    fn begin(&mut self, blocks: &RamBlocks) -> io::Result<()> {
        (**self).begin(blocks)
    }

    fn take(&mut self, block: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()> {
        (**self).take(block, into)
    }

    fn put_back(&mut self, block: BlockIndex, from: &PageBitmap) {
        (**self).put_back(block, from);
    }

    fn mark(&mut self) -> Option<LogMark> {
        (**self).mark()
    }

    fn since(&mut self, mark: LogMark, block: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()> {
        (**self).since(mark, block, into)
    }
}

impl<L: DirtyLog + ?Sized> DirtyLog for Box<L> {
    fn begin(&mut self, blocks: &RamBlocks) -> io::Result<()> {
        (**self).begin(blocks)
    }

    fn take(&mut self, block: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()> {
        (**self).take(block, into)
    }

    fn put_back(&mut self, block: BlockIndex, from: &PageBitmap) {
        (**self).put_back(block, from);
    }

    fn mark(&mut self) -> Option<LogMark> {
        (**self).mark()
    }

    fn since(&mut self, mark: LogMark, block: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()> {
        (**self).since(mark, block, into)
    }
}
