#![doc = include_str!("../README.md")]
//!
//! # How the parts fit
//!
//! ```text
//! RamBlocks ── RamBlock "pc.ram" ── Memory::Mapped(Mapping) ── GuestSlice ── Part / PartMut ── system call
//!                   │                Memory::MappedRam(Places) ── cached, or direct I/O (DirectFile)
//!                   │                two blocks ── Transfer ── pages directly between the two
//!                   DirtyLog ── take ──▶ PageBitmap ── pass
//! ```
//!
//! No Rust reference to guest RAM is ever made, because the RAM changes while it is read. Its bytes are accessed only
//! through a [`GuestSlice`], which copies, and a [`Part`] or [`PartMut`], which a system call reads or fills. This
//! crate has no notion of channels or packets.

// `guest-ram-models` shares these sources but does not contain the unit tests.
#![cfg(not(all(shuttle, test)))]

mod bitmap;
mod block;
mod blocks;
mod digest;
mod dirty;
mod error;
#[cfg(feature = "fault")]
mod fault;
mod file;
mod identity;
mod latency;
mod memory;
#[cfg(shuttle)]
pub mod model;
mod name;
mod page;
mod places;
mod positions;
mod since;
#[cfg(feature = "fault")]
mod sync_types;
mod walk;

pub use bitmap::{PageBitmap, TakenWords, joined, runs};
pub use block::{BlockIndex, Memory, RamBlock};
pub use blocks::{Inaccessible, RamBlocks};
pub use digest::{Digest, DigestOfPieces, DigestStore, PageDigests};
#[cfg(feature = "vm-memory")]
pub use dirty::{AtomicBitmapLog, RegionBitmap};
pub use dirty::{DirtyBitmaps, DirtyLog, DirtyPages, DirtyReader, KeptLog, LogMark, MergedLog, NeverDirty};
#[cfg(feature = "kvm")]
pub use dirty::{KvmDirtyLog, KvmDirtyRings, KvmProtect, KvmRingError, KvmRingLog, KvmRingSize};
#[cfg(feature = "pagemap")]
pub use dirty::{PagemapLog, SoftDirtyLog};
pub use error::Error;
#[cfg(feature = "fault")]
pub use fault::{
    Armed, Copier, CopierError, CopierOptions, CopierStats, Decision, DeviceState, FaultError, FaultEvent,
    FaultKind, FaultsFrom, Features, Landing, LoadError, MemoryKind, Modes, PageSink, PageSource, Pager,
    PagerError, PagerOptions, PagerStats, PlaceEnd, Placed, Prepared, Protection, Region, RequestPages,
    StoreError, ThreadWaits, Trouble, TroubleKind, Userfault,
};
pub use file::{
    AlignedBuffer, DirectFile, Transfer, TransferError, file_size_limit, hold_in_this_thread, kind_of_file,
    open_regular, truncated, with_file_size_errors,
};
pub use identity::Identity;
pub use latency::Latencies;
pub use memory::{Access, GuestSlice, MAX_PARTS, Mapping, Part, PartMut, advance, advance_mut};
#[cfg(feature = "vm-memory")]
pub use memory::{block_of, blocks_of};
pub use name::BlockName;
pub use page::{BlockOffset, PageIndex, PageSize};
pub use places::Places;
pub use positions::PagePositions;
pub use since::{BasePages, Unwritten};
pub use walk::{PageRun, Shape, Walk};
