//! What can go wrong, sorted by who is at fault.
//!
//! A text says what was expected and what was met, the place is in front of it, the cause behind it in
//! [`source`](std::error::Error::source): `channel 3: packet 17: offset 0x7f000 outside block "pc.ram" (0x40000)`.

use std::{fmt, io, sync::Arc, time::Duration};

use crate::{
    live::{NotConverged, Status},
    ram::{BlockName, BlockOffset, PageSize},
    wire::{ChannelId, DeviceId, Flags, VmUuid},
};

/// The result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a migration, or a call on it, failed.
///
/// Cheap to clone: the first error stops everything and is then reported by every call that it ends.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The bytes that a peer sent are no valid packet.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The peer sent valid bytes that break the protocol's rules.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// The peer uses something that this library does not speak.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The caller asked for something that cannot be.
    #[error(transparent)]
    Usage(#[from] Usage),
    /// The operating system refused, or a connection broke.
    #[error("{doing}")]
    Io {
        /// What was being done, and to what.
        doing: String,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// A peer did not do in time what it had to do.
    #[error("{what} within {}", seconds(*.limit))]
    TimedOut {
        /// What did not happen.
        what: String,
        /// How long it was waited for.
        limit: Duration,
    },
    /// Nothing moved on any connection for so long, although something was due.
    #[error("{what}, and nothing has moved on any connection for {}: {hint}", seconds(*.limit))]
    Stalled {
        /// What is due.
        what: String,
        /// How long it was waited for.
        limit: Duration,
        /// Where to look.
        hint: &'static str,
    },
    /// The guest could not be stopped within `max-passes` or `max-total-time`, and runs on at the source.
    #[error(transparent)]
    NotConverged(Box<NotConverged>),
    /// An error that belongs to one place: a channel, a packet, a connection.
    #[error(transparent)]
    At(#[from] Located),
    /// Another part of the migration failed: the main stream, the guest, the caller.
    #[error("{doing}")]
    Other {
        /// What was being done.
        doing: String,
        /// Why it failed.
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// The migration was cancelled.
    #[error("the migration was cancelled")]
    Cancelled,
}

impl Error {
    /// An error of the system, met while `doing` something.
    pub fn io(doing: impl Into<String>, source: io::Error) -> Self {
        Self::Io { doing: doing.into(), source: Arc::new(source) }
    }

    /// An error of a part that this crate knows nothing of, met while `doing` something.
    pub fn other(
        doing: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Other { doing: doing.into(), source: Arc::from(source.into()) }
    }

    /// The same error, told to have happened at `place`.
    #[must_use]
    pub fn at(self, place: impl ToString) -> Self {
        Located { place: place.to_string(), error: Box::new(self) }.into()
    }

    /// The same error, told to have happened on channel `id`.
    #[must_use]
    pub fn on_channel(self, id: ChannelId) -> Self {
        self.at(format_args!("channel {id}"))
    }

    /// The error without the places around it: what to match on.
    pub fn kind(&self) -> &Self {
        match self {
            Self::At(located) => located.error.kind(),
            _ => self,
        }
    }

    /// Whether the migration ended because somebody asked for it.
    pub fn is_cancelled(&self) -> bool {
        matches!(self.kind(), Self::Cancelled)
    }
}

/// An error and its place. It shows as `place: error`, and its cause is the error's cause.
#[derive(Clone, Debug)]
pub struct Located {
    place: String,
    error: Box<Error>,
}

impl Located {
    /// Where: `channel 3`, `packet 17`, `connection from 127.0.0.1:4711`.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// What went wrong there.
    pub fn error(&self) -> &Error {
        &self.error
    }
}

impl fmt::Display for Located {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.error)
    }
}

impl std::error::Error for Located {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&*self.error)
    }
}

