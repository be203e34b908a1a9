//! The flags of a packet head.

use std::{fmt, ops::BitOr};

/// The flags of a packet: SYNC, the compression method, the kind of packet.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Flags(pub u32);

impl Flags {
    /// SYNC: the packet is a sync point of its channel.
    pub const SYNC: Self = Self(0x01);
    /// The bits of the compression method; none set: pages are not compressed.
    pub const METHOD: Self = Self(0x3e);
    /// Pages compressed by zlib, one stream per channel.
    pub const ZLIB: Self = Self(0x02);
    /// Pages compressed by zstd, one frame per channel.
    pub const ZSTD: Self = Self(0x04);
    /// Pages compressed by Intel's IAA.
    pub const QPL: Self = Self(0x08);
    /// Pages compressed by Kunpeng's accelerator.
    pub const UADK: Self = Self(0x10);
    /// Pages compressed by Intel's QAT.
    pub const QATZIP: Self = Self(0x20);
    /// The packet carries device state and has a different layout.
    pub const DEVICE_STATE: Self = Self(0x40);

    /// Whether any bit of `other` is set.
    pub const fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// The bits that are also in `mask`.
    #[must_use]
    pub const fn masked(self, mask: Self) -> Self {
        Self(self.0 & mask.0)
    }

    /// The bits that have no meaning here.
    #[must_use]
    pub const fn unknown(self) -> Self {
        Self(self.0 & !(Self::SYNC.0 | Self::METHOD.0 | Self::DEVICE_STATE.0))
    }
}

impl BitOr for Flags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Display for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}
