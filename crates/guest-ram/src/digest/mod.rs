//! Digests of the pages of a block in a file: they show whether the file still has what was written to it.
//!
//! ```text
//! pages written ──▶ PageDigests ── group by group ──▶ the owner stores them
//!                   PageDigests ◀── group by group ── a DigestStore, when the first page of the group is read
//! pages read ─────▶ compared
//! ```
//!
//! The digest is XXH3 with 128 bits. It finds accidents, not an attacker: who can write to the file can also write
//! digests that fit. A cryptographic hash would not change that, and would take more time than everything else that
//! happens to a page.
//!
//! Memory grows with the pages that were written or read, 16 bytes for each, and not with the length of the block.

mod groups;

use std::{
    fmt::{self, Debug},
    io,
};

use twox_hash::xxhash3_128::Hasher as XxHash3_128;

use groups::Groups;

use crate::{GuestSlice, PageIndex, PageSize};

/// As 32 hexadecimal digits.
impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// The digest of some bytes: XXH3 with 128 bits and without a seed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Digest(u128);

impl Digest {
    /// The number of bytes of a digest.
    pub const BYTES: usize = 16;

    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(XxHash3_128::oneshot(bytes))
    }

    /// The digest as bytes, most significant first.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        self.0.to_be_bytes()
    }

    /// The digest of which these are the [bytes](Self::to_bytes).
    pub fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(u128::from_be_bytes(bytes))
    }
}

/// The digest of bytes that come in pieces.
#[derive(Default)]
pub struct DigestOfPieces(Box<XxHash3_128>);

impl Debug for DigestOfPieces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DigestOfPieces").finish_non_exhaustive()
    }
}

impl DigestOfPieces {
    /// Adds a piece.
    pub fn write(&mut self, piece: &[u8]) {
        self.0.write(piece);
    }

    /// The [digest](Digest::of) of all pieces, one after the other.
    pub fn finish(&self) -> Digest {
        Digest(self.0.finish_128())
    }
}

/// The digests of the pages of a block.
#[derive(Debug)]
pub struct PageDigests {
    page_size: PageSize,
    pages: u64,
    groups: Groups,
    store: Option<Box<dyn DigestStore>>,
}

/// Digests that were stored earlier.
pub trait DigestStore: Debug + Send + Sync {
    /// Reads the digests of group number `group`, of [`PageDigests::GROUP_PAGES`] pages. The last group of a block may
    /// have fewer; the rest is ignored.
    ///
    /// # Errors
    /// If they cannot be read, or are damaged themselves.
    fn group(&self, group: u64) -> io::Result<Vec<Digest>>;
}

impl PageDigests {
    /// The number of pages whose digests are stored together.
    pub const GROUP_PAGES: u64 = groups::GROUP as u64;

    /// Creates the digests of a block of `pages` pages of which none was written.
    pub fn new(pages: u64, page_size: PageSize) -> Self {
        Self { page_size, pages, groups: Groups::new(pages), store: None }
    }

    /// Creates the digests of a block that were stored earlier. Each group is read when it is first needed.
    pub fn stored(pages: u64, page_size: PageSize, store: Box<dyn DigestStore>) -> Self {
        Self { store: Some(store), ..Self::new(pages, page_size) }
    }

