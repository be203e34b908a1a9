//! The blocks that a sender copies into, where its channels connect to nobody.

use std::sync::Arc;

use crate::{
    error::{Error, Result, Usage},
    ram::{BlockIndex, PageIndex, RamBlocks, Transfer},
};

/// Where everything goes. Never changes.
pub(super) struct Copier {
    pub(super) target: Arc<RamBlocks>,
    /// For each block of the source.
    pub(super) transfers: Vec<(BlockIndex, Transfer)>,
}

impl Copier {
    pub(super) fn new(source: &RamBlocks, target: Arc<RamBlocks>) -> Result<Self> {
        let transfer = |of: &crate::ram::RamBlock| {
            let found = target.find(of.name().as_bytes()).ok_or("the target has no such block".to_owned());
            let transfer = found.and_then(|index| {
                let into = target.get(index).ok_or("the target has no such block")?;
                Ok((index, Transfer::new(of, into)?))
            });
            transfer.map_err(|why| Error::from(Usage::OtherBlocks { name: of.name().clone(), why }))
        };
        let transfers = source.iter().map(|(_, block)| transfer(block)).collect::<Result<_>>()?;
        // Nobody would write to it.
        let foreign = target.iter().find(|(_, block)| source.find(block.name().as_bytes()).is_none());
        match foreign {
            None => Ok(Self { transfers, target }),
            Some((_, block)) => {
                let why = "the source has no such block".to_owned();
                Err(Usage::OtherBlocks { name: block.name().clone(), why }.into())
            }
        }
    }

    /// The most pages of a batch.
    pub(super) fn room(&self) -> usize {
        let stretch = self.transfers.first().map_or(1, |(_, transfer)| transfer.stretch());
        usize::try_from(stretch).unwrap_or(1)
    }

    /// The first page from `page` on with which a new batch is to begin.
    pub(super) fn border(&self, block: BlockIndex, page: PageIndex) -> u64 {
        self.transfers.get(block.0).map_or(u64::MAX, |(_, transfer)| transfer.border(page))
    }
}
