//! Detects a new pass in the packets of a channel.
//!
//! A source walks each block upwards, and once in a pass. A channel gets a part of these pages, in the same order. So if a
//! packet lists lower pages than an earlier packet of the same block, a pass has begun in between. The order of the blocks is
//! not used: this side may have another one. A pass of which the channel gets very few pages may be missed.

use crate::ram::{BlockIndex, PageIndex};

/// The walk of a source over its blocks, as one channel shows it.
#[derive(Debug, Default)]
pub(super) struct Walk {
    /// For each block the lowest page of its last packet in this pass.
    at: Vec<Option<PageIndex>>,
    restarts: u64,
}

impl Walk {
    /// Notes a packet that lists these pages of `block`. Returns how often the walk has begun again.
    pub(super) fn packet(&mut self, block: BlockIndex, pages: impl Iterator<Item = PageIndex>) -> u64 {
        let Some(lowest) = pages.min() else { return self.restarts };
        if self.at.len() <= block.0 {
            self.at.resize(block.0 + 1, None);
        }
        if self.at.get(block.0).copied().flatten().is_some_and(|before| lowest < before) {
            self.at.fill(None);
            self.restarts += 1;
        }
        if let Some(at) = self.at.get_mut(block.0) {
            *at = Some(lowest);
        }
        self.restarts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restarts(packets: &[(usize, &[u64])]) -> u64 {
        let mut walk = Walk::default();
        let pages = |pages: &[u64]| pages.iter().copied().map(PageIndex).collect::<Vec<_>>().into_iter();
        packets.iter().map(|(block, list)| walk.packet(BlockIndex(*block), pages(list))).last().unwrap_or(0)
    }

    #[test]
    fn a_lower_page_of_the_same_block_is_a_new_pass() {
        assert_eq!(restarts(&[(0, &[0, 1, 2]), (0, &[3, 9]), (0, &[10])]), 0);
        assert_eq!(restarts(&[(0, &[0, 1, 2]), (0, &[3, 9]), (0, &[2, 10])]), 1);
        assert_eq!(restarts(&[(0, &[50]), (0, &[7]), (0, &[6])]), 2);
    }

    #[test]
    fn another_block_is_no_new_pass_in_any_order() {
        assert_eq!(restarts(&[(3, &[90]), (1, &[5]), (2, &[0])]), 0);
        assert_eq!(restarts(&[(3, &[90]), (1, &[5]), (3, &[80]), (1, &[4])]), 1, "one pass, not two");
    }

    /// A packet may hold the end of a pass and the beginning of the next one, and in any order: zero pages are listed last.
    #[test]
    fn the_order_within_a_packet_does_not_matter() {
        assert_eq!(restarts(&[(0, &[90]), (0, &[99, 1, 2, 98]), (0, &[3])]), 1);
        assert_eq!(restarts(&[(0, &[1, 5, 2]), (0, &[]), (0, &[6, 9, 7])]), 0);
    }
}
