//! Guest memory as RAM blocks.
//!
//! A block is a name, a length and memory. Both sides list the same names and lengths; a destination usually makes
//! its blocks from the source's list. Anything that has to move with the guest and is large is a block: RAM, ROMs
//! that were patched, video memory. What is small is better off as [device bytes](super::leaving).
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
//! | You have | Make the mapping by |
//! | --- | --- |
//! | nothing yet | [`Mapping::anonymous`] |
//! | a memfd, or a file of huge pages | [`Mapping::of_file`]; another process may have handed it over |
//! | a mapping of your own | [`Mapping::from_raw`], which keeps your owner of it alive |
//! | a `GuestMemoryMmap` of `vm-memory` | `multifd::ram::blocks_of` (feature `vm-memory`): all regions in one call |
//!
//! A source does not look at memory of [`Mapping::anonymous`] that nobody has ever touched: Linux 6.7 and later tell it by
//! the page table, terabytes at once. Memory that you have mapped yourself may be so, too; if it is private, anonymous and
//! filled in by no `userfaultfd`, say so with [`Mapping::assume_absent_is_zero`], which is unsafe. **Warning:** said of
//! memory that is not so, guest memory is lost without an error.
//!
//! # For a machine's whole life
//!
//! Blocks are made once and last as long as the machine: it arrives in them, runs, leaves from them, is captured from them and
//! restored into them. They may hold anything when a machine arrives: a page that is zero at the source is made zero, and
//! memory that the page table knows to be untouched is left so. A guest of 64 GiB that uses two costs the destination two.
//!
//! # Names, pages, lengths
//!
//! - A name is 1 to 255 bytes and means the same memory on both sides. Do not number by order alone what can be
//!   plugged.
//! - All blocks have one page size, which is the guest's: 4 KiB on x86. The host's may be greater or smaller.
//! - A length is whole pages; what is behind the last one does not move.
//! - Memory that both hosts see, on a shared file system for example, is listed and not sent:
//!   [`RamBlock::ignored`](multifd::ram::RamBlock::ignored) on both sides, and
//!   [`ignore_shared`](crate::format::Configuration::ignore_shared) in the configuration, without which it is refused.
//!
//! [`Mapping::assume_absent_is_zero`]: multifd::ram::Mapping::assume_absent_is_zero
//! [`Mapping::anonymous`]: multifd::ram::Mapping::anonymous
//! [`Mapping::of_file`]: multifd::ram::Mapping::of_file
//! [`Mapping::from_raw`]: multifd::ram::Mapping::from_raw
