//! What can go wrong, sorted by who is at fault.
//!
//! An error that bytes caused names the stream, and the offset in it at which the field begins. The cause of an error is in
//! `source()`, not in its text.

mod base;
mod unsupported;
mod usage;

use std::{borrow::Cow, fmt, io};

use multifd::{
    Fault,
    error::UntrustedText,
    postcopy::RefusedRequest,
    ram::{BlockName, BlockOffset},
};

pub use base::BadBase;
pub use unsupported::Unsupported;
pub use usage::Usage;

use crate::format::{MachineType, Misfit, SectionId, SectionName, xbzrle::BadDelta};

/// Why a stream or a file could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Bytes that are not valid in the format.
    #[error("{at}: {what}")]
    Malformed {
        /// Where the field begins.
        at: Place,
        /// What is wrong with it.
        what: Malformed,
    },
    /// The stream ends before it is complete.
    #[error("{}; {at}: stream ends where {expected} was expected", cause_of_end(at.stream))]
    Cut {
        /// Where the stream ends.
        at: Place,
        /// What was expected there.
        expected: &'static str,
    },
    /// Well-formed bytes where the rules do not allow them.
    #[error("{at}: {what}")]
    Violation {
        /// Where they are.
        at: Place,
        /// Which rule was broken.
        what: Violation,
    },
    /// The peer uses something that this library does not support.
    #[error("{at}: {what}")]
    Unsupported {
        /// Where it is used.
        at: Place,
        /// What it is, and what to switch off.
        what: Unsupported,
    },
    /// The destination reports that it failed, so it does not have the guest, unless it had [started](Reached::Guest) it.
    #[error("{}", failure(*.code, *.reached, .reason.as_ref()))]
    DestinationFailed {
        /// The value of the SHUT message, never 0.
        code: u32,
        /// How far the destination had come.
        reached: Reached,
        /// The reason that it sent, at most 512 bytes. Only a destination of this library sends one, unless it was switched
        /// off there ([`send_reason`](crate::arrival::ArrivalOptions::send_reason)).
        reason: Option<UntrustedText>,
    },
    /// The destination closed the connection without SHUT, so it does not have the guest.
    #[error(
        "the destination closed the connection without SHUT ({at}), so it does not have the guest; its own log has the reason; \
             {reached}"
    )]
    NoShut {
        /// How far the return path was read.
        at: Place,
        /// How far the destination had come.
        reached: Reached,
    },
    /// The connection ended without SHUT, although this destination has announced that it always sends SHUT: the network or
    /// its process was interrupted, and SHUT may have been lost.
    #[error(
        "the connection ended before the destination's SHUT, which this destination always sends ({at}): the network, a proxy \
             or the end of its process has interrupted it; check whether the guest runs at the destination"
    )]
    CutBeforeShut {
        /// How far the return path was read.
        at: Place,
    },
    /// The source has closed the main connection instead of waiting for the result: it resumes its guest.
    #[error(
        "the source closed the connection (cancelled, or its process ended) before it was informed that all data has arrived \
          ({at}); its guest may run there and must not run here"
    )]
    SourceGone {
        /// How far the stream was read.
        at: Place,
    },
    /// Nothing arrived in time, on this connection or on any other of its side.
    #[error("{at}: nothing arrived in time where {expected} was expected; {}", what_to_check(at.stream))]
    TimedOut {
        /// How far the stream was read.
        at: Place,
        /// What was expected there.
        expected: &'static str,
    },
    /// The destination did not reply in time to a question, which is asked before the guest can move.
    #[error(
        "{at}: nothing arrived in time where the reply to a question was expected; the guest stays at the source: {}",
        STALLED_DESTINATION
    )]
    NoReply {
        /// How far the replies were read.
        at: Place,
    },
    /// The base of a delta cannot be used.
    #[error("the base {base:?} of {of:?} cannot be used")]
    Base {
        /// The path of the delta; may be empty.
        of: UntrustedText,
        /// The path of the base, as the delta has it.
        base: UntrustedText,
        /// Why it cannot be used.
        #[source]
        why: Box<BadBase>,
    },
    /// The caller asked for something that is not possible.
    #[error("{0}")]
    Usage(#[from] Usage),
    /// The implementation of [`Destination`](crate::incoming::Destination) failed.
    #[error("{at}: the destination cannot accept {what}")]
    Destination {
        /// How far the stream was read.
        at: Place,
        /// What it did not accept.
        what: &'static str,
        /// Its error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The system reported an error of a read or write.
    #[error("{at}: cannot {doing}")]
    Io {
        /// How far the stream was read or written.
        at: Place,
        /// The action that failed.
        doing: &'static str,
        /// The system's error.
        source: io::Error,
    },
}

impl Error {
    /// Who or what is at fault.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Malformed { .. } | Self::Violation { .. } | Self::Unsupported { .. } => Fault::Protocol,
            Self::Base { why, .. } => why.fault(),
            Self::DestinationFailed { .. } => Fault::Peer,
            Self::Cut { .. } | Self::NoShut { .. } | Self::CutBeforeShut { .. } | Self::SourceGone { .. } => {
                Fault::Connection
            }
            Self::TimedOut { .. } | Self::NoReply { .. } => Fault::Stalled,
            Self::Usage(_) => Fault::Caller,
            Self::Destination { source, .. } => {
                source.downcast_ref::<multifd::Error>().map_or(Fault::Caller, multifd::Error::fault)
            }
            Self::Io {
                at:
                    Place {
                        stream:
                            StreamKind::File | StreamKind::Stored | StreamKind::Recording | StreamKind::DiskImage,
                        ..
                    },
                ..
            } => Fault::System,
            Self::Io { source, .. } if source.kind() == io::ErrorKind::TimedOut => Fault::Stalled,
            Self::Io { .. } => Fault::Connection,
        }
    }

    /// The same error as one of the engine. `doing` is the action that failed.
    pub(crate) fn while_doing(self, doing: &'static str) -> multifd::Error {
        let fault = self.fault();
        multifd::Error::other(doing, self).because(fault)
    }
}

