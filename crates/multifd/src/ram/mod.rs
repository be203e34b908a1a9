//! Guest RAM: blocks, their pages, their dirty bits, and the memory they live in.
//!
//! ```text
//! RamBlocks ── RamBlock "pc.ram" ── Memory::Mapped(Mapping) ── GuestSlice ── Part / PartMut ── system call
//!                   │                Memory::MappedRam ── cached, or past the page cache (DirectFile)
//!                   │                two blocks ── Lane ── pages straight between the two
//!                   DirtyLog ── take ──▶ PageBitmap ── pass
//! ```
//!
//! Guest RAM is never a Rust reference: it changes while we look at it. The only ways to its bytes are a
//! [`GuestSlice`], which copies, and a [`Part`] or [`PartMut`], which a system call reads or fills.
//! Nothing here knows of channels or packets.

mod bitmap;
mod block;
mod bytes;
mod cut;
mod direct;
mod dirty;
mod file_size;
#[cfg(any(feature = "kvm", feature = "vm-memory"))]
mod granule;
#[cfg(feature = "vm-memory")]
mod guest_memory;
mod huge;
mod identity;
#[cfg(feature = "kvm")]
mod kvm;
mod mapping;
mod merged;
mod name;
mod page;
mod page_table;
#[cfg(feature = "pagemap")]
mod pagemap;
mod part;
mod straight;
mod turn;
mod zero;

pub use bitmap::{PageBitmap, runs};
pub use block::{BlockIndex, Memory, Places, RamBlock, RamBlocks};
pub(crate) use cut::cut_short;
pub(crate) use direct::AlignedBuffer;
pub use direct::DirectFile;
pub use dirty::{DirtyBitmaps, DirtyLog, DirtyPages, DirtyReader, NeverDirty};
pub(crate) use file_size::hold_in_this_thread;
pub use file_size::{file_size_limit, with_file_size_errors};
#[cfg(feature = "vm-memory")]
pub use guest_memory::{AtomicBitmapLog, RegionBitmap, block_of, blocks_of};
pub use identity::Identity;
#[cfg(feature = "kvm")]
pub use kvm::{KvmDirtyLog, KvmDirtyRings, KvmProtect, KvmRingError, KvmRingLog, KvmRingSize};
pub use mapping::{Access, GuestSlice, Mapping};
pub use merged::MergedLog;
pub use name::BlockName;
pub use page::{BlockOffset, PageIndex, PageSize};
#[cfg(feature = "pagemap")]
pub use pagemap::{PagemapLog, SoftDirtyLog};
pub use part::{MAX_PARTS, Part, PartMut, advance, advance_mut};
pub(crate) use straight::{CopyError, Lane};
