//! What can go wrong, sorted by who is at fault.
//!
//! Every error that bytes caused says where: the stream, and the offset in it at which the field
//! begins. Causes from below are in `source()`, not in the text.

use std::{borrow::Cow, fmt, io};

use multifd::{
    Fault,
    ram::{BlockName, BlockOffset},
};

use crate::format::{InvalidMachineType, MachineType, Misfit, SectionId, SectionName, xbzrle::BadDelta};

/// Why a stream or a file could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Bytes that mean nothing in the format.
    #[error("{at}: {what}")]
    Malformed {
        /// Where the field begins.
        at: Place,
        /// What is wrong with it.
        what: Malformed,
    },
    /// The stream ends in the middle.
    #[error("{at}: stream ends where {expected} was expected")]
    Cut {
        /// Where the stream ends.
        at: Place,
        /// What should have come.
        expected: &'static str,
    },
    /// Well-formed bytes where the rules do not allow them.
    #[error("{at}: {what}")]
    Violation {
        /// Where they stand.
        at: Place,
        /// Which rule was broken.
        what: Violation,
    },
    /// The peer uses what this library does not speak.
    #[error("{at}: {what}")]
    Unsupported {
        /// Where it is used.
        at: Place,
        /// What it is, and what to switch off.
        what: Unsupported,
    },
    /// The destination says that it failed; the guest can go on at the source.
    #[error(
        "the destination reported failure (SHUT {code}); its own log has the reason; the guest can go on at the source"
    )]
    DestinationFailed {
        /// The value of the SHUT message, never 0.
        code: u32,
    },
    /// The destination left without SHUT; the guest can go on at the source.
    #[error(
        "{at}: the destination closed the connection without SHUT; the guest can go on at the source; its own log has \
             the reason: channel count, method, UUID and machine type must be the same on both sides"
    )]
    NoShut {
        /// How far the return path got.
        at: Place,
    },
    /// The connection ended without SHUT, though this destination has said that it never leaves without: the network or
    /// whatever stands between has ended it, and its word may have been on the way.
    #[error(
        "{at}: the connection ended before the destination's SHUT, which this destination always sends; the network, a proxy \
             or the end of its process has cut it off: look at the destination whether the guest runs there"
    )]
    CutBeforeShut {
        /// How far the return path got.
        at: Place,
    },
    /// The source has closed the main connection, although it waits to be told how it ended: it takes its guest back.
    #[error(
        "{at}: the source closed the connection before it was told that all is here (cancelled, or its process ended); its guest \
         may run on there and must not run here"
    )]
    SourceGone {
        /// How far the stream got.
        at: Place,
    },
    /// Nothing came in time, on this connection or on any other of its side.
    #[error("{at}: nothing came in time where {expected} was expected; {}", where_to_look(at.stream))]
    TimedOut {
        /// How far the stream got.
        at: Place,
        /// What should have come.
        expected: &'static str,
    },
    /// The caller asked for what cannot be done.
    #[error("{0}")]
    Usage(#[from] Usage),
    /// The implementation of [`Destination`](crate::incoming::Destination) failed.
    #[error("{at}: destination could not take {what}")]
    Destination {
        /// How far the stream got.
        at: Place,
        /// What it was asked to take.
        what: &'static str,
        /// Its own error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The system refused to read or write.
    #[error("{at}: cannot {doing}")]
    Io {
        /// How far the stream got.
        at: Place,
        /// What was tried.
        doing: &'static str,
        /// The system's error.
        source: io::Error,
    },
}

/// What to do about a peer that is alive and silent.
impl Error {
    /// Who or what is at fault.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Malformed { .. } | Self::Violation { .. } | Self::Unsupported { .. } => Fault::Protocol,
            Self::DestinationFailed { .. } => Fault::Peer,
            Self::Cut { .. } | Self::NoShut { .. } | Self::CutBeforeShut { .. } | Self::SourceGone { .. } => {
                Fault::Connection
            }
            Self::TimedOut { .. } => Fault::Stalled,
            Self::Usage(_) => Fault::Caller,
            Self::Destination { source, .. } => {
                source.downcast_ref::<multifd::Error>().map_or(Fault::Caller, multifd::Error::fault)
            }
            Self::Io { at: Place { stream: StreamKind::File, .. }, .. } => Fault::System,
            Self::Io { source, .. } if source.kind() == io::ErrorKind::TimedOut => Fault::Stalled,
            Self::Io { .. } => Fault::Connection,
        }
    }

    /// The same error as one of the engine, met while `doing` something.
    pub(crate) fn while_doing(self, doing: &'static str) -> multifd::Error {
        let fault = self.fault();
        multifd::Error::other(doing, self).because(fault)
    }
}

