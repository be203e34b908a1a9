//! Counters of what was sent or received, with the names of QEMU's `query-migrate`.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::wire::ChannelId;

/// The counters of one channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChannelStats {
    /// The channel.
    pub id: ChannelId,
    /// The number of packets, including SYNC packets, excluding the initial packet.
    pub packets: u64,
    /// Pages whose bytes were sent.
    pub normal: u64,
    /// Pages that were listed as zero.
    pub zero: u64,
    /// Bytes on the connection: initial packet, heads and payloads.
    pub bytes: u64,
    /// The number of channel syncs up to which some pages were copied although `zero-copy-send` was requested.
    pub missed_zero_copy: u64,
}

/// A channel's counters: written by its own thread, readable by any.
#[derive(Debug, Default)]
pub(crate) struct ChannelCounters {
    packets: AtomicU64,
    normal: AtomicU64,
    zero: AtomicU64,
    bytes: AtomicU64,
    missed_zero_copy: AtomicU64,
}

// Relaxed throughout: the numbers order nothing. A reader that has joined the thread, or passed a channel sync with it,
// reads exact values.
impl ChannelCounters {
    /// Counts bytes that belong to no packet.
    pub(crate) fn add_bytes(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts a packet with its pages and all its bytes.
    pub(crate) fn add_packet(&self, normal: usize, zero: usize, bytes: u64) {
        self.packets.fetch_add(1, Ordering::Relaxed);
        self.normal.fetch_add(normal as u64, Ordering::Relaxed);
        self.zero.fetch_add(zero as u64, Ordering::Relaxed);
        self.add_bytes(bytes);
    }

    /// Counts a channel sync; pages before it were `copied` or not.
    pub(crate) fn add_missed_zero_copy(&self, copied: bool) {
        self.missed_zero_copy.fetch_add(copied.into(), Ordering::Relaxed);
    }

    pub(crate) fn snapshot(&self, id: ChannelId) -> ChannelStats {
        ChannelStats {
            id,
            packets: self.packets.load(Ordering::Relaxed),
            normal: self.normal.load(Ordering::Relaxed),
            zero: self.zero.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            missed_zero_copy: self.missed_zero_copy.load(Ordering::Relaxed),
        }
    }
}
