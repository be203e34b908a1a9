//! What can go wrong, sorted by who is at fault.
//!
//! Each text says what was expected and what was found. The place is before the text. The cause is in
//! [`source`](std::error::Error::source) and not in the text. Example: `channel 3: packet 17: offset 0x7f000 outside block
//! "pc.ram" (0x40000)`.

mod chain;
mod fault;
mod untrusted;
mod usage;
mod violation;

use std::{fmt, io, sync::Arc, time::Duration};

pub use chain::{Chain, chain};
pub use untrusted::{Printable, UntrustedText, is_executed};
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
/// Cheap to clone: the first error stops everything, and every call that it ends returns it.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The bytes that a peer sent are not a valid packet.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The peer sent valid bytes that break the protocol's rules.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// The peer uses something that this library does not support.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The caller asked for something that is not possible.
    #[error(transparent)]
    Usage(#[from] Usage),
    /// The operating system reported an error, or a connection failed.
    #[error("{doing}")]
    Io {
        /// The action that failed, and its object.
        doing: String,
        /// The error of the system.
        source: Arc<io::Error>,
    },
    /// A peer did not act within a time limit.
    #[error("{what} within {}", seconds(*.limit))]
    TimedOut {
        /// What did not happen.
        what: String,
        /// The time limit.
        limit: Duration,
    },
    /// Something was expected from the peer, and nothing was transferred on any connection within the time limit.
    #[error("{what}, and nothing was transferred on any connection for {}: {hint}", seconds(*.limit))]
    Stalled {
        /// What was expected.
        what: String,
        /// The time limit.
        limit: Duration,
        /// What the user can check.
        hint: &'static str,
    },
    /// No source has connected to this destination within `accept_timeout`.
    #[error(
        "no source has connected within {}{}: check that the migration was started at the source, and that it connects to this \
         address",
        seconds(*.limit),
        refused_too(*.refused)
    )]
    NoSource {
        /// The time limit.
        limit: Duration,
        /// The number of connections that were refused in this time.
        refused: u64,
    },
    /// As many connections were refused as `max_refused` allows, and no source has connected to this destination.
    #[error(
        "no source has connected, and {} (max-refused): check TLS and addresses on both sides; this is the reason for the last \
         connection",
        connections_refused(*.refused)
    )]
    TooManyRefused {
        /// The number of connections that were refused.
        refused: u64,
        /// Why the last one was refused.
        #[source]
        last: Box<Error>,
    },
    /// The guest could not be stopped within `max-passes` or `max-total-time`. It continues at the source.
    #[error(transparent)]
    NotConverged(Box<NotConverged>),
    /// An error that belongs to one place: a channel, a packet, a connection.
    #[error(transparent)]
    At(#[from] Located),
    /// Another part of the migration failed: the main stream, the guest, the caller.
    #[error("{doing}")]
    Other {
        /// The action that failed.
        doing: String,
        /// Who or what is at fault, if this is known.
        fault: Option<Fault>,
        /// The cause.
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// The guest was stopped for as long as `switchover-timeout` allows, and the destination was not ready to run it. The
    /// guest continues at the source.
    #[error(
        "the destination was not ready within {} after the guest was stopped (switchover-timeout): it is silent, or its \
         network is slow; the guest continues at the source",
        seconds(*.limit)
    )]
    SwitchoverTimeout {
        /// The time limit.
        limit: Duration,
    },
    /// Everything was sent, and the source cannot know whether the destination has the guest. The guest stays stopped at
    /// the source, unless `resume_if_unknown` is on: check whether the guest runs at the destination, then resume it or
    /// discard it at the source.
    #[error(
        "it is not known whether the destination has the guest: make sure that it does not run there before it runs anywhere else"
    )]
    OwnerUnknown(#[source] Box<Error>),
    /// An error of the caller that is a text and has no cause.
    #[error("{text}")]
    Text {
        /// The text.
        text: String,
        /// Who or what is at fault, if this is known.
        fault: Option<Fault>,
    },
    /// A callback of the embedder has not returned. The library cannot interrupt it, so the call that runs the migration
    /// returns this error only when the callback has returned. The connections are closed at once, and
    /// [`Stop::error`](crate::channel::Stop::error) has the error.
    #[error(
        "{call} has not returned for {}, and the migration cannot continue without it: check what this callback waits for",
        seconds(*.waited)
    )]
    CallbackHangs {
        /// Which callback.
        call: Callback,
        /// How long it had run.
        waited: Duration,
    },
    /// A callback of the embedder panicked.
    #[error("{call} panicked: {text}")]
    Panicked {
        /// Which callback.
        call: Callback,
        /// The message of the panic.
        text: String,
    },
    /// The migration failed, and the guest could not be resumed: it is stopped at the source.
    #[error("{error}; the guest could not be resumed and is stopped at the source: {panicked}")]
    NotResumed {
        /// Why the migration failed.
        #[source]
        error: Box<Error>,
        /// Why the guest could not be resumed.
        panicked: Box<Error>,
    },
    /// The migration was cancelled.
    #[error("the migration was cancelled")]
    Cancelled,
}

