//! Reads and writes a QEMU migration stream: main stream, device sections, mapped-ram files.

mod connection;
pub mod error;
pub mod format;
pub mod incoming;
pub mod mapped_ram;
pub mod outgoing;
mod refuse;

pub use connection::Connection;
pub use error::Error;
