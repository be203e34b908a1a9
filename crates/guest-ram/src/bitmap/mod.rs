//! Bitmaps with one bit for each page: dirty pages, and pages that may be nonzero.
//!
//! ```text
//! PageBitmap ── Part<Group>: 2^17 pages ── Part<Leaf>: 2^11 pages ── word: 64 pages
//!               all clear, all set, or made
//! ```
//!
//! A part whose bits are all equal is only a state, so the memory of a bitmap depends on the bits that were set one by
//! one, not on the number of pages: a peer or a file can announce terabytes and send nothing. A part that was made stays
//! until the bitmap is dropped.
//!
//! Any thread may set and clear bits while another thread walks them. A walk skips parts that are all clear, and goes
//! through the others word by word.

mod part;
mod take;
mod tree;

use part::{GROUP_WORDS, Group, LEAF_WORDS, Part, Piece, View};
pub use take::TakenWords;
pub(crate) use tree::mask;
use tree::{Tree, WORD, word_of};

use crate::PageIndex;

/// A bitmap with one bit for each page of a block.
///
/// Setting a bit releases what the thread wrote before; taking the bit acquires it. So a thread that takes a dirty bit
/// sees the page at least as new as it was when the bit was set.
///
/// An empty or full bitmap needs 24 bytes for each 2^17 pages (512 MiB of RAM with pages of 4 KiB). Beyond that, each page
/// needs at most 2 KiB when its bit differs from its neighbours', and all pages together at most 1.2 bits per page.
#[derive(Debug)]
pub struct PageBitmap {
    tree: Tree,
}

impl PageBitmap {
    /// Creates a bitmap of `pages` bits, all clear.
    pub fn new(pages: u64) -> Self {
        Self { tree: Tree::uniform(pages, false) }
    }

    /// Creates a bitmap of `pages` bits, all set.
    pub fn full(pages: u64) -> Self {
        Self { tree: Tree::uniform(pages, true) }
    }

    /// The number of pages.
    #[inline]
    pub fn pages(&self) -> u64 {
        self.tree.pages
    }

