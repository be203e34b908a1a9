//! The initial packet: 64 bytes, sent once, at the beginning of every channel.
//!
//! Its bytes are decoded to the identity of the channel. The receiver decides whether to accept the UUID and the id.
//! The layout is drawn in `docs/develop/stream-format.md`.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    byteorder::big_endian::{U32, U64},
};

use super::{ChannelId, VmUuid};
use crate::error::Malformed;

/// The first four bytes of a channel and of each of its packets.
pub const MAGIC: u32 = 0x1122_3344;
/// The only version of the initial packet and of packets.
pub const VERSION: u32 = 1;
/// The length of an initial packet in bytes.
pub const INITIAL_LEN: usize = 64;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Layout {
    magic: U32,
    version: U32,
    uuid: [u8; 16],
    id: u8,
    unused: [u8; 7],
    unused_words: [U64; 4],
}

const _: () = assert!(size_of::<Layout>() == INITIAL_LEN);

/// The identity that a channel sends when it opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initial {
    /// The source machine's UUID; nil if it has none.
    pub uuid: VmUuid,
    /// The number of the channel.
    pub id: ChannelId,
}

impl Initial {
    /// Encodes the packet. Unused bytes are zero.
    pub fn encode(&self) -> [u8; INITIAL_LEN] {
        let layout = Layout {
            magic: MAGIC.into(),
            version: VERSION.into(),
            uuid: self.uuid.0,
            id: self.id.0,
            unused: [0; 7],
            unused_words: [U64::ZERO; 4],
        };
        zerocopy::transmute!(layout)
    }

    /// Whether bytes begin with the magic of this packet.
    pub fn is_begun_by(bytes: &[u8]) -> bool {
        bytes.starts_with(&MAGIC.to_be_bytes())
    }

    /// Decodes a packet. Unused bytes are ignored.
    ///
    /// # Errors
    /// [`Malformed::Magic`] or [`Malformed::Version`].
    pub fn decode(bytes: &[u8; INITIAL_LEN]) -> Result<Self, Malformed> {
        let layout: Layout = zerocopy::transmute!(*bytes);
        check(layout.magic, layout.version)?;
        Ok(Self { uuid: VmUuid(layout.uuid), id: ChannelId(layout.id) })
    }
}

/// Refuses a wrong magic or version.
pub(super) fn check(magic: U32, version: U32) -> Result<(), Malformed> {
    if magic.get() != MAGIC {
        return Err(Malformed::Magic { expected: MAGIC, found: magic.get() });
    }
    if version.get() != VERSION {
        return Err(Malformed::Version { expected: VERSION, found: version.get() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Written by QEMU 10.0.2 for channel 1 of a machine with this UUID.
    const GOLDEN: [u8; INITIAL_LEN] = {
        let mut bytes = [0; INITIAL_LEN];
        let head = [
            0x11, 0x22, 0x33, 0x44, 0x00, 0x00, 0x00, 0x01, 0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77,
            0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff, 0x01,
        ];
        let mut at = 0;
        while at < head.len() {
            bytes[at] = head[at];
            at += 1;
        }
        bytes
    };

    fn golden() -> Initial {
        Initial { uuid: "00112233-4455-6677-8899-aabbccddeeff".parse().expect("a UUID"), id: ChannelId(1) }
    }

    #[test]
    fn qemus_initial_packet_is_read_and_written_to_the_byte() {
        assert_eq!(Initial::decode(&GOLDEN), Ok(golden()));
        assert_eq!(golden().encode(), GOLDEN);
    }

    #[test]
    fn a_wrong_magic_and_a_wrong_version_are_refused() {
        let mut bytes = GOLDEN;
        bytes[0] = 0x51;
        let refused = Initial::decode(&bytes).expect_err("refused");
        assert_eq!(refused.to_string(), "expected magic 0x11223344, found 0x51223344");
        let mut bytes = GOLDEN;
        bytes[7] = 2;
        assert_eq!(Initial::decode(&bytes), Err(Malformed::Version { expected: 1, found: 2 }));
    }

    #[test]
    fn unused_bytes_are_ignored() {
        let mut bytes = GOLDEN;
        bytes[25..].fill(0xff);
        assert_eq!(Initial::decode(&bytes), Ok(golden()));
    }
}
