//! The bounds against which every number from a peer is checked.

use crate::ram::PageSize;

/// The greatest number of bytes of guest RAM in one packet.
pub const PACKET_BYTES: usize = 512 << 10;

/// The greatest payload: a compressed packet may be a little larger than its pages, but never double.
pub const PAYLOAD_BYTES: u32 = 1 << 20;

/// The greatest number of bytes of a device's state in one packet.
pub const DEVICE_STATE_BYTES: u32 = 64 << 20;

/// The greatest window of a zstd frame, as a power of two: 32 MiB, which level 20 uses, QEMU's highest. A decoder takes
/// this much memory as soon as a frame asks for it.
pub const ZSTD_WINDOW_LOG: u32 = 25;

/// The greatest number of channels of a migration.
pub const CHANNELS: u8 = 255;

/// The greatest number of connections of one host that wait at once, for their first bytes or for main: every channel,
/// main, and some foreign connections.
pub const GREETINGS: usize = CHANNELS as usize + 1 + 64;

/// The same, of all hosts: a foreign host leaves room for a source with every channel.
pub const OUTSIDE: usize = 2 * (CHANNELS as usize + 1);

/// The greatest number of connections that are open at once, with all channels, and some that are being closed. A process
/// may have 1024 descriptors by default.
pub const CONNECTIONS: usize = OUTSIDE + CHANNELS as usize + 1 + 64;

/// The greatest number of pages of the smallest size in a packet.
pub const MAX_PACKET_PAGES: usize = packet_pages(PageSize::KIB_4);

/// The greatest number of pages of `page_size` in a packet.
pub const fn packet_pages(page_size: PageSize) -> usize {
    PACKET_BYTES / page_size.bytes()
}
