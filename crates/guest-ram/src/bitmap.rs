//! Bitmaps with one bit for each page: dirty pages, and pages that may be nonzero.
//!
//! Any thread may set and clear bits while another thread walks them. A walk goes word by word, so the cost for a
//! sparse terabyte is the cost of its words.

use std::sync::atomic::{AtomicU64, Ordering};

use zerocopy::FromZeros;

use crate::PageIndex;

/// A bitmap with one bit for each page of a block.
///
/// Setting a bit releases what the thread wrote before; taking the bit acquires it. So a thread that takes a dirty bit
/// sees the page at least as new as it was when the bit was set.
#[derive(Debug)]
pub struct PageBitmap {
    // For each word, `fetch_or` and `fetch_and` of writers pair with the swaps and loads of walkers.
    words: Box<[AtomicU64]>,
    pages: u64,
}

const WORD: u64 = u64::BITS as u64;

impl PageBitmap {
    /// Creates a bitmap of `pages` bits, all clear. It uses no memory until bits are set, so sparse terabytes are fine.
    ///
    /// # Panics
    /// If there is no memory for the bits.
    pub fn new(pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(WORD)).expect("a bit a page fits the address space");
        let words = <[AtomicU64]>::new_box_zeroed_with_elems(words).expect("memory for a bit a page");
        Self { words, pages }
    }

    /// Creates a bitmap of `pages` bits, all set.
    pub fn full(pages: u64) -> Self {
        let bitmap = Self::new(pages);
        bitmap.fill();
        bitmap
    }

    /// The number of pages.
    #[inline]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The words, least significant bit first. Bits beyond the last page are clear.
    pub fn words(&self) -> impl ExactSizeIterator<Item = u64> + '_ {
        self.words.iter().map(|word| word.load(Ordering::Acquire))
    }

    /// Sets the bits that are set in `words`, from the first page on. Bits beyond the last page are ignored.
    pub fn merge(&self, words: impl IntoIterator<Item = u64>) {
        for (index, (mine, theirs)) in self.words.iter().zip(words).enumerate() {
            let theirs = theirs & self.mask(index);
            if theirs != 0 {
                mine.fetch_or(theirs, Ordering::AcqRel);
            }
        }
    }

    /// Sets every bit.
    pub fn fill(&self) {
        for (index, word) in self.words.iter().enumerate() {
            word.store(self.mask(index), Ordering::Release);
        }
    }

    /// Clears every bit.
    pub fn forget(&self) {
        for word in &self.words {
            word.store(0, Ordering::Release);
        }
    }

    /// Sets the bit of `page` and returns whether it was set before.
    ///
    /// # Panics
    /// If there is no such page.
    #[inline]
    pub fn set(&self, page: PageIndex) -> bool {
        let (word, bit) = self.place(page);
        word.fetch_or(bit, Ordering::AcqRel) & bit != 0
    }

    /// Sets the bits of `count` pages from `first` on.
    ///
    /// # Panics
    /// If there are no such pages.
    pub fn set_run(&self, first: PageIndex, count: u64) {
        let end = first.0.checked_add(count).filter(|end| *end <= self.pages);
        let end = end.unwrap_or_else(|| panic!("{count} pages from {first} of {}", self.pages));
        let mut at = first.0;
        while at < end {
            let bits = (WORD - at % WORD).min(end - at);
            let mask = (u64::MAX >> (WORD - bits)) << (at % WORD);
            self.word(at / WORD).fetch_or(mask, Ordering::AcqRel);
            at += bits;
        }
    }

    /// Clears the bit of `page` and returns whether it was set before.
    ///
    /// # Panics
    /// If there is no such page.
    #[inline]
    pub fn clear(&self, page: PageIndex) -> bool {
        let (word, bit) = self.place(page);
        word.fetch_and(!bit, Ordering::AcqRel) & bit != 0
    }

    /// Whether the bit of `page` is set; `false` if there is no such page.
    #[inline]
    pub fn contains(&self, page: PageIndex) -> bool {
        page.0 < self.pages && {
            let (word, bit) = self.place(page);
            word.load(Ordering::Acquire) & bit != 0
        }
    }

    /// The number of bits that are set.
    pub fn count(&self) -> u64 {
        self.words().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Moves all bits into `into`. Bits that are already set there stay set.
    ///
    /// # Panics
    /// If `into` has a different length.
    pub fn take(&self, into: &Self) {
        assert_eq!(self.pages, into.pages, "bits move between bitmaps of one block");
        for (from, into) in self.words.iter().zip(&into.words) {
            // Most words are clear in most passes, so a load comes before the more expensive swap.
            if from.load(Ordering::Relaxed) != 0 {
                into.fetch_or(from.swap(0, Ordering::AcqRel), Ordering::AcqRel);
            }
        }
    }

    /// The bits of word number `word`; 0 if there is no such word.
    #[inline]
    pub fn word_at(&self, word: usize) -> u64 {
        self.words.get(word).map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Takes the bits of the first word, from word `from` on, that has any. Returns the word's number and its bits.
    pub fn take_word(&self, from: usize) -> Option<(usize, u64)> {
        let words = self.words.get(from..)?;
        let at = words.iter().position(|word| word.load(Ordering::Relaxed) != 0)?;
        Some((from + at, words[at].swap(0, Ordering::AcqRel)))
    }

    fn place(&self, page: PageIndex) -> (&AtomicU64, u64) {
        assert!(page.0 < self.pages, "page {page} of {}", self.pages);
        (self.word(page.0 / WORD), 1 << (page.0 % WORD))
    }

    fn word(&self, index: u64) -> &AtomicU64 {
        &self.words[usize::try_from(index).expect("the words are in memory")]
    }

    /// The pages whose bits are clear, as runs of adjacent pages: first page and count. The iterator loads one word at
    /// a time and does not see bits that are set in this word afterwards.
    pub fn clear_runs(&self) -> impl Iterator<Item = (PageIndex, u64)> + '_ {
        self.words().enumerate().flat_map(|(word, bits)| runs(word, !bits & self.mask(word)))
    }

    fn mask(&self, index: usize) -> u64 {
        mask(self.pages, index)
    }
}