    /// The words, least significant bit first. Bits beyond the last page are clear.
    pub fn words(&self) -> impl ExactSizeIterator<Item = u64> + '_ {
        (0..self.tree.words()).map(|word| self.tree.word_at(word))
    }

    /// Sets the bits that are set in `words`, from the first page on. Bits beyond the last page are ignored.
    pub fn merge(&self, words: impl IntoIterator<Item = u64>) {
        self.merge_at(0, words);
    }

    /// Like [`merge`](Self::merge), from word number `word` on.
    pub fn merge_at(&self, word: usize, words: impl IntoIterator<Item = u64>) {
        for (index, theirs) in (word..self.tree.words()).zip(words) {
            if theirs != 0 {
                self.tree.set_word(index, theirs);
            }
        }
    }

    /// Sets every bit.
    pub fn fill(&self) {
        self.tree.groups.iter().for_each(Part::fill);
    }

    /// Clears every bit.
    pub fn forget(&self) {
        self.tree.groups.iter().for_each(Part::forget);
    }

    /// Sets the bit of `page` and returns whether it was set before.
    ///
    /// # Panics
    /// If there is no such page.
    #[inline]
    pub fn set(&self, page: PageIndex) -> bool {
        let (word, bit) = self.place(page);
        self.tree.set_word(word, bit) & bit != 0
    }

    /// Sets the bits of `count` pages from `first` on.
    ///
    /// # Panics
    /// If there are no such pages.
    pub fn set_run(&self, first: PageIndex, count: u64) {
        for span in self.spans(first, count) {
            match span {
                Span::Group(group) => group.fill(),
                Span::Leaf(group, word) => {
                    if let Some(group) = group.make_unless_set() {
                        group.leaf(word).fill();
                    }
                }
                Span::Word(word, bits) => _ = self.tree.set_word(word, bits),
            }
        }
    }

    /// Clears the bits of `count` pages from `first` on.
    ///
    /// # Panics
    /// If there are no such pages.
    pub fn clear_run(&self, first: PageIndex, count: u64) {
        for span in self.spans(first, count) {
            match span {
                Span::Group(group) => group.forget(),
                Span::Leaf(group, word) => {
                    if let Some(group) = group.make_unless_clear() {
                        group.leaf(word).forget();
                    }
                }
                Span::Word(word, bits) => _ = self.tree.clear_word(word, bits),
            }
        }
    }

    /// Clears the bit of `page` and returns whether it was set before.
    ///
    /// # Panics
    /// If there is no such page.
    #[inline]
    pub fn clear(&self, page: PageIndex) -> bool {
        let (word, bit) = self.place(page);
        self.tree.clear_word(word, bit) & bit != 0
    }

    /// Whether the bit of `page` is set; `false` if there is no such page.
    #[inline]
    pub fn contains(&self, page: PageIndex) -> bool {
        page.0 < self.tree.pages && {
            let (word, bit) = self.place(page);
            self.tree.word_at(word) & bit != 0
        }
    }

    /// The number of bits that are set.
    pub fn count(&self) -> u64 {
        self.set_words().map(|(_, word)| u64::from(word.count_ones())).sum()
    }

    /// Whether no bit is set.
    pub fn is_empty(&self) -> bool {
        self.set_words().next().is_none()
    }

    /// Moves all bits into `into`. Bits that are already set there stay set.
    ///
    /// # Panics
    /// If `into` has a different length.
    pub fn take(&self, into: &Self) {
        assert_eq!(self.tree.pages, into.tree.pages, "bits move between bitmaps of one block");
        for (at, (from, target)) in self.tree.groups.iter().zip(&into.tree.groups).enumerate() {
            match from.take() {
                View::Clear => {}
                View::Set => target.fill(),
                View::Made(group) => group.take(
                    |word| target.make().leaf(word).fill(),
                    |word, bits| _ = into.tree.set_word(at * GROUP_WORDS + word, bits),
                ),
            }
        }
    }

    /// The bits of word number `word`; 0 if there is no such word.
    #[inline]
    pub fn word_at(&self, word: usize) -> u64 {
        self.tree.word_at(word)
    }

    /// The words that have any bit, in order: each word's number and its bits. Parts that are all clear cost no time.
    pub fn set_words(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        self.pieces().flat_map(|piece| piece.words).filter_map(|word| match self.tree.word_at(word) {
            0 => None,
            bits => Some((word, bits)),
        })
    }

    /// The first page from `from` on whose bit is set.
    pub fn next_set(&self, from: PageIndex) -> Option<PageIndex> {
        let start = word_of(from.0);
        let page = |word: usize, bits: u64| PageIndex(word as u64 * WORD + u64::from(bits.trailing_zeros()));
        let first = self.tree.word_at(start) & (u64::MAX << (from.0 % WORD));
        if first != 0 {
            return Some(page(start, first));
        }
        let pieces = self.pieces_from(start).filter(|piece| !piece.is_clear);
        let words = pieces.flat_map(|piece| piece.words.start.max(start + 1)..piece.words.end);
        words
            .map(|word| (word, self.tree.word_at(word)))
            .find(|(_, bits)| *bits != 0)
            .map(|(word, bits)| page(word, bits))
    }

    /// Takes the bits of all words that have any, in order: each word's number and its bits. Bits that are set meanwhile
    /// in a word that was passed stay. Bits of words that the iterator has not returned when it is dropped stay, too.
    pub fn take_words(&self) -> TakenWords<'_> {
        TakenWords::new(&self.tree)
    }

    /// The pages whose bits are set, as runs of adjacent pages: first page and count. The iterator loads one word at a
    /// time and does not see bits that are set in this word afterwards.
    pub fn set_runs(&self) -> impl Iterator<Item = (PageIndex, u64)> + '_ {
        self.set_words().flat_map(|(word, bits)| runs(word, bits))
    }

    /// The pages whose bits are clear, as runs of adjacent pages: first page and count. A run is at most as long as a
    /// part of the bitmap. The iterator loads one word at a time and does not see bits that are set in this word
    /// afterwards.
    pub fn clear_runs(&self) -> impl Iterator<Item = (PageIndex, u64)> + '_ {
        self.all_pieces().flat_map(|piece| {
            let whole = piece.is_clear.then(|| {
                let (first, end) = (piece.words.start as u64 * WORD, piece.words.end as u64 * WORD);
                (PageIndex(first), end.min(self.tree.pages) - first)
            });
            let words = if piece.is_clear { 0..0 } else { piece.words };
            let single =
                words.flat_map(|word| runs(word, !self.tree.word_at(word) & mask(self.tree.pages, word)));
            whole.into_iter().chain(single)
        })
    }

    /// The bitmap in pieces of at most a part, without those that are all clear.
    fn pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        self.all_pieces().filter(|piece| !piece.is_clear)
    }

    fn all_pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        self.pieces_from(0)
    }

    /// The pieces from the part with this word on.
    fn pieces_from(&self, word: usize) -> impl Iterator<Item = Piece> + '_ {
        let end = self.tree.words();
        self.tree.groups.iter().enumerate().skip(word / GROUP_WORDS).flat_map(move |(at, part)| {
            let start = at * GROUP_WORDS;
            part::pieces(part, start..(start + GROUP_WORDS).min(end))
        })
    }

    fn place(&self, page: PageIndex) -> (usize, u64) {
        assert!(page.0 < self.tree.pages, "page {page} of {}", self.tree.pages);
        (word_of(page.0), 1 << (page.0 % WORD))
    }

    /// The parts of a run, as large as possible.
    fn spans(&self, first: PageIndex, count: u64) -> impl Iterator<Item = Span<'_>> {
        let end = first.0.checked_add(count).filter(|end| *end <= self.tree.pages);
        let end = end.unwrap_or_else(|| panic!("{count} pages from {first} of {}", self.tree.pages));
        let mut at = first.0;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let word = word_of(at);
            let group = &self.tree.groups[word / GROUP_WORDS];
            // The last part may have fewer pages than it has bits.
            let whole = |words: usize| {
                let pages = (words as u64 * WORD).min(self.tree.pages - at);
                (at.is_multiple_of(words as u64 * WORD) && end - at >= pages).then_some(pages)
            };
            let (span, pages) = if let Some(pages) = whole(GROUP_WORDS) {
                (Span::Group(group), pages)
            } else if let Some(pages) = whole(LEAF_WORDS) {
                (Span::Leaf(group, word), pages)
            } else {
                let bits = (WORD - at % WORD).min(end - at);
                (Span::Word(word, (u64::MAX >> (WORD - bits)) << (at % WORD)), bits)
            };
            at += pages;
            Some(span)
        })
    }
}

