//! Reads pages and writes them as records.

use std::{
    io::{self, Write},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use multifd::{
    channel::{Stream, Wake},
    postcopy::PageRun,
    ram::{AlignedBuffer, BlockIndex, Memory, PageIndex, RamBlock, RamBlocks},
};

use super::opening::{RamSection, end_of_records};
use crate::{
    error::Usage,
    format::{BlockList, CurrentBlock, Put, Record},
};

/// Pages that were read, one after the other.
#[derive(Default)]
pub(super) struct ReadPages {
    bytes: AlignedBuffer,
    /// For each page: whether it has contents, is zero, or could not be read.
    pages: Vec<ReadPage>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReadPage {
    Normal,
    Zero,
    Unreadable,
}

/// A page that could not be read.
#[derive(Debug)]
pub(super) struct Unreadable {
    pub(super) block: BlockIndex,
    pub(super) page: PageIndex,
    pub(super) error: io::Error,
}

impl ReadPages {
    /// Reads a run. Returns the first page that could not be read, and how many could not.
    pub(super) fn read(&mut self, block: &RamBlock, run: PageRun) -> Option<(Unreadable, u64)> {
        let page_size = block.page_size().bytes();
        let count = usize::try_from(run.count).unwrap_or(usize::MAX);
        let needed = count.saturating_mul(page_size);
        if self.bytes.len() < needed {
            self.bytes = AlignedBuffer::new(needed);
        }
        self.pages.clear();
        let present = |page: &u64| block.is_present(PageIndex(*page));
        let end = run.first.0 + run.count;
        let mut bad: Option<(Unreadable, u64)> = None;
        let mut page = run.first.0;
        while page < end {
            let here = present(&page);
            let stretch = (page..end).take_while(|page| present(page) == here).count();
            if here {
                let first = self.pages.len() * page_size;
                let bytes = self.bytes.get_mut(first..first + stretch * page_size).unwrap_or_default();
                self.pages.resize(self.pages.len() + stretch, ReadPage::Normal);
                if let Err(error) = load(block, PageIndex(page), stretch as u64, bytes) {
                    let error = (stretch == 1).then_some(error);
                    self.read_singly(block, run.block, page, stretch, error, &mut bad);
                }
            } else {
                self.pages.resize(self.pages.len() + stretch, ReadPage::Zero);
            }
            page += stretch as u64;
        }
        if matches!(block.memory(), Memory::Mapped(_)) {
            for (kind, bytes) in self.pages.iter_mut().zip(self.bytes.chunks(page_size)) {
                if *kind == ReadPage::Normal && bytes.iter().all(|byte| *byte == 0) {
                    *kind = ReadPage::Zero;
                }
            }
        }
        bad
    }

    /// Reads the last `stretch` pages one by one, because they could not be read together.
    fn read_singly(
        &mut self,
        block: &RamBlock,
        index: BlockIndex,
        first: u64,
        stretch: usize,
        known: Option<io::Error>,
        bad: &mut Option<(Unreadable, u64)>,
    ) {
        let page_size = block.page_size().bytes();
        let start = self.pages.len() - stretch;
        let bytes = self.bytes.chunks_mut(page_size).skip(start);
        let pages = (first..).map(PageIndex).zip(self.pages.iter_mut().skip(start)).zip(bytes);
        let mut known = known;
        for ((page, kind), bytes) in pages {
            let read = known.take().map_or_else(|| load(block, page, 1, bytes), Err);
            if let Err(error) = read {
                *kind = ReadPage::Unreadable;
                match bad {
                    Some((_, more)) => *more += 1,
                    None => *bad = Some((Unreadable { block: index, page, error }, 1)),
                }
            }
        }
    }
}

fn load(block: &RamBlock, first: PageIndex, count: u64, bytes: &mut [u8]) -> io::Result<()> {
    if matches!(block.memory(), Memory::MappedRam(_)) {
        return block.load_direct(first, count, bytes);
    }
    let pages = bytes.chunks_mut(block.page_size().bytes());
    (first.0..).map(PageIndex).zip(pages).try_for_each(|(page, bytes)| block.load(page, bytes))
}

/// What was written.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Written {
    pub(super) normal: u64,
    pub(super) zero: u64,
    pub(super) bytes: u64,
}

/// A connection that carries pages.
pub(super) struct PageWriter<'a> {
    list: &'a BlockList,
    /// The section of main; `None` on the connection for requested pages, which has only records.
    section: Option<RamSection>,
    out: Mutex<Out>,
}

