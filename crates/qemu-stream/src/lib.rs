//! Reads and writes a QEMU migration stream: main stream, device sections, mapped-ram files.

pub mod error;
pub mod format;
pub mod mapped_ram;
mod refuse;

pub use error::Error;
