//! A walk that takes the bits that it passes.

use std::{ops::Range, sync::atomic::Ordering};

use super::{
    part::{GROUP_WORDS, LEAF_WORDS, Leaf, View},
    tree::{Tree, mask},
};

/// The words of a [`PageBitmap`](super::PageBitmap) that have any bit, taken one by one: the result of [`take_words`](super::PageBitmap::take_words).
#[derive(Debug)]
pub struct TakenWords<'a> {
    tree: &'a Tree,
    /// Words whose bits were taken and not returned yet: all of them were set.
    held: Range<usize>,
    /// The leaf in which the walk is, and the words of it that are ahead.
    leaf: Option<(&'a Leaf, Range<usize>)>,
    /// The first word of the next leaf.
    next: usize,
}

impl<'a> TakenWords<'a> {
    pub(super) fn new(tree: &'a Tree) -> Self {
        Self { tree, held: 0..0, leaf: None, next: 0 }
    }

    /// Goes to the next leaf, or takes the next part that is all set. `None` at the end.
    fn advance(&mut self) -> Option<()> {
        let (start, end) = (self.next, self.tree.words());
        let group = self.tree.groups.get(start / GROUP_WORDS)?;
        let words = |length: usize| start..(start + length).min(end);
        // Within a group, only a part that is made has a next leaf.
        let view = if start.is_multiple_of(GROUP_WORDS) { group.take() } else { View::Made(group.make()) };
        let length = match view {
            View::Clear => GROUP_WORDS,
            View::Set => {
                self.held = words(GROUP_WORDS);
                GROUP_WORDS
            }
            View::Made(group) => {
                match group.leaf(start).take() {
                    View::Clear => {}
                    View::Set => self.held = words(LEAF_WORDS),
                    View::Made(leaf) => self.leaf = Some((leaf, words(LEAF_WORDS))),
                }
                LEAF_WORDS
            }
        };
        self.next = start + length;
        Some(())
    }
}

impl Iterator for TakenWords<'_> {
    type Item = (usize, u64);

    fn next(&mut self) -> Option<(usize, u64)> {
        loop {
            if let Some(word) = self.held.next() {
                return Some((word, mask(self.tree.pages, word)));
            }
            if let Some((leaf, words)) = &mut self.leaf {
                for word in words.by_ref() {
                    let bits = leaf.word(word);
                    if bits.load(Ordering::Relaxed) == 0 {
                        continue;
                    }
                    match bits.swap(0, Ordering::AcqRel) & mask(self.tree.pages, word) {
                        0 => {}
                        bits => return Some((word, bits)),
                    }
                }
                self.leaf = None;
            }
            self.advance()?;
        }
    }
}

impl Drop for TakenWords<'_> {
    fn drop(&mut self) {
        for word in self.held.by_ref() {
            self.tree.set_word(word, u64::MAX);
        }
    }
}
