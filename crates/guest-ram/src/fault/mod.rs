//! Page faults of guest memory, delivered to this process (`userfaultfd`). Feature `fault`.
//!
//! ```text
//! Userfault::open ── what the kernel has ──▶ Userfault ─┐
//! RamBlocks ── what is mapped there ────────────────────┴▶ Armed ── events ─▶ FaultEvent
//!                                                            │  ▲
//!                              another process ◀─ hand_over ─┘  └─ copy, zero, resume, protect, poison, wake
//! ```
//!
//! A thread that accesses a missing page of armed memory waits until the page is placed, poisoned, or no longer armed.
//! So a program that arms memory must serve its faults, or use a [`Pager`] or a [`Copier`], which do.
//!
//! An [`Armed`] owns the blocks, so that memory is no longer registered when it is unmapped. It may serve memory of another
//! process that has [handed over](Armed::hand_over) its descriptor; all addresses are then those of that process.

mod armed;
mod copier;
mod error;
mod event;
mod features;
mod handover;
mod kernel;
mod kind;
mod landing;
mod memory;
mod pager;
mod panicked;
mod turn;
mod userfault;

pub use armed::{Armed, PlaceEnd, Placed, Protection};
#[cfg(shuttle)]
pub use copier::model as copier_model;
pub use copier::{Copier, CopierError, CopierOptions, CopierStats, PageSink, Prepared, StoreError};
pub use error::{DeviceState, FaultError};
pub use event::{FaultEvent, FaultKind};
pub use features::{Features, Modes};
pub use kind::MemoryKind;
pub use landing::Landing;
pub use memory::Region;
#[cfg(shuttle)]
pub use pager::model as pager_model;
pub use pager::{
    Decision, LoadError, PageSource, Pager, PagerError, PagerOptions, PagerStats, RequestPages, ThreadWaits,
    Trouble, TroubleKind,
};
pub use userfault::{FaultsFrom, Userfault};