fn where_to_look(stream: StreamKind) -> &'static str {
    match stream {
        StreamKind::ReturnPath => {
            "the destination stands still, or waits for what this side does not send: more channels (multifd-channels), \
             or the other sync mode (machine types up to 8.0 take legacy, later ones round); make sure that the guest does \
             not run there before it goes on here"
        }
        _ => {
            "the source stands still, or its network does; its guest is there, look at its query-migrate and its log"
        }
    }
}

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
    /// The main stream, source to destination.
    Main,
    /// The messages from destination to source.
    ReturnPath,
    /// A mapped-ram file.
    File,
}

impl fmt::Display for StreamKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Main => "main stream",
            Self::ReturnPath => "return path",
            Self::File => "mapped-ram file",
        })
    }
}

/// Bytes that mean nothing in the format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// A field holds what it must not hold.
    #[error("{field}: expected {expected}, found {found:#x}")]
    Value {
        /// The field.
        field: Cow<'static, str>,
        /// What it may hold.
        expected: Cow<'static, str>,
        /// What it holds.
        found: u64,
    },
    /// A length or count above its bound.
    #[error("{field}: expected at most {max:#x}, found {found:#x}")]
    TooLong {
        /// The field.
        field: Cow<'static, str>,
        /// The bound.
        max: u64,
        /// What was met.
        found: u64,
    },
    /// A name is empty, holds a NUL or is not printable where it must be.
    #[error("{field}: expected a name of 1 to 255 bytes without NUL, found \"{found}\"")]
    Name {
        /// Which name.
        field: &'static str,
        /// The bytes, escaped.
        found: String,
    },
    /// A RAM record with flags that make no record.
    #[error("ram record: expected one known kind, found flags {flags:#x}")]
    RecordFlags {
        /// The flags.
        flags: u64,
    },
    /// An XBZRLE delta does not fit its page.
    #[error("xbzrle record: {0}")]
    Delta(BadDelta),
    /// The stream ended without a description that fits.
    #[error(
        "device part: ends after {length:#x} bytes without a description that fits{}; \
         the stream is incomplete, or its source leaves the description out (machine option suppress-vmdesc)",
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
    /// The source's machine has another type than this side's.
    #[error("the source has machine type {}, this side has {expected}", found.as_ref().map_or("none".into(), ToString::to_string))]
    OtherMachine {
        /// The type that this side takes.
        expected: MachineType,
        /// The source's; `None` from machine types up to 2.3, which do not name theirs.
        found: Option<MachineType>,
    },
    /// Two entries of the list have one name.
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
    /// A page does not lie in its block.
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
    /// The blocks are longer than the total that was announced.
    #[error("block \"{block}\": length {found:#x} is more than the {left:#x} left of the total")]
    BeyondTotal {
        /// The block.
        block: BlockName,
        /// What is left of the total.
        left: u64,
        /// The block's used length.
        found: u64,
    },
    /// A record continues a block, and there was none before it.
    #[error("ram record: flag CONTINUE (0x20), but no record named a block before")]
    NoCurrentBlock,
    /// A record stands where it has no place.
    #[error("{record} record has no place {place}")]
    Misplaced {
        /// The record or section.
        record: &'static str,
        /// Where it stands.
        place: &'static str,
    },
    /// The footer closes another section.
    #[error("footer: expected section {expected}, found {found}")]
    Footer {
        /// The section that is open.
        expected: SectionId,
        /// The section the footer names.
        found: SectionId,
    },
    /// A section that is not the RAM section.
    #[error("section {found} was never started; the ram section is {expected}")]
    UnknownSection {
        /// The RAM section.
        expected: SectionId,
        /// The section named.
        found: SectionId,
    },
    /// A section that was sent in pieces has no last one.
    #[error("section \"{name}\" ({id}): expected its END behind that of ram, found {found}")]
    Unfinished {
        /// Its name.
        name: SectionName,
        /// Its number.
        id: SectionId,
        /// What stands there.
        found: &'static str,
    },
    /// The footer is missing.
    #[error("section {section}: expected a footer (0x7e), found {found:#x}")]
    NoFooter {
        /// The section that is open.
        section: SectionId,
        /// The byte in its place.
        found: u8,
    },
    /// PING before OPEN_RETURN_PATH.
    #[error("command PING without a return path")]
    PingWithoutReturnPath,
    /// SHUT 0 from a destination that cannot have the guest yet.
    #[error(
        "destination says SHUT 0, all is well, before it has been sent the devices; it is not believed, and the guest can go \
         on at the source: make sure that it does not run there"
    )]
    EarlyShut,
    /// Parts of a mapped-ram file lie on each other or outside the file.
    #[error("block \"{block}\": {what} at {at:#x}, expected {expected}")]
    Placement {
        /// The block.
        block: BlockName,
        /// Its bitmap or its pages.
        what: &'static str,
        /// Where it is said to lie.
        at: u64,
        /// Where it may lie.
        expected: String,
    },
    /// More candidates for the end than any real device part has.
    #[error("device part: more than {max} places look like its end")]
    TooManyEnds {
        /// The bound.
        max: usize,
    },
}

