//! Reads pages of a block in a file into a buffer of the channel, with one read for each run of adjacent pages.
//!
//! Pages in mapped memory are not copied. If the file is read with direct I/O, the buffer provides the alignment.

use crate::{
    batch::neighbours,
    error::{Error, Result},
    ram::{AlignedBuffer, PageIndex, RamBlock},
    wire::limits::PACKET_BYTES,
};

/// The buffer, allocated when first needed.
#[derive(Default)]
pub(super) struct FilePages(AlignedBuffer);

impl FilePages {
    /// Reads the pages one after the other; `None` if they are in mapped memory.
    pub(super) fn read(&mut self, block: &RamBlock, pages: &[PageIndex]) -> Result<Option<&[u8]>> {
        if block.slice(PageIndex(0), 0).is_some() {
            return Ok(None);
        }
        if self.0.is_empty() {
            self.0 = AlignedBuffer::new(PACKET_BYTES);
        }
        let page_size = block.page_size().bytes();
        let all = &mut self.0[..pages.len() * page_size];
        let mut rest = &mut *all;
        for (first, count) in neighbours(pages.iter().copied()) {
            let length = usize::try_from(count).unwrap_or(usize::MAX).saturating_mul(page_size);
            let (run, after) = rest.split_at_mut(length);
            block.load_direct(first, count, run).map_err(|error| unread(block, first, error))?;
            rest = after;
        }
        Ok(Some(all))
    }
}

/// The error that pages from `first` on could not be read.
pub(super) fn unread(block: &RamBlock, first: PageIndex, error: std::io::Error) -> Error {
    let offset = block.offset_of(first).map_or(u64::MAX, |offset| offset.0);
    Error::io(format!("read block {:?} at offset {offset:#x}", block.name()), error)
}

/// The error that the system could not read some of these pages in their memory.
pub(super) fn fault(block: &RamBlock, pages: &[PageIndex], error: std::io::Error) -> Error {
    let is_hole = |(first, count): &(PageIndex, u64)| {
        let fault = block.explain_fault(*first, *count, std::io::ErrorKind::Other.into());
        fault.kind() == std::io::ErrorKind::PermissionDenied
    };
    let run = neighbours(pages.iter().copied()).find(is_hole);
    let (first, count) = run.unwrap_or((pages.first().copied().unwrap_or_default(), 1));
    unread(block, first, block.explain_fault(first, count, error))
}