/// A part of a run of pages.
enum Span<'a> {
    /// A whole group.
    Group(&'a Part<Group>),
    /// The whole leaf of a group that has this word.
    Leaf(&'a Part<Group>, usize),
    /// These bits of a word.
    Word(usize, u64),
}

/// The pages whose bits are set in [word](PageBitmap::words) number `word`, as runs of adjacent pages: first page and
/// count.
pub fn runs(word: usize, mut bits: u64) -> impl Iterator<Item = (PageIndex, u64)> {
    let base = word as u64 * WORD;
    std::iter::from_fn(move || {
        if bits == 0 {
            return None;
        }
        let first = bits.trailing_zeros();
        let count = (bits >> first).trailing_ones();
        bits &= if first + count == u64::BITS { 0 } else { u64::MAX << (first + count) };
        Some((PageIndex(base + u64::from(first)), u64::from(count)))
    })
}

/// The same runs, with adjacent ones as one: a bitmap lists a long run in pieces.
pub fn joined(runs: impl IntoIterator<Item = (PageIndex, u64)>) -> impl Iterator<Item = (PageIndex, u64)> {
    let mut runs = runs.into_iter().peekable();
    std::iter::from_fn(move || {
        let (first, mut count) = runs.next()?;
        while let Some((_, more)) = runs.next_if(|(next, _)| next.0 == first.0 + count) {
            count += more;
        }
        Some((first, count))
    })
}

#[cfg(test)]
mod tests;
