//! The state of the RAM section that later records depend on.

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
    /// `None` before the end of the first section of RAM.
    pub(super) footers: Option<bool>,
    pub(super) current: CurrentBlock,
    /// `None` before the first mark of a sync point. Only this mark shows the mode: a FLUSH before the EOS of START exists only in
    /// round mode.
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

    /// Reads the block list after the head of START. `at` is the place of the head. `advised`: POSTCOPY_ADVISE was sent.
    pub(super) fn begin<R: Read>(
        r: &mut Reader<R>,
        head: &SectionHead,
        at: Place,
        configuration: Option<&Configuration>,
        advised: bool,
    ) -> Result<Self, Error> {
        head.check_ram(at)?;
        let page_size = configuration.map(Configuration::page_size).unwrap_or_default();
        let shared = configuration.is_some_and(|configuration| configuration.ignore_shared);
        let blocks = BlockList::decode(r, page_size, shared, advised)?;
        Ok(Self { section: head.id, blocks, footers: None, current: CurrentBlock::default(), mode: None })
    }
}