/// Bytes that are no valid initial packet or packet head.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// The first four bytes are another number.
    #[error("expected magic {expected:#010x}, met {met:#010x}")]
    Magic {
        /// The number that had to be there.
        expected: u32,
        /// The number that was there.
        met: u32,
    },
    /// The version is not 1.
    #[error("expected version {expected}, met {met}")]
    Version {
        /// The version spoken here.
        expected: u32,
        /// The version met.
        met: u32,
    },
    /// Fewer bytes than the head takes.
    #[error("expected {expected} bytes, met {met}")]
    Length {
        /// The bytes that the head takes.
        expected: usize,
        /// The bytes that were there.
        met: usize,
    },
    /// `pages_alloc` is above what a packet holds.
    #[error(
        "pages_alloc {met} is above the {most} pages of a packet: is the page size the same on both sides?"
    )]
    PagesAlloc {
        /// The most pages that a packet of this page size holds.
        most: u32,
        /// The count met.
        met: u32,
    },
    /// More normal pages than `pages_alloc`.
    #[error("{normal} normal pages are more than pages_alloc {alloc}")]
    NormalPages {
        /// The field `pages_alloc`.
        alloc: u32,
        /// The count met.
        normal: u32,
    },
    /// More zero pages than are left of `pages_alloc`.
    #[error("{zero} zero pages beside {normal} normal ones are more than pages_alloc {alloc}")]
    ZeroPages {
        /// The field `pages_alloc`.
        alloc: u32,
        /// The count of normal pages.
        normal: u32,
        /// The count met.
        zero: u32,
    },
    /// The packet lists pages of a block without a name.
    #[error("the packet lists pages, but names no block")]
    NoBlockName,
    /// A device-state packet with a flag beside its own.
    #[error("device-state packet: expected flags 0x40 alone, met {met}")]
    DeviceStateFlags {
        /// All flags of the packet.
        met: Flags,
    },
    /// A device-state packet without a device.
    #[error("device-state packet: expected a device id of 1 to 255 bytes, ended by NUL")]
    DeviceId,
    /// A device-state packet without state, or with too much.
    #[error("device-state packet: next_packet_size {met:#x} is not 0x1 to {most:#x}")]
    DeviceStateSize {
        /// The most.
        most: u32,
        /// The field's value.
        met: u32,
    },
    /// An offset inside a page.
    #[error("offset {offset} is no multiple of the page size {page_size}")]
    Unaligned {
        /// The offset met.
        offset: BlockOffset,
        /// The page size of the migration.
        page_size: PageSize,
    },
    /// `next_packet_size` does not fit the pages listed.
    #[error("next_packet_size {met} does not fit {pages} pages of {page_size}: expected {expected}")]
    PayloadSize {
        /// The payload that the pages make.
        expected: u64,
        /// The field's value.
        met: u32,
        /// Normal pages listed.
        pages: u32,
        /// The page size of the migration.
        page_size: PageSize,
    },
    /// `next_packet_size` of a packed payload is nothing, or more than any packet takes.
    #[error("next_packet_size {met} of compressed pages: expected 1 to {most}")]
    CompressedSize {
        /// The greatest payload.
        most: u32,
        /// The field's value.
        met: u32,
    },
    /// A payload that is not what its method makes.
    #[error("broken {method} data: {why}")]
    Compressed {
        /// The method.
        method: &'static str,
        /// What the decompressor says.
        why: String,
    },
    /// A payload that holds more or less than the pages listed.
    #[error("the payload makes {} bytes, expected {expected}", made(*.expected, *.met))]
    Inflated {
        /// The bytes of the pages listed.
        expected: usize,
        /// The bytes made, one more than expected if there are more.
        met: usize,
    },
}

/// A rule of the protocol that the peer broke.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// The initial packet carries the UUID of another machine.
    #[error("expected machine UUID {expected}, met {met}: give both sides the same UUID")]
    ForeignUuid {
        /// The UUID of this side.
        expected: VmUuid,
        /// The UUID met.
        met: VmUuid,
    },
    /// The channel's id is not below the number of channels.
    #[error(
        "channel id {id} is not below the number of channels {channels}: set multifd-channels to the same number on both sides"
    )]
    ChannelId {
        /// The id met.
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
        /// The id met twice.
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
        "expected {expected} channels, {met} connected before the first sync: set multifd-channels to the same number on both sides"
    )]
    ChannelCount {
        /// The number of channels that this side was told.
        expected: u16,
        /// The number that came.
        met: u16,
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
        "the source announced {announced} channels, but only {met} connected in time: check that whatever is between source \
         and destination (proxy, firewall) passes all connections"
    )]
    TooFewChannels {
        /// The number that the source announced.
        announced: u16,
        /// The number that came.
        met: u16,
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
        "sync point {point}: {met} packets have come, but the source has numbered them up to {greatest}: packets went to a \
         channel that has not connected; give its number of channels (multifd-channels) on this side, and check that whatever \
         is between source and destination (proxy, firewall) passes all connections"
    )]
    MissingPackets {
        /// The sync point that the main stream is at, from 1.
        point: u64,
        /// The greatest number of a packet, which are counted from 0.
        greatest: u64,
        /// The packets that have come.
        met: u64,
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
        /// The name met.
        name: BlockName,
    },
    /// A page outside its block.
    #[error("offset {offset} outside block {name:?} ({used_length:#x})")]
    OutsideBlock {
        /// The offset met.
        offset: BlockOffset,
        /// The block's name.
        name: BlockName,
        /// The block's used length in bytes.
        used_length: u64,
    },
    /// A connection ended in the middle of something.
    #[error("connection closed after {met} of {expected} bytes of {what}")]
    Cut {
        /// What was being read.
        what: &'static str,
        /// Its length.
        expected: u64,
        /// The bytes that came.
        met: u64,
    },
    /// A channel ended although main has another sync point.
    #[error("connection closed before sync point {expected}, after {met}")]
    EndedEarly {
        /// The sync point that the main stream is at, from 1.
        expected: u64,
        /// The sync points that the channel has seen.
        met: u64,
    },
    /// Pages after the sync point that ended the RAM.
    #[error("packet with {pages} pages after the last sync point")]
    PagesAfterEnd {
        /// Pages listed.
        pages: u32,
    },
    /// A packet with pages before the source announced its blocks.
    #[error("packet with pages before the source announced its RAM blocks")]
    PagesBeforeBlocks,
    /// The packet's method is not the one that this side was told.
    #[error(
        "expected method {expected}, met flags {met}: set multifd-compression to {expected} at the source"
    )]
    Method {
        /// The method of this side.
        expected: &'static str,
        /// The flags of the packet.
        met: Flags,
    },
}