/// What the peer uses and this library does not speak.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unsupported {
    /// The stream has another version.
    #[error("stream version {0}: expected 3")]
    Version(u32),
    /// A subsection of the configuration whose length nobody can know.
    #[error("configuration subsection \"{0}\" is unknown and cannot be skipped")]
    Subsection(SectionName),
    /// A page size that is no size from 4 to 64 KiB.
    #[error("target page bits {0}: expected 12 to 16")]
    PageBits(u32),
    /// A section that cannot be skipped, because it has no length.
    #[error("section \"{name}\" cannot be skipped{}", remedy.map(|r| format!("; {r}")).unwrap_or_default())]
    Section {
        /// Its name.
        name: SectionName,
        /// What to do about it.
        remedy: Option<&'static str>,
    },
    /// A record of a section sent in pieces that nobody here has ever seen, so that its length is not known.
    #[error(
        "section \"{name}\": record {found:#x} is not known, so its end cannot be found; the guest can go on at the source"
    )]
    LiveRecord {
        /// The section.
        name: SectionName,
        /// The first word of the record.
        found: u64,
    },
    /// A device sent before the end of RAM by a source without footers.
    #[error(
        "device \"{name}\" is sent before the end of ram without a footer, so its end cannot be found: switch \
             send-section-footer on at the source, or unplug the device"
    )]
    EarlyDevice {
        /// The device.
        name: SectionName,
    },
    /// A source with a return path whose description does not come.
    #[error(
        "device part: no description behind {length:#x} bytes that look complete, and with a return path nothing \
             else tells the end: switch the machine's option suppress-vmdesc off at the source, or its capability \
             return-path"
    )]
    NoDescription {
        /// Bytes after the RAM section.
        length: u64,
    },
    /// Something that a capability of the source has brought.
    #[error("{what} is not served: switch capability {capability} off at the source")]
    Capability {
        /// What was met.
        what: &'static str,
        /// The capability to switch off.
        capability: &'static str,
    },
    /// Something that a capability must bring and has not.
    #[error("{what}: capability {capability} was off when it was written")]
    NeedsCapability {
        /// What was met.
        what: &'static str,
        /// The capability that should have been on.
        capability: &'static str,
    },
    /// A mapped-ram header of a later version.
    #[error("block \"{block}\": mapped-ram header version {found}, expected at most 1")]
    MappedRamVersion {
        /// The block.
        block: BlockName,
        /// The version.
        found: u32,
    },
}

/// What the caller did wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Usage {
    /// Calls in the wrong order.
    #[error("{call} has no place {state}")]
    OutOfOrder {
        /// The call.
        call: &'static str,
        /// Where the stream is.
        state: &'static str,
    },
    /// A block list that cannot be written.
    #[error("block list: {0}")]
    Blocks(String),
    /// A page that is not in its block.
    #[error("page {page} is not in block {block}")]
    NoSuchPage {
        /// Number of the block in the list.
        block: usize,
        /// The page.
        page: u64,
    },
    /// A device has the number of the RAM section.
    #[error(
        "device {device:?} has section number {section}, which is that of ram: number the devices from another one on"
    )]
    SectionTaken {
        /// The number.
        section: SectionId,
        /// The device.
        device: SectionName,
    },
    /// A name, machine type or device that cannot be written.
    #[error("{what}: {why}")]
    Value {
        /// What was given.
        what: &'static str,
        /// Why it cannot be used.
        why: String,
    },
    /// A file that would be longer than this process may make one.
    #[error(
        "the file takes {size:#x} bytes and more, and the limit of a file's size (RLIMIT_FSIZE, `ulimit -f`) is {limit:#x}: \
         raise the limit"
    )]
    FileSize {
        /// The limit of the process, in bytes.
        limit: u64,
        /// The bytes up to the devices, which come behind.
        size: u64,
    },
    /// A name that no machine type can have.
    #[error(transparent)]
    MachineType(#[from] InvalidMachineType),
    /// The machine type does not go with what was asked.
    #[error("machine type {machine}: {why}")]
    Machine {
        /// The machine type.
        machine: MachineType,
        /// What does not go with it.
        why: &'static str,
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
