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

use std::sync::atomic::Ordering;

use part::{GROUP_WORDS, Group, LEAF_WORDS, Part, Piece, View};
pub use take::TakenWords;

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
    groups: Box<[Part<Group>]>,
    pages: u64,
}

const WORD: u64 = u64::BITS as u64;

impl PageBitmap {
    /// Creates a bitmap of `pages` bits, all clear.
    pub fn new(pages: u64) -> Self {
        Self::uniform(pages, false)
    }

    /// Creates a bitmap of `pages` bits, all set.
    pub fn full(pages: u64) -> Self {
        Self::uniform(pages, true)
    }

    fn uniform(pages: u64, full: bool) -> Self {
        let groups = word_count(pages).div_ceil(GROUP_WORDS);
        Self { groups: (0..groups).map(|_| Part::uniform(full)).collect(), pages }
    }

    /// The number of pages.
    #[inline]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The words, least significant bit first. Bits beyond the last page are clear.
    pub fn words(&self) -> impl ExactSizeIterator<Item = u64> + '_ {
        (0..word_count(self.pages)).map(|word| self.word_at(word))
    }

    /// Sets the bits that are set in `words`, from the first page on. Bits beyond the last page are ignored.
    pub fn merge(&self, words: impl IntoIterator<Item = u64>) {
        self.merge_at(0, words);
    }

    /// Like [`merge`](Self::merge), from word number `word` on.
    pub fn merge_at(&self, word: usize, words: impl IntoIterator<Item = u64>) {
        for (index, theirs) in (word..word_count(self.pages)).zip(words) {
            if theirs != 0 {
                self.set_word(index, theirs);
            }
        }
    }

    /// Sets every bit.
    pub fn fill(&self) {
        self.groups.iter().for_each(Part::fill);
    }

    /// Clears every bit.
    pub fn forget(&self) {
        self.groups.iter().for_each(Part::forget);
    }

    /// Sets the bit of `page` and returns whether it was set before.
    ///
    /// # Panics
    /// If there is no such page.
    #[inline]
    pub fn set(&self, page: PageIndex) -> bool {
        let (word, bit) = self.place(page);
        self.set_word(word, bit) & bit != 0
    }

    /// Sets the bits of `count` pages from `first` on.
    ///
    /// # Panics
    /// If there are no such pages.
    pub fn set_run(&self, first: PageIndex, count: u64) {
        for span in self.spans(first, count) {
            match span {
                Span::Group(group) => group.fill(),
                Span::Leaf(group, word) => _ = group.make_unless_set().map(|group| group.leaf(word).fill()),
                Span::Word(word, bits) => _ = self.set_word(word, bits),
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
                    _ = group.make_unless_clear().map(|group| group.leaf(word).forget())
                }
                Span::Word(word, bits) => _ = self.clear_word(word, bits),
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
        self.clear_word(word, bit) & bit != 0
    }

    /// Whether the bit of `page` is set; `false` if there is no such page.
    #[inline]
    pub fn contains(&self, page: PageIndex) -> bool {
        page.0 < self.pages && {
            let (word, bit) = self.place(page);
            self.word_at(word) & bit != 0
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
        assert_eq!(self.pages, into.pages, "bits move between bitmaps of one block");
        for (at, (from, target)) in self.groups.iter().zip(&into.groups).enumerate() {
            match from.take() {
                View::Clear => {}
                View::Set => target.fill(),
                View::Made(group) => group.take(
                    |word| target.make().leaf(word).fill(),
                    |word, bits| _ = into.set_word(at * GROUP_WORDS + word, bits),
                ),
            }
        }
    }

    /// The bits of word number `word`; 0 if there is no such word.
    #[inline]
    pub fn word_at(&self, word: usize) -> u64 {
        match self.groups.get(word / GROUP_WORDS).map(Part::view) {
            None | Some(View::Clear) => 0,
            Some(View::Set) => mask(self.pages, word),
            Some(View::Made(group)) => group.word_at(word % GROUP_WORDS) & mask(self.pages, word),
        }
    }

    /// The words that have any bit, in order: each word's number and its bits. Parts that are all clear cost no time.
    pub fn set_words(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        self.pieces().flat_map(|piece| piece.words).filter_map(|word| match self.word_at(word) {
            0 => None,
            bits => Some((word, bits)),
        })
    }

    /// Takes the bits of all words that have any, in order: each word's number and its bits. Bits that are set meanwhile
    /// in a word that was passed stay. Bits of words that the iterator has not returned when it is dropped stay, too.
    pub fn take_words(&self) -> TakenWords<'_> {
        TakenWords::new(self)
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
                (PageIndex(first), end.min(self.pages) - first)
            });
            let words = if piece.is_clear { 0..0 } else { piece.words };
            let single = words.flat_map(|word| runs(word, !self.word_at(word) & mask(self.pages, word)));
            whole.into_iter().chain(single)
        })
    }

    /// The bitmap in pieces of at most a part, without those that are all clear.
    fn pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        self.all_pieces().filter(|piece| !piece.is_clear)
    }

    fn all_pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        let end = word_count(self.pages);
        self.groups.iter().enumerate().flat_map(move |(at, part)| {
            let start = at * GROUP_WORDS;
            part::pieces(part, start..(start + GROUP_WORDS).min(end))
        })
    }

    fn place(&self, page: PageIndex) -> (usize, u64) {
        assert!(page.0 < self.pages, "page {page} of {}", self.pages);
        (word_of(page.0), 1 << (page.0 % WORD))
    }

    /// Sets `bits` of a word. Returns the word's bits before, of those in `bits` at least.
    #[inline]
    fn set_word(&self, word: usize, bits: u64) -> u64 {
        let bits = bits & mask(self.pages, word);
        let leaf = match self.groups.get(word / GROUP_WORDS).filter(|_| bits != 0) {
            None => return 0,
            Some(group) => group.make_unless_set().and_then(|group| group.leaf(word).make_unless_set()),
        };
        leaf.map_or(bits, |leaf| leaf.word(word).fetch_or(bits, Ordering::AcqRel))
    }

    /// Clears `bits` of a word. Returns the word's bits before, of those in `bits` at least.
    #[inline]
    fn clear_word(&self, word: usize, bits: u64) -> u64 {
        let group = self.groups.get(word / GROUP_WORDS).and_then(Part::make_unless_clear);
        let leaf = group.and_then(|group| group.leaf(word).make_unless_clear());
        leaf.map_or(0, |leaf| leaf.word(word).fetch_and(!bits, Ordering::AcqRel))
    }

    /// The parts of a run, as large as possible.
    fn spans(&self, first: PageIndex, count: u64) -> impl Iterator<Item = Span<'_>> {
        let end = first.0.checked_add(count).filter(|end| *end <= self.pages);
        let end = end.unwrap_or_else(|| panic!("{count} pages from {first} of {}", self.pages));
        let mut at = first.0;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let word = word_of(at);
            let group = &self.groups[word / GROUP_WORDS];
            // The last part may have fewer pages than it has bits.
            let whole = |words: usize| {
                let pages = (words as u64 * WORD).min(self.pages - at);
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

fn word_count(pages: u64) -> usize {
    usize::try_from(pages.div_ceil(WORD)).expect("the number of words fits the address space")
}

fn word_of(page: u64) -> usize {
    usize::try_from(page / WORD).expect("the number of words fits the address space")
}

/// A mask of the bits of word number `index` that belong to pages, in a bitmap of `pages` pages.
#[inline]
pub(crate) fn mask(pages: u64, index: usize) -> u64 {
    let behind = (index as u64 + 1).saturating_mul(WORD).saturating_sub(pages);
    if behind < WORD { u64::MAX >> behind } else { 0 }
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

#[cfg(test)]
mod tests;
