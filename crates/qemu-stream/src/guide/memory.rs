//! Guest memory as RAM blocks.
//!
//! A block has a name, a length and memory. Both sides have blocks of the same names and lengths; a destination usually
//! creates its blocks from the source's list. Everything large that belongs to the guest is a block: RAM, patched ROMs, video
//! memory. Send small state as [device bytes](super::leaving).
//!
//! ```
//! use multifd::ram::{BlockIndex, BlockName, Mapping, Memory, PageIndex, PageSize, RamBlock, RamBlocks};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let block = |name, bytes| -> Result<RamBlock, Box<dyn std::error::Error>> {
//!     let memory = Memory::Mapped(Mapping::anonymous(bytes)?);
//!     Ok(RamBlock::new(BlockName::new(name).ok_or("1 to 255 bytes")?, bytes, PageSize::KIB_4, memory)?)
//! };
//! let blocks = RamBlocks::new(vec![block("ram.low", 1 << 20)?, block("ram.high", 4 << 20)?])?;
//! assert_eq!(blocks.total(), 5 << 20);
//!
//! // Guest RAM is never a Rust reference: it is copied in and out, or moved by system calls.
//! let low = blocks.block(BlockIndex(0))?;
//! low.store(PageIndex(3), &[7; 4096])?;
//! let mut page = [0; 4096];
//! low.slice(PageIndex(3), 1).ok_or("mapped")?.copy_to(&mut page);
//! assert_eq!(page, [7; 4096]);
//! # Ok(())
//! # }
//! ```
//!
//! # Where the memory comes from
//!
//! | You have | Create the mapping with |
//! | --- | --- |
//! | no memory yet | [`Mapping::anonymous`] |
//! | a memfd, or a file of huge pages | [`Mapping::of_file`]; another process may have passed the descriptor |
//! | a mapping of your own | [`Mapping::from_raw`], which keeps the owner of your mapping alive |
//! | a `GuestMemoryMmap` of `vm-memory` | `multifd::ram::blocks_of` (feature `vm-memory`): all regions in one call |
//!
//! A source does not read memory that was never touched, because the system would allocate it. It finds private memory that
//! was never touched through the page table (Linux 6.7 and later), and holes of a mapped file through the file (memfd, tmpfs,
//! ext4, hugetlbfs), terabytes at once. You need not declare anything: the system is asked what is mapped. If you mapped a
//! file yourself, name it with [`Mapping::with_file`]. [`RamBlock::touched`] has the details.
//!
//! Parts of a block may be mapped without access rights (`PROT_NONE`), for memory that is not plugged in. Such a part is sent
//! as zero if it was never touched; otherwise the migration fails with block and offset. So discard what a guest unplugs.
//! **Warning:** do not remove access rights, or discard or unmap memory, while a migration runs, except at moments when the
//! dirty log is being read: the engine may be reading the memory.
//!
//! # For a machine's whole life
//!
//! Create the blocks once. They exist as long as the machine: it arrives in them, runs, leaves from them, is captured from
//! them and restored into them. They may contain any data when a machine arrives: a page that is zero at the source is set to
//! zero, and memory that is known to be untouched stays untouched. A guest of 64 GiB that uses two costs the
//! destination two.
//!
//! # Names, pages, lengths
//!
//! - A name has 1 to 255 bytes and means the same memory on both sides. Do not name memory that can be plugged by its position
//!   alone.
//! - All blocks have the same page size, which is the guest's: 4 KiB on x86. The page size of the host may differ.
//! - A length is a number of whole pages. Bytes after the last whole page are not sent.
//! - Memory that both hosts can access, for example on a shared file system, is listed but not sent: use
//!   [`RamBlock::ignored`](multifd::ram::RamBlock::ignored) on both sides, and
//!   [`ignore_shared`](crate::format::Configuration::ignore_shared) in the configuration. Without the latter it is refused.
//!
//! [`Mapping::with_file`]: multifd::ram::Mapping::with_file
//! [`RamBlock::touched`]: multifd::ram::RamBlock::touched
//! [`Mapping::anonymous`]: multifd::ram::Mapping::anonymous
//! [`Mapping::of_file`]: multifd::ram::Mapping::of_file
//! [`Mapping::from_raw`]: multifd::ram::Mapping::from_raw
