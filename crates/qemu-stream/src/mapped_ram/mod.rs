//! The mapped-ram file: a migration stream in which every page has a fixed place.
//!
//! ```text
//! head ─ entry 0 ─ header ─ bitmap ─┄─ pages ─ entry 1 ─ header ─ bitmap ─┄─ pages ─ EOS ─ tail
//!                           │          │ aligned to 1 MiB
//!                           └ 1 bit per page: present. Only this decides; holes may contain anything.
//! tail = footer [early devices] [SWITCHOVER_START] END EOS footer, devices, EOF, JSON
//! ```
//!
//! Machine types up to 2.3 have no configuration and no footers, here as over a connection. With x-ignore-shared, a
//! block that is not sent has no bitmap (its bitmap offset is 0), and a hole instead of its pages. No QEMU writes or
//! loads such a file.
//!
//! QEMU 9.0 and later write and read such files with `file:PATH[,offset=N]`. [`Layout`] computes all places and writes
//! everything but the pages; [`MappedRamFile`] reads a file, ours or QEMU's. The owner of the RAM moves the pages to
//! and from their places in the file: a [`Capture`] makes the engine's channels copy them from this process's memory, a
//! [`Restore`] into it. The [manual](crate::guide::snapshots) shows both.
//!
//! ```
//! use std::os::unix::fs::FileExt;
//!
//! use multifd::ram::{BlockIndex, BlockName, PageIndex, PageSize};
//! use qemu_stream::{format::*, mapped_ram::*};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let file = tempfile::tempfile()?;
//! let machine = Configuration::new(MachineType::new("pc-q35-10.0")?);
//! let ram = BlockEntry::new(BlockName::new("pc.ram").ok_or("a name")?, 1 << 20);
//! let blocks = BlockList::new(vec![ram], PageSize::KIB_4)?;
//! let devices = DevicePart::build(&[], 4096, SectionId(2))?;
//!
//! let layout = Layout::new(&machine, &blocks, SectionId(1), 0)?;
//! let page_7 = layout.places()[0].page_offset(PageIndex(7)).ok_or("outside")?;
//! file.write_all_at(&[42; 4096], page_7)?;
//! let tail = Tail { switchover_start: true, devices: &devices, about: None, base: None };
//! layout.write(&file, &tail, |_, _| vec![1 << 7, 0, 0, 0])?;
//!
//! let read = MappedRamFile::open(file, 0)?;
//! assert_eq!(read.blocks(), &blocks);
//! assert!(read.bitmap(BlockIndex(0))?.contains(PageIndex(7)));
//! # Ok(())
//! # }
//! ```

#![warn(clippy::indexing_slicing)]

mod access;
mod appendix;
mod arrived;
mod base;
mod capture;
mod chain;
mod file;
mod header;
mod holes;
mod layout;
#[cfg(feature = "fault")]
mod lazy;
mod machine;
mod merge;
#[cfg(feature = "fault")]
mod moment;
mod note;
mod pieces;
mod restore;
mod scattered;
mod verify;

use multifd::ram::{PageIndex, PageSize};

pub use appendix::BaseName;
pub use base::{Base, Captured};
pub use capture::{Capture, CaptureOptions};
pub use chain::{Digests, FoundFile};
pub use file::ChainFile;
pub use layout::{Layout, Shape, Tail};
#[cfg(feature = "fault")]
pub use lazy::LazyError;
pub use machine::{MappedRamFile, ReadPath, StoredMachine};
pub use merge::Merge;
#[cfg(feature = "fault")]
pub use moment::{MomentCapture, MomentError};
pub use restore::Restore;
pub(crate) use scattered::Scattered;
pub use verify::{Damage, Verification, Verify};

/// QEMU's alignment for the pages of a block, so that they can be written unbuffered.
pub const PAGES_ALIGNMENT: u64 = 1 << 20;

/// The places of a block's bitmap and pages, as absolute file positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockPlace {
    /// The position of the bitmap; 0 if the block is not sent because both sides share its memory.
    pub bitmap_offset: u64,
    /// Where page 0 begins.
    pub pages_offset: u64,
    /// Bytes of pages.
    pub used_length: u64,
    /// The page size.
    pub page_size: PageSize,
}

impl BlockPlace {
    /// Whether the block's memory is not sent: no page of it is in the file.
    pub fn is_ignored(&self) -> bool {
        self.bitmap_offset == 0
    }

    /// The number of pages.
    pub fn pages(&self) -> u64 {
        self.page_size.whole_pages_in(self.used_length)
    }

    /// The number of 64-bit words in the bitmap.
    pub fn bitmap_words(&self) -> u64 {
        self.pages().div_ceil(u64::from(u64::BITS))
    }

    /// The position of `page`; `None` if the block has no such page.
    pub fn page_offset(&self, page: PageIndex) -> Option<u64> {
        let offset = self.page_size.offset_of(page).filter(|_| page.0 < self.pages())?;
        self.pages_offset.checked_add(offset.0)
    }

    fn bitmap_length(&self) -> u64 {
        self.bitmap_words() * WORD as u64
    }
}

/// Bytes of one word of a bitmap.
const WORD: usize = 8;
/// Bytes of a bitmap that are converted to or from words at once.
const BITMAP_PIECE: usize = 64 << 10;
