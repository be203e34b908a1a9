//! Machines that are stored in another form than a mapped-ram file.
//!
//! ```text
//! stream, one byte after the other ─ Events ─▶ pages ─ batches ─▶ scratch file ─▶ StoredMachine
//! the same, in a file ─ Events ─▶ positions of its pages ─▶ StoredMachine
//! recording ─ Played ─ Arrival ─▶ pages ─▶ scratch file ─▶ StoredMachine
//! head and XML of a libvirt image  ─▶ LibvirtImage: what it says, and where its stream begins
//! head of a qcow2 image ─▶ DiskImage: its snapshots ─▶ VmState: the stream of one of them
//! ```
//!
//! A stream is read once, from its beginning to its end, and each page is written to its place in a mapped-ram file, which is
//! then opened like any other. If the stream can be read at any position, its pages stay where they are: only what XBZRLE changes
//! is written. The input is untrusted: nothing is allocated or written beyond the bounds of
//! [`format::limits`](crate::format::limits) and the length of the blocks that the stream announces.

#![warn(clippy::indexing_slicing)]

mod ahead;
mod batch;
mod disk_image;
mod input;
mod libvirt;
mod pages;
mod receive;
mod unfold;
mod vm_state;

pub use disk_image::{DiskImage, Snapshot};
pub use libvirt::LibvirtImage;
pub use pages::Pages;
pub use receive::Receive;
pub use unfold::Unfold;
pub use vm_state::VmState;

#[cfg(test)]
mod tests;
