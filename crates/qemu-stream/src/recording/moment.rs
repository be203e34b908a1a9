//! What happened on the main connection, and when.

use std::{fmt, time::Duration};

use super::Side;

/// A step of the main connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moment {
    /// When its last byte arrived at the recorder, since the start.
    pub at: Duration,
    /// Who has sent it.
    pub side: Side,
    /// What it is.
    pub step: Step,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// The configuration; the machine type, if the stream has it.
    Configuration(Option<String>),
    /// A command of the source, with its name and value.
    Command(String),
    /// The block list.
    Blocks {
        /// The number of blocks.
        count: u64,
        /// The bytes of all of them.
        bytes: u64,
    },
    /// A pass over RAM begins, or the last one.
    Pass {
        /// Whether the guest is stopped.
        last: bool,
    },
    /// All channels have to reach their next SYNC.
    SyncPoint,
    /// RAM is complete.
    EndOfRam,
    /// The first bytes of the devices.
    Devices,
    /// The end of the main stream.
    End,
    /// A message of the destination.
    Message(String),
    /// The direction cannot be parsed from here on.
    Unreadable(String),
}

/// The time in which the guest was stopped, as far as the stream shows it. Without post-copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Downtime {
    /// From the previous event of the main stream to the last pass. The source stops its guest within this time.
    pub before: Duration,
    /// From the beginning of the last pass to the end of RAM.
    pub ram: Duration,
    /// From the end of RAM to the end of the device state.
    pub devices: Duration,
    /// From the end of the device state to SHUT; `None` if the destination has sent none.
    pub reply: Option<Duration>,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Configuration(Some(machine)) => write!(f, "configuration: machine {machine}"),
            Self::Configuration(None) => f.write_str("header"),
            Self::Command(text) => f.write_str(text),
            Self::Blocks { count, bytes } => write!(f, "{count} RAM blocks, {bytes} bytes"),
            Self::Pass { last: false } => f.write_str("section of RAM (PART)"),
            Self::Pass { last: true } => f.write_str("last pass"),
            Self::SyncPoint => f.write_str("sync point"),
            Self::EndOfRam => f.write_str("end of RAM"),
            Self::Devices => f.write_str("device state"),
            Self::End => f.write_str("end of the main stream"),
            Self::Message(text) => f.write_str(text),
            Self::Unreadable(why) => write!(f, "cannot be parsed further: {why}"),
        }
    }
}
