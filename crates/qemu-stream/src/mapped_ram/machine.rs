//! A machine in files: in one, or in a delta and its bases.
//!
//! ```text
//! newest file: configuration, block list, devices
//! page ── in the newest file? ── in its base? … ── zero
//! ```
//!
//! A block of an older file counts only as far as every newer file has it: a block that shrank and grew again is zero there.

use std::{fs::File, ops::Deref, path::Path, sync::Arc};

use multifd::ram::{
    BlockIndex, Digest, DirectFile, Memory, PageBitmap, PageIndex, Places, RamBlock, RamBlocks, runs,
};

use super::{BlockPlace, ChainFile, Scattered, access::direct, holes::Holes};
use crate::{
    error::{Error, Place, StreamKind, Unsupported, Usage},
    format::{BlockEntry, BlockList, Configuration, DevicePart, SectionId, SyncMode},
};

/// The greatest number of files of a machine: 63 deltas and a whole machine. Each is open while the machine is read.
pub(super) const MOST_FILES: usize = 64;

/// A whole machine that is stored: in one file, or in a delta and its bases. Everything that reads pages takes it.
#[derive(Debug)]
pub struct StoredMachine {
    /// Newest first; never empty. All but the last are deltas.
    files: Vec<ChainFile>,
    /// Whether its files have the bytes of its pages, and not only their bitmaps.
    has_pages: bool,
    /// Pages that are in no place of its file.
    scattered: Option<Scattered>,
}

/// How the pages of a block in a file are read.
#[derive(Clone, Debug)]
pub enum ReadPath {
    /// Through the page cache, into a private buffer.
    Cached,
    /// With direct I/O, by channels; as [`Cached`](Self::Cached) over main. The bases of a delta are read in the same way.
    Direct(Arc<DirectFile>),
    /// Not read: channels send from a mapping of the file, without a copy. Requires channels that neither compress nor
    /// encrypt.
    Mapped,
}

/// The pages that one file has of a block.
pub(super) struct Layer<'a> {
    pub(super) file: &'a ChainFile,
    pub(super) block: BlockIndex,
    pub(super) pages: PageBitmap,
}

impl StoredMachine {
    /// The greatest number of files: 63 deltas and a whole machine.
    pub const MOST_FILES: usize = MOST_FILES;

    /// Of these files, newest first, at least one.
    pub(super) fn of(files: Vec<ChainFile>) -> Self {
        assert!(!files.is_empty(), "a machine is in at least one file");
        Self { files, has_pages: true, scattered: None }
    }

    /// The machine that was written to a scratch file.
    pub(crate) fn of_scratch(file: File, has_pages: bool) -> Result<Self, Error> {
        Ok(Self { has_pages, ..Self::of(vec![ChainFile::read_damaged(file, 0, Path::new(""))?]) })
    }

    /// The same, with these pages besides those of its file. None of them is in both.
    pub(crate) fn with(self, scattered: Scattered) -> Self {
        Self { scattered: Some(scattered), ..self }
    }

    /// The stream in which pages are that were [left there](crate::stored::Unfold::in_file).
    pub fn stream(&self) -> Option<&File> {
        self.scattered.as_ref().map(Scattered::file)
    }

    /// Whether its pages can be read. Only a stream of which [the pages were counted](crate::stored::Pages::Count) has none.
    pub fn has_pages(&self) -> bool {
        self.has_pages
    }

    /// The newest file, which has everything but the pages of its bases.
    pub fn newest(&self) -> &ChainFile {
        self.files.first().expect("never empty")
    }

    /// Its files, newest first: all but the last are deltas.
    pub fn files(&self) -> &[ChainFile] {
        &self.files
    }

    /// The configuration; `None` for machine types up to 2.3.
    pub fn configuration(&self) -> Option<&Configuration> {
        self.newest().configuration()
    }

    /// How the source has marked the ends of dirty rounds, if the file contains this. A file written by QEMU does not,
    /// nor a file of a machine that arrived without channels.
    pub fn sync_mode(&self) -> Option<SyncMode> {
        self.newest().sync_mode()
    }

    /// The RAM section's number.
    pub fn section(&self) -> SectionId {
        self.newest().section()
    }

    /// The block list.
    pub fn blocks(&self) -> &BlockList {
        self.newest().blocks()
    }

    /// Whether a block was left out, because both sides share its memory.
    pub fn is_ignored(&self, block: BlockIndex) -> bool {
        self.newest().place(block).is_some_and(BlockPlace::is_ignored)
    }

    /// Whether the stream has SWITCHOVER_START.
    pub fn switchover_start(&self) -> bool {
        self.newest().switchover_start()
    }

    /// The devices and their description.
    pub fn devices(&self) -> &DevicePart {
        self.newest().devices()
    }

    /// What the writer has recorded about the capture, as JSON; `None` if it has recorded nothing, as QEMU.
    pub fn about(&self) -> Option<&str> {
        self.newest().about()
    }

    /// Whether pages are compared with digests, so that damage is found. A file of QEMU has none, unless they were
    /// [added](super::Verify::add).
    pub fn has_digests(&self) -> bool {
        self.files.iter().all(ChainFile::has_digests)
    }