/// Something valid that this library does not speak.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unsupported {
    /// A flag without a meaning here.
    #[error("packet flags {flags} hold {unknown}, which this version does not know")]
    Flags {
        /// All flags of the packet.
        flags: Flags,
        /// Those without a meaning here.
        unknown: Flags,
    },
    /// Pages packed by a method that this build does not speak.
    #[error(
        "packet of method {name} ({met}), which is not built in: set multifd-compression to none at the source{}",
        built_in()
    )]
    Method {
        /// The method's bits.
        met: Flags,
        /// QEMU's name for it.
        name: &'static str,
    },
    /// The peer speaks TLS on a connection that is plain here.
    #[error("the source speaks TLS: give tls-creds on this side too, or clear it at the source")]
    Tls,
    /// A device-state packet.
    #[error(
        "device-state packet (flag 0x40) of device {device:?} instance {instance}: switch the device's transfer over \
             multifd off at the source"
    )]
    DeviceState {
        /// The device.
        device: DeviceId,
        /// Which of several of that name.
        instance: u32,
    },
}

/// A call that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Usage {
    /// A number outside of its [range](crate::parameters).
    #[error("expected {name} {least} to {most}, met {met}")]
    OutOfRange {
        /// The parameter.
        name: &'static str,
        /// The least value.
        least: u64,
        /// The greatest value.
        most: u64,
        /// The value given.
        met: i128,
    },
    /// A way of zero pages that there is not.
    #[error("expected zero-page-detection none, legacy or multifd, met {met:?}")]
    ZeroPageDetection {
        /// The name given.
        met: String,
    },
    /// Origins of channels in no form that is known.
    #[error("expected channels-from main, any, or IP addresses with commas between them, found {met:?}")]
    ChannelsFrom {
        /// The text given.
        met: String,
    },
    /// A method that this build does not speak.
    #[error("expected multifd-compression none{}, met {met:?}", built_in())]
    Method {
        /// The name given.
        met: String,
    },
    /// An address in no form that is known.
    #[error(
        "expected an address like tcp:HOST:PORT, unix:PATH, vsock:CID:PORT, exec:COMMAND or fd:N, met {0:?}"
    )]
    Address(String),
    /// An option behind an address that is not known, or not so.
    #[error("address option: expected {expected}, met {met:?}")]
    AddressOption {
        /// What it can be.
        expected: &'static str,
        /// The option given.
        met: String,
    },
    /// The transport has one connection only, and more were asked for.
    #[error(
        "{0} is a single connection and cannot carry channels: set multifd-channels to 0, or use tcp, unix or vsock"
    )]
    SingleConnection(String),
    /// The sender is to end with pages that no sync point has followed.
    #[error("pages were queued after the last sync and may not have left: call sync before finish")]
    Unsynced,
    /// `zero-copy-send` where pages are copied anyway.
    #[error("zero-copy-send cannot be used {0}: pages would be copied all the same, so switch it off")]
    ZeroCopy(&'static str),
    /// An option for connections, where there are none.
    #[error(
        "{0} is for connections: between memory and a file pages are copied as they are, so switch it off"
    )]
    ForConnections(&'static str),
    /// Blocks that cannot be copied into blocks of their names.
    #[error("block {name:?} cannot be copied: {why}")]
    OtherBlocks {
        /// The block's name.
        name: BlockName,
        /// What is in the way.
        why: String,
    },
    /// TLS to an address that names no host, and no name given.
    #[error("{0} has no host name to hold the certificate of tls-creds against: give tls-hostname")]
    NoTlsHostname(String),
    /// Two blocks have one name.
    #[error("two RAM blocks are named {0:?}")]
    DuplicateBlock(BlockName),
    /// The blocks have different page sizes.
    #[error("RAM blocks with pages of {0} and of {1} in one migration")]
    MixedPageSizes(PageSize, PageSize),
    /// The memory handed over is shorter than the block.
    #[error("block {name:?}: {mapped:#x} bytes of memory for a used length of {used_length:#x}")]
    ShortMemory {
        /// The block's name.
        name: BlockName,
        /// The bytes of memory.
        mapped: u64,
        /// The block's used length.
        used_length: u64,
    },
    /// The block ends inside a page, and the wire carries whole pages only.
    #[error(
        "block {name:?}: {used_length:#x} bytes end inside a page of {page_size}, whose bytes cannot be sent"
    )]
    PartialPage {
        /// The block's name.
        name: BlockName,
        /// The block's used length.
        used_length: u64,
        /// The page size of the migration.
        page_size: PageSize,
    },
    /// A page that the block does not have.
    #[error("block {name:?} has no page {page} ({pages} pages)")]
    NoSuchPage {
        /// The block's name.
        name: BlockName,
        /// The page asked for.
        page: u64,
        /// The pages of the block.
        pages: u64,
    },
    /// A block number that the registry does not have.
    #[error("there is no RAM block number {0}")]
    NoSuchBlock(usize),
    /// The block's memory cannot be received into.
    #[error("block {0:?} is mapped for reading and cannot be received into")]
    ReadOnly(BlockName),
    /// The block's memory is mapped without the right to read it.
    #[error("block {0:?} is mapped without the right to read, so its pages cannot be sent")]
    Unreadable(BlockName),
    /// No dirty log can be made of the bitmaps of the block's memory.
    #[error("block {name:?}: the dirty bitmap does not fit: {why}")]
    DirtyBitmap {
        /// The block's name.
        name: BlockName,
        /// What is in the way.
        why: &'static str,
    },
    /// A sender or receiver was set up for the second time.
    #[error("this end of the migration was set up before: make a new one for each migration")]
    UsedTwice,
    /// A call that needs what has not been set up yet.
    #[error("{0} is not there yet: set it up first")]
    TooEarly(&'static str),
    /// A migration was told to go on while it was not waiting to be.
    #[error("the migration is {met}: it can be told to go on when it is pre-switchover")]
    NotPaused {
        /// Its state.
        met: Status,
    },
    /// A state that does not follow the present one.
    #[error("a migration that is {from} cannot become {to}")]
    IllegalTransition {
        /// The present state.
        from: Status,
        /// The state asked for.
        to: Status,
    },
}

