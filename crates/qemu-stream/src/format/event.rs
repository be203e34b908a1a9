//! The steps of a main stream as values, in the order of the stream.
//!
//! ```text
//! Configuration ─ Command* ─ Blocks ─ SyncMode ─ SyncPoint ─ Eos ─ SectionEnd ─┬─ Pass ─ pages, SyncPoint ─ Eos ─ SectionEnd ─┐
//!                 OtherSection*                                                └──── Command*, OtherSection* ◀────────────────┘
//!                                           after the last pass: EndOfRam ─ OtherSection* ─ Devices* ─ End
//! post-copy, between two passes:            Command (PACKAGED) ─ Command (LISTEN) ─ Devices ─ Command (PING)* ─ Command (RUN)
//!                                           after the last pass: EndOfRam ─ OtherSection* ─ End
//! ```
//!
//! An event borrows what is large: a page is not copied. [`incoming`](crate::incoming) reads events and
//! [`outgoing`](crate::outgoing) writes them. An event that was read is written as the same bytes.

use multifd::ram::PageIndex;

use super::{
    BlockIndex, BlockList, Command, Configuration, DevicePart, Section, SectionId, SyncMode, xbzrle,
};
use crate::error::{Error, Malformed, Place};

/// One step of a main stream. Later versions may add events: a `match` needs an arm for unknown ones.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The header, with the configuration of the machine; `None` from machine types up to 2.3. The first event; occurs once.
    Configuration(Option<&'a Configuration>),
    /// A command. Occurs before RAM and between the sections of RAM.
    Command(&'a Command),
    /// A section other than RAM, before the end of RAM or immediately after it: a device that is sent early (FULL), or a piece of
    /// a section that is sent in pieces (START, PART, END).
    OtherSection {
        /// Its head.
        head: &'a Section,
        /// The whole section as in the stream: head, body, footer.
        bytes: &'a [u8],
    },
    /// RAM begins: the head of its START, and the block list. Occurs once, before all pages.
    Blocks {
        /// The number of the RAM section.
        section: SectionId,
        /// The blocks.
        blocks: &'a BlockList,
    },
    /// How the stream marks its sync points. Occurs once, before the first sync point. It has no bytes of its own: the first
    /// mark shows the mode. [`SyncMode::Round`] means that multifd is on at the source; with [`SyncMode::Legacy`] it may be on
    /// or off.
    SyncMode(SyncMode),
    /// All channels have to reach their next SYNC before the next event is read.
    SyncPoint(SyncMark),
    /// The body of a section of RAM ends: the body of START, or of a pass.
    Eos,
    /// A section of RAM ends, after its [`Eos`](Self::Eos). QEMU delays a footer until it has more to send.
    SectionEnd {
        /// Whether it has a footer: all sections of a stream have one, or none has.
        footer: bool,
    },
    /// A pass over RAM begins: a PART, or the END.
    Pass {
        /// Whether it is the last pass (END): the guest is stopped.
        last: bool,
    },
    /// The page is zero.
    ZeroPage {
        /// The block.
        block: BlockIndex,
        /// The page in it.
        page: PageIndex,
    },
    /// The page and its contents.
    Page {
        /// The block.
        block: BlockIndex,
        /// The page in it.
        page: PageIndex,
        /// The contents: one page size of bytes.
        bytes: &'a [u8],
    },
    /// The changes of a page that arrived before.
    Xbzrle {
        /// The block.
        block: BlockIndex,
        /// The page in it.
        page: PageIndex,
        /// The changes.
        delta: Delta<'a>,
    },
    /// The last section of RAM has ended. Has no bytes of its own.
    EndOfRam,
    /// Bytes of the device part, as they arrive. The borders between devices, and the end of the stream, are unknown until the
    /// description of all devices has arrived. In a stream of post-copy, all devices at once, in the package: between the commands
    /// POSTCOPY_LISTEN and POSTCOPY_RUN.
    Devices(&'a [u8]),
    /// The stream is complete. Contains the devices, split: the bytes of all [`Devices`](Self::Devices) and
    /// [`OtherSection`](Self::OtherSection) events. The last event. A stream of post-copy has no description; the devices are
    /// [split by their footers](DevicePart::is_split_by_footers), if that is possible.
    End(Box<DevicePart>),
}

impl Event<'_> {
    /// A short name, for messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Configuration(_) => "configuration",
            Self::Command(_) => "command",
            Self::OtherSection { .. } => "section beside ram",
            Self::Blocks { .. } => "block list",
            Self::SyncMode(_) => "sync mode",
            Self::SyncPoint(_) => "sync point",
            Self::Eos => "end of records",
            Self::SectionEnd { .. } => "end of a section of ram",
            Self::Pass { .. } => "pass",
            Self::ZeroPage { .. } => "zero page",
            Self::Page { .. } => "page",
            Self::Xbzrle { .. } => "delta of a page",
            Self::EndOfRam => "end of ram",
            Self::Devices(_) => "devices",
            Self::End(_) => "end of the stream",
        }
    }
}

/// How a sync point is marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncMark {
    /// By a MULTIFD_FLUSH record.
    Flush,
    /// By the EOS of a section, which is the next event. Only in [`SyncMode::Legacy`].
    Eos,
}

/// The changes of a page, relative to its previous contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delta<'a> {
    bytes: &'a [u8],
    at: Place,
}

impl<'a> Delta<'a> {
    pub(crate) fn new(bytes: &'a [u8], at: Place) -> Self {
        Self { bytes, at }
    }

    /// The changes, encoded as in the stream.
    pub fn as_bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Where the changes begin in the stream.
    pub fn place(&self) -> Place {
        self.at
    }

    /// Changes the previous contents of the page into the new ones.
    ///
    /// # Errors
    /// If the delta does not fit the page. The page may then be partly changed.
    pub fn apply(&self, page: &mut [u8]) -> Result<(), Error> {
        xbzrle::apply(self.bytes, page).map_err(|bad| Malformed::Delta(bad).at(self.at))
    }
}
