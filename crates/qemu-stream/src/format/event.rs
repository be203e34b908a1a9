//! What a main stream consists of, as values: one for each step, in the order of the stream.
//!
//! ```text
//! Configuration ─ Command* ─ Blocks ─ SyncMode ─ SyncPoint ─ Eos ─ SectionEnd ─┬─ Pass ─ pages, SyncPoint ─ Eos ─ SectionEnd ─┐
//!                 OtherSection*                                                └──── Command*, OtherSection* ◀────────────────┘
//!                                           behind the last pass: EndOfRam ─ OtherSection* ─ Devices* ─ End
//! ```
//!
//! An event lends what is large: a page is not copied. [`incoming`](crate::incoming) reads events,
//! [`outgoing`](crate::outgoing) writes them, and what was read is written again byte by byte as it was.

use multifd::ram::PageIndex;

use super::{
    BlockIndex, BlockList, Command, Configuration, DevicePart, Section, SectionId, SyncMode, xbzrle,
};
use crate::error::{Error, Malformed, Place};

/// One step of a main stream. Later versions may add events: a `match` needs an arm for those it does not know.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The header, with the configuration of the machine; `None` from machine types up to 2.3. First, and once.
    Configuration(Option<&'a Configuration>),
    /// A command. Comes before RAM and between its sections.
    Command(&'a Command),
    /// A section that is not RAM's and comes before the end of RAM or right behind it: a device that is sent early (FULL), or a
    /// piece of a section that is sent in pieces (START, PART, END).
    OtherSection {
        /// Its head.
        head: &'a Section,
        /// All of it as it is in the stream: head, body, footer.
        bytes: &'a [u8],
    },
    /// RAM begins: the head of its START, and the block list. Once, before all pages.
    Blocks {
        /// The number of the RAM section.
        section: SectionId,
        /// The blocks.
        blocks: &'a BlockList,
    },
    /// How the stream marks its sync points. Once, before the first one. Has no bytes of its own: the first mark shows it.
    /// [`SyncMode::Round`] means that multifd is on at the source, [`SyncMode::Legacy`] leaves it open.
    SyncMode(SyncMode),
    /// All channels have to reach their next SYNC before anything behind this is read.
    SyncPoint(SyncMark),
    /// The body of a section of RAM ends: of its START, or of a pass.
    Eos,
    /// A section of RAM ends, behind its [`Eos`](Self::Eos). QEMU keeps a footer back until it has more to send.
    SectionEnd {
        /// Whether it has a footer. It is the same for all sections of a stream.
        footer: bool,
    },
    /// A pass over RAM begins: a PART, or the END.
    Pass {
        /// Whether it is the last one (END): the guest is stopped.
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
        /// As many bytes as a page has.
        bytes: &'a [u8],
    },
    /// What has changed in a page that came before.
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
    /// Bytes of the device part, in the pieces in which they arrive. Where one device ends and the next begins, and where the
    /// stream ends, is not known before the description of all devices has come.
    Devices(&'a [u8]),
    /// The stream is complete. The devices, split: what [`Devices`](Self::Devices) and [`OtherSection`](Self::OtherSection) have
    /// brought, and nothing else. Last, and once.
    End(Box<DevicePart>),
}

impl Event<'_> {
    /// What it is, in a word or two, for messages.
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
    /// By the EOS of a section, which is the event that follows: [`SyncMode::Legacy`].
    Eos,
}

/// The changes of a page, against contents that came before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delta<'a> {
    bytes: &'a [u8],
    at: Place,
}

impl<'a> Delta<'a> {
    pub(crate) fn new(bytes: &'a [u8], at: Place) -> Self {
        Self { bytes, at }
    }

    /// The changes as the stream encodes them.
    pub fn as_bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Where in the stream they begin.
    pub fn place(&self) -> Place {
        self.at
    }

    /// Turns the last contents of the page into its new ones.
    ///
    /// # Errors
    /// If the delta does not fit the page, which may then hold a part of it.
    pub fn apply(&self, page: &mut [u8]) -> Result<(), Error> {
        xbzrle::apply(self.bytes, page).map_err(|bad| Malformed::Delta(bad).at(self.at))
    }
}