/// How much of a migration a destination has received, as its replies show. The text names the likely causes of a failure there,
/// the likeliest first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Reached {
    /// It has not replied.
    #[default]
    Nothing,
    /// It has accepted the configuration.
    Configuration,
    /// It has all of RAM.
    Ram,
    /// It has loaded the devices of a guest that starts before its RAM is there, so the guest may have run there.
    Guest,
}

impl fmt::Display for Reached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing => {
                "it had not replied yet; likely causes, the likeliest first: another machine type, another multifd-channels (or \
                 multifd on one side only), TLS on one side only, another UUID"
            }
            Self::Configuration => {
                "it had accepted the machine type; likely causes, the likeliest first: another RAM size or other memory devices, \
                 another multifd-compression, another multifd-channels"
            }
            Self::Ram => {
                "it had all of RAM; likely causes, the likeliest first: other devices or other options of a device, another \
                 number of CPUs, a disk that it cannot open"
            }
            Self::Guest => {
                "the guest may have run there; make sure that it has ended there before it runs anywhere else"
            }
        })
    }
}

/// The text of a failure that the destination has reported.
fn failure(code: u32, reached: Reached, reason: Option<&UntrustedText>) -> String {
    match (reason, reached) {
        (Some(reason), Reached::Guest) => {
            format!("the destination failed: \"{reason}\" (SHUT {code}); {reached}")
        }
        (None, Reached::Guest) => {
            format!("the destination reported failure (SHUT {code}); its own log has the reason; {reached}")
        }
        (Some(reason), _) => {
            format!("the destination refused: \"{reason}\" (SHUT {code}); it does not have the guest")
        }
        (None, _) => format!(
            "the destination reported failure (SHUT {code}), so it does not have the guest; its own log has the reason; \
             {reached}"
        ),
    }
}

/// Why a stream has ended too early.
fn cause_of_end(stream: StreamKind) -> &'static str {
    match stream {
        StreamKind::Main | StreamKind::Preempt => {
            "the source closed the connection (cancelled, or its process ended)"
        }
        StreamKind::ReturnPath => "the destination closed the connection (it failed, or its process ended)",
        StreamKind::File | StreamKind::Stored | StreamKind::Recording | StreamKind::DiskImage => {
            "the file is incomplete"
        }
    }
}

/// What to check if the peer of a connection is silent.
fn what_to_check(stream: StreamKind) -> String {
    if stream != StreamKind::ReturnPath {
        return "the source or its network is stalled, and the guest is still at the source: check query-migrate and the log there".into();
    }
    format!("{STALLED_DESTINATION}; make sure that the guest does not run there before it runs anywhere else")
}

const STALLED_DESTINATION: &str = "the destination makes no progress, or waits for something that this side does not send: more channels \
                                   (multifd-channels), or the other sync mode (machine types up to 8.0 use legacy, later ones round)";

