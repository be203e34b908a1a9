//! Reads and writes a QEMU migration stream: main stream, device sections, mapped-ram files.

pub mod error;
pub mod format;

pub use error::Error;
