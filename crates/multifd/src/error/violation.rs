//! Rules of the protocol that a peer has broken with valid bytes.

use crate::{
    ram::{BlockName, BlockOffset},
    wire::{ChannelId, Flags, VmUuid},
};

/// A rule of the protocol that the peer broke.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// The initial packet carries the UUID of another machine.
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
    /// A channel connected when RAM had been moving for a while.
    #[error("channel {id} connected after sync point {point}: its pages may be outdated")]
    LateChannel {
        /// The channel's id.
        id: ChannelId,
        /// The sync point that the main stream has passed, from 1.
        point: u64,
    },
    /// Two connections claim the same id.
    #[error("channel id {id} is already taken")]
    DuplicateChannel {
        /// The id found twice.
        id: ChannelId,
    },
    /// A channel had been admitted when main came from another host.
    #[error(
        "channel {id} comes from another host than main: it may be a stranger; if the source sends so, choose where channels \
         may come from (channels-from)"
    )]
    ForeignChannel {
        /// The channel's id.
        id: ChannelId,
    },
    /// The source opened another number of channels than this side expects.
    #[error(
        "expected {expected} channels, {found} connected before the first sync: set multifd-channels to the same number on both sides"
    )]
    ChannelCount {
        /// The number of channels that this side was told.
        expected: u16,
        /// The number that came.
        found: u16,
    },
    /// The source announced another number of channels than this side was given.
    #[error(
        "the source announced {announced} channels, but multifd-channels is {expected} on this side: set it to {announced}, \
         or leave it out"
    )]
    AnnouncedChannels {
        /// The number of channels that this side was given.
        expected: u8,
        /// The number that the source announced.
        announced: u8,
    },
    /// The source announced more channels than have come.
    #[error(
        "the source announced {announced} channels, but only {found} connected in time: check that whatever is between source \
         and destination (proxy, firewall) passes all connections"
    )]
    TooFewChannels {
        /// The number that the source announced.
        announced: u16,
        /// The number that came.
        found: u16,
    },
    /// The ids of the channels leave a gap.
    #[error(
        "channel {missing} is missing: {channels} channels are here, and ids from 0 on were expected; its connection may have \
         failed at the source"
    )]
    ChannelMissing {
        /// The first id that is not there.
        missing: ChannelId,
        /// How many channels are there.
        channels: u16,
    },
    /// The source has channels, none of which has come.
    #[error(
        "the source has multifd on, but no channel connected in time: check that whatever is between source and destination \
         (proxy, firewall) passes all connections"
    )]
    NoChannels,
    /// The source has numbered packets that no channel has brought.
    #[error(
        "sync point {point}: {found} packets have come, but the source has numbered them up to {greatest}: packets went to a \
         channel that has not connected; give its number of channels (multifd-channels) on this side, and check that whatever \
         is between source and destination (proxy, firewall) passes all connections"
    )]
    MissingPackets {
        /// The sync point that the main stream is at, from 1.
        point: u64,
        /// The greatest number of a packet, which are counted from 0.
        greatest: u64,
        /// The packets that have come.
        found: u64,
    },
    /// A connection from the source's host that was dropped because it did not say, or not well, what it is.
    #[error(
        "it did not say what it is and was dropped, but may have been a channel, whose pages would be missing: give the \
         number of channels (multifd-channels) on this side"
    )]
    LostConnection,
    /// A packet names a block that the source did not announce.
    #[error("unknown block {name:?}: the source has not announced it")]
    UnknownBlock {
        /// The name found.
        name: BlockName,
    },
    /// A page outside its block.
    #[error("offset {offset} outside block {name:?} ({used_length:#x})")]
    OutsideBlock {
        /// The offset found.
        offset: BlockOffset,
        /// The block's name.
        name: BlockName,
        /// The block's used length in bytes.
        used_length: u64,
    },
    /// A connection ended in the middle of something.
    #[error("connection closed after {found} of {expected} bytes of {what}")]
    Cut {
        /// What was being read.
        what: &'static str,
        /// Its length.
        expected: u64,
        /// The bytes that came.
        found: u64,
    },
    /// A channel ended although main has another sync point.
    #[error("connection closed before sync point {expected}, after {found}")]
    EndedEarly {
        /// The sync point that the main stream is at, from 1.
        expected: u64,
        /// The sync points that the channel has seen.
        found: u64,
    },
    /// Pages after the sync point that ended the RAM.
    #[error("packet with {pages} pages after the last sync point")]
    PagesAfterEnd {
        /// Pages listed.
        pages: u32,
    },
    /// The end of RAM, and not every page has come.
    #[error(
        "{missing} {} of RAM never came, the first in block {name:?} at offset {offset}: a channel may have been lost on its \
         way, or the source leaves pages out (free-page hints of virtio-balloon: missing-pages zero takes them for zero); the machine \
         would not be whole",
        if *.missing == 1 { "page" } else { "pages" }
    )]
    PagesMissing {
        /// Pages that have come neither as bytes nor as zero, in all blocks.
        missing: u64,
        /// The first block that is not whole.
        name: BlockName,
        /// Its first page that is missing.
        offset: BlockOffset,
    },
    /// The end of RAM, and no page at all has come.
    #[error(
        "RAM ended and not one page of it has come: the channels were lost on their way, or the source sent nothing"
    )]
    NoPages,
    /// A packet with pages before the source announced its blocks.
    #[error("packet with pages before the source announced its RAM blocks")]
    PagesBeforeBlocks,
    /// The packet's method is not the one that this side was told.
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
