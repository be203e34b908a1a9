//! A RAM block: a name, a used length, a page size and its memory.

use std::{io, ops::Range, sync::Arc};

use crate::{
    Access, BlockName, BlockOffset, Digest, Error, GuestSlice, Mapping, PageBitmap, PageIndex, PageSize,
    Places, bitmap,
    file::truncated,
    memory::{areas::Areas, residency},
    places::Run,
};

/// The position of a block in its [`RamBlocks`](crate::RamBlocks), from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(pub usize);

/// Where the bytes of a block are stored.
#[derive(Debug)]
pub enum Memory {
    /// In this process's address space. Pages are sent and received without a copy. No record of the pages' contents is
    /// kept: the contents are checked when needed, by reading the pages or by querying the page table.
    Mapped(Mapping),
    /// At the pages' places in a mapped-ram file. Pages pass through a private buffer, one run at a time.
    MappedRam(Places),
}

/// A block of guest RAM, or of a ROM or device memory that migrates like RAM.
///
/// A block lives as long as its machine and keeps no state of migrations. Each migration checks anew what a page
/// contains.
#[derive(Debug)]
pub struct RamBlock {
    name: BlockName,
    used_length: u64,
    page_size: PageSize,
    pages: u64,
    memory: Memory,
    ignored: bool,
}

impl RamBlock {
    /// Creates a block of `used_length` bytes in `memory`. The memory may have any contents.
    ///
    /// # Errors
    /// [`Error::ShortMemory`] if a mapping is shorter than `used_length`; [`Error::OtherPages`] if the places have a
    /// different number of pages than the block.
    pub fn new(
        name: BlockName,
        used_length: u64,
        page_size: PageSize,
        memory: Memory,
    ) -> Result<Self, Error> {
        let pages = page_size.whole_pages_in(used_length);
        match &memory {
            Memory::Mapped(mapping) if mapping.len() < used_length => {
                return Err(Error::ShortMemory { name, mapped: mapping.len(), used_length });
            }
            Memory::MappedRam(Places { mapped: Some(mapping), .. }) if mapping.len() < used_length => {
                return Err(Error::ShortMemory { name, mapped: mapping.len(), used_length });
            }
            Memory::MappedRam(places) if places.present.pages() != pages => {
                return Err(Error::OtherPages { name, expected: pages, found: places.present.pages() });
            }
            Memory::Mapped(_) | Memory::MappedRam(_) => {}
        }
        Ok(Self { name, used_length, page_size, pages, memory, ignored: false })
    }

    /// Marks the block as ignored: none of its pages are sent, because both sides share its memory (capability
    /// `x-ignore-shared`).
    #[must_use]
    pub fn ignored(mut self) -> Self {
        self.ignored = true;
        self
    }

    /// Whether the block is [ignored](RamBlock::ignored): its pages are not sent.
    #[inline]
    pub fn is_ignored(&self) -> bool {
        self.ignored
    }

    /// The name that identifies the block on both sides.
    #[inline]
    pub fn name(&self) -> &BlockName {
        &self.name
    }

    /// The length in bytes that is used and migrates.
    #[inline]
    pub fn used_length(&self) -> u64 {
        self.used_length
    }

    /// The size of its pages.
    #[inline]
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// The number of whole pages. A block smaller than a page has none.
    #[inline]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Whether `page` may be nonzero, as far as this is known without reading it. For a block in a mapped-ram file:
    /// whether the page is in the file. For mapped memory: always `true`.
    #[inline]
    pub fn is_present(&self, page: PageIndex) -> bool {
        match &self.memory {
            Memory::Mapped(_) => page.0 < self.pages,
            Memory::MappedRam(places) => places.present.contains(page),
        }
    }

