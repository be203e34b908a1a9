//! Compares pages that are written to a file with an earlier state of their block, the base, and leaves out those that are
//! equal.
//!
//! ```text
//! page ── digest other than the base's ──────────────────▶ stored
//!   └──── the same digest ── base read ── equal bytes ───▶ left out
//!                                     └── other bytes ───▶ stored
//! ```
//!
//! A digest of this crate finds accidents, but two pages can be made to have the same one. So bytes decide. If the base
//! cannot be read, the page is stored.
//!
//! Each page is in one of three states: stored (`present` of the [`Places`](crate::Places)), zero here and not in the base
//! (`zeroed`), or as in the base. A page is in the hands of one thread at a time.

use std::{fmt::Debug, io, sync::Arc};

use crate::{AlignedBuffer, Digest, PageBitmap, PageIndex, PageSize};

/// What a page is that is neither written nor cleared, in a file that has only pages that differ from a base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unwritten {
    /// It is zero: the writer writes or clears every page that may be anything else.
    Zero,
    /// It is as in the base: the writer writes or clears every page that may have changed.
    AsBase,
}

/// The pages of an earlier state of a block, in files: [`RamBlocks::as_base`](crate::RamBlocks::as_base).
pub trait BasePages: Debug + Send + Sync {
    /// The size of the pages.
    fn page_size(&self) -> PageSize;

    /// Whether a page may be nonzero; `false` beyond the last page.
    fn is_present(&self, page: PageIndex) -> bool;

    /// Word number `word` of the pages that may be nonzero, least significant bit first; 0 beyond the last word.
    fn present_word(&self, word: usize) -> u64;

    /// The digest of a page; `None` if it is not known.
    ///
    /// # Errors
    /// If it cannot be read.
    fn digest_of(&self, page: PageIndex) -> io::Result<Option<Digest>>;

    /// Reads as many pages from `first` on as `buffer` has room for.
    ///
    /// # Errors
    /// If a page cannot be read, or differs from its digest.
    fn load(&self, first: PageIndex, buffer: &mut [u8]) -> io::Result<()>;
}

/// The base of a block, and the pages that became zero since.
#[derive(Debug)]
pub(crate) struct Since {
    base: Arc<dyn BasePages>,
    zeroed: PageBitmap,
}

impl Since {
    pub(crate) fn new(base: Arc<dyn BasePages>, pages: u64, unwritten: Unwritten) -> Self {
        let zeroed = PageBitmap::new(pages);
        if unwritten == Unwritten::Zero {
            let words = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
            zeroed.merge((0..words).map(|word| base.present_word(word)));
        }
        Self { base, zeroed }
    }

