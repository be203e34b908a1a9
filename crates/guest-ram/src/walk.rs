//! The order in which pages are taken that nobody has requested: each page once, beginning after the last request.
//!
//! A request claims its pages; the walk claims what is left, and continues after the last request, around to the beginning. The
//! owner of a walk protects it by a lock, so a page is claimed once. A fault, a file or a connection is unknown here.

use std::fmt;

use crate::{BlockIndex, PageBitmap, PageIndex, joined};

/// The size of a block, in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The number of pages.
    pub pages: u64,
    /// The number of pages in a host page of the machine's memory, which is filled in whole host pages. At least 1.
    pub host_page: u64,
}

/// Adjacent pages of one block: whole host pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// The block.
    pub block: BlockIndex,
    /// The first page.
    pub first: PageIndex,
    /// The number of pages.
    pub count: u64,
}

#[cfg_attr(not(feature = "fault"), expect(dead_code, reason = "only the pager asks"))]
impl PageRun {
    /// The page after the last.
    pub(crate) fn end(&self) -> u64 {
        self.first.0.saturating_add(self.count)
    }

    /// Whether the first page of `other` is one of these.
    pub(crate) fn contains(&self, other: &Self) -> bool {
        self.block == other.block && (self.first.0..self.end()).contains(&other.first.0)
    }

    /// The first page of each of its host pages.
    pub(crate) fn host_pages(&self, host_page: u64) -> impl Iterator<Item = u64> + use<> {
        (self.first.0..self.end()).step_by(usize::try_from(host_page).unwrap_or(usize::MAX))
    }
}

/// Which pages were not claimed yet, and which of them are next.
pub struct Walk {
    blocks: Vec<Block>,
    cursor: Cursor,
    /// No page of the first part is left.
    first_is_done: bool,
}

struct Block {
    shape: Shape,
    /// Pages that were not claimed yet.
    left: PageBitmap,
    /// Those of them that come before all others.
    first: PageBitmap,
}

#[derive(Clone, Copy, Default)]
struct Cursor {
    block: usize,
    page: u64,
}

impl fmt::Debug for Walk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Walk").field("blocks", &self.blocks.len()).finish_non_exhaustive()
    }
}

impl Walk {
    /// Creates the walk of blocks with these shapes over the pages that are not in `there`. A host page counts as there if all
    /// of its pages are. `first` are the pages that the walk takes before all others. Both have an element for each block.
    ///
    /// # Panics
    /// If the lists have different lengths, or a bitmap is not that of its block.
    pub fn new(shapes: &[Shape], first: &[PageBitmap], there: &[PageBitmap]) -> Self {
        assert!(shapes.len() == first.len() && shapes.len() == there.len(), "an element for each block");
        let blocks = shapes.iter().zip(first).zip(there);
        let blocks = blocks.map(|((shape, first), there)| Block::new(*shape, first, there)).collect();
        Self { blocks, cursor: Cursor::default(), first_is_done: false }
    }

    /// The shape of a block.
    pub fn shape(&self, block: BlockIndex) -> Option<Shape> {
        self.blocks.get(block.0).map(|block| block.shape)
    }

    /// The host page that contains a page; `None` if there is no such page.
    pub fn host_page(&self, block: BlockIndex, page: PageIndex) -> Option<PageRun> {
        let shape = self.shape(block).filter(|shape| page.0 < shape.pages)?;
        let (first, count) = shape.whole(page.0, 1);
        Some(PageRun { block, first: PageIndex(first), count })
    }

    /// Claims a host page; `false` if it was claimed before, or does not exist.
    pub fn claim(&mut self, page: PageRun) -> bool {
        self.blocks.get(page.block.0).is_some_and(|block| block.claim(page.first.0, page.count))
    }

    /// Continues after this request.
    pub fn continue_after(&mut self, request: PageRun) {
        self.cursor = Cursor { block: request.block.0, page: request.first.0.saturating_add(request.count) };
    }

    /// Claims the next pages of the first part: at most `most`, or one host page. `None` if no page of this part is left.
    pub fn next_first(&mut self, most: u64) -> Option<PageRun> {
        if self.first_is_done {
            return None;
        }
        let run = self.next(most, |block| &block.first);
        self.first_is_done = run.is_none();
        run
    }

    /// Claims the next pages, of whichever part: at most `most`, or one host page. `None` if every page was claimed.
    pub fn next_any(&mut self, most: u64) -> Option<PageRun> {
        self.next(most, |block| &block.left)
    }

    /// The number of pages that were not claimed yet.
    pub fn left(&self) -> u64 {
        self.blocks.iter().map(|block| block.left.count()).sum()
    }

    /// Whether every page was claimed.
    pub fn is_done(&self) -> bool {
        self.blocks.iter().all(|block| block.left.is_empty())
    }