/// A stream and an offset in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which stream.
    pub stream: StreamKind,
    /// Bytes from its beginning; for a file, from the beginning of the file.
    pub offset: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: offset {:#x}", self.stream, self.offset)
    }
}

/// Which stream is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StreamKind {
    /// The main stream, from source to destination.
    Main,
    /// The messages from destination to source.
    ReturnPath,
    /// A mapped-ram file.
    File,
    /// The connection of capability postcopy-preempt, from source to destination.
    Preempt,
    /// A main stream that was stored.
    Stored,
    /// A recording of a migration.
    Recording,
    /// A qcow2 image.
    DiskImage,
}

impl fmt::Display for StreamKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Main => "main stream",
            Self::ReturnPath => "return path",
            Self::File => "mapped-ram file",
            Self::Preempt => "postcopy-preempt",
            Self::Stored => "stored stream",
            Self::Recording => "recording",
            Self::DiskImage => "disk image",
        })
    }
}

/// Bytes that are not valid in the format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// A field has a value that is not allowed.
    #[error("{field}: expected {expected}, found {found:#x}")]
    Value {
        /// The field.
        field: Cow<'static, str>,
        /// The allowed values.
        expected: Cow<'static, str>,
        /// The value found.
        found: u64,
    },
    /// A length or count is greater than its bound.
    #[error("{field}: expected at most {max:#x}, found {found:#x}")]
    TooLong {
        /// The field.
        field: Cow<'static, str>,
        /// The bound.
        max: u64,
        /// The value found.
        found: u64,
    },
    /// A name is empty, contains a NUL, or is not printable where it must be.
    #[error("{field}: expected a name of 1 to 255 bytes without NUL, found \"{found}\"")]
    Name {
        /// Which name.
        field: &'static str,
        /// The bytes, escaped.
        found: String,
    },
    /// The flags of a RAM record are not those of one known kind.
    #[error("ram record: expected one known kind, found flags {flags:#x}")]
    RecordFlags {
        /// The flags.
        flags: u64,
    },
    /// A part of a file is not what was written there.
    #[error(
        "{0}: differs from its digest: the file was damaged after it was written, by the disk, a copy or another program"
    )]
    Damaged(&'static str),
    /// An XBZRLE delta does not fit its page.
    #[error("xbzrle record: {0}")]
    Delta(BadDelta),
    /// The stream ended without a description that matches the devices.
    #[error(
        "device part: ends after {length:#x} bytes without a description that fits{}; \
         the stream is incomplete, or its source omits the description (machine option suppress-vmdesc)",
        last.as_ref().map(|m| format!(" (nearest: {m})")).unwrap_or_default()
    )]
    NoDescription {
        /// Bytes after the RAM section.
        length: u64,
        /// Why the nearest candidate did not fit.
        last: Option<Misfit>,
    },
    /// A file has no description that fits, and no devices that end with the file.
    #[error(
        "device part: no end in the last {length:#x} bytes of the file{}; the file is incomplete, or it was saved without a \
         description (machine option suppress-vmdesc) and bytes other than zeros follow the machine: cut them off",
        last.as_ref().map(|m| format!(" (nearest: {m})")).unwrap_or_default()
    )]
    NoEndInFile {
        /// Bytes after the RAM section.
        length: u64,
        /// Why the nearest candidate did not fit.
        last: Option<Misfit>,
    },
}