    /// The pages `bytes` from `first` on, in runs that all equal those of the base or all differ from them.
    pub(crate) fn split<'b>(
        &self,
        first: PageIndex,
        bytes: &'b [u8],
        page_size: PageSize,
    ) -> Vec<(bool, PageIndex, &'b [u8])> {
        let size = page_size.bytes();
        let mut runs: Vec<(bool, PageIndex, &[u8])> = Vec::new();
        let mut start = 0;
        for (number, is_equal) in self.equal(first, bytes, page_size).into_iter().enumerate() {
            let end = (number + 1) * size;
            match runs.last_mut() {
                Some((equal, _, run)) if *equal == is_equal => {
                    *run = bytes.get(start..end).unwrap_or_default();
                }
                _ => {
                    start = number * size;
                    let run = bytes.get(start..end).unwrap_or_default();
                    runs.push((is_equal, PageIndex(first.0 + number as u64), run));
                }
            }
        }
        runs
    }

    /// For each page whether it equals that of the base.
    fn equal(&self, first: PageIndex, bytes: &[u8], page_size: PageSize) -> Vec<bool> {
        let size = page_size.bytes();
        let pages = || (first.0..).map(PageIndex).zip(bytes.chunks_exact(size));
        let base = &*self.base;
        if base.page_size() != page_size {
            return pages().map(|_| false).collect();
        }
        let mut may_equal = Vec::with_capacity(bytes.len() / size);
        let mut equal: Vec<_> = pages()
            .map(|(page, bytes)| {
                let is_present = base.is_present(page);
                may_equal.push(is_present && has_digest(base, page, bytes));
                !is_present && bytes.iter().all(|byte| *byte == 0)
            })
            .collect();
        let mut buffer = None;
        let mut at = 0;
        while let Some(skipped) = may_equal.iter().skip(at).position(|may| *may) {
            let start = at + skipped;
            let length = may_equal.iter().skip(start).take_while(|may| **may).count();
            at = start + length;
            let buffer = buffer.get_or_insert_with(|| AlignedBuffer::new(bytes.len()));
            let (Some(run), Some(stored), Some(equal)) = (
                bytes.get(start * size..at * size),
                buffer.get_mut(..length * size),
                equal.get_mut(start..at),
            ) else {
                break;
            };
            compare(base, PageIndex(first.0 + start as u64), run, stored, equal);
        }
        equal
    }

    /// Pages are stored, or as in the base.
    pub(crate) fn is_as_base(&self, first: PageIndex, count: u64) {
        self.zeroed.clear_run(first, count);
    }

    /// Pages are zero.
    pub(crate) fn is_zero(&self, first: PageIndex, count: u64) {
        for page in (first.0..first.0 + count).map(PageIndex) {
            if self.base.is_present(page) {
                self.zeroed.set(page);
            } else {
                self.zeroed.clear(page);
            }
        }
    }

    /// The runs of pages that are zero here and not in the base.
    pub(crate) fn zeroed_runs(&self) -> Vec<(PageIndex, u64)> {
        let mut joined: Vec<(PageIndex, u64)> = Vec::new();
        for (first, count) in self.zeroed.set_runs() {
            match joined.last_mut() {
                Some((start, length)) if start.0 + *length == first.0 => *length += count,
                _ => joined.push((first, count)),
            }
        }
        joined
    }

    /// The pages that became zero are stored.
    pub(crate) fn is_settled(&self) {
        self.zeroed.forget();
    }
}

/// Whether the base's page has the digest of `bytes`; also `true` if it has none.
fn has_digest(base: &dyn BasePages, page: PageIndex, bytes: &[u8]) -> bool {
    match base.digest_of(page) {
        Ok(Some(digest)) => digest == Digest::of(bytes),
        Ok(None) => true,
        // A page that is not read is stored.
        Err(_) => false,
    }
}