struct Out {
    stream: Stream,
    current: CurrentBlock,
    buffer: Vec<u8>,
}

impl<'a> PageWriter<'a> {
    pub(super) fn main(stream: Stream, list: &'a BlockList, section: RamSection) -> Self {
        Self::new(stream, list, Some(section))
    }

    pub(super) fn of_requests(stream: Stream, list: &'a BlockList) -> Self {
        Self::new(stream, list, None)
    }

    fn new(stream: Stream, list: &'a BlockList, section: Option<RamSection>) -> Self {
        let out = Out { stream, current: CurrentBlock::default(), buffer: Vec::new() };
        Self { list, section, out: Mutex::new(out) }
    }

    /// The waker that shuts the connection down.
    pub(super) fn waker(&self) -> Arc<dyn Wake> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner).stream.waker()
    }

    /// Limits what waits in the connection. Returns its shortest round trip.
    pub(super) fn limit_backlog(&self, limit: Option<u64>) -> Option<Duration> {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        out.stream.limit_backlog(limit);
        out.stream.round_trip()
    }

    /// Writes other bytes of the stream.
    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        out.stream.write_all(bytes)
    }

    /// Writes the pages of a run that were read. If one of them could not be read, only the others of its run are written,
    /// and none if they are a host page of the destination, which is placed whole.
    pub(super) fn send(&self, run: PageRun, read: &ReadPages, whole: bool) -> io::Result<Written> {
        let mut written = Written::default();
        if whole && read.pages.contains(&ReadPage::Unreadable) {
            return Ok(written);
        }
        let page_size = self.list.page_size().bytes();
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        let Out { stream, current, buffer } = &mut *out;
        buffer.clear();
        self.section.inspect(|section| section.begin(buffer));
        let pages = (run.first.0..).map(PageIndex).zip(&read.pages).zip(read.bytes.chunks(page_size));
        for ((page, kind), bytes) in pages {
            match kind {
                ReadPage::Normal => {
                    Record::Page(run.block, page).encode(self.list, current, buffer).map_err(no_such_page)?;
                    buffer.put(bytes);
                    written.normal += 1;
                }
                ReadPage::Zero => {
                    Record::Zero(run.block, page).encode(self.list, current, buffer).map_err(no_such_page)?;
                    written.zero += 1;
                }
                ReadPage::Unreadable => {}
            }
        }
        self.section.inspect(|section| section.end(buffer));
        stream.write_all(buffer)?;
        written.bytes = buffer.len() as u64;
        Ok(written)
    }

    /// Writes that no more pages follow on the connection for requested pages.
    pub(super) fn end(&self) -> io::Result<()> {
        let mut bytes = Vec::new();
        end_of_records(&mut bytes);
        self.write(&bytes)
    }
}

/// The schedule has only pages of the list.
fn no_such_page(usage: Usage) -> io::Error {
    io::Error::other(usage)
}

/// The error of a page that could not be read.
pub(super) fn unread(blocks: &RamBlocks, bad: Unreadable, pages: u64) -> multifd::Error {
    let Unreadable { block, page, error } = bad;
    let place = blocks.get(block).map_or_else(
        || "a page".to_owned(),
        |block| {
            let offset = block.offset_of(page).map_or(u64::MAX, |offset| offset.0);
            format!("block {:?} at offset {offset:#x}", block.name())
        },
    );
    let more = if pages > 1 { format!(", the first of {pages} unreadable pages") } else { String::new() };
    multifd::Error::io(format!("read {place}{more}"), error)
}