fn made(expected: usize, met: usize) -> String {
    if met > expected { format!("more than {expected}") } else { met.to_string() }
}

/// The methods beside none, as the rest of an enumeration.
fn built_in() -> &'static str {
    match (cfg!(feature = "zlib"), cfg!(feature = "zstd")) {
        (true, true) => ", zlib or zstd",
        (true, false) => " or zlib",
        (false, true) => " or zstd",
        (false, false) => "",
    }
}

fn seconds(limit: Duration) -> String {
    if limit.subsec_millis() == 0 {
        format!("{} s", limit.as_secs())
    } else {
        format!("{} ms", limit.as_millis())
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn the_place_stands_in_front_and_the_kind_stays_reachable() {
        let name = BlockName::new("pc.ram").expect("valid");
        let outside = Violation::OutsideBlock { offset: BlockOffset(0x7f000), name, used_length: 0x40000 };
        let error = Error::from(outside.clone()).at("packet 17").on_channel(ChannelId(3));
        assert_eq!(
            error.to_string(),
            r#"channel 3: packet 17: offset 0x7f000 outside block "pc.ram" (0x40000)"#
        );
        assert!(matches!(error.kind(), Error::Violation(v) if *v == outside));
    }

    #[test]
    fn the_cause_is_in_the_chain_and_not_in_the_text() {
        let error =
            Error::io("write to 127.0.0.1:1", io::ErrorKind::BrokenPipe.into()).on_channel(ChannelId(0));
        assert_eq!(error.to_string(), "channel 0: write to 127.0.0.1:1");
        assert_eq!(error.source().expect("a cause").to_string(), "broken pipe");
    }

    #[test]
    fn a_limit_is_told_in_seconds_or_milliseconds() {
        let error = |limit| Error::TimedOut { what: "no initial packet came".into(), limit }.to_string();
        assert_eq!(error(Duration::from_secs(30)), "no initial packet came within 30 s");
        assert_eq!(error(Duration::from_millis(1500)), "no initial packet came within 1500 ms");
    }
}