    /// The next of these pages, from the cursor on and around, which are claimed.
    fn next(&mut self, most: u64, pages_of: impl Fn(&Block) -> &PageBitmap) -> Option<PageRun> {
        let (blocks, before) = (self.blocks.len(), self.cursor);
        // The block of the cursor comes a second time, with the pages before the cursor.
        for turn in 0..=blocks {
            let index = self.cursor.block % blocks.max(1);
            let block = self.blocks.get(index)?;
            if let Some(first) = pages_of(block).next_set(PageIndex(self.cursor.page)) {
                let Shape { pages, host_page } = block.shape;
                let first = first.0 - first.0 % host_page;
                // Up to a multiple of this number, so that runs begin at one after that: the borders of huge pages.
                let most = pieces(most, host_page);
                let limit = (first - first % most).saturating_add(most).min(pages);
                let mut end = first;
                while end < limit && pages_of(block).contains(PageIndex(end)) {
                    let host_end = (end + host_page).min(pages);
                    block.claim(end, host_end - end);
                    end = host_end;
                }
                self.cursor = Cursor { block: index, page: end };
                return Some(PageRun {
                    block: BlockIndex(index),
                    first: PageIndex(first),
                    count: end - first,
                });
            }
            if turn < blocks {
                self.cursor = Cursor { block: (index + 1) % blocks, page: 0 };
            }
        }
        self.cursor = before;
        None
    }
}

impl Block {
    fn new(shape: Shape, first: &PageBitmap, there: &PageBitmap) -> Self {
        let shape = Shape { host_page: shape.host_page.max(1), ..shape };
        assert!(shape.pages == first.pages() && shape.pages == there.pages(), "a bit for each page");
        let block = Self { shape, left: PageBitmap::full(shape.pages), first: PageBitmap::new(shape.pages) };
        if shape.host_page == 1 {
            there.set_runs().for_each(|(first, count)| block.left.clear_run(first, count));
        } else {
            for (first, count) in joined(there.set_runs()) {
                let from = first.0.next_multiple_of(shape.host_page);
                // The last host page of a block may be incomplete.
                let end = match first.0 + count {
                    end if end == shape.pages => end,
                    end => end - end % shape.host_page,
                };
                if from < end {
                    block.left.clear_run(PageIndex(from), end - from);
                }
            }
        }
        first.set_runs().for_each(|(first, count)| {
            let (first, count) = shape.whole(first.0, count);
            block.first.set_run(PageIndex(first), count);
        });
        block.left.clear_runs().for_each(|(first, count)| block.first.clear_run(first, count));
        block
    }

    /// Claims a host page; `false` if it was claimed before.
    fn claim(&self, first: u64, count: u64) -> bool {
        if !self.left.contains(PageIndex(first)) {
            return false;
        }
        self.left.clear_run(PageIndex(first), count);
        self.first.clear_run(PageIndex(first), count);
        true
    }
}

impl Shape {
    /// The whole host pages that contain these pages: the first page, and their number. The last host page of a block may be shorter.
    #[must_use]
    pub fn whole(self, first: u64, count: u64) -> (u64, u64) {
        let from = first - first % self.host_page;
        let end = (first + count).next_multiple_of(self.host_page).min(self.pages);
        (from, end - from)
    }
}

/// The number of pages of one job: at most `most`, and whole host pages.
fn pieces(most: u64, host_page: u64) -> u64 {
    (most - most % host_page).max(host_page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claimed_page_is_not_walked_and_the_walk_continues_after_it() {
        let shape = Shape { pages: 8, host_page: 2 };
        let (first, there) = (PageBitmap::new(8), PageBitmap::new(8));
        first.set(PageIndex(7));
        there.set_run(PageIndex(0), 3);
        let mut walk = Walk::new(&[shape], &[first], &[there]);
        assert_eq!(walk.left(), 6);
        let asked = walk.host_page(BlockIndex(0), PageIndex(5)).expect("a page");
        assert_eq!((asked.first, asked.count), (PageIndex(4), 2));
        assert!(walk.claim(asked) && !walk.claim(asked));
        walk.continue_after(asked);
        let runs = |run: Option<PageRun>| run.map(|run| (run.first.0, run.count));
        assert_eq!(runs(walk.next_first(1)), Some((6, 2)));
        assert_eq!(runs(walk.next_first(1)), None);
        assert_eq!(runs(walk.next_any(9)), Some((2, 2)));
        assert_eq!(runs(walk.next_any(9)), None);
        assert!(walk.is_done());
        assert!(walk.host_page(BlockIndex(0), PageIndex(8)).is_none());
        assert!(walk.host_page(BlockIndex(1), PageIndex(0)).is_none());
    }

    /// Regression: a host page is larger than the pieces in which a bitmap lists its runs, and no host page counted as there.
    #[test]
    fn huge_pages_that_are_there_are_not_walked() {
        let shape = Shape { pages: 3072, host_page: 512 };
        let (first, there) = (PageBitmap::new(3072), PageBitmap::full(3072));
        there.clear_run(PageIndex(512), 1024);
        there.clear_run(PageIndex(2300), 1);
        let mut walk = Walk::new(&[shape], &[first], &[there]);
        assert_eq!(walk.left(), 1536);
        let asked = walk.host_page(BlockIndex(0), PageIndex(768)).expect("a page");
        assert!(walk.claim(asked) && !walk.claim(asked));
        assert_eq!(walk.left(), 1024);
    }
}