    /// The number of pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The digest of a page; `None` if it is not known: the page was not written, or does not exist.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub fn get(&self, page: PageIndex) -> io::Result<Option<Digest>> {
        if page.0 >= self.pages {
            return Ok(None);
        }
        let group = match (self.groups.get(page.0), &self.store) {
            (Some(group), _) => group,
            (None, None) => return Ok(None),
            (None, Some(store)) => {
                let stored = store.group(page.0 / Self::GROUP_PAGES)?;
                self.groups.fill(page.0, stored.into_iter().map(|digest| digest.0))
            }
        };
        Ok(Some(Digest(group.get(page.0))).filter(|digest| *digest != Digest::default()))
    }

    /// Records the digests of whole pages from `first` on. Pages that the block does not have are ignored.
    pub fn note(&self, first: PageIndex, bytes: &[u8]) {
        for (page, bytes) in (first.0..self.pages).zip(bytes.chunks_exact(self.page_size.bytes())) {
            self.groups.make(page).set(page, Digest::of(bytes).0);
        }
    }

    /// Like [`note`](Self::note), for pages in guest memory. If the guest writes to a page at the same time, its digest
    /// may be that of bytes that were never written anywhere; the page is dirty then, and is written again.
    pub fn note_slice(&self, first: PageIndex, slice: GuestSlice<'_>) {
        let done = self.each_page(first, slice, |page, bytes| {
            self.note(page, bytes);
            Ok::<_, io::Error>(None::<PageIndex>)
        });
        debug_assert!(done.is_ok(), "to note a digest cannot fail");
    }

    /// Compares whole pages from `first` on, of those for which `is_present`. Returns the first page that differs from
    /// its digest or has none.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub fn first_difference(
        &self,
        first: PageIndex,
        bytes: &[u8],
        is_present: impl Fn(PageIndex) -> bool,
    ) -> io::Result<Option<PageIndex>> {
        for (page, bytes) in (first.0..).map(PageIndex).zip(bytes.chunks_exact(self.page_size.bytes())) {
            if is_present(page) && self.get(page)? != Some(Digest::of(bytes)) {
                return Ok(Some(page));
            }
        }
        Ok(None)
    }

    /// Like [`first_difference`](Self::first_difference), for pages in guest memory, all of which count as present.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub fn first_difference_in(
        &self,
        first: PageIndex,
        slice: GuestSlice<'_>,
    ) -> io::Result<Option<PageIndex>> {
        self.each_page(first, slice, |page, bytes| self.first_difference(page, bytes, |_| true))
    }

    /// Copies the pages of a slice one by one, until `then` returns something.
    fn each_page<T, E>(
        &self,
        first: PageIndex,
        mut slice: GuestSlice<'_>,
        mut then: impl FnMut(PageIndex, &[u8]) -> Result<Option<T>, E>,
    ) -> Result<Option<T>, E> {
        let mut page = vec![0; self.page_size.bytes()];
        for index in (first.0..).map(PageIndex) {
            if slice.len() < page.len() {
                break;
            }
            slice.up_to(page.len()).copy_to(&mut page);
            if let Some(found) = then(index, &page)? {
                return Ok(Some(found));
            }
            slice = slice.after(page.len());
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::{Access, Mapping};

    const PAGE: PageSize = PageSize::KIB_4;

    #[test]
    fn digests_of_written_pages_are_known_and_those_of_others_are_not() {
        let digests = PageDigests::new(1 << 30, PAGE);
        let mut bytes = vec![1; 4096];
        bytes.extend([2; 4096]);
        digests.note(PageIndex((1 << 30) - 2), &bytes);
        let known = |page| digests.get(PageIndex(page)).expect("nothing is read");
        assert_eq!(known((1 << 30) - 2), Some(Digest::of(&[1; 4096])));
        assert_eq!(known((1 << 30) - 1), Some(Digest::of(&[2; 4096])));
        assert_eq!([known(0), known((1 << 30) - 3), known(1 << 30), known(u64::MAX)], [None; 4]);
        let differs = |at, bytes: &[u8]| digests.first_difference(PageIndex(at), bytes, |_| true);
        assert_eq!(differs((1 << 30) - 2, &bytes).expect("compared"), None);
        bytes[4096 + 17] ^= 1;
        assert_eq!(differs((1 << 30) - 2, &bytes).expect("compared"), Some(PageIndex((1 << 30) - 1)));
        assert_eq!(differs(7, &bytes).expect("compared"), Some(PageIndex(7)), "a page without a digest");
    }

    #[test]
    fn pages_beyond_the_block_are_ignored() {
        let digests = PageDigests::new(1, PAGE);
        digests.note(PageIndex(0), &[1; 3 * 4096]);
        digests.note(PageIndex(u64::MAX), &[1; 3 * 4096]);
        assert_eq!(digests.get(PageIndex(1)).expect("nothing is read"), None);
        assert!(digests.get(PageIndex(0)).expect("nothing is read").is_some());
    }

    #[test]
    fn digest_is_that_of_the_published_algorithm() {
        // The published value for no bytes.
        let empty = 0x99aa_06d3_0147_98d8_6001_c324_468d_497f_u128;
        assert_eq!(Digest::of(&[]).to_bytes(), empty.to_be_bytes());
        assert_eq!(Digest::from_bytes(empty.to_be_bytes()), Digest::of(&[]));
        let mut pieces = DigestOfPieces::default();
        pieces.write(&[1; 777]);
        pieces.write(&[2; 333]);
        assert_eq!(pieces.finish(), Digest::of(&[vec![1; 777], vec![2; 333]].concat()));
    }

    #[test]
    fn pages_of_guest_memory_have_the_same_digests_as_their_bytes() {
        let memory = Mapping::anonymous(8192).expect("memory");
        let slice = || memory.slice(0, 8192).expect("inside");
        slice().copy_from(&[3; 8192]);
        let digests = PageDigests::new(9, PAGE);
        digests.note_slice(PageIndex(7), slice());
        assert_eq!(digests.get(PageIndex(8)).expect("nothing is read"), Some(Digest::of(&[3; 4096])));
        let differs = || digests.first_difference_in(PageIndex(7), slice()).expect("compared");
        assert_eq!(differs(), None);
        memory.slice(5000, 1).expect("inside").copy_from(&[4]);
        assert_eq!(differs(), Some(PageIndex(8)));
        let file = tempfile::tempfile().expect("a file");
        file.set_len(4096).expect("sized");
        let shared = Mapping::of_file(&file, 0, 4096, Access::Read).expect("mapped");
        digests.note_slice(PageIndex(0), shared.slice(0, 4096).expect("inside"));
        assert_eq!(digests.get(PageIndex(0)).expect("nothing is read"), Some(Digest::of(&[0; 4096])));
    }

    #[derive(Debug)]
    struct Stored(AtomicU64);

    impl DigestStore for Stored {
        fn group(&self, group: u64) -> io::Result<Vec<Digest>> {
            self.0.fetch_add(1, Ordering::Relaxed);
            match group {
                0 => Ok(vec![Digest(5); 3]),
                _ => Err(io::ErrorKind::InvalidData.into()),
            }
        }
    }

    #[test]
    fn stored_group_is_read_once_and_an_error_of_it_is_returned() {
        let digests = PageDigests::stored(1024, PAGE, Box::new(Stored(AtomicU64::new(0))));
        assert_eq!(digests.get(PageIndex(2)).expect("read"), Some(Digest(5)));
        assert_eq!(digests.get(PageIndex(1)).expect("read"), Some(Digest(5)));
        assert_eq!(digests.get(PageIndex(3)).expect("read"), None, "fewer were stored");
        assert!(digests.get(PageIndex(512)).is_err());
        assert_eq!(
            digests.first_difference(PageIndex(512), &[0; 4096], |_| false).expect("not compared"),
            None
        );
    }
}