    /// The pages that [may be nonzero](RamBlock::is_present), in words of 64 bits, least significant bit first.
    pub fn present_words(&self) -> impl ExactSizeIterator<Item = u64> + '_ {
        (0..usize::try_from(self.pages.div_ceil(64)).unwrap_or(usize::MAX))
            .map(|word| self.present_word(word))
    }

    /// Word number `word` of [`present_words`](RamBlock::present_words); 0 beyond the last word.
    #[inline]
    pub fn present_word(&self, word: usize) -> u64 {
        match &self.memory {
            Memory::MappedRam(places) => places.present.word_at(word),
            Memory::Mapped(_) => bitmap::mask(self.pages, word),
        }
    }

    /// Records that pages were written. Does nothing for mapped memory, which keeps no such record.
    ///
    /// # Panics
    /// If the block is in a file and has no such pages.
    #[inline]
    pub fn note_written(&self, first: PageIndex, count: u64) {
        if let Memory::MappedRam(places) = &self.memory {
            places.note_written(first, count);
        }
    }

    /// Where the block's bytes are stored.
    #[inline]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The offset of `page`; `None` if the block has no such page.
    #[inline]
    pub fn offset_of(&self, page: PageIndex) -> Option<BlockOffset> {
        if page.0 < self.pages() { self.page_size.offset_of(page) } else { None }
    }

    /// Writes whole pages from `first` on, to memory or to the file.
    ///
    /// # Errors
    /// If the file cannot be written.
    ///
    /// # Panics
    /// If `bytes` are not whole pages of this block.
    pub fn store(&self, first: PageIndex, bytes: &[u8]) -> io::Result<()> {
        self.write(first, bytes, false)
    }

    /// Like [`store`](Self::store), for a channel: bypasses the page cache if the file is to be written with direct
    /// I/O.
    pub fn store_direct(&self, first: PageIndex, bytes: &[u8]) -> io::Result<()> {
        self.write(first, bytes, true)
    }

    fn write(&self, first: PageIndex, bytes: &[u8], channel: bool) -> io::Result<()> {
        let page_size = self.page_size.bytes();
        let count = (bytes.len() / page_size) as u64;
        let inside = first.0.checked_add(count).is_some_and(|end| end <= self.pages());
        assert!(bytes.len().is_multiple_of(page_size) && inside, "whole pages of the block");
        match &self.memory {
            Memory::Mapped(mapping) => {
                let start = self.page_size.offset_of(first).map_or(u64::MAX, |offset| offset.0);
                mapping.slice(start, bytes.len()).expect("the mapping covers the block").copy_from(bytes);
                Ok(())
            }
            Memory::MappedRam(places) => places.store(first, bytes, self.page_size, channel),
        }
    }

    /// Completes a file that has only the pages that differ from a base ([`Places::since`]): pages that became zero are
    /// stored as holes, or as zeros. Does nothing for other blocks. To be called when all pages have been written, before the
    /// [present](RamBlock::is_present) pages are recorded.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn settle(&self) -> io::Result<()> {
        match &self.memory {
            Memory::Mapped(_) => Ok(()),
            Memory::MappedRam(places) => places.settle(self.page_size),
        }
    }

    /// The file that has `page`, by its number among the [layers](Places::layered), and the position of the page in it.
    /// `None` for mapped memory, and for a page that no file has: it is zero.
    pub fn position_of(&self, page: PageIndex) -> Option<(usize, u64)> {
        let BlockOffset(start) = self.offset_of(page)?;
        match &self.memory {
            Memory::Mapped(_) => None,
            Memory::MappedRam(places) => places.position(page, start),
        }
    }

    /// The digest of a page in a file; `None` if it has none.
    pub(crate) fn digest_of(&self, page: PageIndex) -> io::Result<Option<Digest>> {
        let Memory::MappedRam(places) = &self.memory else { return Ok(None) };
        let digests = places.of(page).and_then(Places::digests);
        digests.map_or(Ok(None), |digests| digests.get(page))
    }

    /// Reads a page from memory or from the file into a private buffer. A page that is not
    /// [present](RamBlock::is_present) reads as zero.
    ///
    /// # Errors
    /// If the file cannot be read, or the page differs from its [digest](Places::with_digests).
    ///
    /// # Panics
    /// If the block has no such page, or `buffer` is not a page long.
    pub fn load(&self, page: PageIndex, buffer: &mut [u8]) -> io::Result<()> {
        let start = self.offset_of(page).expect("a page of the block").0;
        assert_eq!(buffer.len(), self.page_size.bytes(), "a page's buffer");
        if !self.is_present(page) {
            buffer.fill(0);
            return Ok(());
        }
        match &self.memory {
            Memory::Mapped(mapping) => {
                mapping.slice(start, buffer.len()).expect("the mapping covers the block").copy_to(buffer);
                Ok(())
            }
            Memory::MappedRam(places) => {
                let places = places.of(page).unwrap_or(places);
                places.read(buffer, page, self.page_size, false)?;
                self.compare(places, page, buffer)
            }
        }
    }

    /// Reads `count` pages of a file from `first` on. Bypasses the page cache if the file is to be read with direct
    /// I/O. Pages that are not [present](RamBlock::is_present) read as zero.
    ///
    /// # Errors
    /// If the file cannot be read, or a page differs from its [digest](Places::with_digests).
    ///
    /// # Panics
    /// If the block has no such pages or is not in a file, or `buffer` has a different length.
    pub fn load_direct(&self, first: PageIndex, count: u64, buffer: &mut [u8]) -> io::Result<()> {
        let Memory::MappedRam(places) = &self.memory else { panic!("a block in a file") };
        let page_size = self.page_size.bytes();
        let inside = first.0.checked_add(count).is_some_and(|end| end <= self.pages());
        assert!(inside && buffer.len() as u64 == count * page_size as u64, "pages of the block");
        let mut rest = buffer;
        for Run { of, first, count } in places.runs(first, count) {
            let length = usize::try_from(count).unwrap_or(usize::MAX).saturating_mul(page_size);
            let (piece, after) = rest.split_at_mut(length.min(rest.len()));
            rest = after;
            if let Some(of) = of {
                of.read(piece, first, self.page_size, true)?;
                self.compare(of, first, piece)?;
            }
            for (page, bytes) in (first.0..).map(PageIndex).zip(piece.chunks_mut(page_size)) {
                if !places.present.contains(page) {
                    bytes.fill(0);
                }
            }
        }
        Ok(())
    }

    /// Compares present pages that were read with their digests, if there are some.
    fn compare(&self, places: &Places, first: PageIndex, bytes: &[u8]) -> io::Result<()> {
        let Some(digests) = &places.digests else { return Ok(()) };
        match digests.first_difference(first, bytes, |page| places.present.contains(page))? {
            None => Ok(()),
            Some(page) => Err(self.damaged(places, page)),
        }
    }

    /// The error that a page differs from its digest.
    pub(crate) fn damaged(&self, places: &Places, page: PageIndex) -> io::Error {
        let offset = self.offset_of(page).unwrap_or(BlockOffset(u64::MAX));
        let error = Error::Damaged { name: self.name.clone(), offset, file: places.name.clone() };
        io::Error::new(io::ErrorKind::InvalidData, error)
    }

    /// Makes a page zero. Mapped memory is read first and written only if it is nonzero. In a mapped-ram file, the page
    /// is no longer [present](RamBlock::is_present); its bytes in the file stay.
    ///
    /// # Panics
    /// If the block has no such page.
    pub fn clear(&self, page: PageIndex) {
        match &self.memory {
            Memory::MappedRam(places) => places.clear_run(page, 1),
            Memory::Mapped(_) => {
                let slice = self.slice(page, 1).expect("a page of the block");
                if !slice.is_zero() {
                    slice.clear();
                }
            }
        }
    }

    /// Like [`clear`](Self::clear), for `count` pages from `first` on.
    ///
    /// # Panics
    /// If the block has no such pages.
    pub fn clear_run(&self, first: PageIndex, count: u64) {
        match &self.memory {
            Memory::MappedRam(places) => places.clear_run(first, count),
            Memory::Mapped(_) => (first.0..first.0 + count).map(PageIndex).for_each(|page| self.clear(page)),
        }
    }

    /// Whether a page is zero. The page is read to find out. If the guest writes at the same time, the answer may be
    /// wrong; this is harmless, because the page is then dirty again. A page in a file is not read: its [present
    /// bit](RamBlock::is_present) decides. A page in a mapping that [may shrink](Mapping::may_shrink) is not read
    /// either and counts as nonzero.
    pub fn is_zero(&self, page: PageIndex) -> bool {
        match &self.memory {
            Memory::Mapped(mapping) if mapping.may_shrink() => false,
            Memory::Mapped(_) => self.slice(page, 1).is_some_and(|slice| slice.is_zero()),
            Memory::MappedRam(places) => !places.present.contains(page),
        }
    }

    /// The pages that may be nonzero now. For a mapped-ram file: the pages in the file. For mapped memory: the
    /// [touched](RamBlock::touched) pages if they are known, otherwise all pages.
    pub fn may_hold(&self) -> PageBitmap {
        self.touched().unwrap_or_else(|| {
            let bits = PageBitmap::new(self.pages);
            bits.merge(self.present_words());
            bits
        })
    }

    /// The pages of mapped memory that may be nonzero, found without reading them; all others are zero. `None` if nothing
    /// is known of any page, for blocks in a mapped-ram file, and for [ignored](RamBlock::ignored) blocks.
    ///
    /// | Memory | Who is asked | Requires |
    /// |---|---|---|
    /// | [`Mapping::anonymous`], or [declared](Mapping::assume_absent_is_zero) | the page table | Linux 6.7 |
    /// | private and anonymous, which `/proc/self/smaps` proves | the page table | Linux 6.7 |
    /// | a mapping of [its file](Mapping::of_file), shared or private | the file; for a private mapping the page table, too | memfd, tmpfs, ext4 or hugetlbfs |
    /// | filled by a `userfaultfd`, of another file, or mapped over | nobody: these pages may be nonzero | |
    ///
    /// The answer holds for the moment of the call. Use it only for pages whose dirty bits were taken before: a page that
    /// is written after that is dirty again. Without a dirty log, nothing may write to the memory until its pages have
    /// been sent.
    ///
    /// For several blocks, [`RamBlocks::touched`](crate::RamBlocks::touched) is faster.
    pub fn touched(&self) -> Option<PageBitmap> {
        let areas = self.questioned().and_then(|range| residency::areas_of(&[range]));
        self.touched_among(areas.as_ref())
    }

    /// The addresses of which the system must be asked what is mapped there, before it is known who knows the touched
    /// pages. `None` if nothing needs to be asked.
    pub(crate) fn questioned(&self) -> Option<Range<u64>> {
        let is_asked = |(mapping, _): &(&Mapping, _)| !mapping.is_absent_zero() && !self.ignored;
        self.mapped().filter(is_asked).map(|(_, memory)| residency::addresses(&memory))
    }

    /// The mapping and the memory of its pages; `None` without such pages.
    fn mapped(&self) -> Option<(&Mapping, GuestSlice<'_>)> {
        let Memory::Mapped(mapping) = &self.memory else { return None };
        let memory = self.slice(PageIndex(0), self.pages).filter(|memory| memory.len() > 0)?;
        Some((mapping, memory))
    }

    /// The addresses of mapped pages; `None` if it has no such pages.
    pub(crate) fn addresses(&self) -> Option<Range<u64>> {
        self.mapped().map(|(_, memory)| residency::addresses(&memory))
    }

    /// The [touched](RamBlock::touched) pages, with what the system has answered.
    pub(crate) fn touched_among(&self, areas: Option<&Areas>) -> Option<PageBitmap> {
        let (mapping, memory) = self.mapped().filter(|_| !self.ignored)?;
        let touched = residency::touched(&memory, mapping, self.page_size, areas).inspect_err(|error| {
            tracing::debug!(block = %self.name, %error, "touched pages cannot be queried: pages are read instead");
        });
        touched.ok().flatten()
    }

    /// The runs of pages of which the system does not let this process access a part: first page and count.
    pub(crate) fn inaccessible_among(&self, access: Access, areas: &Areas) -> Vec<(PageIndex, u64)> {
        let Some((mapping, memory)) = self.mapped() else { return Vec::new() };
        let writes = access == Access::ReadWrite && mapping.is_writable();
        let (start, page) = (memory.as_ptr().addr() as u64, self.page_size.bytes() as u64);
        let closed = areas.parts(&residency::addresses(&memory)).into_iter().filter(|(_, area)| match area {
            Some(area) => !area.readable || writes && !area.writable,
            None => true,
        });
        let runs = closed.map(|(part, _)| {
            let first = part.start.saturating_sub(start) / page;
            let end = part.end.saturating_sub(start).div_ceil(page).min(self.pages);
            (PageIndex(first), end.saturating_sub(first))
        });
        runs.filter(|(_, count)| *count > 0).collect()
    }

    /// The error that `count` pages from `first` on may not be accessed.
    pub fn inaccessible(&self, first: PageIndex, count: u64) -> Error {
        let offset = self.offset_of(first).unwrap_or(BlockOffset(u64::MAX));
        let len = count.saturating_mul(self.page_size.bytes() as u64);
        Error::Inaccessible { name: self.name.clone(), offset, len }
    }

    /// Explains why the system could not access `count` pages from `first` on (`EFAULT`): they may not be accessed, or
    /// the file of the mapping is too short. Returns `error` unchanged if neither is so.
    pub fn explain_fault(&self, first: PageIndex, count: u64, error: io::Error) -> io::Error {
        let areas = self.addresses().and_then(|range| Areas::without_flags(&[range]).ok());
        let holes = areas.map(|areas| self.inaccessible_among(Access::Read, &areas)).unwrap_or_default();
        let end = first.0.saturating_add(count);
        let hole = holes.into_iter().find(|(at, count)| at.0 < end && first.0 < at.0 + count);
        match hole {
            Some((at, count)) => {
                let refused = self.inaccessible(at, count);
                io::Error::new(io::ErrorKind::PermissionDenied, refused)
            }
            None if self.is_of_a_file() => truncated(),
            None => error,
        }
    }

    fn is_of_a_file(&self) -> bool {
        match &self.memory {
            Memory::Mapped(mapping) => mapping.may_shrink() || mapping.backing().is_some(),
            Memory::MappedRam(_) => true,
        }
    }

    /// The location of the block's bytes: 0 for this process's memory or an identifier of the file, then start and end.
    /// `None` if the block has no bytes, or they are in no order.
    pub(crate) fn range(&self) -> Option<(usize, u64, u64)> {
        let (within, start) = match &self.memory {
            Memory::Mapped(mapping) => (0, mapping.slice(0, 0)?.as_ptr().addr() as u64),
            Memory::MappedRam(places) if places.is_scattered() => return None,
            Memory::MappedRam(places) => (Arc::as_ptr(&places.file).addr(), places.offset),
        };
        (self.used_length > 0).then(|| (within, start, start.saturating_add(self.used_length)))
    }

    /// Whether reading its pages may raise `SIGBUS`, because they are in a mapping of a file that another process may
    /// truncate. Such pages are moved by system calls only.
    pub fn may_shrink(&self) -> bool {
        matches!(&self.memory, Memory::Mapped(mapping) if mapping.may_shrink())
    }

    /// `count` pages of mapped memory from `first` on; `None` if they are not all in the block, or if the block is in a
    /// file that is not mapped.
    #[inline]
    pub fn slice(&self, first: PageIndex, count: u64) -> Option<GuestSlice<'_>> {
        let end = first.0.checked_add(count)?;
        if end > self.pages() {
            return None;
        }
        let len = usize::try_from(count).ok()?.checked_mul(self.page_size.bytes())?;
        let mapping = match &self.memory {
            Memory::Mapped(mapping) => mapping,
            Memory::MappedRam(places) => places.mapped.as_ref()?,
        };
        mapping.slice(self.page_size.offset_of(first)?.0, len)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn block(name: &str, used_length: u64) -> RamBlock {
        let memory = Memory::Mapped(Mapping::anonymous(used_length).expect("memory"));
        RamBlock::new(BlockName::new(name).expect("a name"), used_length, PageSize::KIB_4, memory)
            .expect("a block")
    }

    #[test]
    fn a_block_smaller_than_a_page_and_an_empty_one_have_no_pages() {
        for length in [0, 1, 4095] {
            let block = block("small", length);
            assert_eq!(block.pages(), 0);
            assert!(block.offset_of(PageIndex(0)).is_none());
            assert!(block.slice(PageIndex(0), 1).is_none());
        }
    }

    #[test]
    fn a_page_outside_the_block_has_no_slice() {
        let block = block("b", 3 * 4096 + 5);
        assert!(block.slice(PageIndex(0), 3).is_some());
        assert!(block.slice(PageIndex(1), 3).is_none());
        assert!(block.slice(PageIndex(u64::MAX), 1).is_none());
        assert!(block.slice(PageIndex(0), u64::MAX).is_none());
    }

    #[test]
    fn a_block_of_terabytes_works() {
        let block = block("huge", 2 << 40);
        assert_eq!(block.pages(), 1 << 29);
        assert_eq!(block.slice(PageIndex((1 << 29) - 1), 1).expect("the last page").len(), 4096);
    }

    #[test]
    fn pages_are_stored_in_memory_and_in_files_and_cleared_there() {
        let file = Arc::new(tempfile::tempfile().expect("a file"));
        let in_file = Memory::MappedRam(Places::new(file.clone(), 8192, PageBitmap::new(4)));
        for memory in [in_file, Memory::Mapped(Mapping::anonymous(4 * 4096).expect("memory"))] {
            let name = BlockName::new("b").expect("a name");
            let block = RamBlock::new(name, 4 * 4096, PageSize::KIB_4, memory).expect("a block");
            let mapped = matches!(block.memory(), Memory::Mapped(_));
            block.store(PageIndex(1), &[7; 8192]).expect("stored");
            assert_eq!(block.present_words().next(), Some(if mapped { 0b1111 } else { 0b0110 }));
            block.clear(PageIndex(2));
            block.clear(PageIndex(3));
            assert_eq!(block.present_words().next(), Some(if mapped { 0b1111 } else { 0b0010 }));
            for (page, expected) in [(1, 7), (2, 0), (3, 0)] {
                let mut bytes = [1; 4096];
                block.load(PageIndex(page), &mut bytes).expect("loaded");
                assert_eq!(bytes, [expected; 4096]);
            }
            if let Some(slice) = block.slice(PageIndex(2), 1) {
                assert!(slice.is_zero());
                assert!(!block.slice(PageIndex(1), 1).expect("there").is_zero());
            }
        }
        let mut bytes = [0; 4096];
        file.read_exact_at(&mut bytes, 8192 + 4096).expect("written");
        assert_eq!(bytes, [7; 4096]);
    }

    #[test]
    fn places_of_another_number_of_pages_are_refused() {
        let file = Arc::new(tempfile::tempfile().expect("a file"));
        let places = Places::new(file, 0, PageBitmap::new(3));
        let name = BlockName::new("b").expect("a name");
        let refused = RamBlock::new(name, 4 * 4096, PageSize::KIB_4, Memory::MappedRam(places));
        assert_eq!(
            refused.expect_err("refused").to_string(),
            r#"block "b": expected a bit for each of 4 pages, found 3"#
        );
    }

    #[test]
    fn memory_shorter_than_the_block_is_refused() {
        let memory = Memory::Mapped(Mapping::anonymous(4096).expect("memory"));
        let refused = RamBlock::new(BlockName::new("b").expect("a name"), 8192, PageSize::KIB_4, memory);
        assert_eq!(
            refused.expect_err("refused").to_string(),
            r#"block "b": 0x1000 bytes of memory for a used length of 0x2000"#
        );
    }
}
