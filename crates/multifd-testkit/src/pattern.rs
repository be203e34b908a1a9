//! Contents that reveal a misplaced page.
//!
//! Every eight-byte word of a page is computed from its position: seed, block, page, generation, place in the page. The
//! computation is reversible, so a word in the wrong place shows where it came from: another page, another block, an
//! older generation (a version that was overtaken), another place in the page.
//!
//! ```
//! use multifd_testkit::pattern::{Origin, Pattern};
//!
//! let pattern = Pattern::new(7);
//! let mut page = vec![0; 4096];
//! pattern.fill(Origin { block: 0, page: 5, generation: 1 }, &mut page);
//! let stray = pattern.check(Origin { block: 0, page: 6, generation: 1 }, &page).unwrap_err();
//! assert_eq!(
//!     stray.to_string(),
//!     "block 0 page 6 generation 1: from byte 0 on it holds block 0 page 5 generation 1"
//! );
//! ```

use std::error::Error;
use std::fmt;

/// The position of a page, and its version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// The number of the block; only the lower 10 bits are used.
    pub block: u16,
    /// The index of the page in its block; only the lower 32 bits are used.
    pub page: u64,
    /// How many times the page was rewritten; only the lower 10 bits are used.
    pub generation: u16,
}

/// A family of contents: patterns of two seeds have no page in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pattern {
    seed: u64,
}

/// A page with wrong contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// The expected contents of the page.
    pub expected: Origin,
    /// The first byte of the first word that differs.
    pub at: usize,
    /// What was found there.
    pub found: Found,
}

/// The contents of a page from some byte on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// The contents of this page, at the same place in it.
    Page(Origin),
    /// Only zeros up to the end of the page.
    Zeroes,
    /// Bytes that no page of this pattern has there; the value is the first word.
    Foreign(u64),
}

impl Pattern {
    /// The pattern of a seed.
    pub fn new(seed: u64) -> Self {
        Self { seed: mix(seed.wrapping_add(STEP)) }
    }

    /// Fills `page` with the contents of `origin`. Any length is allowed; bytes after the last whole word are the head
    /// of the next word.
    pub fn fill(&self, origin: Origin, page: &mut [u8]) {
        let mut word = self.first_word(origin);
        for bytes in page.chunks_mut(WORD) {
            bytes.copy_from_slice(&word.to_be_bytes()[..bytes.len()]);
            word = word.wrapping_add(STEP);
        }
    }

    /// Checks that `page` has the contents of `origin`.
    ///
    /// # Errors
    ///
    /// The first word that differs, and what was found there.
    pub fn check(&self, origin: Origin, page: &[u8]) -> Result<(), Mismatch> {
        let mut word = self.first_word(origin);
        for (index, bytes) in page.chunks(WORD).enumerate() {
            if *bytes != word.to_be_bytes()[..bytes.len()] {
                let at = index * WORD;
                return Err(Mismatch { expected: origin, at, found: self.recognise(page, at) });
            }
            word = word.wrapping_add(STEP);
        }
        Ok(())
    }

    /// Fills a block of pages of one generation.
    ///
    /// # Panics
    ///
    /// If `page_size` is zero.
    pub fn fill_block(&self, block: u16, generation: u16, page_size: usize, memory: &mut [u8]) {
        for (page, bytes) in (0..).zip(memory.chunks_mut(page_size)) {
            self.fill(Origin { block, page, generation }, bytes);
        }
    }

    /// Checks a block of pages of one generation.
    ///
    /// # Errors
    ///
    /// The first page with wrong contents.
    ///
    /// # Panics
    ///
    /// If `page_size` is zero.
    pub fn check_block(
        &self,
        block: u16,
        generation: u16,
        page_size: usize,
        memory: &[u8],
    ) -> Result<(), Mismatch> {
        (0..)
            .zip(memory.chunks(page_size))
            .try_for_each(|(page, bytes)| self.check(Origin { block, page, generation }, bytes))
    }

    /// Recognises the contents of `page` from byte `at` on.
    fn recognise(&self, page: &[u8], at: usize) -> Found {
        if page[at..].iter().all(|byte| *byte == 0) {
            return Found::Zeroes;
        }
        let word = |index: usize| page.get(index * WORD..(index + 1) * WORD).map(be_word);
        let origin = |index: usize| self.origin(word(index)?, index);
        let index = at / WORD;
        // By chance, one foreign word in 4096 has an origin. Only an origin that an adjacent word shares is meaningful.
        let agreed = |neighbour: usize| origin(index).filter(|here| origin(neighbour) == Some(*here));
        let found = agreed(index + 1).or_else(|| agreed(index.checked_sub(1)?));
        match found {
            Some(origin) => Found::Page(origin),
            None => Found::Foreign(word(index).unwrap_or_default()),
        }
    }

    fn first_word(&self, origin: Origin) -> u64 {
        let block = u64::from(origin.block) & SMALL_MASK;
        let generation = u64::from(origin.generation) & SMALL_MASK;
        let id = block << 42 | generation << 32 | origin.page & PAGE_MASK;
        mix(id ^ self.seed)
    }

