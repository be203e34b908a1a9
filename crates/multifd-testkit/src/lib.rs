//! What the project tests migrations with: patterns that reveal a misplaced page, and real QEMUs to talk to.
//!
//! ```text
//! pattern   fills pages with words that tell where they belong, and says where a stray page came from
//! guest     a guest that keeps rewriting its memory, checks it, and reports on its serial line
//! bad_destination
//!           a destination that misbehaves on demand
//! bad_source
//!           a source that misbehaves on demand, over real sockets
//! child     processes that end with the run that started them, even if it is killed
//! proxy     a TCP proxy that connects onwards late
//! rough_network
//!           two hosts, and a line between them that loses, delays and reorders packets
//! in_use    the threads and descriptors of a process, to be compared before and after
//! skip      a test that the machine has not the means for, listed with the reason
//! qemu      QEMU processes: found, started with that guest, driven over QMP, killed on every path
//! ```
//!
//! The kit knows nothing of the crates it tests: it must not believe what they say. It panics only where its
//! caller has made a mistake; what a peer or the system does comes back as an error that says what was
//! expected and what was met, with the peer's own last words.

pub mod bad_destination;
pub mod bad_source;
pub mod certificates;
pub mod child;
pub mod guest;
mod in_use;
mod number;
pub mod pattern;
pub mod proxy;
pub mod qemu;
pub mod rough_network;
mod skip;

pub use in_use::in_use;
pub use number::number;
pub use skip::{lacks, skip};
