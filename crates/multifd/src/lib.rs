//! Moves the RAM of a running virtual machine over many channels.

mod batch;
pub mod channel;
mod compress;
pub mod error;
pub mod live;
mod options;
pub mod ram;
mod send;
mod stats;
pub mod wire;

pub use compress::Method;
pub use error::{Error, Result};
pub use options::{ChannelCount, ReceiveOptions, SendOptions};
pub use send::{SendCounters, Sender};
pub use stats::ChannelStats;
