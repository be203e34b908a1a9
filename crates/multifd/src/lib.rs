//! Moves the RAM of a running virtual machine over many channels.

pub mod ram;
pub mod wire;
