//! The stream as bytes: pure, bounded, no sockets.
//!
//! ```text
//! header ─ configuration ─ commands ─ START ram ─ PART* ─ [SWITCHOVER_START] ─ END ─ FULL* ─ EOF ─ JSON
//! configuration/           command/     │ section/                              device_part/
//!                                       └ block list, records: blocks/, record/, xbzrle.rs
//! ```
//!
//! The input is a [`Reader`] over anything that can be read. The output is values that are valid by construction; each
//! type has `decode` and `encode` side by side. An [`Error`](crate::Error) names the stream and the offset. The whole
//! format is drawn in `docs/develop/stream-format.md`.

#![warn(clippy::indexing_slicing)]

mod blocks;
mod command;
mod configuration;
mod device_part;
mod event;
pub mod limits;
mod machine;
pub(crate) mod name;
mod other;
mod put;
mod reader;
mod record;
mod return_path;
mod rounds;
pub(crate) mod run_state;
mod section;
mod section_id;
#[cfg(test)]
pub(crate) mod testing;
pub mod xbzrle;

pub(crate) use blocks::ListReader;
pub use blocks::{BlockEntry, BlockList};
pub use command::{Command, PageSizes};
pub use configuration::{Configuration, decode_header, encode_header};
pub(crate) use configuration::{DELTA_VERSION, decode_header_of_file};
pub use device_part::{
    Description, Device, DevicePart, DeviceSection, EarlyPart, EndFinder, LiveSection, Misfit,
};
pub(crate) use device_part::{Package, devices_of_package};
pub use event::{Delta, Event, SyncMark};
pub use machine::{InvalidMachineType, MachineType, MachineVersion};
pub use multifd::ram::BlockIndex;
pub use name::SectionName;
pub use other::{Compressor, LibvirtStorage, OtherFormat};
pub(crate) use put::Put;
pub use reader::Reader;
pub(crate) use reader::Skip;
pub use record::{CurrentBlock, Record};
pub use return_path::Message;
pub(crate) use return_path::{
    BYE_PING, DISCARDED_PING, LOADED_PING, POSTCOPY_CHANNELS_MARK, POSTCOPY_CHANNELS_PING, READY_PING,
    REASON_PING, VERDICT_MARK,
};
pub(crate) use rounds::{ROUND_MARK, ROUND_PING, as_lost_channel, lost_channel};
pub use section::{Section, SectionHead, decode_footer, encode_footer, footer_follows};
pub use section_id::SectionId;

/// How the ends of dirty rounds are marked on the main stream if multifd is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncMode {
    /// Every EOS of the RAM section: machine types up to 8.0.
    Legacy,
    /// A MULTIFD_FLUSH record at the end of each scan over RAM: machine types from 8.1 on.
    Round,
}
