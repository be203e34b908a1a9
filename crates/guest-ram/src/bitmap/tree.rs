//! The parts of a bitmap as a whole: words are found, set and cleared.

use std::sync::atomic::Ordering;

use super::part::{GROUP_WORDS, Group, Part, View};

pub(super) const WORD: u64 = u64::BITS as u64;

/// The bits of `pages` pages.
#[derive(Debug)]
pub(super) struct Tree {
    pub(super) groups: Box<[Part<Group>]>,
    pub(super) pages: u64,
}

impl Tree {
    /// All bits set, or all clear.
    pub(super) fn uniform(pages: u64, full: bool) -> Self {
        let groups = word_count(pages).div_ceil(GROUP_WORDS);
        Self { groups: (0..groups).map(|_| Part::uniform(full)).collect(), pages }
    }

    /// The number of words.
    pub(super) fn words(&self) -> usize {
        word_count(self.pages)
    }

    /// The bits of a word; 0 if there is no such word.
    #[inline]
    pub(super) fn word_at(&self, word: usize) -> u64 {
        match self.groups.get(word / GROUP_WORDS).map(Part::view) {
            None | Some(View::Clear) => 0,
            Some(View::Set) => mask(self.pages, word),
            Some(View::Made(group)) => group.word_at(word % GROUP_WORDS) & mask(self.pages, word),
        }
    }

    /// Sets `bits` of a word. Returns the word's bits before, of those in `bits` at least.
    #[inline]
    pub(super) fn set_word(&self, word: usize, bits: u64) -> u64 {
        let bits = bits & mask(self.pages, word);
        let leaf = match self.groups.get(word / GROUP_WORDS).filter(|_| bits != 0) {
            None => return 0,
            Some(group) => group.make_unless_set().and_then(|group| group.leaf(word).make_unless_set()),
        };
        leaf.map_or(bits, |leaf| leaf.word(word).fetch_or(bits, Ordering::AcqRel))
    }

    /// Clears `bits` of a word. Returns the word's bits before, of those in `bits` at least.
    #[inline]
    pub(super) fn clear_word(&self, word: usize, bits: u64) -> u64 {
        let group = self.groups.get(word / GROUP_WORDS).and_then(Part::make_unless_clear);
        let leaf = group.and_then(|group| group.leaf(word).make_unless_clear());
        leaf.map_or(0, |leaf| leaf.word(word).fetch_and(!bits, Ordering::AcqRel))
    }
}

fn word_count(pages: u64) -> usize {
    usize::try_from(pages.div_ceil(WORD)).expect("the number of words fits the address space")
}

pub(super) fn word_of(page: u64) -> usize {
    usize::try_from(page / WORD).expect("the number of words fits the address space")
}

/// A mask of the bits of word number `index` that belong to pages, in a bitmap of `pages` pages.
#[inline]
pub(crate) fn mask(pages: u64, index: usize) -> u64 {
    let behind = (index as u64).saturating_add(1).saturating_mul(WORD).saturating_sub(pages);
    if behind < WORD { u64::MAX >> behind } else { 0 }
}
