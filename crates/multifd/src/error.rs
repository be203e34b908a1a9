//! What can go wrong, sorted by who is at fault.
//!
//! A text says what was expected and what was met, the place is in front of it, the cause behind it in
//! [`source`](std::error::Error::source): `channel 3: packet 17: offset 0x7f000 outside block "pc.ram" (0x40000)`.

mod violation;

use std::{fmt, io, sync::Arc, time::Duration};

pub use violation::Violation;

use crate::{
    live::{NotConverged, Status},
    ram::{BlockName, BlockOffset, PageSize},
    wire::{ChannelId, DeviceId, Flags},
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
