//! What a reader has to remember of the RAM section, and its records.

use std::io::Read;

use multifd::ram::PageSize;

use crate::{
    error::{Error, PeerMisbehaved, Place},
    format::{
        BlockList, Configuration, CurrentBlock, Delta, Event, Reader, Record, SectionHead, SectionId,
        SyncMark, SyncMode,
    },
};

/// The RAM section, since its START.
pub(super) struct Ram {
    pub(super) section: SectionId,
    pub(super) blocks: BlockList,
    /// Known since the first section of RAM has ended.
    pub(super) footers: Option<bool>,
    current: CurrentBlock,
    mode: Option<SyncMode>,
}

/// Which section of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Start,
    Pass,
    Last,
}

/// What a record means for what follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    /// More records.
    More,
    /// The sync point of the FLUSH that has shown the sync mode.
    SyncAtFlush,
    /// The sync point of the EOS that has shown the sync mode.
    SyncAtEos,
    /// The EOS that was the mark of the sync point.
    Eos,
    /// The end of the section.
    Footer,
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

    /// The next record of a section. Nothing names the sync mode but the first one: a FLUSH before the EOS of START is there in
    /// round mode only.
    pub(super) fn record<'r, R: Read>(
        &mut self,
        r: &'r mut Reader<R>,
        part: Part,
    ) -> Result<(Event<'r>, After), Error> {
        let event = match Record::decode(r, &self.blocks, &mut self.current)? {
            Record::Zero(..) | Record::Page(..) | Record::Xbzrle(..) if part == Part::Start => {
                let (record, place) = ("page", "in the first section of ram");
                return Err(PeerMisbehaved::Misplaced { record, place }.at(r.place()));
            }
            Record::Zero(block, page) => Event::ZeroPage { block, page },
            Record::Page(block, page) => {
                let bytes = r.lend(self.blocks.page_size().bytes(), "a page")?;
                Event::Page { block, page, bytes }
            }
            Record::Xbzrle(block, page, length) => {
                let at = r.here();
                let delta = Delta::new(r.lend(length.into(), "an xbzrle delta")?, at);
                Event::Xbzrle { block, page, delta }
            }
            Record::MultifdFlush => match self.mode {
                Some(_) => Event::SyncPoint(SyncMark::Flush),
                None => {
                    self.mode = Some(SyncMode::Round);
                    return Ok((Event::SyncMode(SyncMode::Round), After::SyncAtFlush));
                }
            },
            Record::Eos => {
                return Ok(match self.mode {
                    Some(SyncMode::Round) => (Event::Eos, After::Footer),
                    Some(SyncMode::Legacy) => (Event::SyncPoint(SyncMark::Eos), After::Eos),
                    None => {
                        self.mode = Some(SyncMode::Legacy);
                        (Event::SyncMode(SyncMode::Legacy), After::SyncAtEos)
                    }
                });
            }
        };
        Ok((event, After::More))
    }
}
