//! What can be chosen: a struct for each side and one for the passes, with defaults that work with a default QEMU.
//!
//! Names, ranges and defaults of numbers are in [`parameters`]; `settings.rs` reads and writes all of them as data.

mod channels;
mod migrate;
pub mod parameters;
mod postcopy;
mod receive;
mod send;
#[cfg(feature = "serde")]
mod settings;

pub use channels::{ChannelCount, ChannelsFrom};
pub use migrate::{MigrateOptions, ZeroPageDetection};
pub use postcopy::PostcopyWhen;
pub use receive::ReceiveOptions;
pub use send::SendOptions;