    /// What identifies the machine: a digest of everything that is read of it. `None` without digests.
    pub fn root(&self) -> Option<Digest> {
        self.newest().root()
    }

    /// Reads which pages of a block may be nonzero; all others are zero. The memory of the result grows with the pages that
    /// are present, not with the length of the block.
    ///
    /// # Errors
    /// If there is no such block or the system cannot read.
    pub fn bitmap(&self, block: BlockIndex) -> Result<PageBitmap, Error> {
        if let ([file], None) = (&*self.files, &self.scattered) {
            return file.bitmap(block);
        }
        let present = PageBitmap::new(self.newest().place(block).map_or(0, BlockPlace::pages));
        for layer in self.layers(block)? {
            layer.pages.set_words().for_each(|(word, bits)| present.merge_at(word, [bits]));
        }
        if let Some(others) = self.scattered.as_ref().and_then(|of| of.present(block, present.pages())) {
            others.set_words().for_each(|(word, bits)| present.merge_at(word, [bits]));
        }
        Ok(present)
    }

    /// Which pages of a block are in which file. No page is in two.
    pub(super) fn layers(&self, block: BlockIndex) -> Result<Vec<Layer<'_>>, Error> {
        let newest = self.newest();
        if let [file] = &*self.files {
            return Ok(vec![Layer { file, block, pages: file.bitmap(block)? }]);
        }
        let (Some(entry), Some(place)) = (newest.blocks().entries().get(block.0), newest.place(block)) else {
            return Ok(Vec::new());
        };
        let (total, undecided) = (place.pages(), PageBitmap::full(place.pages()));
        let mut layers = Vec::new();
        for file in &self.files {
            let found = file.blocks().iter().find(|(_, found)| found.name == entry.name);
            let Some((index, place)) = found.and_then(|(index, _)| Some((index, file.place(index)?))) else {
                break;
            };
            if place.is_ignored() {
                break;
            }
            if place.pages() < total {
                // Zero, whatever an older file has there.
                undecided.clear_run(PageIndex(place.pages()), total - place.pages());
            }
            let pages = PageBitmap::new(total);
            for (word, bits) in file.bitmap(index)?.set_words() {
                let bits = bits & undecided.word_at(word);
                runs(word, bits).for_each(|(first, count)| undecided.clear_run(first, count));
                pages.merge_at(word, [bits]);
            }
            if file.is_delta() {
                without_holes(file.file(), place, &pages);
            }
            layers.push(Layer { file, block: index, pages });
        }
        Ok(layers)
    }

    /// Creates the blocks in the files with the pages that are present, to be sent or copied. `path` returns for each
    /// how its pages are read; the place is that in the newest file. Blocks that were left out are
    /// [ignored](RamBlock::ignored). If there are digests, a page that differs from its digest cannot be read. Then, for a delta,
    /// and for a [stream](Self::stream), no block is [mapped](ReadPath::Mapped): what a mapping shows may differ from what was
    /// compared, and a stream has no places. A stream is not read with [direct I/O](ReadPath::Direct) either.
    ///
    /// # Errors
    /// If the bitmaps cannot be read or the file cannot be mapped; if its pages were only
    /// [counted](crate::stored::Pages::Count).
    pub fn ram_blocks(
        &self,
        mut path: impl FnMut(&BlockEntry, &BlockPlace) -> ReadPath,
    ) -> multifd::Result<RamBlocks> {
        if !self.has_pages {
            let (call, state) = ("reading pages", "of a stream whose pages were only counted");
            return Err(multifd::Error::other("open the blocks", Usage::OutOfOrder { call, state }));
        }
        let mut others: Option<Vec<_>> = None;
        let mut blocks = Vec::new();
        for ((index, entry), place) in self.blocks().iter().zip(self.newest().places()) {
            let path = path(entry, place);
            let layers = self.layers(index).map_err(|error| multifd::Error::other("read a bitmap", error))?;
            let mut places = Vec::with_capacity(layers.len());
            for Layer { file, block, pages } in layers {
                let Some(place) = file.place(block) else { continue };
                let digests = file.digests_of(block).map(Arc::new);
                let is_mapped = matches!(path, ReadPath::Mapped) && digests.is_none() && self.is_one_file();
                let of_file = Places::new(file.shared_file().clone(), place.pages_offset, pages);
                let of_file = of_file.with_digests(digests);
                let of_file = match &*self.files {
                    [_] => of_file,
                    _ => of_file.named(file.path().display().to_string()),
                };
                places.push(match &path {
                    ReadPath::Direct(direct) if std::ptr::eq(file, self.newest()) => {
                        of_file.past_cache(Some(direct.clone()))
                    }
                    ReadPath::Direct(_) => of_file.past_cache(self.direct(file, &mut others)),
                    ReadPath::Mapped if is_mapped => of_file.map(entry.used_length).map_err(|error| {
                        multifd::Error::io(format!("map block {:?} of the file", entry.name), error)
                    })?,
                    ReadPath::Mapped | ReadPath::Cached => of_file,
                });
            }
            places.extend(self.scattered.as_ref().and_then(|of| of.places(index, place.pages())));
            let none = || {
                Places::new(
                    self.newest().shared_file().clone(),
                    place.pages_offset,
                    PageBitmap::new(place.pages()),
                )
            };
            let places = Places::layered(places).unwrap_or_else(none);
            let memory = Memory::MappedRam(places);
            let block = RamBlock::new(entry.name.clone(), entry.used_length, place.page_size, memory)?;
            blocks.push(if place.is_ignored() { block.ignored() } else { block });
        }
        Ok(RamBlocks::new(blocks)?)
    }

    /// Whether each page is at its place in the newest file.
    pub fn is_one_file(&self) -> bool {
        self.files.len() == 1 && self.scattered.is_none()
    }

    /// Direct I/O for a base; each is opened once.
    fn direct(
        &self,
        of: &ChainFile,
        opened: &mut Option<Vec<Option<Arc<DirectFile>>>>,
    ) -> Option<Arc<DirectFile>> {
        let opened =
            opened.get_or_insert_with(|| self.files.iter().map(|file| direct(file.file())).collect());
        let number = self.files.iter().position(|file| std::ptr::eq(file, of))?;
        opened.get(number)?.clone()
    }
}

