//! A channel's packets as bytes.
//!
//! ```text
//! 64 bytes    head                payload               head       head
//! ┌─────────┬───────────────────┬─────────────────────┬──────────┬───────────────────┬──
//! │ Initial │ Packet: 2 pages,… │ page 7 │ page 8 │ … │ SYNC     │ Packet: zero only │ …
//! └─────────┴───────────────────┴─────────────────────┴──────────┴───────────────────┴──
//! ```
//!
//! This module has no I/O, no unsafe code and no knowledge of sender or receiver. Every number is big-endian. Every
//! count is checked against its bound before a value exists. The bytes are drawn in `docs/develop/stream-format.md`.

#![warn(clippy::indexing_slicing)]

mod device_id;
mod device_state;
mod flags;
mod id;
mod initial;
pub mod limits;
mod packet;

pub use device_id::DeviceId;
pub use device_state::{COMMON_LEN, DEVICE_STATE_LEN, DeviceState};
pub use flags::Flags;
pub use id::{ChannelId, ParseUuidError, VmUuid};
pub use initial::{INITIAL_LEN, Initial, MAGIC, VERSION};
pub use packet::{HeadBuffer, Packet, Pages, head_len};
