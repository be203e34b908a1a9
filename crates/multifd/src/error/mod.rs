//! What can go wrong, sorted by who is at fault.
//!
//! A text says what was expected and what was met, the place is in front of it, the cause behind it in
//! [`source`](std::error::Error::source): `channel 3: packet 17: offset 0x7f000 outside block "pc.ram" (0x40000)`.

mod chain;
mod fault;
mod usage;
mod violation;

use std::{fmt, io, sync::Arc, time::Duration};

pub use chain::{Chain, chain};
pub use usage::Usage;
pub use violation::Violation;

pub use crate::outcome::{Callback, Fault};

use crate::{
    outcome::NotConverged,
    ram::{self, BlockOffset, PageSize},
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
        /// Who or what is at fault, where that is known.
        fault: Option<Fault>,
        /// Why it failed.
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// The guest stood for as long as `switchover-timeout` allows, and the destination did not get ready to run it. It goes
    /// on at the source.
    #[error(
        "the guest stood for {} and the destination has not got all of it: it is silent, or its network is slow; the guest \
         goes on at the source",
        seconds(*.limit)
    )]
    SwitchoverTimeout {
        /// How long the guest may stand.
        limit: Duration,
    },
    /// Everything was sent, and nobody at the source can know whether the destination has the guest. The guest stays stopped
    /// at the source, unless `resume_if_unknown` says otherwise: find out whether it runs at the destination, then resume it
    /// here or drop it.
    #[error(
        "it is not known whether the destination has the guest: find out before it goes on at the source"
    )]
    OwnerUnknown(#[source] Box<Error>),
    /// A callback of the embedder panicked.
    #[error("{call} panicked: {text}")]
    Panicked {
        /// Which call.
        call: Callback,
        /// What the panic says.
        text: String,
    },
    /// The migration failed, and the guest could not be made to go on: it stands.
    #[error("{error}; and the guest stands here: {panicked}")]
    NotResumed {
        /// Why the migration failed.
        #[source]
        error: Box<Error>,
        /// Why the guest stands.
        panicked: Box<Error>,
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
        Self::Other { doing: doing.into(), fault: None, source: Arc::from(source.into()) }
    }

    /// The same [other](Self::other) error, with what is known of who is at fault. Any other kind of error says so itself.
    #[must_use]
    pub fn because(self, because: Fault) -> Self {
        match self {
            Self::Other { doing, source, .. } => Self::Other { doing, fault: Some(because), source },
            other => other,
        }
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

impl From<ram::Error> for Error {
    fn from(error: ram::Error) -> Self {
        Self::Usage(Usage::Ram(error))
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
    #[error("expected magic {expected:#010x}, found {found:#010x}")]
    Magic {
        /// The number that had to be there.
        expected: u32,
        /// The number that was there.
        found: u32,
    },
    /// The version is not 1.
    #[error("expected version {expected}, found {found}")]
    Version {
        /// The version spoken here.
        expected: u32,
        /// The version found.
        found: u32,
    },
    /// Fewer bytes than the head takes.
    #[error("expected {expected} bytes, found {found}")]
    Length {
        /// The bytes that the head takes.
        expected: usize,
        /// The bytes that were there.
        found: usize,
    },
    /// `pages_alloc` is above what a packet holds.
    #[error(
        "pages_alloc {found} is above the {most} pages of a packet: is the page size the same on both sides?"
    )]
    PagesAlloc {
        /// The most pages that a packet of this page size holds.
        most: u32,
        /// The count found.
        found: u32,
    },
    /// More normal pages than `pages_alloc`.
    #[error("{normal} normal pages are more than pages_alloc {alloc}")]
    NormalPages {
        /// The field `pages_alloc`.
        alloc: u32,
        /// The count found.
        normal: u32,
    },
    /// More zero pages than are left of `pages_alloc`.
    #[error("{zero} zero pages beside {normal} normal ones are more than pages_alloc {alloc}")]
    ZeroPages {
        /// The field `pages_alloc`.
        alloc: u32,
        /// The count of normal pages.
        normal: u32,
        /// The count found.
        zero: u32,
    },
    /// The packet lists pages of a block without a name.
    #[error("the packet lists pages, but names no block")]
    NoBlockName,
    /// A device-state packet with a flag beside its own.
    #[error("device-state packet: expected flags 0x40 alone, found {found}")]
    DeviceStateFlags {
        /// All flags of the packet.
        found: Flags,
    },
    /// A device-state packet without a device.
    #[error("device-state packet: expected a device id of 1 to 255 bytes, ended by NUL")]
    DeviceId,
    /// A device-state packet without state, or with too much.
    #[error("device-state packet: next_packet_size {found:#x} is not 0x1 to {most:#x}")]
    DeviceStateSize {
        /// The most.
        most: u32,
        /// The field's value.
        found: u32,
    },
    /// An offset inside a page.
    #[error("offset {offset} is no multiple of the page size {page_size}")]
    Unaligned {
        /// The offset found.
        offset: BlockOffset,
        /// The page size of the migration.
        page_size: PageSize,
    },
    /// `next_packet_size` does not fit the pages listed.
    #[error("next_packet_size {found} does not fit {pages} pages of {page_size}: expected {expected}")]
    PayloadSize {
        /// The payload that the pages make.
        expected: u64,
        /// The field's value.
        found: u32,
        /// Normal pages listed.
        pages: u32,
        /// The page size of the migration.
        page_size: PageSize,
    },
    /// `next_packet_size` of a packed payload is nothing, or more than any packet takes.
    #[error("next_packet_size {found} of compressed pages: expected 1 to {most}")]
    CompressedSize {
        /// The greatest payload.
        most: u32,
        /// The field's value.
        found: u32,
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
    #[error("the payload makes {} bytes, expected {expected}", made(*.expected, *.found))]
    Inflated {
        /// The bytes of the pages listed.
        expected: usize,
        /// The bytes made, one more than expected if there are more.
        found: usize,
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
        "packet of method {name} ({found}), which is not built in: set multifd-compression to {known} at the source"
    )]
    Method {
        /// The methods that are built in: `none, zlib or zstd`.
        known: String,
        /// The method's bits.
        found: Flags,
        /// QEMU's name for it.
        name: &'static str,
    },
    /// A zstd frame with a window that no level of QEMU's asks for.
    #[error(
        "the source's zstd frame needs a window of {}, expected at most {}, which is what multifd-zstd-level 20 \
         needs: set multifd-zstd-level to 20 or less at the source",
        size(*found),
        size(*most)
    )]
    ZstdWindow {
        /// The greatest window in bytes.
        most: u64,
        /// The window that the frame asks for.
        found: u64,
    },
    /// The channels' decompression needs more memory than this side allows.
    #[error(
        "decompression of all channels needs {} ({} for this channel), but decompression-memory is {} on this side: increase \
         it, or decrease multifd-zstd-level or multifd-channels at the source",
        size(*needed),
        size(*window),
        size(*limit)
    )]
    DecoderMemory {
        /// The limit in bytes, for all channels together.
        limit: u64,
        /// What the channels need, this one included.
        needed: u64,
        /// What this channel needs.
        window: u64,
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

/// `32 MiB`, or `5 bytes`.
fn size(bytes: u64) -> String {
    const MIB: u64 = 1 << 20;
    if bytes > 0 && bytes.is_multiple_of(MIB) {
        format!("{} MiB", bytes / MIB)
    } else {
        format!("{bytes} bytes")
    }
}

fn made(expected: usize, found: usize) -> String {
    if found > expected { format!("more than {expected}") } else { found.to_string() }
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
    use crate::ram::BlockName;

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
