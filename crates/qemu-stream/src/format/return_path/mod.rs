//! Messages from destination to source: `u16` type, `u16` length, data.

use std::io::Read;

use multifd::{error::UntrustedText, ram::BlockName};

use super::{Put, Reader, limits};
use crate::error::{Error, Malformed};

const SHUT: u16 = 1;
const PONG: u16 = 2;
const REQ_PAGES_ID: u16 = 3;
const REQ_PAGES: u16 = 4;
const RECV_BITMAP: u16 = 5;
const RESUME_ACK: u16 = 6;
const SWITCHOVER_ACK: u16 = 7;
/// A message of this library. It is sent only to a source that has [asked for it](REASON_PING).
const REASON: u16 = 0x6d66;

/// The value of a PONG that a destination of this library sends, without a PING, to a source of this library. It
/// announces that the destination will always send SHUT, even when it fails. So a connection that closes without SHUT
/// was not closed by the destination.
pub(crate) const VERDICT_MARK: u32 = 0x6d66_6501;

/// The value of the PING by which a source of this library asks whether all of RAM has arrived. Its guest is stopped,
/// and the end of RAM follows at once. For a QEMU it is a PING like any other.
pub(crate) const READY_PING: u32 = 0x6d66_6601;

/// The value of the PING by which a source of this library announces that it understands [`Message::Reason`]. For a QEMU
/// it is a PING like any other.
pub(crate) const REASON_PING: u32 = 0x6d66_6701;

/// The value of the PING by which a source of this library asks whether the destination takes pages over channels after the switch to
/// post-copy. For a QEMU it is a PING like any other.
pub(crate) const POSTCOPY_CHANNELS_PING: u32 = 0x6d66_6801;

/// The value of the PING by which a source of this library says that it has got SHUT after post-copy. A destination that does not get
/// it waits for the source to return.
pub(crate) const BYE_PING: u32 = 0x6d66_6901;

/// The value of the PING after DISCARD, the same as QEMU's.
pub(crate) const DISCARDED_PING: u32 = 2;

/// The value of the PING before the command to run the guest, the same as QEMU's. Its PONG says that the destination has the guest.
pub(crate) const LOADED_PING: u32 = 3;

/// The value of the PONG, without a PING, by which a destination of this library says that it does.
pub(crate) const POSTCOPY_CHANNELS_MARK: u32 = 0x6d66_6802;

const RESUME_ACK_VALUE: u32 = 1;
const BITMAP_END: u64 = 0x0123_4567_89ab_cdef;

/// A message from the destination to the source.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Message {
    /// The destination sends nothing more: 0 if everything is loaded, otherwise it has failed.
    Shut(u32),
    /// The answer to PING.
    Pong(u32),
    /// Pages that postcopy needs now; without a block, the block of the last request is meant.
    ReqPages {
        /// The block.
        block: Option<BlockName>,
        /// Offset of the first byte.
        start: u64,
        /// Number of bytes.
        length: u32,
    },
    /// The pages of a block that have arrived.
    RecvBitmap {
        /// The block.
        block: BlockName,
        /// Bit i of byte i / 8, least significant first; a multiple of 8 bytes.
        bitmap: Vec<u8>,
    },
    /// The destination is ready to continue with postcopy.
    ResumeAck,
    /// Ready for the switchover.
    SwitchoverAck,
    /// Why the SHUT that follows is a failure. QEMU has no such message: a destination of this library sends it to a source
    /// of this library. At most 512 bytes of the text are sent.
    Reason(UntrustedText),
}

