//! The destination's side of the main stream.
//!
//! ```text
//! connection ─▶ Events ─▶ configuration ─ commands ─ blocks ─ ram records ─ … ─ device part ─▶ Loaded
//!     ▲                       │              │          │         │
//!     └── PONG, SHUT ─────────┴── Incoming ──┴──────────┴─────────┴──▶ Destination: configuration, blocks, pages, sync
//! ```
//!
//! [`Incoming`] reads a whole migration in the caller's thread and calls a [`Destination`] for what it reads. It owns
//! the connection and one buffer, replies to the source and keeps its time limits. [`Events`] is the layer below: the stream
//! event by event, for a program that acts in the middle of it. What is not supported is refused by name. Nothing that a peer
//! sends makes them allocate, loop or index beyond `format/limits.rs`.

#![warn(clippy::indexing_slicing)]

mod contents;
mod counts;
mod destination;
mod early;
mod events;
mod known;
mod line;
mod loaded;
mod loader;
mod passes;
mod postcopy;
mod precopy;
mod preempt;
mod rounds;

pub use crate::format::{Delta, Event, SyncMark};
pub(crate) use counts::MainCounts;
pub use counts::MainPages;
pub use destination::Destination;
#[cfg(feature = "fault")]
pub(crate) use early::RunEarly;
pub use events::Events;
pub(crate) use line::BeforeRefusal;
pub use loaded::Loaded;
pub(crate) use loader::LoaderState;
pub use loader::{Expected, LeftOut, Loader};
pub(crate) use precopy::{CHANNELS_END, PAUSE, SILENCE, STALL};
pub use precopy::{Incoming, Outcome};
