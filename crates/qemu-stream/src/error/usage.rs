//! Errors of the caller.

use crate::format::{InvalidMachineType, MachineType, SectionId, SectionName};

/// What the caller did wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Usage {
    /// Calls in the wrong order.
    #[error("{call} is not allowed {state}")]
    OutOfOrder {
        /// The call.
        call: &'static str,
        /// The state of the stream.
        state: &'static str,
    },
    /// A block list that cannot be written.
    #[error("block list: {0}")]
    Blocks(String),
    /// A page that does not exist in its block.
    #[error("page {page} is not in block {block}")]
    NoSuchPage {
        /// Number of the block in the list.
        block: usize,
        /// The page.
        page: u64,
    },
    /// A device has the same section number as RAM.
    #[error(
        "device {device:?} has section number {section}, which is that of ram: begin the numbers of the devices with another one"
    )]
    SectionTaken {
        /// The number.
        section: SectionId,
        /// The device.
        device: SectionName,
    },
    /// A name, machine type or device that cannot be written.
    #[error("{what}: {why}")]
    Value {
        /// What cannot be written.
        what: &'static str,
        /// The reason.
        why: String,
    },
    /// The file would be longer than the file size limit of this process.
    #[error(
        "the file needs at least {size:#x} bytes, but this process may only write files of {limit:#x} bytes (RLIMIT_FSIZE, \
         `ulimit -f`): raise the limit"
    )]
    FileSize {
        /// The limit of the process, in bytes.
        limit: u64,
        /// The bytes that the file needs before the devices.
        size: u64,
    },
    /// A name that is not a valid machine type.
    #[error(transparent)]
    MachineType(#[from] InvalidMachineType),
    /// The machine type does not allow what was requested.
    #[error("machine type {machine}: {why}")]
    Machine {
        /// The machine type.
        machine: MachineType,
        /// What it does not allow.
        why: &'static str,
    },
}
