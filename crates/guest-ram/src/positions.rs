//! Where the pages of a block are in a file that has them in any order, as a stream has.
//!
//! ```text
//! page ─ group of 512 pages ─ position ─▶ pages that follow each other closely ─ one preadv ─▶ buffer
//!                                         what lies between two of them ─▶ thrown away
//! ```

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, IoSliceMut},
    os::unix::fs::FileExt,
};

use rustix::io::{Errno, preadv};

use crate::{PageBitmap, PageIndex, PageSize};

/// The position of each page of a block in a file, in bytes from its beginning. A page without a position is not in the file.
///
/// The memory that it needs grows with the pages that have a position: 8 bytes each if they are next to each other, 4 KiB at most.
#[derive(Debug, Default)]
pub struct PagePositions {
    /// One more than each position; 0 if there is none.
    groups: BTreeMap<u64, Box<[u64; GROUP]>>,
}

impl PagePositions {
    /// No page has a position.
    pub fn new() -> Self {
        Self::default()
    }

    /// Records where `page` is.
    pub fn set(&mut self, page: PageIndex, position: u64) {
        let group = self.groups.entry(page.0 / GROUP as u64).or_insert_with(|| Box::new([0; GROUP]));
        if let Some(entry) = group.get_mut(within(page)) {
            *entry = position.saturating_add(1);
        }
    }

    /// Records that `page` is not in the file.
    pub fn clear(&mut self, page: PageIndex) {
        if let Some(entry) =
            self.groups.get_mut(&(page.0 / GROUP as u64)).and_then(|group| group.get_mut(within(page)))
        {
            *entry = 0;
        }
    }

    /// Where `page` is.
    pub fn get(&self, page: PageIndex) -> Option<u64> {
        self.groups.get(&(page.0 / GROUP as u64))?.get(within(page))?.checked_sub(1)
    }

    /// The pages of a block of `pages` pages that have a position.
    pub fn present(&self, pages: u64) -> PageBitmap {
        let present = PageBitmap::new(pages);
        for (group, entries) in &self.groups {
            for (word, entries) in entries.chunks(64).enumerate() {
                let bits = entries
                    .iter()
                    .enumerate()
                    .fold(0, |bits, (bit, entry)| bits | u64::from(*entry > 0) << bit);
                let number = usize::try_from(*group).unwrap_or(usize::MAX).saturating_mul(GROUP / 64);
                present.merge_at(number.saturating_add(word), [bits]);
            }
        }
        present
    }

    /// Reads the pages from `first` on that are in the file. Of other pages, the bytes of `buffer` stay.
    pub(crate) fn read(
        &self,
        file: &File,
        first: PageIndex,
        page_size: PageSize,
        buffer: &mut [u8],
    ) -> io::Result<()> {
        let page = page_size.bytes();
        let mut near: Vec<(u64, &mut [u8])> = Vec::new();
        for (index, bytes) in (first.0..).map(PageIndex).zip(buffer.chunks_exact_mut(page)) {
            let Some(at) = self.get(index) else { continue };
            let follows = near.last().is_none_or(|(last, _)| is_near(*last, page, at));
            if !follows || near.len() == MOST {
                read_near(file, page, std::mem::take(&mut near))?;
            }
            near.push((at, bytes));
        }
        read_near(file, page, near)
    }
}

/// The entry of a page in its group.
fn within(page: PageIndex) -> usize {
    usize::try_from(page.0 % GROUP as u64).unwrap_or(0)
}

/// Whether a page at `at` can be read with the same call as the one at `last`.
fn is_near(last: u64, page: usize, at: u64) -> bool {
    let end = last.saturating_add(page as u64);
    at.checked_sub(end).is_some_and(|between| between <= BETWEEN as u64)
}