/// Reads pages of the base, and records which of them equal `bytes`.
fn compare(base: &dyn BasePages, first: PageIndex, bytes: &[u8], stored: &mut [u8], equal: &mut [bool]) {
    let size = base.page_size().bytes();
    let read = base.load(first, stored);
    let is_read = read.is_ok();
    let pages = (first.0..).map(PageIndex).zip(bytes.chunks_exact(size)).zip(stored.chunks_exact_mut(size));
    for (((page, bytes), stored), equal) in pages.zip(equal) {
        // One page that cannot be read is no reason to store all of them.
        let loaded = if is_read { Ok(()) } else { base.load(page, stored) };
        *equal = match loaded {
            Ok(()) => bytes == stored,
            Err(error) => {
                tracing::debug!(page = page.0, %error, "a page of the base cannot be read: it is stored");
                false
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::fs::FileExt};

    use super::*;
    use crate::{BlockIndex, BlockName, Mapping, Memory, PageDigests, Places, RamBlock, RamBlocks, Transfer};

    const PAGE: usize = 4096;
    const SIZE: PageSize = PageSize::KIB_4;

    fn file() -> Arc<File> {
        Arc::new(tempfile::tempfile().expect("a file"))
    }

    fn block(memory: Memory, pages: usize) -> RamBlock {
        RamBlock::new(BlockName::new("b").expect("a name"), (pages * PAGE) as u64, SIZE, memory)
            .expect("a block")
    }

    fn places(file: &Arc<File>, pages: usize) -> Places {
        let digests = Arc::new(PageDigests::new(pages as u64, SIZE));
        Places::new(file.clone(), 0, PageBitmap::new(pages as u64)).with_digests(Some(digests))
    }

    fn pages(bytes: &[u8]) -> Vec<u8> {
        bytes.iter().flat_map(|byte| [*byte; PAGE]).collect()
    }

    /// A base of four pages: 1, 2, zero, 4.
    fn base() -> (Arc<File>, Arc<RamBlocks>) {
        let file = file();
        let base = block(Memory::MappedRam(places(&file, 4)), 4);
        base.store(PageIndex(0), &pages(&[1, 2, 9, 4])).expect("stored");
        base.clear(PageIndex(2));
        (file, Arc::new(RamBlocks::new(vec![base]).expect("one")))
    }

    fn delta(base: &Arc<RamBlocks>, length: usize, unwritten: Unwritten) -> (Arc<File>, RamBlock) {
        let file = file();
        file.set_len((length * PAGE) as u64).expect("sized");
        let places = places(&file, length).since(base.as_base(BlockIndex(0)).expect("there"), unwritten);
        (file, block(Memory::MappedRam(places), length))
    }

    fn present(block: &RamBlock) -> u64 {
        block.present_word(0)
    }

    #[test]
    fn only_pages_that_differ_are_stored() {
        let (_file, base) = base();
        let (_file, delta) = delta(&base, 6, Unwritten::Zero);
        delta.store_direct(PageIndex(0), &pages(&[1, 7, 0, 4, 0, 8])).expect("stored");
        assert_eq!(present(&delta), 0b10_0010);
        // What differed once may be equal again, and the reverse.
        delta.store(PageIndex(1), &pages(&[2])).expect("stored");
        delta.store(PageIndex(3), &pages(&[5])).expect("stored");
        delta.settle().expect("settled");
        assert_eq!(present(&delta), 0b10_1000);
    }

    #[test]
    fn page_that_became_zero_is_a_hole_that_is_present() {
        let (_file, base) = base();
        let (_file, delta) = delta(&base, 5, Unwritten::AsBase);
        delta.store(PageIndex(1), &pages(&[7])).expect("stored");
        delta.clear_run(PageIndex(1), 4);
        assert_eq!(present(&delta), 0);
        delta.settle().expect("settled");
        assert_eq!(present(&delta), 0b1010, "the base has pages 1 and 3 of those that are zero");
        let mut bytes = pages(&[9]);
        for page in [1, 3] {
            delta.load(PageIndex(page), &mut bytes).expect("it has the digest of zeros");
            assert_eq!(bytes, pages(&[0]));
        }
    }

    #[test]
    fn unwritten_pages_are_zero_or_as_in_the_base() {
        let (_file, base) = base();
        let (_file, zero) = delta(&base, 3, Unwritten::Zero);
        zero.settle().expect("settled");
        assert_eq!(present(&zero), 0b011);
        let (_file, same) = delta(&base, 3, Unwritten::AsBase);
        same.settle().expect("settled");
        assert_eq!(present(&same), 0);
    }

    /// Digests of the new pages in the base, although it has other bytes, as if two pages had the same digest.
    #[test]
    fn pages_with_one_digest_are_told_apart_by_their_bytes() {
        let (file, base) = base();
        file.write_all_at(&[9], PAGE as u64).expect("changed");
        let (_file, with) = delta(&base, 4, Unwritten::Zero);
        with.store(PageIndex(0), &pages(&[1, 2])).expect("stored");
        assert_eq!(present(&with), 0b10, "the base is damaged there: the page is stored");
        // Without digests nothing but the bytes tells them apart.
        let bits = PageBitmap::full(4);
        let plain = block(Memory::MappedRam(Places::new(file, 0, bits)), 4);
        let plain = Arc::new(RamBlocks::new(vec![plain]).expect("one"));
        let (_file, without) = delta(&plain, 4, Unwritten::AsBase);
        without.store(PageIndex(0), &pages(&[1, 2])).expect("stored");
        assert_eq!(present(&without), 0b10);
    }

    #[test]
    fn pages_of_guest_memory_are_compared_too() {
        let (_file, base) = base();
        let (_file, delta) = delta(&base, 4, Unwritten::AsBase);
        let memory = Mapping::anonymous(4 * PAGE as u64).expect("memory");
        memory.slice(0, 4 * PAGE).expect("inside").copy_from(&pages(&[1, 2, 3, 4]));
        let guest = block(Memory::Mapped(memory), 4);
        Transfer::new(&guest, &delta)
            .expect("into a file")
            .copy(&guest, &delta, PageIndex(0), 4)
            .expect("copied");
        assert_eq!(present(&delta), 0b100);
    }

    #[test]
    fn page_is_read_from_the_first_file_that_has_it_and_no_layer_is_written() {
        let (old, new) = (file(), file());
        old.write_all_at(&pages(&[1, 2, 3, 4]), 0).expect("written");
        new.write_all_at(&pages(&[5, 6, 7, 8]), 0).expect("written");
        let layer = |file: &Arc<File>, bits| {
            let present = PageBitmap::new(5);
            present.merge([bits]);
            Places::new(file.clone(), 0, present)
        };
        let joined = Places::layered(vec![layer(&new, 0b0010), layer(&old, 0b0111)]).expect("the same pages");
        let chain = block(Memory::MappedRam(joined), 5);
        assert_eq!(present(&chain), 0b0111);
        let expected = pages(&[1, 6, 3, 0, 0]);
        let mut bytes = pages(&[9; 5]);
        chain.load_direct(PageIndex(0), 5, &mut bytes).expect("read");
        assert!(bytes == expected);
        let memory = Mapping::anonymous(5 * PAGE as u64).expect("memory");
        let guest = block(Memory::Mapped(memory), 5);
        let transfer = Transfer::new(&chain, &guest).expect("out of files");
        transfer.copy(&chain, &guest, PageIndex(0), 5).expect("copied");
        guest.slice(PageIndex(0), 5).expect("all").copy_to(&mut bytes);
        assert!(bytes == expected);
        assert_eq!(chain.position_of(PageIndex(1)), Some((0, PAGE as u64)));
        assert_eq!(chain.position_of(PageIndex(2)), Some((1, 2 * PAGE as u64)));
        assert_eq!(chain.position_of(PageIndex(3)), None);
        assert!(chain.store(PageIndex(0), &pages(&[1])).is_err());
        assert!(Transfer::new(&guest, &chain).is_err());
        assert!(Places::layered(vec![layer(&new, 1), Places::new(old, 0, PageBitmap::new(4))]).is_none());
    }

    #[test]
    fn file_that_is_damaged_or_too_short_is_named() {
        let (whole, short) = (file(), file());
        whole.write_all_at(&pages(&[1, 2]), 0).expect("written");
        let digests = Arc::new(PageDigests::new(2, SIZE));
        digests.note(PageIndex(0), &pages(&[7]));
        let one = |page| {
            let present = PageBitmap::new(2);
            present.set(PageIndex(page));
            present
        };
        let layers = vec![
            Places::new(whole, 0, one(0)).with_digests(Some(digests)).named("damaged"),
            Places::new(short, 0, one(1)).named("short"),
        ];
        let chain = block(Memory::MappedRam(Places::layered(layers).expect("layers")), 2);
        let mut bytes = pages(&[0]);
        let damaged = chain.load(PageIndex(0), &mut bytes).expect_err("damaged").to_string();
        assert!(damaged.contains(r#"differs from its digest in "damaged""#), "{damaged}");
        let short = chain.load(PageIndex(1), &mut bytes).expect_err("short").to_string();
        assert!(short.contains(r#"cannot read file "short""#), "{short}");
    }
}
