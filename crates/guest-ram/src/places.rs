//! The places of a block's pages in a file, or in several files.

use std::{error, fmt, fs::File, io, iter, os::unix::fs::FileExt, ptr, slice, sync::Arc};

use rustix::fs::{FallocateFlags, fallocate};

use crate::{
    Access, DirectFile, Mapping, PageBitmap, PageDigests, PageIndex, PagePositions, PageSize,
    file::{explained, size_limit},
    since::{BasePages, Since, Unwritten},
};

/// The places of a block's pages in a mapped-ram file, and which of them are used.
///
/// **Warning:** only `present` defines what a page contains. A page without its bit is zero, regardless of the bytes in
/// the file, and [clearing](crate::RamBlock::clear) a page changes only its bit. A file that something else reads as
/// plain RAM, such as a guest that maps it, would keep old bytes there. Use [`Mapping::of_file`] for such a file.
#[derive(Debug)]
pub struct Places {
    /// The file, shared by all blocks in it.
    pub(crate) file: Arc<File>,
    /// Direct I/O for channels, if used; main never uses it.
    pub(crate) direct: Option<Arc<DirectFile>>,
    /// The position of the block's first byte, in bytes from the beginning of the file.
    pub(crate) offset: u64,
    /// One bit for each page of the block: set if the page is in the file, otherwise the page is zero.
    pub(crate) present: PageBitmap,
    /// The same bytes mapped for reading, if channels send from the mapping instead of reading the file.
    pub(crate) mapped: Option<Mapping>,
    /// Digests of the pages that are in the file.
    pub(crate) digests: Option<Arc<PageDigests>>,
    /// The name of the file for errors, if it is one of several.
    pub(crate) name: Option<Arc<str>>,
    /// The files that have the pages, if they are several. `present` has the pages of all of them.
    layers: Vec<Places>,
    /// What the file is compared with while it is written, if it has only pages that differ.
    pub(crate) since: Option<Since>,
    /// Where each page is, if they are in any order: `offset` means nothing then.
    positions: Option<Arc<PagePositions>>,
}

/// A run of pages that are all in one file, or all in none.
pub(crate) struct Run<'a> {
    pub(crate) of: Option<&'a Places>,
    pub(crate) first: PageIndex,
    pub(crate) count: u64,
}

impl Places {
    /// Creates places in `file`, the first at `offset` bytes from its beginning. `present` has a bit for each page that
    /// is in the file; all others are zero. The page cache is used.
    pub fn new(file: Arc<File>, offset: u64, present: PageBitmap) -> Self {
        Self {
            file,
            direct: None,
            offset,
            present,
            mapped: None,
            digests: None,
            name: None,
            layers: Vec::new(),
            since: None,
            positions: None,
        }
    }

    /// The places of a block of `pages` pages in a file that has them in any order, as a stream has. They can be read and not be
    /// written, through the page cache.
    pub fn scattered(file: Arc<File>, pages: u64, positions: Arc<PagePositions>) -> Self {
        let present = positions.present(pages);
        Self { positions: Some(positions), ..Self::new(file, 0, present) }
    }

    /// Joins the places of the same block in several files, newest first: a page is where the first of them has it, and zero
    /// if none has it. The pages can be read and not be written. `None` if there are no layers, or their numbers of pages
    /// differ.
    pub fn layered(mut layers: Vec<Self>) -> Option<Self> {
        if layers.len() == 1 {
            return layers.pop();
        }
        let first = layers.first()?;
        let present = PageBitmap::new(first.present.pages());
        for layer in &layers {
            if layer.present.pages() != present.pages() {
                return None;
            }
            layer.present.set_words().for_each(|(word, bits)| present.merge_at(word, [bits]));
        }
        let joined = Self::new(first.file.clone(), first.offset, present);
        Some(Self { layers, ..joined })
    }