    /// The origin of word number `index` of a page. The id leaves twelve bits zero, which distinguishes foreign words.
    fn origin(&self, word: u64, index: usize) -> Option<Origin> {
        let id = unmix(word.wrapping_sub((index as u64).wrapping_mul(STEP))) ^ self.seed;
        let small = |shift: u32| (id >> shift & SMALL_MASK) as u16;
        (id >> 52 == 0).then(|| Origin { block: small(42), generation: small(32), page: id & PAGE_MASK })
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block {} page {} generation {}", self.block, self.page, self.generation)
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: from byte {} on it holds ", self.expected, self.at)?;
        match &self.found {
            Found::Page(origin) => origin.fmt(f),
            Found::Zeroes => f.write_str("zeroes"),
            Found::Foreign(word) => write!(f, "the foreign word {word:#018x}"),
        }
    }
}

impl Error for Mismatch {}

/// Mixes an id so that near ids have nothing in common; reversible.
fn mix(id: u64) -> u64 {
    let id = (id ^ id >> 32).wrapping_mul(MULTIPLIER);
    id ^ id >> 32
}

/// Undoes [`mix`].
fn unmix(word: u64) -> u64 {
    // A shift by half the width is its own inverse.
    let id = (word ^ word >> 32).wrapping_mul(INVERSE);
    id ^ id >> 32
}

/// The inverse of an odd number modulo 2^64. Each step doubles the number of correct bits.
const fn inverse(odd: u64) -> u64 {
    let mut guess = odd;
    let mut step = 0;
    while step < 6 {
        guess = guess.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(guess)));
        step += 1;
    }
    guess
}

fn be_word(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |word, byte| word << 8 | u64::from(*byte))
}

const WORD: usize = 8;
const PAGE_MASK: u64 = (1 << 32) - 1;
const SMALL_MASK: u64 = (1 << 10) - 1;
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
const MULTIPLIER: u64 = 0xd6e8_feb8_6659_fd93;
const INVERSE: u64 = inverse(MULTIPLIER);

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Origin = Origin { block: 3, page: 1000, generation: 2 };

    fn page_of(origin: Origin) -> Vec<u8> {
        let mut page = vec![0; 4096];
        Pattern::new(1).fill(origin, &mut page);
        page
    }

    fn found(page: &[u8]) -> (usize, Found) {
        let mismatch = Pattern::new(1).check(HERE, page).unwrap_err();
        (mismatch.at, mismatch.found)
    }

    #[test]
    fn page_in_its_place_passes() {
        assert_eq!(Pattern::new(1).check(HERE, &page_of(HERE)), Ok(()));
    }

    #[test]
    fn page_of_another_place_block_or_time_tells_where_it_came_from() {
        for origin in [
            Origin { page: 1001, ..HERE },
            Origin { block: 4, ..HERE },
            Origin { generation: 1, ..HERE },
            Origin { block: 0x3ff, page: PAGE_MASK, generation: 0x3ff },
        ] {
            assert_eq!(found(&page_of(origin)), (0, Found::Page(origin)));
        }
    }

    #[test]
    fn page_that_is_stale_from_some_byte_on_says_from_where() {
        let old = Origin { generation: 1, ..HERE };
        let mut page = page_of(HERE);
        page[1024..].copy_from_slice(&page_of(old)[1024..]);
        assert_eq!(found(&page), (1024, Found::Page(old)));
    }

    #[test]
    fn page_shifted_by_a_word_is_foreign() {
        let page = page_of(HERE);
        let mut shifted = page[8..].to_vec();
        shifted.extend_from_slice(&page[..8]);
        assert!(matches!(found(&shifted), (0, Found::Foreign(_))));
    }

    #[test]
    fn lost_page_is_told_from_a_foreign_one() {
        assert_eq!(found(&[0; 4096]), (0, Found::Zeroes));
        assert_eq!(found(&[0xff; 4096]), (0, Found::Foreign(u64::MAX)));
    }

    #[test]
    fn single_flipped_bit_is_found_in_every_byte() {
        let page = page_of(HERE);
        for at in 0..page.len() {
            let mut flipped = page.clone();
            flipped[at] ^= 0x10;
            assert_eq!(found(&flipped).0, at / 8 * 8);
        }
    }

    #[test]
    fn page_of_another_seed_is_foreign_or_elsewhere() {
        let mut page = vec![0; 4096];
        Pattern::new(2).fill(HERE, &mut page);
        assert!(Pattern::new(1).check(HERE, &page).is_err());
    }

    #[test]
    fn block_with_two_pages_swapped_names_the_first() {
        let mut memory = vec![0; 8 * 4096];
        let pattern = Pattern::new(1);
        pattern.fill_block(0, 0, 4096, &mut memory);
        assert_eq!(pattern.check_block(0, 0, 4096, &memory), Ok(()));
        let (front, back) = memory.split_at_mut(5 * 4096);
        front[2 * 4096..3 * 4096].swap_with_slice(&mut back[..4096]);
        let mismatch = pattern.check_block(0, 0, 4096, &memory).unwrap_err();
        assert_eq!(mismatch.expected.page, 2);
        assert_eq!(mismatch.found, Found::Page(Origin { block: 0, page: 5, generation: 0 }));
    }

    #[test]
    fn mixing_can_be_undone() {
        for word in [0, 1, u64::MAX, 0x0123_4567_89ab_cdef] {
            assert_eq!(unmix(mix(word)), word);
        }
    }
}