impl Error {
    /// An error of the system. `doing` is the action that failed.
    pub fn io(doing: impl Into<String>, source: io::Error) -> Self {
        Self::Io { doing: doing.into(), source: Arc::new(source) }
    }

    /// An error of a part that this crate does not know. `doing` is the action that failed.
    pub fn other(
        doing: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Other { doing: doing.into(), fault: None, source: Arc::from(source.into()) }
    }

    /// An error that is only a text: what happened, and what to do. [`fault`](Self::fault) is [`Fault::Caller`], unless it is
    /// set with [`because`](Self::because).
    pub fn text(text: impl Into<String>) -> Self {
        Self::Text { text: text.into(), fault: None }
    }

    /// The same error with its [fault](Self::fault), if it is an [other](Self::other) error or a [text](Self::text). All other
    /// kinds of errors have a fault of their own.
    #[must_use]
    pub fn because(self, because: Fault) -> Self {
        match self {
            Self::Other { doing, source, .. } => Self::Other { doing, fault: Some(because), source },
            Self::Text { text, .. } => Self::Text { text, fault: Some(because) },
            other => other,
        }
    }

    /// The same error with `place` before its text.
    #[must_use]
    pub fn at(self, place: impl ToString) -> Self {
        Located { place: place.to_string(), error: Box::new(self) }.into()
    }

    /// The same error with the place `channel ID`.
    #[must_use]
    pub fn on_channel(self, id: ChannelId) -> Self {
        self.at(format_args!("channel {id}"))
    }

    /// The error without its places, to match on.
    pub fn kind(&self) -> &Self {
        match self {
            Self::At(located) => located.error.kind(),
            _ => self,
        }
    }

    /// Whether the migration was cancelled.
    pub fn is_cancelled(&self) -> bool {
        matches!(self.kind(), Self::Cancelled)
    }
}

impl From<ram::Error> for Error {
    fn from(error: ram::Error) -> Self {
        Self::Usage(Usage::Ram(error))
    }
}

/// An error and its place. The text is `place: error`; the cause is the cause of the error.
#[derive(Clone, Debug)]
pub struct Located {
    place: String,
    error: Box<Error>,
}