    /// Gives the file a name for errors: which of several files is damaged or cannot be read.
    #[must_use]
    pub fn named(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Makes the file one that has only the pages that differ from those of `base`, which is an earlier state of the same
    /// block, of any length. `unwritten` is what a page is that is neither written nor
    /// [cleared](crate::RamBlock::clear). A page that is written is left out if its bytes equal those that are read from the
    /// base. [`RamBlock::settle`](crate::RamBlock::settle) completes the pages that became zero.
    ///
    /// If the pages of the base have another size, everything is stored.
    #[must_use]
    pub fn since(mut self, base: Arc<dyn BasePages>, unwritten: Unwritten) -> Self {
        self.since = Some(Since::new(base, self.present.pages(), unwritten));
        self
    }

    /// Makes channels bypass the page cache, if `direct` is given; main never does.
    #[must_use]
    pub fn past_cache(mut self, direct: Option<Arc<DirectFile>>) -> Self {
        self.direct = direct;
        self
    }

    /// Maps the first `len` bytes for reading, so that channels send from the mapping instead of reading the file. Only
    /// system calls access it, so a file that is truncated in the meantime causes an error and no signal.
    ///
    /// # Errors
    /// As [`Mapping::of_file`]; if its pages are [in any order](Self::scattered).
    pub fn map(mut self, len: u64) -> io::Result<Self> {
        if self.is_scattered() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "pages in a stream have no order"));
        }
        self.mapped = Some(Mapping::of_file(&self.file, self.offset, len, Access::Read)?);
        Ok(self)
    }

    /// Records a digest of every page that is written, and compares every page that is read with its digest. Pages sent
    /// from a [mapping](Self::map) of the file are not compared.
    #[must_use]
    pub fn with_digests(mut self, digests: Option<Arc<PageDigests>>) -> Self {
        self.digests = digests;
        self
    }

    /// The digests of its pages, if there are some.
    pub fn digests(&self) -> Option<&PageDigests> {
        self.digests.as_deref()
    }

    /// The position of the first page, in bytes from the beginning of the file.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Which of the layers has `page`, and the position of the page in its file. Without layers the number is 0. `None` if no
    /// file has it.
    pub(crate) fn position(&self, page: PageIndex, start: u64) -> Option<(usize, u64)> {
        let all = if self.layers.is_empty() { slice::from_ref(self) } else { &*self.layers };
        let (number, of) = all.iter().enumerate().find(|(_, places)| places.present.contains(page))?;
        let at = match &of.positions {
            Some(positions) => positions.get(page)?,
            None => of.offset + start,
        };
        Some((number, at))
    }

    /// Whether pages can be written.
    pub(crate) fn is_writable(&self) -> bool {
        self.layers.is_empty() && !self.is_scattered()
    }

    /// Whether its pages are in any order, so that a run of them cannot be read as one piece.
    pub(crate) fn is_scattered(&self) -> bool {
        self.positions.is_some()
    }

    /// Writes whole pages from `first` on, or those of them that differ from the base, if there is one.
    pub(crate) fn store(
        &self,
        first: PageIndex,
        bytes: &[u8],
        page_size: PageSize,
        channel: bool,
    ) -> io::Result<()> {
        if !self.is_writable() {
            let why = "pages in several files, or in a stream, can only be read";
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        let Some(since) = &self.since else { return self.put(first, bytes, page_size, channel) };
        for (is_equal, first, bytes) in since.split(first, bytes, page_size) {
            let count = (bytes.len() / page_size.bytes()) as u64;
            if is_equal {
                self.present.clear_run(first, count);
                since.is_as_base(first, count);
            } else {
                self.put(first, bytes, page_size, channel)?;
            }
        }
        Ok(())
    }

    fn put(&self, first: PageIndex, bytes: &[u8], page_size: PageSize, channel: bool) -> io::Result<()> {
        let Self { file, direct, offset, digests, .. } = self;
        let at = offset + page_size.offset_of(first).map_or(u64::MAX, |offset| offset.0);
        // First, because the bytes have just arrived in the processor's cache.
        if let Some(digests) = digests {
            digests.note(first, bytes);
        }
        size_limit::held(|| match direct.as_deref().filter(|_| channel) {
            Some(direct) => direct.write_all_at(file, bytes, at),
            None => file.write_all_at(bytes, at),
        })?;
        self.note_written(first, (bytes.len() / page_size.bytes()) as u64);
        Ok(())
    }

    /// Records that pages were written.
    pub(crate) fn note_written(&self, first: PageIndex, count: u64) {
        self.present.set_run(first, count);
        if let Some(since) = &self.since {
            since.is_as_base(first, count);
        }
    }

    /// Records that pages are zero.
    pub(crate) fn clear_run(&self, first: PageIndex, count: u64) {
        self.present.clear_run(first, count);
        if let Some(since) = &self.since {
            since.is_zero(first, count);
        }
    }

    /// Makes pages that became zero since the base present, as zeros.
    pub(crate) fn settle(&self, page_size: PageSize) -> io::Result<()> {
        let Some(since) = &self.since else { return Ok(()) };
        let zeros = vec![0; ZEROS];
        for (first, count) in since.zeroed_runs() {
            let start = page_size.offset_of(first).map_or(u64::MAX, |offset| offset.0);
            let length = count * page_size.bytes() as u64;
            size_limit::held(|| zero(&self.file, self.offset + start, length, &zeros))?;
            if let Some(digests) = &self.digests {
                let step = ZEROS / page_size.bytes();
                for at in (first.0..first.0 + count).step_by(step) {
                    let pages = usize::try_from(first.0 + count - at).unwrap_or(step).min(step);
                    digests.note(PageIndex(at), zeros.get(..pages * page_size.bytes()).unwrap_or_default());
                }
            }
            self.present.set_run(first, count);
        }
        since.is_settled();
        Ok(())
    }

    /// The places that have `page`. Without layers these are all.
    pub(crate) fn of(&self, page: PageIndex) -> Option<&Self> {
        match &*self.layers {
            [] => Some(self),
            layers => layers.iter().find(|layer| layer.present.contains(page)),
        }
    }

    /// `count` pages from `first` on as runs that are in one file each.
    pub(crate) fn runs(&self, first: PageIndex, count: u64) -> impl Iterator<Item = Run<'_>> {
        let (mut at, end) = (first.0, first.0 + count);
        iter::from_fn(move || {
            let start = PageIndex(at);
            let of = (at < end).then(|| self.of(start))?;
            let same = |page: &u64| match (self.of(PageIndex(*page)), of) {
                (Some(one), Some(other)) => ptr::eq(one, other),
                (one, other) => one.is_none() && other.is_none(),
            };
            at = match &*self.layers {
                [] => end,
                _ => (at + 1..end).find(|page| !same(page)).unwrap_or(end),
            };
            Some(Run { of, first: start, count: at - start.0 })
        })
    }

    /// Reads pages from `first` on. What `buffer` has for a page that is not present is of no meaning.
    pub(crate) fn read(
        &self,
        buffer: &mut [u8],
        first: PageIndex,
        page_size: PageSize,
        channel: bool,
    ) -> io::Result<()> {
        let at = self.offset + page_size.offset_of(first).map_or(u64::MAX, |offset| offset.0);
        let read = match (&self.positions, &self.direct) {
            (Some(positions), _) => positions.read(&self.file, first, page_size, buffer),
            (None, Some(direct)) if channel => direct.read_exact_at(&self.file, buffer, at),
            (None, _) => self.file.read_exact_at(buffer, at),
        };
        read.map_err(|error| self.explain(error))
    }

    /// The error of a read, with the name of the file if it is one of several.
    pub(crate) fn explain(&self, error: io::Error) -> io::Error {
        let source = explained(error);
        match &self.name {
            Some(name) => io::Error::new(source.kind(), OfFile { name: name.clone(), source }),
            None => source,
        }
    }
}

/// Makes a part of the file zero, as a hole if the file system has holes.
fn zero(file: &File, at: u64, length: u64, zeros: &[u8]) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    if fallocate(file, flags, at, length).is_ok() {
        return Ok(());
    }
    let mut done = 0;
    while done < length {
        let piece = usize::try_from(length - done).map_or(zeros, |rest| zeros.get(..rest).unwrap_or(zeros));
        file.write_all_at(piece, at + done)?;
        done += piece.len() as u64;
    }
    Ok(())
}

/// The number of zeros that are written at once, a multiple of every page size.
const ZEROS: usize = 256 << 10;

/// The file that cannot be read.
#[derive(Debug)]
struct OfFile {
    name: Arc<str>,
    source: io::Error,
}

impl fmt::Display for OfFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot read file {:?}", self.name)
    }
}

impl error::Error for OfFile {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        Some(&self.source)
    }
}
