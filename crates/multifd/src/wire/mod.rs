//! Packets as bytes: pure, no I/O.

mod id;

pub use id::{ChannelId, ParseUuidError, VmUuid};