/// Reads pages of which each is near the one before.
fn read_near(file: &File, page: usize, mut pages: Vec<(u64, &mut [u8])>) -> io::Result<()> {
    if let [(at, bytes)] = &mut *pages {
        return file.read_exact_at(bytes, *at);
    }
    let (Some((start, _)), Some((last, _))) = (pages.first(), pages.last()) else { return Ok(()) };
    let (start, length) = (*start, last - start + page as u64);
    let mut between = vec![0; BETWEEN * pages.len()];
    let mut parts = Vec::with_capacity(2 * pages.len());
    let mut end = start;
    for ((at, bytes), skipped) in pages.iter_mut().zip(between.chunks_exact_mut(BETWEEN)) {
        let gap = usize::try_from(*at - end).unwrap_or(0);
        if let Some(skipped) = skipped.get_mut(..gap).filter(|skipped| !skipped.is_empty()) {
            parts.push(IoSliceMut::new(skipped));
        }
        end = *at + bytes.len() as u64;
        parts.push(IoSliceMut::new(bytes));
    }
    match preadv(file, &mut parts, start) {
        Ok(count) if count as u64 == length => return Ok(()),
        // Less than was asked for: one by one, which also finds the page that cannot be read.
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    drop(parts);
    pages.iter_mut().try_for_each(|(at, bytes)| file.read_exact_at(bytes, *at))
}

/// Pages whose positions are allocated together.
const GROUP: usize = 512;
/// Pages that are read with one call: each may need two parts, and the system takes 1024.
const MOST: usize = 512;
/// Bytes between two pages that are rather read and thrown away than jumped over. A stream has 8, or up to 264 where the name of a
/// block is repeated.
const BETWEEN: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    /// Pages 0 to 1299 behind heads of 8 bytes, in an order that turns round at each 700th, with a hole of 4 KiB before page 9.
    fn file() -> (File, PagePositions) {
        let (file, mut positions) = (tempfile::tempfile().expect("a file"), PagePositions::new());
        let mut at = 0;
        for page in (0..700_u64).chain((700..1300).rev()) {
            at += if page == 9 { 4096 } else { 8 };
            positions.set(PageIndex(page), at);
            file.write_all_at(&bytes_of(page), at).expect("written");
            at += PAGE as u64;
        }
        (file, positions)
    }

    fn bytes_of(page: u64) -> Vec<u8> {
        page.to_be_bytes().repeat(PAGE / 8)
    }

    #[test]
    fn pages_are_read_from_their_positions_and_others_stay() {
        let (file, mut positions) = file();
        positions.clear(PageIndex(5));
        let present = positions.present(1400);
        assert_eq!(present.count(), 1299);
        for (first, count) in [(0_u64, 1400_usize), (3, 1), (4, 3), (699, 2), (1298, 102)] {
            let mut buffer = vec![0xab; count * PAGE];
            positions.read(&file, PageIndex(first), PageSize::KIB_4, &mut buffer).expect("read");
            for (page, bytes) in (first..).zip(buffer.chunks_exact(PAGE)) {
                let is_there = page != 5 && page < 1300;
                assert_eq!(present.contains(PageIndex(page)), is_there, "page {page}");
                let expected = if is_there { bytes_of(page) } else { vec![0xab; PAGE] };
                assert!(bytes == expected, "page {page} of {count} from {first} on");
            }
        }
    }

    #[test]
    fn page_beyond_the_end_of_the_file_is_an_error() {
        let (file, positions) = file();
        file.set_len(50 * PAGE as u64).expect("cut");
        let mut buffer = vec![0; 100 * PAGE];
        let error = positions.read(&file, PageIndex(0), PageSize::KIB_4, &mut buffer).expect_err("cut");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        positions.read(&file, PageIndex(0), PageSize::KIB_4, &mut buffer[..40 * PAGE]).expect("all there");
    }

    #[test]
    fn pages_of_terabytes_need_memory_only_where_they_are() {
        let mut positions = PagePositions::new();
        positions.set(PageIndex(1 << 40), u64::MAX - 1);
        positions.clear(PageIndex(7));
        assert_eq!(
            (positions.get(PageIndex(1 << 40)), positions.get(PageIndex(7))),
            (Some(u64::MAX - 1), None)
        );
        assert_eq!(positions.groups.len(), 1);
    }
}