/// A mask of the bits of word number `index` that belong to pages, in a bitmap of `pages` pages.
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
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn pages(bitmap: &PageBitmap) -> BTreeSet<u64> {
        (0..bitmap.pages()).filter(|page| bitmap.contains(PageIndex(*page))).collect()
    }

    #[test]
    fn runs_are_the_set_bits_in_the_fewest_pieces() {
        let of = |word| runs(0, word).map(|(first, count)| (first.0, count)).collect::<Vec<_>>();
        assert_eq!(of(0), []);
        assert_eq!(of(u64::MAX), [(0, 64)]);
        assert_eq!(of(0b1101), [(0, 1), (2, 2)]);
        assert_eq!(of(1 << 63 | 1), [(0, 1), (63, 1)]);
    }

    proptest! {
        #[test]
        fn a_bitmap_does_what_a_set_of_numbers_does(
            length in 1_u64..300,
            steps in prop::collection::vec((0..4_u8, any::<u64>(), any::<u64>()), 0..60),
        ) {
            let (bitmap, other) = (PageBitmap::new(length), PageBitmap::new(length));
            let (mut model, mut taken) = (BTreeSet::new(), BTreeSet::new());
            for (step, a, b) in steps {
                let page = a % length;
                match step {
                    0 => prop_assert_eq!(bitmap.set(PageIndex(page)), !model.insert(page)),
                    1 => prop_assert_eq!(bitmap.clear(PageIndex(page)), model.remove(&page)),
                    2 => {
                        let count = b % (length - page + 1);
                        bitmap.set_run(PageIndex(page), count);
                        model.extend(page..page + count);
                    }
                    _ => {
                        bitmap.take(&other);
                        taken.append(&mut model);
                    }
                }
                prop_assert_eq!(pages(&bitmap), model.clone());
                prop_assert_eq!(pages(&other), taken.clone());
                prop_assert_eq!(bitmap.count(), model.len() as u64);
            }
        }

        #[test]
        fn runs_are_the_set_bits_in_order(bits: u64, word in 0_usize..9) {
            let listed: Vec<u64> = runs(word, bits).flat_map(|(first, count)| first.0..first.0 + count).collect();
            let expected: Vec<u64> = (0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| word as u64 * 64 + bit).collect();
            prop_assert_eq!(listed, expected);
            let starts: Vec<(PageIndex, u64)> = runs(word, bits).collect();
            prop_assert!(starts.windows(2).all(|pair| pair[0].0.0 + pair[0].1 < pair[1].0.0), "neighbours are one run");
        }
    }

    #[test]
    fn a_full_bitmap_has_no_bit_beyond_its_last_page() {
        for pages in [1, 63, 64, 65, 128] {
            let bitmap = PageBitmap::full(pages);
            assert_eq!(bitmap.count(), pages);
            bitmap.merge([u64::MAX; 4]);
            assert_eq!(bitmap.count(), pages);
        }
        assert_eq!(PageBitmap::full(0).words().len(), 0);
    }

    #[test]
    fn taking_words_empties_the_bitmap_and_passes_over_empty_ones() {
        let bitmap = PageBitmap::new(1000);
        for page in [3, 700, 999] {
            bitmap.set(PageIndex(page));
        }
        assert_eq!(bitmap.take_word(0), Some((0, 1 << 3)));
        assert_eq!(bitmap.take_word(0), Some((10, 1 << 60)));
        assert_eq!(bitmap.take_word(11), Some((15, 1 << 39)));
        assert_eq!(bitmap.take_word(16), None);
        assert_eq!(bitmap.count(), 0);
    }
}
