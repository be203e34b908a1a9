//! The head of a device-state packet: a device of the source (VFIO, 10.0 and later) sends its state over channels.
//!
//! ```text
//! 0 magic, version, flags with 0x40 | 12 device id, 256 bytes, ended by NUL | 268 instance | 272 next_packet_size | 276
//! ```
//!
//! It shares three fields with the packets that list pages and is shorter than these packets, so a reader checks the
//! flags before it waits for the rest. The head is only parsed for messages: a device's state is for its device, and no
//! file has a place for it.

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned, byteorder::big_endian::U32};

use super::{
    device_id::DeviceId,
    flags::Flags,
    initial::{MAGIC, check},
    limits::DEVICE_STATE_BYTES,
};
use crate::error::{Error, Malformed};

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Layout {
    magic: U32,
    version: U32,
    flags: U32,
    id: [u8; 256],
    instance: U32,
    next_packet_size: U32,
}

/// The number of bytes that the two kinds of head have in common: magic, version, flags.
pub const COMMON_LEN: usize = 12;

/// The length of a device-state packet's head in bytes.
pub const DEVICE_STATE_LEN: usize = 276;
const _: () = assert!(size_of::<Layout>() == DEVICE_STATE_LEN);

/// The head of a device-state packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// The device's name, as in its section on main.
    pub device: DeviceId,
    /// The number that distinguishes devices with this name.
    pub instance: u32,
    /// Bytes of state that follow.
    pub payload_len: u32,
}

impl DeviceState {
    /// Whether a head with these first bytes is one of device state.
    pub fn is_begun_by(common: &[u8; COMMON_LEN]) -> bool {
        let [m0, m1, m2, m3, _, _, _, _, f0, f1, f2, f3] = *common;
        let (magic, flags) = (U32::from_bytes([m0, m1, m2, m3]), U32::from_bytes([f0, f1, f2, f3]));
        magic.get() == MAGIC && Flags(flags.get()).intersects(Flags::DEVICE_STATE)
    }

    /// Decodes a head.
    ///
    /// # Errors
    /// [`Malformed`] if a field is wrong, or the packet is a SYNC as well.
    pub fn decode(bytes: &[u8; DEVICE_STATE_LEN]) -> Result<Self, Error> {
        let layout = Layout::ref_from_bytes(bytes)
            .map_err(|_| Malformed::Length { expected: DEVICE_STATE_LEN, found: bytes.len() })?;
        check(layout.magic, layout.version)?;
        let flags = Flags(layout.flags.get());
        if flags != Flags::DEVICE_STATE {
            return Err(Malformed::DeviceStateFlags { found: flags }.into());
        }
        let id = layout.id.iter().position(|byte| *byte == 0).filter(|end| *end > 0);
        let id = id.and_then(|end| layout.id.get(..end)).ok_or(Malformed::DeviceId)?;
        let payload_len = layout.next_packet_size.get();
        if !(1..=DEVICE_STATE_BYTES).contains(&payload_len) {
            return Err(Malformed::DeviceStateSize { most: DEVICE_STATE_BYTES, found: payload_len }.into());
        }
        let device = DeviceId::new(id);
        Ok(Self { device, instance: layout.instance.get(), payload_len })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A head for 16 bytes of state: id `dev`, instance 3.
    fn head() -> [u8; DEVICE_STATE_LEN] {
        let mut head = [0; DEVICE_STATE_LEN];
        head[..12].copy_from_slice(&[0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1, 0, 0, 0, 0x40]);
        head[12..15].copy_from_slice(b"dev");
        head[271] = 3;
        head[275] = 16;
        head
    }

    fn with(at: usize, bytes: &[u8]) -> Result<DeviceState, String> {
        let mut head = head();
        head[at..at + bytes.len()].copy_from_slice(bytes);
        DeviceState::decode(&head).map_err(|error| error.to_string())
    }

    #[test]
    fn a_head_names_device_and_instance() {
        let read = with(0, &[]).unwrap();
        assert_eq!((read.device.as_bytes(), read.instance, read.payload_len), (&b"dev"[..], 3, 16));
        assert_eq!(with(12, &[b'x'; 255]).unwrap().device.as_bytes(), [b'x'; 255]);
        assert_eq!(with(12, b"\x1b[2J\0").unwrap().device.to_string(), "\\x1b[2J");
    }

    #[test]
    fn a_head_with_a_wrong_field_is_refused() {
        assert_eq!(with(0, &[0]).unwrap_err(), "expected magic 0x11223344, found 0x00223344");
        assert_eq!(with(7, &[2]).unwrap_err(), "expected version 1, found 2");
        assert_eq!(
            with(11, &[0x41]).unwrap_err(),
            "device-state packet: expected flags 0x40 alone, found 0x41"
        );
        assert_eq!(
            with(11, &[0x42]).unwrap_err(),
            "device-state packet: expected flags 0x40 alone, found 0x42"
        );
        assert!(with(12, &[0]).unwrap_err().contains("device id"));
        assert!(with(12, &[b'x'; 256]).unwrap_err().contains("device id"));
        assert!(with(272, &[0; 4]).unwrap_err().contains("next_packet_size 0x0"));
        assert!(with(272, &DEVICE_STATE_BYTES.to_be_bytes()).is_ok());
        assert!(with(272, &(DEVICE_STATE_BYTES + 1).to_be_bytes()).is_err());
    }

    #[test]
    fn the_first_bytes_tell_it_from_other_packets() {
        let begun = |flags: u8| {
            let mut common: [u8; COMMON_LEN] = *head().first_chunk().unwrap();
            common[11] = flags;
            DeviceState::is_begun_by(&common)
        };
        assert!(begun(0x40) && begun(0x41));
        assert!(!begun(0) && !begun(1) && !begun(0x3e));
        assert!(!DeviceState::is_begun_by(&[0x40; COMMON_LEN]));
    }

    proptest! {
        #[test]
        fn any_head_is_read_or_refused(bytes: [u8; DEVICE_STATE_LEN]) {
            let mut bytes = bytes;
            bytes[..12].copy_from_slice(&head()[..12]);
            if let Ok(read) = DeviceState::decode(&bytes) {
                prop_assert!((1..=DEVICE_STATE_BYTES).contains(&read.payload_len));
                prop_assert!((1..256).contains(&read.device.as_bytes().len()));
            }
        }
    }
}