impl Message {
    /// Appends the message.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut data = Vec::new();
        let kind = match self {
            Self::Shut(value) => {
                data.put_u32(*value);
                SHUT
            }
            Self::Pong(value) => {
                data.put_u32(*value);
                PONG
            }
            Self::ReqPages { block, start, length } => {
                data.put_u64(*start);
                data.put_u32(*length);
                if let Some(block) = block {
                    data.put_name(block);
                }
                if block.is_some() { REQ_PAGES_ID } else { REQ_PAGES }
            }
            Self::RecvBitmap { block, .. } => {
                data.put_name(block);
                RECV_BITMAP
            }
            Self::ResumeAck => {
                data.put_u32(RESUME_ACK_VALUE);
                RESUME_ACK
            }
            Self::SwitchoverAck => SWITCHOVER_ACK,
            Self::Reason(text) => {
                let text = text.as_raw();
                let sent = text.floor_char_boundary(limits::MESSAGE.into());
                data.put(text.get(..sent).unwrap_or_default().as_bytes());
                REASON
            }
        };
        out.put_u16(kind);
        #[expect(
            clippy::cast_possible_truncation,
            reason = "at most a name and 12 bytes, or 512 bytes of text"
        )]
        out.put_u16(data.len() as u16);
        out.put(&data);
        if let Self::RecvBitmap { bitmap, .. } = self {
            let padding = bitmap.len().next_multiple_of(8) - bitmap.len();
            out.put_u64((bitmap.len() + padding) as u64);
            out.put(bitmap);
            (0..padding).for_each(|_| out.put_u8(0));
            out.put_u64(BITMAP_END);
        }
    }

    /// Decodes a message; `None` if the destination has closed the return path between two messages.
    ///
    /// # Errors
    /// If the type is unknown, the length wrong, or the stream ends within the message.
    pub fn decode<R: Read>(r: &mut Reader<R>) -> Result<Option<Self>, Error> {
        Self::decode_within(r, limits::RECV_BITMAP)
    }

    /// Like [`decode`](Self::decode), of a machine whose bitmaps have at most this number of bytes.
    pub(crate) fn decode_within<R: Read>(r: &mut Reader<R>, most: u64) -> Result<Option<Self>, Error> {
        if r.peek()?.is_none() {
            return Ok(None);
        }
        let kind = r.u16("type of a message")?;
        let at = r.place();
        let length = r.u16("length of a message")?;
        if length > limits::MESSAGE {
            let max = limits::MESSAGE.into();
            return Err(Malformed::too_long("length of a message", max, length.into()).at(r.place()));
        }
        let before = r.position();
        let wrong =
            |text: &'static str| Malformed::value(format!("length of message {kind}"), text, length).at(at);
        let fixed = |expected: u16, text| if length == expected { Ok(()) } else { Err(wrong(text)) };
        let message = match kind {
            SHUT => {
                fixed(4, "4")?;
                Self::Shut(r.u32("value of SHUT")?)
            }
            PONG => {
                fixed(4, "4")?;
                Self::Pong(r.u32("value of PONG")?)
            }
            REQ_PAGES | REQ_PAGES_ID => {
                if kind == REQ_PAGES {
                    fixed(12, "0xc")?;
                } else if length < 14 {
                    return Err(wrong("at least 0xe"));
                }
                let start = r.u64("start of the pages")?;
                let length = r.u32("length of the pages")?;
                let block = match kind {
                    REQ_PAGES_ID => Some(r.block_name("block of the pages")?),
                    _ => None,
                };
                Self::ReqPages { block, start, length }
            }
            RECV_BITMAP => Self::RecvBitmap { block: r.block_name("block of a bitmap")?, bitmap: Vec::new() },
            RESUME_ACK => {
                fixed(4, "4")?;
                let value = r.u32("value of RESUME_ACK")?;
                if value != RESUME_ACK_VALUE {
                    return Err(Malformed::value("value of RESUME_ACK", "1", value).at(r.place()));
                }
                Self::ResumeAck
            }
            SWITCHOVER_ACK => fixed(0, "0").map(|()| Self::SwitchoverAck)?,
            REASON => {
                let text = r.bytes(length.into(), limits::MESSAGE.into(), "text of a reason")?;
                Self::Reason(UntrustedText::from_bytes(&text))
            }
            unknown => return Err(Malformed::value("type of a message", "1 to 7", unknown).at(at)),
        };
        if r.position() - before != u64::from(length) {
            return Err(wrong("the length of its contents"));
        }
        match message {
            Self::RecvBitmap { block, .. } => {
                decode_bitmap(r, most).map(|bitmap| Self::RecvBitmap { block, bitmap })
            }
            complete => Ok(complete),
        }
        .map(Some)
    }
}

fn decode_bitmap<R: Read>(r: &mut Reader<R>, most: u64) -> Result<Vec<u8>, Error> {
    let size = r.u64("size of a bitmap")?;
    if size % 8 != 0 {
        return Err(Malformed::value("size of a bitmap", "a multiple of 8", size).at(r.place()));
    }
    let bitmap = r.bytes(size, most, "bitmap")?;
    let end = r.u64("end of a bitmap")?;
    if end != BITMAP_END {
        return Err(Malformed::value("end of a bitmap", "0x123456789abcdef", end).at(r.place()));
    }
    Ok(bitmap)
}

#[cfg(test)]
mod tests;
