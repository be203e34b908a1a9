//! The test kit of the project: patterns that reveal a misplaced page, and real QEMUs as peers.
//!
//! ```text
//! pattern   fills pages with words that contain their position, and reports where a misplaced page came from
//! guest     a guest that keeps rewriting its memory, checks it, and reports on its serial line
//! bad_destination
//!           a destination that misbehaves on demand
//! bad_source
//!           a source that misbehaves on demand, over real sockets
//! child     processes that end with the run that started them, even if it is killed
//! crowd     hosts that keep hundreds of silent connections open
//! huge_pages
//!           huge pages that are set aside for a test
//! proxy     a TCP proxy that connects to its target late, or breaks a connection
//! rough_network
//!           two hosts, and a line between them that loses, delays and reorders packets; or one with a limited line
//! in_use    the threads and descriptors of a process, to be compared before and after
//! slow_file a file on a file system that takes its time for each read
//! silent    a destination that accepts connections and reads nothing
//! skip      a test that this machine cannot run, listed with the reason
//! qemu      QEMU processes: found, started with that guest, driven over QMP, killed on every path
//! ```
//!
//! The kit does not use the crates that it tests, because it must not rely on them. It panics only if its caller has
//! made a mistake. Failures of a peer or the system are returned as errors that say what was expected and what was
//! found, with the peer's last output.

pub mod bad_destination;
pub mod bad_source;
pub mod certificates;
pub mod child;
pub mod crowd;
pub mod guest;
mod huge_pages;
mod in_use;
mod number;
pub mod pattern;
pub mod proxy;
pub mod qemu;
pub mod rough_network;
pub mod silent;
mod skip;
pub mod slow_file;

pub use huge_pages::HugePages;
pub use in_use::{in_use, in_use_after};
pub use number::number;
pub use skip::{lacks, skip};
