//! Where dirty pages come from: the log that a pass takes its bits from.

use std::{io, sync::Arc};

use super::{BlockIndex, PageBitmap, PageIndex, RamBlocks};

/// The log of pages that the guest has written.
///
/// A migration sends every page once and from then on those that the log names. It asks with the guest running
/// before every pass, and once more after the guest has stopped.
///
/// A log that costs the guest something, as the kernel's do, starts when it is made and ends with its drop: make it for
/// one migration, before that runs. What was written before it was made is sent by the first pass.
pub trait DirtyLog {
    /// The *bitmap sync*: sets in `into` the bits of all pages of `block` written since they were last taken,
    /// and forgets them in the same step. A write that happens meanwhile must be found now or the next time.
    ///
    /// # Errors
    /// If the log cannot be read; the migration then fails.
    fn take(&mut self, block: BlockIndex, into: &PageBitmap) -> io::Result<()>;

    /// Puts bits back that were taken and whose pages no destination has: the migration failed or was cancelled.
    fn put_back(&mut self, block: BlockIndex, from: &PageBitmap);
}

impl<L: DirtyLog + ?Sized> DirtyLog for &mut L {
    fn take(&mut self, block: BlockIndex, into: &PageBitmap) -> io::Result<()> {
        (**self).take(block, into)
    }

    fn put_back(&mut self, block: BlockIndex, from: &PageBitmap) {
        (**self).put_back(block, from);
    }
}

impl<L: DirtyLog + ?Sized> DirtyLog for Box<L> {
    fn take(&mut self, block: BlockIndex, into: &PageBitmap) -> io::Result<()> {
        (**self).take(block, into)
    }

    fn put_back(&mut self, block: BlockIndex, from: &PageBitmap) {
        (**self).put_back(block, from);
    }
}

/// A dirty log kept by the writers themselves: whoever writes to guest memory marks the page.
///
/// Clones share their bits. Mark a page *after* writing to it.
#[derive(Clone, Debug)]
pub struct DirtyBitmaps(Arc<[PageBitmap]>);

impl DirtyBitmaps {
    /// Clear bits for all pages of `blocks`.
    pub fn new(blocks: &RamBlocks) -> Self {
        Self(blocks.iter().map(|(_, block)| PageBitmap::new(block.pages())).collect())
    }

    /// Marks a page as written.
    ///
    /// # Panics
    /// If there is no such block or page.
    pub fn mark(&self, block: BlockIndex, page: PageIndex) {
        self.0[block.0].set(page);
    }

    /// The bits of one block.
    pub fn of(&self, block: BlockIndex) -> Option<&PageBitmap> {
        self.0.get(block.0)
    }
}

impl DirtyLog for DirtyBitmaps {
    fn take(&mut self, block: BlockIndex, into: &PageBitmap) -> io::Result<()> {
        self.0[block.0].take(into);
        Ok(())
    }

    fn put_back(&mut self, block: BlockIndex, from: &PageBitmap) {
        self.0[block.0].merge(from.words());
    }
}

/// The dirty log of a guest that does not run: nothing is ever written.
#[derive(Clone, Copy, Debug, Default)]
pub struct NeverDirty;

impl DirtyLog for NeverDirty {
    fn take(&mut self, _block: BlockIndex, _into: &PageBitmap) -> io::Result<()> {
        Ok(())
    }

    fn put_back(&mut self, _block: BlockIndex, _from: &PageBitmap) {}
}
