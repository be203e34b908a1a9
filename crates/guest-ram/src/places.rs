//! The places of a block's pages in a file.

use std::{fs::File, io, sync::Arc};

use crate::{Access, DirectFile, Mapping, PageBitmap};

/// The places of a block's pages in a mapped-ram file, and which of them count.
///
/// **Warning:** only `present` says what a page is. A page without its bit is zero, whatever bytes the file has in its
/// place, and to [clear](crate::RamBlock::clear) a page changes its bit alone. A file that something else reads as plain RAM, such
/// as a guest that maps it, would keep old bytes there: that is memory, made by [`Mapping::of_file`].
#[derive(Debug)]
pub struct Places {
    /// Shared by all blocks in it.
    pub(crate) file: Arc<File>,
    /// How channels go past the page cache, if they do; main never does.
    pub(crate) direct: Option<Arc<DirectFile>>,
    /// Where the block's first byte lies, in bytes from the beginning of the file.
    pub(crate) offset: u64,
    /// A bit for each page of the block that is in the file; all others are zero.
    pub(crate) present: PageBitmap,
    /// The same bytes mapped for reading, if channels are to send from there instead of reading the file.
    pub(crate) mapped: Option<Mapping>,
}

impl Places {
    /// Places in `file`, the first at `offset` bytes from its beginning, with a bit for each page that is there: all others
    /// are zero. They are reached through the page cache.
    pub fn new(file: Arc<File>, offset: u64, present: PageBitmap) -> Self {
        Self { file, direct: None, offset, present, mapped: None }
    }

    /// Has channels go past the page cache, if there is a way; main never does.
    #[must_use]
    pub fn past_cache(mut self, direct: Option<Arc<DirectFile>>) -> Self {
        self.direct = direct;
        self
    }

    /// Maps the first `len` bytes for reading, so that channels send from there instead of reading the file. They are touched
    /// by system calls alone, so a file that is cut shorter meanwhile is an error and no signal.
    ///
    /// # Errors
    /// As [`Mapping::of_file`].
    pub fn map(mut self, len: u64) -> io::Result<Self> {
        self.mapped = Some(Mapping::of_file(&self.file, self.offset, len, Access::Read)?);
        Ok(self)
    }

    /// Where the first page lies, in bytes from the beginning of the file.
    pub fn offset(&self) -> u64 {
        self.offset
    }
}
