//! A part of a bitmap: all clear, all set, or made, which means that its bits have memory.
//!
//! A part changes between all clear and all set as often as it likes, and becomes made once. All changes of the state
//! are read-modify-writes, like those of a word: a thread that sets a bit of a part that is all set already must still
//! release what it wrote to the thread that takes the part.

use std::{
    ops::Range,
    sync::{
        OnceLock,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
};

/// Words of a leaf: 2 KiB pages in 256 bytes.
pub(super) const LEAF_WORDS: usize = 32;
/// Leaves of a group.
const LEAVES: usize = 64;
/// Words of a group.
pub(super) const GROUP_WORDS: usize = LEAVES * LEAF_WORDS;

/// A part of a bitmap.
#[derive(Debug)]
pub(super) struct Part<T> {
    /// Becomes `MADE` inside the initialization of `made`, and never changes after that.
    state: AtomicU8,
    made: OnceLock<Box<T>>,
}

const CLEAR: u8 = 0;
const SET: u8 = 1;
const MADE: u8 = 2;

/// What a part is.
#[derive(Debug)]
pub(super) enum View<'a, T> {
    /// All bits are clear.
    Clear,
    /// All bits are set.
    Set,
    /// The bits.
    Made(&'a T),
}

/// What a part is made of.
pub(super) trait Bits {
    /// All bits set, or all clear.
    fn uniform(full: bool) -> Self;
    /// Sets every bit.
    fn fill(&self);
    /// Clears every bit.
    fn forget(&self);
}

impl<T: Bits> Part<T> {
    pub(super) fn uniform(full: bool) -> Self {
        Self { state: AtomicU8::new(if full { SET } else { CLEAR }), made: OnceLock::new() }
    }

    #[inline]
    pub(super) fn view(&self) -> View<'_, T> {
        if let Some(made) = self.made.get() {
            return View::Made(made);
        }
        match self.state.load(Ordering::Acquire) {
            CLEAR => View::Clear,
            SET => View::Set,
            _ => View::Made(self.make()),
        }
    }

    /// The bits, which get memory if they have none.
    #[inline]
    pub(super) fn make(&self) -> &T {
        self.made.get_or_init(|| Box::new(T::uniform(self.state.swap(MADE, Ordering::AcqRel) == SET)))
    }

    /// Like [`make`](Self::make), but `None` if all bits are set.
    #[inline]
    pub(super) fn make_unless_set(&self) -> Option<&T> {
        self.make_unless(SET)
    }

    /// Like [`make`](Self::make), but `None` if all bits are clear.
    #[inline]
    pub(super) fn make_unless_clear(&self) -> Option<&T> {
        self.make_unless(CLEAR)
    }

    #[inline]
    fn make_unless(&self, state: u8) -> Option<&T> {
        match self.made.get() {
            Some(made) => Some(made),
            None if self.change(state, state) == state => None,
            None => Some(self.make()),
        }
    }

    /// Takes all bits of a part that is all set. The bits of a part that is made stay there.
    pub(super) fn take(&self) -> View<'_, T> {
        match self.change(SET, CLEAR) {
            CLEAR => View::Clear,
            SET => View::Set,
            _ => View::Made(self.make()),
        }
    }

    pub(super) fn fill(&self) {
        if self.change(CLEAR, SET) == MADE {
            self.make().fill();
        }
    }

    pub(super) fn forget(&self) {
        if self.change(SET, CLEAR) == MADE {
            self.make().forget();
        }
    }

    /// Changes the state, if it is `from`. Returns the state before.
    fn change(&self, from: u8, to: u8) -> u8 {
        let changed = self.state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire);
        changed.unwrap_or_else(|found| found)
    }
}

/// Adjacent words of which some have bits, or none.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) words: Range<usize>,
    pub(super) is_clear: bool,
}

/// The pieces of a part whose words are `words` of the bitmap.
pub(super) fn pieces(part: &Part<Group>, words: Range<usize>) -> impl Iterator<Item = Piece> + '_ {
    let (whole, leaves) = match part.view() {
        View::Clear => (Some(true), &[][..]),
        View::Set => (Some(false), &[][..]),
        View::Made(group) => (None, &group.leaves[..]),
    };
    let whole = whole.map(|is_clear| Piece { words: words.clone(), is_clear });
    let single = leaves.iter().enumerate().map(move |(at, leaf)| {
        let start = (words.start + at * LEAF_WORDS).min(words.end);
        let is_clear = matches!(leaf.view(), View::Clear);
        Piece { words: start..(start + LEAF_WORDS).min(words.end), is_clear }
    });
    whole.into_iter().chain(single).filter(|piece| !piece.words.is_empty())
}

/// A row of leaves.
#[derive(Debug)]
pub(super) struct Group {
    leaves: [Part<Leaf>; LEAVES],
}

impl Group {
    /// The leaf of a word of the bitmap that is in this group.
    #[inline]
    pub(super) fn leaf(&self, word: usize) -> &Part<Leaf> {
        &self.leaves[word / LEAF_WORDS % LEAVES]
    }

    /// A word; its bits beyond the last page are undefined.
    #[inline]
    pub(super) fn word_at(&self, word: usize) -> u64 {
        match self.leaf(word).view() {
            View::Clear => 0,
            View::Set => u64::MAX,
            View::Made(leaf) => leaf.word(word).load(Ordering::Acquire),
        }
    }

    /// Takes all bits: `whole` gets the first word of a leaf that is all set, `some` gets the other words, which are
    /// counted from the group's first word. Bits beyond the last page are undefined.
    pub(super) fn take(&self, whole: impl Fn(usize), some: impl Fn(usize, u64)) {
        for (at, leaf) in self.leaves.iter().enumerate() {
            match leaf.take() {
                View::Clear => {}
                View::Set => whole(at * LEAF_WORDS),
                View::Made(leaf) => {
                    for (word, bits) in (at * LEAF_WORDS..).zip(&leaf.words) {
                        // Most words are clear in most passes, so a load comes before the more expensive swap.
                        if bits.load(Ordering::Relaxed) != 0 {
                            some(word, bits.swap(0, Ordering::AcqRel));
                        }
                    }
                }
            }
        }
    }
}

impl Bits for Group {
    fn uniform(full: bool) -> Self {
        Self { leaves: std::array::from_fn(|_| Part::uniform(full)) }
    }

    fn fill(&self) {
        self.leaves.iter().for_each(Part::fill);
    }

    fn forget(&self) {
        self.leaves.iter().for_each(Part::forget);
    }
}

/// Words.
#[derive(Debug)]
pub(super) struct Leaf {
    // For each word, `fetch_or` and `fetch_and` of writers pair with the swaps and loads of walkers.
    words: [AtomicU64; LEAF_WORDS],
}

impl Leaf {
    /// A word of the bitmap, which is in this leaf.
    #[inline]
    pub(super) fn word(&self, word: usize) -> &AtomicU64 {
        &self.words[word % LEAF_WORDS]
    }
}

impl Bits for Leaf {
    fn uniform(full: bool) -> Self {
        Self { words: std::array::from_fn(|_| AtomicU64::new(if full { u64::MAX } else { 0 })) }
    }

    fn fill(&self) {
        self.words.iter().for_each(|word| word.store(u64::MAX, Ordering::Release));
    }

    fn forget(&self) {
        self.words.iter().for_each(|word| word.store(0, Ordering::Release));
    }
}
