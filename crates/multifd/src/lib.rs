//! Moves the RAM of a running virtual machine over many channels.

pub mod error;
pub mod live;
pub mod ram;
pub mod wire;

pub use error::{Error, Result};