impl Located {
    /// The place: `channel 3`, `packet 17`, `connection from 127.0.0.1:4711`.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// The error at this place.
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

/// Bytes that are not a valid initial packet or packet head.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// The first four bytes are not the magic number.
    #[error("expected magic {expected:#010x}, found {found:#010x}")]
    Magic {
        /// The magic number.
        expected: u32,
        /// The number found.
        found: u32,
    },
    /// The version is not 1.
    #[error("expected version {expected}, found {found}")]
    Version {
        /// The supported version.
        expected: u32,
        /// The version found.
        found: u32,
    },
    /// There are fewer bytes than the head needs.
    #[error("expected {expected} bytes, found {found}")]
    Length {
        /// The length of the head in bytes.
        expected: usize,
        /// The number of bytes found.
        found: usize,
    },
    /// `pages_alloc` is greater than the number of pages that a packet can have.
    #[error(
        "pages_alloc {found} is above the {most} pages of a packet: is the page size the same on both sides?"
    )]
    PagesAlloc {
        /// The greatest number of pages of a packet with this page size.
        most: u32,
        /// The value of the field.
        found: u32,
    },
    /// There are more normal pages than `pages_alloc`.
    #[error("{normal} normal pages are more than pages_alloc {alloc}")]
    NormalPages {
        /// The field `pages_alloc`.
        alloc: u32,
        /// The number of normal pages.
        normal: u32,
    },
    /// Normal and zero pages together are more than `pages_alloc`.
    #[error("{normal} normal and {zero} zero pages are more than pages_alloc {alloc}")]
    ZeroPages {
        /// The field `pages_alloc`.
        alloc: u32,
        /// The number of normal pages.
        normal: u32,
        /// The number of zero pages.
        zero: u32,
    },
    /// The packet lists pages, and the name of their block is empty.
    #[error("the packet lists pages, but names no block")]
    NoBlockName,
    /// A device-state packet has another flag set.
    #[error("device-state packet: expected flags 0x40 alone, found {found}")]
    DeviceStateFlags {
        /// All flags of the packet.
        found: Flags,
    },
    /// A device-state packet has no valid device id.
    #[error("device-state packet: expected a device id of 1 to 255 bytes, ended by NUL")]
    DeviceId,
    /// A device-state packet has no state, or too much.
    #[error("device-state packet: next_packet_size {found:#x} is not 0x1 to {most:#x}")]
    DeviceStateSize {
        /// The greatest value.
        most: u32,
        /// The field's value.
        found: u32,
    },
    /// An offset is not the beginning of a page.
    #[error("offset {offset} is not a multiple of the page size {page_size}")]
    Unaligned {
        /// The offset found.
        offset: BlockOffset,
        /// The page size of the migration.
        page_size: PageSize,
    },
    /// `next_packet_size` does not match the pages in the list.
    #[error("next_packet_size {found} does not fit {pages} pages of {page_size}: expected {expected}")]
    PayloadSize {
        /// The length of the payload for these pages, in bytes.
        expected: u64,
        /// The field's value.
        found: u32,
        /// The number of normal pages in the list.
        pages: u32,
        /// The page size of the migration.
        page_size: PageSize,
    },
    /// `next_packet_size` of a compressed payload is 0, or greater than the longest payload.
    #[error("next_packet_size {found} of compressed pages: expected 1 to {most}")]
    CompressedSize {
        /// The length of the longest payload, in bytes.
        most: u32,
        /// The field's value.
        found: u32,
    },
    /// The decompressor refused the payload.
    #[error("broken {method} data: {why}")]
    Compressed {
        /// The method.
        method: &'static str,
        /// The error of the decompressor.
        why: String,
    },
    /// The decompressed payload is longer or shorter than the pages in the list.
    #[error("the payload decompresses to {} bytes, expected {expected}", made(*.expected, *.found))]
    Inflated {
        /// The length of the pages in the list, in bytes.
        expected: usize,
        /// The decompressed length in bytes; `expected + 1` if it is longer.
        found: usize,
    },
}

/// Something valid that this library does not support.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unsupported {
    /// A flag that this library does not support.
    #[error("packet flags {flags} include {unknown}, which this version does not support")]
    Flags {
        /// All flags of the packet.
        flags: Flags,
        /// The flags that are not supported.
        unknown: Flags,
    },
    /// The pages are compressed by a method that this build does not support.
    #[error(
        "packet of method {name} ({found}), which this build does not support: set multifd-compression to {known} at the source"
    )]
    Method {
        /// The methods that this build supports: `none, zlib or zstd`.
        known: String,
        /// The bits of the method.
        found: Flags,
        /// QEMU's name of the method.
        name: &'static str,
    },
    /// A zstd frame with a window that no level of QEMU needs.
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
    /// The peer uses TLS, and this side does not.
    #[error("the source uses TLS: set tls-creds on this side too, or clear it at the source")]
    Tls,
    /// A device-state packet.
    #[error(
        "device-state packet (flag 0x40) of device {device:?} instance {instance}: switch the device's transfer over \
             multifd off at the source"
    )]
    DeviceState {
        /// The device.
        device: DeviceId,
        /// The number of the device among those with this name.
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

/// `1 connection was refused`.
fn connections_refused(refused: u64) -> String {
    match refused {
        1 => "1 connection was refused".into(),
        more => format!("{more} connections were refused"),
    }
}

fn refused_too(refused: u64) -> String {
    match refused {
        0 => String::new(),
        some => format!(", and {} (the log has the reasons)", connections_refused(some)),
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
