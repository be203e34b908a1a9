//! The bounds of everything that a peer can make long.
//!
//! Each is far above what real machines send, and low enough that a hostile peer gains nothing from it. A length is
//! compared with its bound before it is used to allocate, index, loop or multiply.

/// Bytes of a machine type's name.
pub const MACHINE_NAME: u32 = 255;

/// Capabilities listed in the configuration. Real streams list at most two.
pub const CAPABILITIES: u32 = 64;

/// RAM blocks in the list. Machines with hundreds of hot-plugged parts have fewer.
pub const BLOCKS: usize = 16_384;

/// Bytes of RAM in all blocks together: 64 TiB.
pub const RAM_TOTAL: u64 = 1 << 46;

/// Bytes of a host page: 4 TiB. The largest that a processor has is 256 GiB.
pub const HOST_PAGE: u64 = 1 << 42;

/// Bytes of a command's data; the wire's own bound.
pub const COMMAND: u16 = u16::MAX;

/// Bytes of a return-path message's data.
pub const MESSAGE: u16 = 512;

/// Bytes of a bitmap in a RECV_BITMAP message: one bit per page for all of [`RAM_TOTAL`].
pub const RECV_BITMAP: u64 = RAM_TOTAL >> 12 >> 3;

/// Bytes between the RAM section and the end of the stream, or in a package of post-copy.
pub const DEVICE_PART: usize = 256 << 20;

/// PINGs at the end of a package. QEMU sends one or two.
pub const PACKAGE_PINGS: usize = 8;

/// Bytes of devices sent before the end of RAM. virtio-mem has one bit per block of about 2 MiB.
pub const EARLY_PART: usize = 16 << 20;

/// Bytes of all live sections. A guest of 16 GiB has a hash table of 128 MiB.
pub const LIVE_PART: usize = 256 << 20;

/// Bytes of the closing description. A q35 guest has 45 KiB.
pub const DESCRIPTION: u32 = 16 << 20;

/// Devices in the closing description.
pub const DEVICES: usize = 65_536;

/// Places in the device part that look like its end.
pub const ENDS: usize = 4_096;

/// Bytes of descriptions that are parsed in search of the one that fits.
pub const DESCRIPTIONS_PARSED: u64 = 128 << 20;

/// Bytes that are allocated before they arrive.
pub const AHEAD: usize = 64 << 10;
