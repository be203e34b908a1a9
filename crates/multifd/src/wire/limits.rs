//! The bounds that every number from a peer meets.

use crate::ram::PageSize;

/// The bytes of guest RAM that one packet carries at the most.
pub const PACKET_BYTES: usize = 512 << 10;

/// The greatest payload: a compressed packet may outgrow its pages a little, never double.
pub const PAYLOAD_BYTES: u32 = 1 << 20;

/// The most bytes of a device's state in one packet.
pub const DEVICE_STATE_BYTES: u32 = 64 << 20;

/// The largest window that a zstd frame may ask for, as a power of two: 128 MiB, zstd's own limit. Level 20 asks for 32
/// MiB.
pub const ZSTD_WINDOW_LOG: u32 = 27;

/// The most channels of a migration.
pub const CHANNELS: u8 = 255;

/// The most connections that wait at once for their first bytes: every channel, main, and a few strangers.
pub const GREETINGS: usize = CHANNELS as usize + 1 + 64;

/// The most pages of the smallest size that a packet lists.
pub const MAX_PACKET_PAGES: usize = packet_pages(PageSize::KIB_4);

/// How many pages of `page_size` a packet lists at the most.
pub const fn packet_pages(page_size: PageSize) -> usize {
    PACKET_BYTES / page_size.bytes()
}
