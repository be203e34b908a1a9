//! Commands: `u16` number, `u16` length, data.

use std::io::Read;

use multifd::ram::BlockName;

use super::{Put, Reader};
use crate::error::{Error, Malformed};

const OPEN_RETURN_PATH: u16 = 1;
const PING: u16 = 2;
const POSTCOPY_ADVISE: u16 = 3;
const POSTCOPY_LISTEN: u16 = 4;
const POSTCOPY_RUN: u16 = 5;
const POSTCOPY_RAM_DISCARD: u16 = 6;
const PACKAGED: u16 = 7;
const ENABLE_COLO: u16 = 8;
const POSTCOPY_RESUME: u16 = 9;
const RECV_BITMAP: u16 = 10;
const SWITCHOVER_START: u16 = 11;

/// The value of a PING that announces channels: `mfd`, and the number of channels in the last byte.
const CHANNELS_MARK: u32 = 0x6d66_6400;

/// The bytes of one range in POSTCOPY_RAM_DISCARD.
const RANGE: usize = 16;

/// A command from the source to the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Command {
    /// The destination may now write on the main connection.
    OpenReturnPath,
    /// Answer PONG with this value.
    Ping(u32),
    /// Postcopy may follow. Without contents: of dirty bitmaps only.
    PostcopyAdvise(Option<PageSizes>),
    /// Get ready for page requests.
    PostcopyListen,
    /// Start the guest.
    PostcopyRun,
    /// Forget these pages.
    PostcopyRamDiscard {
        /// The block they are in.
        block: BlockName,
        /// Start and length of each range, in bytes.
        ranges: Vec<(u64, u64)>,
    },
    /// The number of bytes of stream that follow the command.
    Packaged(u32),
    /// Colo may follow.
    EnableColo,
    /// Continue after a broken postcopy.
    PostcopyResume,
    /// Send RECV_BITMAP of this block.
    RecvBitmap(BlockName),
    /// The guest has stopped and the last sections follow.
    SwitchoverStart,
}

/// The page sizes of POSTCOPY_ADVISE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageSizes {
    /// The bitwise or of the host page sizes of all RAM blocks.
    pub host: u64,
    /// The target page size.
    pub target: u64,
}

