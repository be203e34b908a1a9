//! What each channel was given since the destination's last reply.
//!
//! A channel records the pages of a batch before it sends them. A reply settles the round: pages of channels that are lost are to be
//! sent again, and everything else has arrived. Nothing else removes a page.

use crate::{
    batch::{Batch, neighbours},
    ram::{PageBitmap, RamBlocks},
    wire::ChannelId,
};

/// One bitmap for each channel and block.
pub(super) struct Given {
    channels: Box<[Vec<PageBitmap>]>,
}

impl Given {
    pub(super) fn new(channels: u8, blocks: &RamBlocks) -> Self {
        let of_channel = || blocks.iter().map(|(_, block)| PageBitmap::new(block.pages())).collect();
        Self { channels: std::iter::repeat_with(of_channel).take(channels.into()).collect() }
    }

    /// Channel `id` is about to send these pages. Called by its thread.
    pub(super) fn record(&self, id: ChannelId, batch: &Batch) {
        let pages = self.channels.get(usize::from(id.0)).and_then(|blocks| blocks.get(batch.block.0));
        let Some(pages) = pages else { return };
        for (first, count) in neighbours(batch.pages()) {
            pages.set_run(first, count);
        }
    }

    /// The destination has replied that it has everything, except what the channels in `lost` were given. These pages are set in
    /// `again`, one bitmap for each block; all others are forgotten. Every channel must be idle. Returns the number of pages to send
    /// again; a page that was to be sent anyway counts as well.
    pub(super) fn settle(&self, lost: &[ChannelId], again: &[PageBitmap]) -> u64 {
        let mut pages = 0;
        for (id, blocks) in (0..=u8::MAX).map(ChannelId).zip(&self.channels) {
            for (given, again) in blocks.iter().zip(again) {
                if lost.contains(&id) {
                    pages += given.count();
                    given.take(again);
                } else {
                    given.forget();
                }
            }
        }
        pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        batch::Kind,
        ram::{BlockIndex, BlockName, Mapping, Memory, PageIndex, PageSize, RamBlock},
    };

    fn blocks() -> RamBlocks {
        let block = |name: &str| {
            let memory = Memory::Mapped(Mapping::anonymous(64 * 4096).expect("memory"));
            let name = BlockName::new(name).expect("a name");
            RamBlock::new(name, 64 * 4096, PageSize::KIB_4, memory).expect("a block")
        };
        RamBlocks::new(vec![block("a"), block("b")]).expect("blocks")
    }

    fn give(given: &Given, id: u8, block: usize, kind: Kind, first: u64, count: u64) {
        let mut batch = Batch::new(PageSize::KIB_4);
        batch.push(kind, BlockIndex(block), PageIndex(first), count);
        given.record(ChannelId(id), &batch);
    }

    #[test]
    fn only_what_lost_channels_were_given_since_the_last_reply_is_sent_again() {
        let blocks = blocks();
        let again: Vec<_> = blocks.iter().map(|(_, block)| PageBitmap::new(block.pages())).collect();
        let given = Given::new(3, &blocks);
        give(&given, 1, 0, Kind::Normal, 0, 8);
        assert_eq!(given.settle(&[], &again), 0, "it has arrived");
        give(&given, 0, 0, Kind::Normal, 8, 8);
        give(&given, 1, 0, Kind::Unknown, 20, 2);
        give(&given, 1, 1, Kind::Zero, 5, 1);
        give(&given, 2, 1, Kind::Normal, 30, 4);
        assert_eq!(given.settle(&[ChannelId(1)], &again), 3);
        let runs = |block: usize| again[block].set_runs().collect::<Vec<_>>();
        assert_eq!((runs(0), runs(1)), (vec![(PageIndex(20), 2)], vec![(PageIndex(5), 1)]));
        assert_eq!(
            given.settle(&[ChannelId(0), ChannelId(1), ChannelId(2)], &again),
            0,
            "a reply counts once"
        );
    }
}
