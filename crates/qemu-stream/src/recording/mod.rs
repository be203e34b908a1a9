//! Recordings of migrations: what passed between a source and a destination, when, and who waited.
//!
//! ```text
//! file ─▶ Recording ─┬─ records ─▶ heads, in the order of the file
//!                    ├─ OneWay ─▶ the bytes of one direction of one connection, as a Read
//!                    ├─ Timeline: connections, packets, passes, messages, downtime
//!                    └─ Played ─▶ a listener, whose links are the recorded connections
//! ```
//!
//! A file is untrusted: every number has a bound, and nothing is allocated for bytes that are not there. A file that ends within a
//! record is complete up to that record, because a recorder may be killed. The format is drawn in `docs/develop/stream-format.md`.

#![warn(clippy::indexing_slicing)]

mod bytes;
mod channel;
mod format;
mod main_stream;
mod moment;
mod one_way;
mod played;
mod records;
mod timeline;

pub use bytes::Bytes;
pub use channel::ChannelLine;
pub use format::{ConnectionNumber, FileHead, RecordHead, RecordKind, Side};
pub use moment::{Downtime, Moment, Step};
pub use one_way::OneWay;
pub use played::Played;
pub use records::{Record, Recording, Records};
pub use timeline::{Connection, ConnectionKind, Ending, Flow, Timeline};

#[cfg(test)]
mod tests;
