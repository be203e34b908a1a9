//! Converts the bits of a log to pages of a block. The log counts in host pages or in pages of its own.

use super::mark;
use crate::{BlockOffset, PageBitmap, PageSize, runs};

/// The bytes that the bits of a foreign log cover: the first bit covers `size` bytes from offset `start` of the block,
/// each later bit the next `size` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CoarseBits {
    pub(crate) start: BlockOffset,
    /// A power of two.
    pub(crate) size: u64,
}

impl CoarseBits {
    /// Sets the bit of each page that shares a byte with a set bit of `words`. Bytes beyond the block's last whole page
    /// are ignored.
    pub(crate) fn mark(self, into: &PageBitmap, page_size: PageSize, words: impl IntoIterator<Item = u64>) {
        let page = page_size.bytes() as u64;
        if self.start.0 == 0 && self.size == page {
            return into.merge(words);
        }
        for (index, word) in words.into_iter().enumerate() {
            for (first, count) in runs(index, word) {
                let from = self.start.0 + first.0 * self.size;
                mark(into, page_size, from..from + count * self.size);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::PageIndex;

    proptest! {
        #[test]
        fn a_page_is_marked_if_and_only_if_a_set_bit_touches_it(
            pages in 1_u64..200,
            start in 0_u64..100,
            size_bits in 12_u32..22,
            page_bits in 12_u32..17,
            words in prop::collection::vec(any::<u64>() , 1..4),
        ) {
            let page_size = PageSize::from_bits(page_bits).expect("in range");
            let coarse = CoarseBits { start: BlockOffset(start * 4096), size: 1 << size_bits };
            let into = PageBitmap::new(pages);
            coarse.mark(&into, page_size, words.iter().copied());
            let page = page_size.bytes() as u64;
            for at in 0..pages {
                let touched = (0..words.len() as u64 * 64).any(|bit| {
                    let from = coarse.start.0 + bit * coarse.size;
                    let set = words[usize::try_from(bit / 64).expect("small")] >> (bit % 64) & 1 == 1;
                    set && from < (at + 1) * page && from + coarse.size > at * page
                });
                prop_assert_eq!(into.contains(PageIndex(at)), touched, "page {}", at);
            }
        }
    }
}
