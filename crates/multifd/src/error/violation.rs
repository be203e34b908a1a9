//! Rules of the protocol that a peer has broken with valid bytes.

use crate::{
    ram::{BlockName, BlockOffset},
    wire::{ChannelId, Flags, VmUuid},
};

/// A rule of the protocol that the peer broke.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// The initial packet contains the UUID of another machine.
    #[error("expected machine UUID {expected}, found {found}: give both sides the same UUID")]
    ForeignUuid {
        /// The UUID of this side.
        expected: VmUuid,
        /// The UUID found.
        found: VmUuid,
    },
    /// The channel's id is not below the number of channels.
    #[error(
        "channel id {id} is not below the number of channels {channels}: set multifd-channels to the same number on both sides"
    )]
    ChannelId {
        /// The id found.
        id: ChannelId,
        /// The number of channels.
        channels: u16,
    },
    /// A channel connected after the second sync point.
    #[error("channel {id} connected after sync point {point}: its pages may be outdated")]
    LateChannel {
        /// The channel's id.
        id: ChannelId,
        /// The sync point that the main stream has passed, from 1.
        point: u64,
    },
    /// Two connections have the same channel id.
    #[error("channel id {id} is already taken")]
    DuplicateChannel {
        /// The id found twice.
        id: ChannelId,
    },
    /// Main came from another host than a channel that had been accepted before.
    #[error(
        "channel {id} comes from another host than main and may not belong to this migration: if it does, set channels-from"
    )]
    ForeignChannel {
        /// The channel's id.
        id: ChannelId,
    },
    /// What a source sends to hand its memory over is not usable.
    #[error("the source does not hand its memory over: {what}")]
    HandOver {
        /// What is wrong.
        what: String,
    },
    /// The number of channels of the source differs from the one that is configured on this side.
    #[error(
        "expected {expected} channels, {found} connected before the first sync: set multifd-channels to the same number on both sides"
    )]
    ChannelCount {
        /// The number of channels that is configured on this side.
        expected: u16,
        /// The number of channels that connected.
        found: u16,
    },
    /// The number of channels that the source announced differs from the one that is configured on this side.
    #[error(
        "the source announced {announced} channels, but multifd-channels is {expected} on this side: set it to {announced}, \
         or leave it out"
    )]
    AnnouncedChannels {
        /// The number of channels that is configured on this side.
        expected: u8,
        /// The number that the source announced.
        announced: u8,
    },
    /// Fewer channels connected than the source announced.
    #[error(
        "the source announced {announced} channels, but only {found} connected in time: check that all devices between source \
         and destination (proxy, firewall) let all connections pass"
    )]
    TooFewChannels {
        /// The number that the source announced.
        announced: u16,
        /// The number of channels that connected.
        found: u16,
    },
    /// The ids of the channels are not consecutive.
    #[error(
        "channel {missing} is missing: {channels} channels are connected, and their ids have to be consecutive from 0 on; the \
         connection of channel {missing} may have failed at the source"
    )]
    ChannelMissing {
        /// The first id that is missing.
        missing: ChannelId,
        /// The number of channels that are connected.
        channels: u16,
    },
    /// The source has multifd on, but no channel connected.
    #[error(
        "the source has multifd on, but no channel connected in time: check that all devices between source and destination \
         (proxy, firewall) let all connections pass"
    )]
    NoChannels,
    /// The source has numbered more packets than the channels have delivered.
    #[error(
        "sync point {point}: {found} packets have arrived, but the source has numbered them up to {greatest}: some packets \
         were sent on a channel that did not connect; set multifd-channels on this side to the source's number, and check \
         that all devices between source and destination (proxy, firewall) let all connections pass"
    )]
    MissingPackets {
        /// The sync point that the main stream is at, from 1.
        point: u64,
        /// The greatest packet number. Packets are counted from 0.
        greatest: u64,
        /// The number of packets that have arrived.
        found: u64,
    },
    /// A connection from the source's host was dropped, because its first bytes were missing or invalid.
    #[error(
        "its first bytes were missing or invalid, so it was dropped, but it may have been a channel, whose pages would be \
         missing: set the number of channels (multifd-channels) on this side"
    )]
    LostConnection,
    /// A packet names a block that the source has not announced.
    #[error("unknown block {name:?}: the source has not announced it")]
    UnknownBlock {
        /// The name found.
        name: BlockName,
    },
    /// A page is outside its block.
    #[error("offset {offset} outside block {name:?} ({used_length:#x})")]
    OutsideBlock {
        /// The offset found.
        offset: BlockOffset,
        /// The block's name.
        name: BlockName,
        /// The block's used length in bytes.
        used_length: u64,
    },
    /// The source closed a connection before all expected bytes had arrived.
    #[error(
        "the source closed the connection (cancelled, or its process ended) after {found} of {expected} bytes of {what}"
    )]
    Cut {
        /// What was being received.
        what: &'static str,
        /// Its length in bytes.
        expected: u64,
        /// The number of bytes that arrived.
        found: u64,
    },
    /// The source closed a channel before the sync point that main has reached.
    #[error(
        "the source closed the channel (cancelled, or its process ended) before sync point {expected}, after sync point {found}"
    )]
    EndedEarly {
        /// The sync point that the main stream is at, from 1.
        expected: u64,
        /// The number of sync points that the channel has reached.
        found: u64,
    },
    /// A channel whose connection is broken cannot be left out.
    #[error("cannot continue without channel {id}: {why}")]
    LostChannel {
        /// The channel's id.
        id: ChannelId,
        /// What is wrong.
        why: &'static str,
    },
    /// Pages arrived after the last sync point.
    #[error("packet with {pages} pages after the last sync point")]
    PagesAfterEnd {
        /// The number of pages in the list.
        pages: u32,
    },
    /// RAM has ended, and some pages have not arrived.
    #[error(
        "{missing} {} of RAM did not arrive, the first in block {name:?} at offset {offset}, so the machine would not be \
         complete: the network may have lost a channel, or the source omits pages (free-page hints of virtio-balloon: \
         missing-pages zero replaces them by zeros)",
        if *.missing == 1 { "page" } else { "pages" }
    )]
    PagesMissing {
        /// The number of pages of all blocks that arrived neither as bytes nor as zero.
        missing: u64,
        /// The first block that is not complete.
        name: BlockName,
        /// The offset of its first missing page.
        offset: BlockOffset,
    },
    /// RAM has ended, and no page has arrived.
    #[error(
        "RAM ended and not one page has arrived: the network lost the channels, or the source sent nothing"
    )]
    NoPages,
    /// A packet with pages arrived before the source announced its blocks.
    #[error("packet with pages before the source announced its RAM blocks")]
    PagesBeforeBlocks,
    /// The method of the packet differs from the one that is configured on this side.
    #[error(
        "expected method {expected}, found flags {found}: set multifd-compression to {expected} at the source"
    )]
    Method {
        /// The method of this side.
        expected: &'static str,
        /// The flags of the packet.
        found: Flags,
    },
}