impl Command {
    /// The name of the command.
    pub fn name(&self) -> &'static str {
        match self {
            Self::OpenReturnPath => "OPEN_RETURN_PATH",
            Self::Ping(_) => "PING",
            Self::PostcopyAdvise(_) => "POSTCOPY_ADVISE",
            Self::PostcopyListen => "POSTCOPY_LISTEN",
            Self::PostcopyRun => "POSTCOPY_RUN",
            Self::PostcopyRamDiscard { .. } => "POSTCOPY_RAM_DISCARD",
            Self::Packaged(_) => "PACKAGED",
            Self::EnableColo => "ENABLE_COLO",
            Self::PostcopyResume => "POSTCOPY_RESUME",
            Self::RecvBitmap(_) => "RECV_BITMAP",
            Self::SwitchoverStart => "SWITCHOVER_START",
        }
    }

    /// Announces that the source has this many channels, 0 if multifd is off: a PING whose value a destination of this
    /// library recognises. Any other destination replies to it like to any PING.
    pub fn announce_channels(channels: u8) -> Self {
        Self::Ping(CHANNELS_MARK | u32::from(channels))
    }

    /// The number of channels that the command announces, if it announces one.
    pub fn announced_channels(&self) -> Option<u8> {
        match self {
            Self::Ping(value) if value & !0xff == CHANNELS_MARK => Some(value.to_be_bytes()[3]),
            _ => None,
        }
    }

    /// The name of the command in a refusal.
    pub(crate) fn refusal(&self) -> &'static str {
        match self {
            Self::PostcopyListen => "command POSTCOPY_LISTEN",
            Self::PostcopyRun => "command POSTCOPY_RUN",
            Self::PostcopyRamDiscard { .. } => "command POSTCOPY_RAM_DISCARD",
            Self::Packaged(_) => "command PACKAGED",
            Self::PostcopyResume => "command POSTCOPY_RESUME",
            Self::RecvBitmap(_) => "command RECV_BITMAP",
            other => other.name(),
        }
    }

    /// Appends the command, without the section type before it.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut data = Vec::new();
        let number = match self {
            Self::OpenReturnPath => OPEN_RETURN_PATH,
            Self::Ping(value) => {
                data.put_u32(*value);
                PING
            }
            Self::PostcopyAdvise(sizes) => {
                if let Some(sizes) = sizes {
                    data.put_u64(sizes.host);
                    data.put_u64(sizes.target);
                }
                POSTCOPY_ADVISE
            }
            Self::PostcopyListen => POSTCOPY_LISTEN,
            Self::PostcopyRun => POSTCOPY_RUN,
            Self::PostcopyRamDiscard { block, ranges } => {
                data.put_u8(0);
                data.put_name(block);
                data.put_u8(0);
                // Ranges beyond one command are omitted; the caller splits them.
                for (start, length) in ranges.iter().take(Self::RANGES_MAX) {
                    data.put_u64(*start);
                    data.put_u64(*length);
                }
                POSTCOPY_RAM_DISCARD
            }
            Self::Packaged(length) => {
                data.put_u32(*length);
                PACKAGED
            }
            Self::EnableColo => ENABLE_COLO,
            Self::PostcopyResume => POSTCOPY_RESUME,
            Self::RecvBitmap(block) => {
                data.put_name(block);
                RECV_BITMAP
            }
            Self::SwitchoverStart => SWITCHOVER_START,
        };
        out.put_u16(number);
        #[expect(clippy::cast_possible_truncation, reason = "258 bytes and RANGES_MAX ranges at most")]
        out.put_u16(data.len() as u16);
        out.put(&data);
    }

    /// The number of ranges that fit into one POSTCOPY_RAM_DISCARD, with any name.
    pub const RANGES_MAX: usize = (u16::MAX as usize - 258) / RANGE;

    /// Decodes a command, without the section type before it. The bytes after PACKAGED are not read.
    ///
    /// # Errors
    /// If its number is unknown, its length is wrong, or the stream ends early.
    pub fn decode<R: Read>(r: &mut Reader<R>) -> Result<Self, Error> {
        let number = r.u16("number of a command")?;
        let at = r.place();
        let length = r.u16("length of a command")?;
        let fixed = |expected: u16, text: &'static str| {
            let wrong = || Malformed::value(format!("length of command {number}"), text, length).at(at);
            if length == expected { Ok(()) } else { Err(wrong()) }
        };
        match number {
            OPEN_RETURN_PATH => fixed(0, "0").map(|()| Self::OpenReturnPath),
            PING => {
                fixed(4, "4")?;
                Ok(Self::Ping(r.u32("value of PING")?))
            }
            POSTCOPY_ADVISE if length == 0 => Ok(Self::PostcopyAdvise(None)),
            POSTCOPY_ADVISE => {
                fixed(16, "0 or 0x10")?;
                let host = r.u64("host page sizes")?;
                let target = r.u64("target page size")?;
                Ok(Self::PostcopyAdvise(Some(PageSizes { host, target })))
            }
            POSTCOPY_LISTEN => fixed(0, "0").map(|()| Self::PostcopyListen),
            POSTCOPY_RUN => fixed(0, "0").map(|()| Self::PostcopyRun),
            POSTCOPY_RAM_DISCARD => Self::decode_discard(r, length),
            PACKAGED => {
                fixed(4, "4")?;
                Ok(Self::Packaged(r.u32("length of a package")?))
            }
            ENABLE_COLO => fixed(0, "0").map(|()| Self::EnableColo),
            POSTCOPY_RESUME => fixed(0, "0").map(|()| Self::PostcopyResume),
            RECV_BITMAP => {
                let before = r.position();
                let block = r.block_name("block of RECV_BITMAP")?;
                if r.position() - before != u64::from(length) {
                    let expected = "the length of its block name";
                    return Err(Malformed::value("length of RECV_BITMAP", expected, length).at(at));
                }
                Ok(Self::RecvBitmap(block))
            }
            SWITCHOVER_START => fixed(0, "0").map(|()| Self::SwitchoverStart),
            unknown => Err(Malformed::value("number of a command", "1 to 11", unknown).at(at)),
        }
    }

    fn decode_discard<R: Read>(r: &mut Reader<R>, length: u16) -> Result<Self, Error> {
        let at = r.place();
        let before = r.position();
        let version = r.u8("version of POSTCOPY_RAM_DISCARD")?;
        if version != 0 {
            return Err(Malformed::value("version of POSTCOPY_RAM_DISCARD", "0", version).at(r.place()));
        }
        let block = r.block_name("block of POSTCOPY_RAM_DISCARD")?;
        let terminator = r.u8("terminator of POSTCOPY_RAM_DISCARD")?;
        if terminator != 0 {
            return Err(Malformed::value("terminator of POSTCOPY_RAM_DISCARD", "0", terminator).at(r.place()));
        }
        let left = u64::from(length).checked_sub(r.position() - before);
        let Some(left) = left.filter(|left| left % RANGE as u64 == 0) else {
            let expected = "its block name and whole ranges";
            return Err(Malformed::value("length of POSTCOPY_RAM_DISCARD", expected, length).at(at));
        };
        let mut ranges = Vec::new();
        for _ in 0..left / RANGE as u64 {
            ranges.push((r.u64("start of a range")?, r.u64("length of a range")?));
        }
        Ok(Self::PostcopyRamDiscard { block, ranges })
    }
}

#[cfg(test)]
mod tests;
