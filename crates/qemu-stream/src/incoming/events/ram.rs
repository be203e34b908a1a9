//! What a reader has to remember of the RAM section.

use std::io::Read;

use multifd::ram::PageSize;

use crate::{
    error::{Error, Place},
    format::{BlockList, Configuration, CurrentBlock, Reader, SectionHead, SectionId, SyncMode},
};

/// The RAM section, since its START.
pub(super) struct Ram {
    pub(super) section: SectionId,
    pub(super) blocks: BlockList,
    /// Known since the first section of RAM has ended.
    pub(super) footers: Option<bool>,
    pub(super) current: CurrentBlock,
    /// Known since the first mark of a sync point. Nothing names it but this: a FLUSH before the EOS of START is there in
    /// round mode only.
    pub(super) mode: Option<SyncMode>,
}

/// Which section of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Start,
    Pass,
    Last,
}

impl Ram {
    /// Before START: a section without blocks.
    pub(super) fn none() -> Self {
        let (section, blocks) = (SectionId(0), BlockList::none(PageSize::default()));
        Self { section, blocks, footers: None, current: CurrentBlock::default(), mode: None }
    }

    /// The block list behind the head of START, which stands at `at`.
    pub(super) fn begin<R: Read>(
        r: &mut Reader<R>,
        head: &SectionHead,
        at: Place,
        configuration: Option<&Configuration>,
    ) -> Result<Self, Error> {
        head.check_ram(at)?;
        let page_size = configuration.map(Configuration::page_size).unwrap_or_default();
        let shared = configuration.is_some_and(|configuration| configuration.ignore_shared);
        let blocks = BlockList::decode(r, page_size, shared)?;
        Ok(Self { section: head.id, blocks, footers: None, current: CurrentBlock::default(), mode: None })
    }
}
