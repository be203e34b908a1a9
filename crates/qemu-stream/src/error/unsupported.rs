//! What a peer uses and this library does not support.

use multifd::ram::BlockName;

use crate::format::{OtherFormat, SectionName};

/// Something of the peer that this library does not support.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unsupported {
    /// The first bytes are those of another format.
    #[error("expected a stream of QEMU, found {0}")]
    OtherFormat(OtherFormat),
    /// Another version of the stream.
    #[error("stream version {0}: expected 3")]
    Version(u32),
    /// A delta where a whole machine is expected.
    #[error(
        "it is a delta, which has only the pages that differ from its base: it must be opened together with its base, or be \
         merged with it"
    )]
    Delta,
    /// A subsection of the configuration whose length is unknown.
    #[error("configuration subsection \"{0}\" is unknown and cannot be skipped")]
    Subsection(SectionName),
    /// A page size that is not between 4 and 64 KiB.
    #[error("target page bits {0}: expected 12 to 16")]
    PageBits(u32),
    /// A section that cannot be skipped, because its length is unknown.
    #[error("section \"{name}\" cannot be skipped{}", remedy.map(|r| format!("; {r}")).unwrap_or_default())]
    Section {
        /// Its name.
        name: SectionName,
        /// What to do about it, if known.
        remedy: Option<&'static str>,
    },
    /// An unknown record of a section that is sent in pieces. Its length is unknown, too.
    #[error("section \"{name}\": record {found:#x} is not known, so its end cannot be found")]
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
    /// A source with a return path does not send a description.
    #[error(
        "device part: no description after {length:#x} bytes that look complete, and with a return path nothing \
             else shows the end: switch the machine's option suppress-vmdesc off at the source, or its capability \
             return-path"
    )]
    NoDescription {
        /// Bytes after the RAM section.
        length: u64,
    },
    /// The destination replied with TLS, and this side does not use it.
    #[error("the destination uses TLS: set tls-creds on this side too, or clear it at the destination")]
    TlsAtDestination,
    /// Something that is only sent with a capability that is not supported.
    #[error("{what} is not supported: switch capability {capability} off at the source")]
    Capability {
        /// What was found.
        what: &'static str,
        /// The capability to switch off.
        capability: &'static str,
    },
    /// The same, sent by the destination.
    #[error("{what} is not supported: switch capability {capability} off at the destination")]
    DestinationCapability {
        /// What was found.
        what: &'static str,
        /// The capability to switch off.
        capability: &'static str,
    },
    /// Something is missing that is only sent with a capability.
    #[error("{what}: capability {capability} was off when it was written")]
    NeedsCapability {
        /// What was found.
        what: &'static str,
        /// The capability that should have been on.
        capability: &'static str,
    },
    /// A disk image whose snapshots are read by QEMU alone.
    #[error("{0}, whose snapshots QEMU alone reads: start it with -loadvm NAME -S, and capture the machine")]
    DiskImage(&'static str),
    /// A recording that cannot be received again.
    #[error("{0}, from which no machine can be read: multifd inspect shows what passed")]
    Recording(&'static str),
    /// A mapped-ram header of a later version.
    #[error("block \"{block}\": mapped-ram header version {found}, expected at most 1")]
    MappedRamVersion {
        /// The block.
        block: BlockName,
        /// The version.
        found: u32,
    },
}
