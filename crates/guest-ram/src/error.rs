//! What cannot be, as the caller asked for it.

use crate::{BlockName, PageSize};

/// Why blocks, memory or a dirty log cannot be had as asked for. What the system refuses is an
/// [`io::Error`](std::io::Error); where a function gives one of those, this may be [within it](std::io::Error::get_ref).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Two blocks have one name.
    #[error("two RAM blocks are named {0:?}")]
    DuplicateBlock(BlockName),
    /// The blocks have different page sizes.
    #[error("RAM blocks with pages of {0} and of {1} in one migration")]
    MixedPageSizes(PageSize, PageSize),
    /// The memory handed over is shorter than the block.
    #[error("block {name:?}: {mapped:#x} bytes of memory for a used length of {used_length:#x}")]
    ShortMemory {
        /// The block's name.
        name: BlockName,
        /// The bytes of memory.
        mapped: u64,
        /// The block's used length.
        used_length: u64,
    },
    /// The places in a file are those of another number of pages.
    #[error("block {name:?}: expected a bit for each of {expected} pages, found {found}")]
    OtherPages {
        /// The block's name.
        name: BlockName,
        /// The pages of the block.
        expected: u64,
        /// The bits given.
        found: u64,
    },
    /// A file that is to be mapped ends before the mapping would.
    #[error(
        "a mapping of {len:#x} bytes from offset {offset:#x} on reaches beyond the end of the file ({size:#x})"
    )]
    ShortFile {
        /// Where the mapping was to begin.
        offset: u64,
        /// The bytes that were to be mapped.
        len: u64,
        /// The length of the file.
        size: u64,
    },
    /// A merged dirty log of no logs.
    #[error(
        "no dirty log was merged, so every write of the guest would be lost: use NeverDirty for one that does not run"
    )]
    NoLogs,
    /// Two blocks have bytes in common.
    #[error("blocks {0:?} and {1:?} share bytes: each needs memory of its own")]
    SharedBytes(BlockName, BlockName),
    /// Two parts of one migration were made for different blocks.
    #[error("made for other blocks than the migration's: {why}")]
    NotTheseBlocks {
        /// The first difference.
        why: String,
    },
    /// A block number that the registry does not have.
    #[error("there is no RAM block number {0}")]
    NoSuchBlock(usize),
    /// The block's memory is mapped without the right to read it.
    #[error("block {0:?} is mapped without the right to read, so its pages cannot be sent")]
    Unreadable(BlockName),
    /// No dirty log can be made of the bitmaps of the block's memory.
    #[error("block {name:?}: the dirty bitmap does not fit: {why}")]
    DirtyBitmap {
        /// The block's name.
        name: BlockName,
        /// What is in the way.
        why: &'static str,
    },
}
