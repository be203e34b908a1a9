//! The bodies of the RAM section: records until EOS, pages and sync points handed on.

use std::io::Read;

use super::destination::{Destination, refused};
use crate::{
    error::{Error, Malformed, PeerMisbehaved},
    format::{BlockList, CurrentBlock, Reader, Record, SyncMode, xbzrle},
};

/// What lasts from one section of RAM to the next.
pub(super) struct Ram<'a> {
    blocks: &'a BlockList,
    current: CurrentBlock,
    /// The page an XBZRLE delta is applied to; empty until one comes.
    page: Vec<u8>,
}

impl<'a> Ram<'a> {
    pub(super) fn new(blocks: &'a BlockList) -> Self {
        Self { blocks, current: CurrentBlock::default(), page: Vec::new() }
    }

    /// The rest of START's body, behind the block list. Nothing names the sync mode but this: a FLUSH
    /// before the EOS is there in round mode only.
    pub(super) fn start<R: Read, D: Destination>(
        &mut self,
        r: &mut Reader<R>,
        destination: &mut D,
    ) -> Result<SyncMode, Error> {
        let mut mode = SyncMode::Legacy;
        loop {
            match Record::decode(r, self.blocks, &mut self.current)? {
                Record::Eos => break,
                Record::MultifdFlush => {
                    if mode == SyncMode::Legacy {
                        mode = SyncMode::Round;
                        destination.multifd().map_err(|e| refused(r, "multifd", e))?;
                    }
                    sync(r, destination)?;
                }
                Record::Zero(..) | Record::Page(..) | Record::Xbzrle(..) => {
                    let (record, place) = ("page", "in the first section of ram");
                    return Err(PeerMisbehaved::Misplaced { record, place }.at(r.place()));
                }
            }
        }
        if mode == SyncMode::Legacy {
            sync(r, destination)?;
        }
        tracing::debug!(?mode, "sync mode recognised");
        Ok(mode)
    }

    /// The body of a PART or END.
    pub(super) fn body<R: Read, D: Destination>(
        &mut self,
        r: &mut Reader<R>,
        mode: SyncMode,
        destination: &mut D,
    ) -> Result<(), Error> {
        let page_size = self.blocks.page_size().bytes();
        loop {
            match Record::decode(r, self.blocks, &mut self.current)? {
                Record::Zero(block, page) => {
                    destination.zero_page(block, page).map_err(|e| refused(r, "a zero page", e))?;
                }
                Record::Page(block, page) => {
                    let bytes = r.lend(page_size, "a page")?;
                    destination.page(block, page, bytes).map_err(|e| refused(r, "a page", e))?;
                }
                Record::Xbzrle(block, page, length) => {
                    self.page.resize(page_size, 0);
                    let read = destination.read_page(block, page, &mut self.page);
                    read.map_err(|e| refused(r, "a page to be changed", e))?;
                    let delta = r.lend(length.into(), "an xbzrle delta")?;
                    if let Err(bad) = xbzrle::apply(delta, &mut self.page) {
                        return Err(Malformed::Delta(bad).at(r.place()));
                    }
                    destination.page(block, page, &self.page).map_err(|e| refused(r, "a page", e))?;
                }
                Record::MultifdFlush => sync(r, destination)?,
                Record::Eos => {
                    return match mode {
                        SyncMode::Legacy => sync(r, destination),
                        SyncMode::Round => Ok(()),
                    };
                }
            }
        }
    }
}

fn sync<R: Read, D: Destination>(r: &Reader<R>, destination: &mut D) -> Result<(), Error> {
    destination.sync().map_err(|e| refused(r, "a sync point", e))
}
