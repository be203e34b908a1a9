//! The places of a block's pages in a file.

use std::{fs::File, io, sync::Arc};

use crate::{Access, DirectFile, Mapping, PageBitmap, PageDigests};

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
}

impl Places {
    /// Creates places in `file`, the first at `offset` bytes from its beginning. `present` has a bit for each page that
    /// is in the file; all others are zero. The page cache is used.
    pub fn new(file: Arc<File>, offset: u64, present: PageBitmap) -> Self {
        Self { file, direct: None, offset, present, mapped: None, digests: None }
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
    /// As [`Mapping::of_file`].
    pub fn map(mut self, len: u64) -> io::Result<Self> {
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
}
