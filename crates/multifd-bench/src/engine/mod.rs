//! The engine as two real processes: this program as `source` and as `destination`.
//!
//! ```text
//! orchestrator ── one line per migration ──▶ source ══ channels, main ══▶ destination ── a line when loaded ──▶ orchestrator
//! ```
//!
//! With `raw`, the same two processes move the same memory with sockets only. A source may also capture into a file,
//! and a destination may restore from one; then there is no peer.
//!
//! A source keeps its RAM and migrates once for each line; a destination has fresh memory and ends after one migration.

mod beyond;
mod blocks;
mod destination;
mod file;
mod lend;
mod one_pass;
mod raw;
mod source;

use serde::{Deserialize, Serialize};

pub(crate) use destination::{DestinationArgs, destination};
pub(crate) use file::check_file;
pub(crate) use one_pass::{Stopped, one_pass};
pub(crate) use source::{SourceArgs, source};

/// A command for a source.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Go {
    pub(crate) address: String,
    pub(crate) channels: u8,
    /// none, zlib or zstd, at level 1.
    pub(crate) method: String,
    /// The folder with certificates, for TLS.
    pub(crate) tls: Option<String>,
    /// Into the file `address` instead.
    pub(crate) file: Option<IntoFile>,
}

/// How a file is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IntoFile {
    /// With direct I/O.
    pub(crate) direct_io: bool,
    /// Whether the file must be on the disk at the end.
    pub(crate) synced: bool,
}

/// The result of a source, when the destination has everything.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Sent {
    /// Bytes on all connections.
    pub(crate) transferred: u64,
    /// Peak resident memory beyond RAM, in bytes.
    pub(crate) beyond: u64,
}

/// The result of a destination, when it has everything.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Loaded {
    /// Peak resident memory beyond RAM, in bytes.
    pub(crate) beyond: u64,
}

/// The block with the contents: QEMU's name for it.
const RAM: &str = "pc.ram";
