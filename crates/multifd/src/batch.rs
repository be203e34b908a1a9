//! A batch: pages of one block on the way to a channel.
//!
//! The collector fills a batch, a channel carries it, and it comes back empty. There is a fixed number of batches for
//! the whole migration. They are moved from owner to owner, never copied or reallocated.

use crate::{
    ram::{BlockIndex, PageIndex, PageSize},
    wire::limits::packet_pages,
};

/// What is known about a page before it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Its bytes are sent.
    Normal,
    Zero,
    /// Unknown: the channel that carries the batch checks it.
    Unknown,
}

/// Pages of one block: up to 512 KiB, which become one packet, or the size of a [copy](crate::Sender::set_up_into).
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) block: BlockIndex,
    normal: Vec<PageIndex>,
    zero: Vec<PageIndex>,
    /// Pages that were not checked yet.
    unknown: Vec<PageIndex>,
    capacity: usize,
}

impl Batch {
    /// Creates an empty batch with room for the pages of a packet.
    pub(crate) fn new(page_size: PageSize) -> Self {
        Self::with_room(packet_pages(page_size))
    }

    /// Creates an empty batch with room for all pages that it will ever contain.
    pub(crate) fn with_room(capacity: usize) -> Self {
        Self {
            block: BlockIndex(0),
            normal: Vec::with_capacity(capacity),
            zero: Vec::with_capacity(capacity),
            unknown: Vec::with_capacity(capacity),
            capacity,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn len(&self) -> usize {
        self.normal.len() + self.zero.len() + self.unknown.len()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.len() == self.capacity
    }

    /// Whether it contains at least an eighth of its capacity, so that it may be handed over before it is full.
    pub(crate) fn is_worth_a_way(&self) -> bool {
        8 * self.len() >= self.capacity
    }

    /// Whether a page of `block` may be added: there is room, and the present pages are of the same block.
    pub(crate) fn takes(&self, block: BlockIndex) -> bool {
        self.is_empty() || (self.block == block && !self.is_full())
    }

    /// Adds pages of `block` from `first` on, as many of `count` as there is room for. Returns their number.
    ///
    /// # Panics
    /// If the batch does not [take](Batch::takes) one.
    pub(crate) fn push(&mut self, kind: Kind, block: BlockIndex, first: PageIndex, count: u64) -> u64 {
        assert!(self.takes(block), "a batch holds pages of one block, up to its capacity");
        self.block = block;
        let count = count.min((self.capacity - self.len()) as u64);
        let list = match kind {
            Kind::Normal => &mut self.normal,
            Kind::Zero => &mut self.zero,
            Kind::Unknown => &mut self.unknown,
        };
        list.extend((first.0..first.0 + count).map(PageIndex));
        count
    }

    /// Divides the unchecked pages into normal and zero ones. Allocates nothing: either list has room for all pages of
    /// a batch.
    pub(crate) fn part(&mut self, is_zero: impl Fn(PageIndex) -> bool) {
        for page in self.unknown.drain(..) {
            if is_zero(page) {
                self.zero.push(page);
            } else {
                self.normal.push(page);
            }
        }
    }

    /// The pages whose bytes are sent, in the order in which they were added.
    pub(crate) fn normal(&self) -> &[PageIndex] {
        &self.normal
    }

    /// The pages that are zero.
    pub(crate) fn zero(&self) -> &[PageIndex] {
        &self.zero
    }

    /// All pages, in no particular order.
    pub(crate) fn pages(&self) -> impl Iterator<Item = PageIndex> + '_ {
        self.normal.iter().chain(&self.zero).chain(&self.unknown).copied()
    }

    /// Removes all pages and keeps the memory.
    pub(crate) fn clear(&mut self) {
        self.normal.clear();
        self.zero.clear();
        self.unknown.clear();
    }
}

/// The pages in the given order, with adjacent pages combined: first page and count.
pub(crate) fn neighbours(
    pages: impl IntoIterator<Item = PageIndex>,
) -> impl Iterator<Item = (PageIndex, u64)> {
    let mut pages = pages.into_iter().peekable();
    std::iter::from_fn(move || {
        let first = pages.next()?;
        let mut count = 1;
        while pages.next_if(|page| page.0 == first.0 + count).is_some() {
            count += 1;
        }
        Some((first, count))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_batch_holds_what_a_packet_holds_and_comes_back_empty(
            steps in prop::collection::vec((0_usize..3, 0_u64..1000, 1_u64..200, 0_usize..3), 1..400),
        ) {
            let mut batch = Batch::new(PageSize::KIB_4);
            let room = (batch.normal.as_ptr(), batch.zero.as_ptr());
            let mut model: Option<(BlockIndex, Vec<PageIndex>, Vec<PageIndex>)> = None;
            for (block, first, count, kind) in steps {
                let block = BlockIndex(block);
                let held = model.as_ref().map_or(0, |(_, normal, zero)| normal.len() + zero.len());
                let fits = model.as_ref().is_none_or(|(of, ..)| *of == block && held < 128);
                prop_assert_eq!(batch.takes(block), fits);
                if !fits {
                    let (_, mut normal, mut zero) = model.take().expect("not empty");
                    batch.part(|page| page.0 % 2 == 0);
                    // Pages that were checked here come after the others.
                    let sorted = |pages: &[PageIndex]| {
                        let mut pages = pages.to_vec();
                        pages.sort_unstable();
                        pages
                    };
                    normal.sort_unstable();
                    zero.sort_unstable();
                    prop_assert_eq!(sorted(batch.normal()), normal);
                    prop_assert_eq!(sorted(batch.zero()), zero);
                    batch.clear();
                }
                let held = if fits { held } else { 0 };
                let kind = [Kind::Normal, Kind::Zero, Kind::Unknown][kind];
                let taken = batch.push(kind, block, PageIndex(first), count);
                prop_assert_eq!(taken, count.min(128 - held as u64));
                let entry = model.get_or_insert((block, Vec::new(), Vec::new()));
                for page in (first..first + taken).map(PageIndex) {
                    let zero = kind == Kind::Zero || kind == Kind::Unknown && page.0 % 2 == 0;
                    if zero { entry.2.push(page) } else { entry.1.push(page) }
                }
            }
            prop_assert_eq!(room, (batch.normal.as_ptr(), batch.zero.as_ptr()), "nothing was reallocated");
        }

        #[test]
        fn neighbours_are_the_pages_in_order_in_the_fewest_runs(pages in prop::collection::vec(0_u64..12, 0..60)) {
            let runs: Vec<_> = neighbours(pages.iter().copied().map(PageIndex)).collect();
            let flat: Vec<u64> = runs.iter().flat_map(|(first, count)| first.0..first.0 + count).collect();
            prop_assert_eq!(flat, pages);
            prop_assert!(runs.windows(2).all(|pair| pair[0].0.0 + pair[0].1 != pair[1].0.0));
        }
    }

    #[test]
    fn a_batch_of_64_kib_pages_is_full_with_eight() {
        let mut batch = Batch::new(PageSize::KIB_64);
        for page in 0..8 {
            assert!(batch.takes(BlockIndex(4)));
            assert_eq!(batch.push(Kind::Normal, BlockIndex(4), PageIndex(page), 1), 1);
        }
        assert!(batch.is_full() && !batch.takes(BlockIndex(4)));
    }
}