/// Well-formed bytes where the rules do not allow them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// A record or message names a block that is not in the list.
    #[error("block \"{0}\" is not in the block list")]
    UnknownBlock(BlockName),
    /// The machine type of the source is not the one of this side.
    #[error("the source has machine type {}, this side has {expected}", found.as_ref().map_or("none".into(), ToString::to_string))]
    OtherMachine {
        /// The machine type of this side.
        expected: MachineType,
        /// The machine type of the source; `None` from machine types up to 2.3, which do not send it.
        found: Option<MachineType>,
    },
    /// Two entries of the list have the same name.
    #[error("block \"{0}\" is listed twice")]
    BlockTwice(BlockName),
    /// Two sections of devices have one name and one instance.
    #[error(
        "device \"{name}\" instance {instance} is sent twice: it is not known which of its two states is right"
    )]
    DeviceTwice {
        /// The name.
        name: SectionName,
        /// The instance.
        instance: u32,
    },
    /// A page is outside its block.
    #[error("page at {offset} outside block \"{block}\" ({used_length:#x})")]
    PageOutside {
        /// The block.
        block: BlockName,
        /// The page's offset.
        offset: BlockOffset,
        /// The block's used length.
        used_length: u64,
    },
    /// A used length is not a whole number of pages.
    #[error("block \"{block}\": expected a used length in whole pages of {page_size:#x}, found {found:#x}")]
    PartialPage {
        /// The block.
        block: BlockName,
        /// The page size in bytes.
        page_size: u64,
        /// The used length.
        found: u64,
    },
    /// The lengths of the blocks are together more than the announced total.
    #[error("block \"{block}\": length {found:#x} is more than the {left:#x} left of the total")]
    BeyondTotal {
        /// The block.
        block: BlockName,
        /// The rest of the total, in bytes.
        left: u64,
        /// The block's used length in bytes.
        found: u64,
    },
    /// A record continues a block, and no record before it named one.
    #[error("ram record: flag CONTINUE (0x20), but no record named a block before")]
    NoCurrentBlock,
    /// A destination requests pages that do not exist.
    #[error("request for {length:#x} bytes at {start:#x} of block \"{}\": {why}", block.as_ref().map_or("".into(), ToString::to_string))]
    Request {
        /// The block.
        block: Option<BlockName>,
        /// The offset of the first byte.
        start: u64,
        /// The number of bytes.
        length: u32,
        /// What is wrong with it.
        why: RefusedRequest,
    },
    /// A record is not allowed at its place.
    #[error("{record} is not allowed {place}")]
    Misplaced {
        /// The record or section.
        record: &'static str,
        /// Where it is.
        place: &'static str,
    },
    /// The footer names another section.
    #[error("footer: expected section {expected}, found {found}")]
    Footer {
        /// The current section.
        expected: SectionId,
        /// The section that the footer names.
        found: SectionId,
    },
    /// A section that is neither the RAM section nor another one that was started.
    #[error("section {found} was never started; the ram section is {expected}")]
    UnknownSection {
        /// The RAM section.
        expected: SectionId,
        /// The section found.
        found: SectionId,
    },
    /// The last piece of a section that was sent in pieces is missing.
    #[error("section \"{name}\" ({id}): expected its END after that of ram, found {found}")]
    Unfinished {
        /// Its name.
        name: SectionName,
        /// Its number.
        id: SectionId,
        /// What was found instead.
        found: &'static str,
    },
    /// The footer is missing.
    #[error("section {section}: expected a footer (0x7e), found {found:#x}")]
    NoFooter {
        /// The current section.
        section: SectionId,
        /// The byte found instead.
        found: u8,
    },
    /// PING before OPEN_RETURN_PATH.
    #[error("command PING without a return path")]
    PingWithoutReturnPath,
    /// SHUT 0 from a destination that cannot have the guest yet.
    #[error(
        "the destination reported success (SHUT 0) before the devices were sent to it, which cannot be true: make sure \
         that the guest does not run there before it runs anywhere else"
    )]
    EarlyShut,
    /// Parts of a mapped-ram file overlap, or are outside the file.
    #[error("block \"{block}\": {what} at {at:#x}, expected {expected}")]
    Placement {
        /// The block.
        block: BlockName,
        /// Its bitmap or its pages.
        what: &'static str,
        /// The offset in the file.
        at: u64,
        /// The allowed offsets.
        expected: String,
    },
    /// More places look like the end of the device part than in any real one.
    #[error("device part: more than {max} places look like its end")]
    TooManyEnds {
        /// The bound.
        max: usize,
    },
}
impl Malformed {
    pub(crate) fn value(
        field: impl Into<Cow<'static, str>>,
        expected: impl Into<Cow<'static, str>>,
        found: impl Into<u64>,
    ) -> Self {
        Self::Value { field: field.into(), expected: expected.into(), found: found.into() }
    }

    pub(crate) fn too_long(field: impl Into<Cow<'static, str>>, max: u64, found: u64) -> Self {
        Self::TooLong { field: field.into(), max, found }
    }

    pub(crate) fn at(self, at: Place) -> Error {
        Error::Malformed { at, what: self }
    }
}

impl Violation {
    pub(crate) fn at(self, at: Place) -> Error {
        Error::Violation { at, what: self }
    }
}

impl Unsupported {
    pub(crate) fn at(self, at: Place) -> Error {
        Error::Unsupported { at, what: self }
    }
}