impl ChainFile {
    /// The blocks in this file alone, with the pages that it has, without their digests.
    pub(super) fn own_blocks(&self, path: &ReadPath) -> multifd::Result<RamBlocks> {
        let mut blocks = Vec::new();
        for ((index, entry), place) in self.blocks().iter().zip(self.places()) {
            let present =
                self.bitmap(index).map_err(|error| multifd::Error::other("read a bitmap", error))?;
            let places = Places::new(self.shared_file().clone(), place.pages_offset, present);
            let places = match path {
                ReadPath::Direct(direct) => places.past_cache(Some(direct.clone())),
                ReadPath::Cached | ReadPath::Mapped => places,
            };
            let memory = Memory::MappedRam(places);
            blocks.push(RamBlock::new(entry.name.clone(), entry.used_length, place.page_size, memory)?);
        }
        Ok(RamBlocks::new(blocks)?)
    }
}

/// Takes the pages out that are holes in the file: they are zero and need not be read.
fn without_holes(file: &File, place: &BlockPlace, pages: &PageBitmap) {
    let (mut holes, size) = (Holes::of(file), place.page_size.bytes() as u64);
    let found: Vec<_> = pages.set_runs().collect();
    for (first, count) in found {
        for page in (first.0..first.0 + count).map(PageIndex) {
            let Some(at) = place.page_offset(page) else { continue };
            if holes.has(&(at..at + size)) {
                pages.clear(page);
            }
        }
    }
}

/// A whole machine in one file.
#[derive(Debug)]
pub struct MappedRamFile(StoredMachine);

impl MappedRamFile {
    /// Reads the file whose stream begins at `offset`, and checks everything but the pages. If the file has digests, they
    /// must fit; each page is compared with its digest when it is read.
    ///
    /// # Errors
    /// If it is not a mapped-ram file, incomplete, hostile, damaged, or the system cannot read it. [`Unsupported::Delta`] if
    /// it is a delta, which is not whole: [`StoredMachine::open`] opens it with its bases.
    pub fn open(file: File, offset: u64) -> Result<Self, Error> {
        Self::whole(ChainFile::read(file, offset, Path::new(""))?)
    }

    /// Like [`open`](Self::open), and ignores digests: for a file that is known to be damaged, to save what can be read.
    ///
    /// # Errors
    /// If it is not a mapped-ram file, incomplete, hostile, a delta, or the system cannot read it.
    pub fn open_damaged(file: File, offset: u64) -> Result<Self, Error> {
        Self::whole(ChainFile::read_damaged(file, offset, Path::new(""))?)
    }

    fn whole(file: ChainFile) -> Result<Self, Error> {
        if file.is_delta() {
            let at = Place { stream: StreamKind::File, offset: file.offset() };
            return Err(Unsupported::Delta.at(at));
        }
        Ok(Self(StoredMachine::of(vec![file])))
    }

    /// The places of the blocks, in the order of the list.
    pub fn places(&self) -> &[BlockPlace] {
        self.newest().places()
    }

    /// Where one block lies.
    pub fn place(&self, block: BlockIndex) -> Option<&BlockPlace> {
        self.newest().place(block)
    }

    /// The number of bytes in the file after the machine and its digests, usually 0. QEMU and this library ignore them: a
    /// copy may have been filled up to a whole number of blocks. The file may also have been written over a longer one.
    pub fn trailing_bytes(&self) -> u64 {
        self.newest().trailing_bytes()
    }

    /// The file, to read pages from.
    pub fn file(&self) -> &File {
        self.newest().file()
    }

    #[cfg(test)]
    pub(super) fn stream(&self) -> std::ops::Range<u64> {
        self.newest().stream()
    }
}

impl Deref for MappedRamFile {
    type Target = StoredMachine;

    fn deref(&self) -> &StoredMachine {
        &self.0
    }
}

impl From<MappedRamFile> for StoredMachine {
    fn from(file: MappedRamFile) -> Self {
        file.0
    }
}
