//! The errors that the caller's input causes.

use std::sync::Arc;

use crate::{BlockName, BlockOffset, PageSize};

/// Why blocks, memory or a dirty log cannot be made as requested. Errors of the system are
/// [`io::Error`](std::io::Error)s; where a function returns one of those, this error may be [inside
/// it](std::io::Error::get_ref).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Two blocks have the same name.
    #[error("two RAM blocks are named {0:?}")]
    DuplicateBlock(BlockName),
    /// The blocks have different page sizes.
    #[error("RAM blocks with pages of {0} and of {1} in one migration")]
    MixedPageSizes(PageSize, PageSize),
    /// The memory that was passed in is shorter than the block.
    #[error("block {name:?}: {mapped:#x} bytes of memory for a used length of {used_length:#x}")]
    ShortMemory {
        /// The block's name.
        name: BlockName,
        /// The length of the memory in bytes.
        mapped: u64,
        /// The block's used length.
        used_length: u64,
    },
    /// The places in a file have a different number of pages than the block.
    #[error("block {name:?}: expected a bit for each of {expected} pages, found {found}")]
    OtherPages {
        /// The block's name.
        name: BlockName,
        /// The number of pages of the block.
        expected: u64,
        /// The number of bits that were given.
        found: u64,
    },
    /// A file that is to be mapped ends before the mapping would.
    #[error(
        "a mapping of {len:#x} bytes from offset {offset:#x} on reaches beyond the end of the file ({size:#x})"
    )]
    ShortFile {
        /// The offset at which the mapping was to begin.
        offset: u64,
        /// The number of bytes to be mapped.
        len: u64,
        /// The length of the file.
        size: u64,
    },
    /// The memory of a block is not the part of a file that it was said to be.
    #[error("block {name:?}: its memory is not the file from offset {offset:#x} on: {why}")]
    OtherMemory {
        /// The block's name.
        name: BlockName,
        /// The offset at which the block was said to begin.
        offset: u64,
        /// The reason.
        why: String,
    },
    /// A merged dirty log of no logs.
    #[error(
        "no dirty log was merged, so every write of the guest would be lost: use NeverDirty for a guest that does not run"
    )]
    NoLogs,
    /// Two blocks have bytes in common.
    #[error("blocks {0:?} and {1:?} share bytes: each needs memory of its own")]
    SharedBytes(BlockName, BlockName),
    /// Two parts of one migration were made for different blocks.
    #[error("created for other blocks than those of the migration: {why}")]
    NotTheseBlocks {
        /// The first difference.
        why: String,
    },
    /// The registry has no block with this number.
    #[error("there is no RAM block number {0}")]
    NoSuchBlock(usize),
    /// The block's memory is mapped without read permission.
    #[error("block {0:?} is mapped without read permission, so its pages cannot be sent")]
    Unreadable(BlockName),
    /// No dirty log can be made from the bitmaps of the block's memory.
    #[error("block {name:?}: the dirty bitmap does not fit: {why}")]
    DirtyBitmap {
        /// The block's name.
        name: BlockName,
        /// The reason.
        why: &'static str,
    },
    /// A page in a file is not what was written there.
    #[error(
        "block {name:?}: the page at offset {offset} differs from its digest{}: the file was damaged after it was written, by \
         the disk, a copy or another program",
        file.as_ref().map(|file| format!(" in {file:?}")).unwrap_or_default()
    )]
    Damaged {
        /// The block's name.
        name: BlockName,
        /// The offset of the page in the block.
        offset: BlockOffset,
        /// The file, if it is one of several.
        file: Option<Arc<str>>,
    },
    /// A part of the block's memory may not be accessed, and may be nonzero.
    #[error(
        "block {name:?}: {len:#x} bytes from offset {offset} on are mapped without the right to access them \
         (PROT_NONE), as memory that the guest has unplugged: map them with the right, or discard what they contain \
         (MADV_DONTNEED; FALLOC_FL_PUNCH_HOLE if it is a file), so that they count as zero"
    )]
    Inaccessible {
        /// The block's name.
        name: BlockName,
        /// The offset of the first byte in the block.
        offset: BlockOffset,
        /// The number of bytes.
        len: u64,
    },
}
