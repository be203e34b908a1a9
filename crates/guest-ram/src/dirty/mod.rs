//! Where dirty pages come from: the log that a pass takes its bits from.
//!
//! | The writer | The log |
//! |---|---|
//! | marks the pages itself | [`DirtyBitmaps`] |
//! | is a vCPU of `/dev/kvm` | `KvmDirtyLog`, `KvmDirtyRings` (feature `kvm`) |
//! | is a thread of this process, or the kernel for one | `PagemapLog`, `SoftDirtyLog` (feature `pagemap`) |
//! | goes through `vm-memory` | `AtomicBitmapLog` (feature `vm-memory`) |
//! | several of these | [`MergedLog`] |
//! | does not run | [`NeverDirty`] |

mod bitmaps;
#[cfg(any(feature = "kvm", feature = "vm-memory"))]
mod coarse;
#[cfg(feature = "kvm")]
mod kvm;
mod mark;
mod merged;
#[cfg(feature = "pagemap")]
mod pagemap;
mod sole_reader;
#[cfg(feature = "vm-memory")]
mod vm_memory;

use std::io;

pub use bitmaps::{DirtyBitmaps, DirtyReader, NeverDirty};
#[cfg(feature = "kvm")]
pub use kvm::{KvmDirtyLog, KvmDirtyRings, KvmProtect, KvmRingError, KvmRingLog, KvmRingSize};
pub(crate) use mark::mark;
pub use merged::MergedLog;
#[cfg(feature = "pagemap")]
pub use pagemap::{PagemapLog, SoftDirtyLog};
#[cfg(feature = "vm-memory")]
pub use vm_memory::{AtomicBitmapLog, RegionBitmap};

use crate::{BlockIndex, PageBitmap, PageIndex, RamBlocks};

/// The log of pages that the guest has written.
///
/// A migration sends every page once and from then on those that the log names. It asks with the guest running
/// before every pass, and once more after the guest has stopped.
///
/// A log that costs the guest something, as the kernel's do, starts when it is made and ends with its drop: make it for
/// one migration, before that runs. What was written before it was made is sent by the first pass.
///
/// An error of a call, or a panic in one, ends the migration as any other error does: the guest goes on at the source.
pub trait DirtyLog {
    /// A migration of `blocks` begins. Called once, before the first [`take`](DirtyLog::take), with the guest running.
    ///
    /// # Errors
    /// If the log is of other blocks, or somebody else reads it; the migration then fails.
    fn begin(&mut self, blocks: &RamBlocks) -> io::Result<()>;

    /// The *bitmap sync*: adds to `into` all pages of `block` written since they were last taken, and forgets them in the
    /// same step. A write that happens meanwhile must be found now or the next time.
    ///
    /// # Errors
    /// If the log cannot be read; the migration then fails.
    fn take(&mut self, block: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()>;

    /// Puts bits back that were taken and whose pages no destination has: the migration failed or was cancelled. Called after
    /// an error of [`take`](DirtyLog::take), too.
    fn put_back(&mut self, block: BlockIndex, from: &PageBitmap);
}

/// Pages of one block that a [`DirtyLog`] has found. Pages can be added to it and not taken out: most are there already
/// when a log is asked for the first time.
#[derive(Debug)]
pub struct DirtyPages<'a>(&'a PageBitmap);

impl<'a> DirtyPages<'a> {
    /// Pages are added to `pages`.
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

    /// Takes all bits out of `from` and adds their pages.
    ///
    /// # Panics
    /// If it is of another number of pages.
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
}
