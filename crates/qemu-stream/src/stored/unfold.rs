//! Makes a mapped-ram file of a stream.
//!
//! ```text
//! Configuration ─ Blocks ─▶ layout, scratch file as a hole ─ Page, ZeroPage, Xbzrle ─▶ places ─ End ─▶ head, bitmaps, devices
//! ```

use std::{
    fs::File,
    io::{self, Read},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use multifd::{
    channel::Stop,
    ram::{BlockIndex, PageBitmap, RamBlocks, with_file_size_errors},
};

use super::{batch::Batch, pages::Pages};
use crate::{
    error::{Error, Place, StreamKind, Unsupported},
    format::{BlockList, Command, Configuration, DevicePart, Event, SectionId, SyncMode},
    incoming::Events,
    mapped_ram::{Layout, Shape, StoredMachine, Tail},
};

/// Reads a stream that was stored one byte after the other, as QEMU writes it with `exec:cat > FILE`.
#[derive(Debug)]
#[must_use]
pub struct Unfold<R> {
    stream: R,
    pages: Pages,
}

impl<R: Read> Unfold<R> {
    /// Of this stream, which begins with QEMU's magic, and all of its pages.
    pub fn new(stream: R) -> Self {
        Self { stream, pages: Pages::Keep }
    }

    /// What is kept of its pages. Default: all.
    pub fn pages(mut self, pages: Pages) -> Self {
        self.pages = pages;
        self
    }

    /// Writes the machine as a mapped-ram file to `scratch`, an empty file that is open for reading and writing, and opens it
    /// there. `read` counts the bytes of the stream. A page that the stream does not have is zero.
    ///
    /// # Errors
    /// If the stream is malformed, incomplete, or has its pages on other connections (multifd); if the scratch file cannot be
    /// written, for example because its file system is full; if `stop` has cancelled it.
    pub fn run(self, scratch: &Arc<File>, read: &AtomicU64, stop: &Stop) -> Result<StoredMachine, Error> {
        let Self { stream, pages } = self;
        let mut events = Events::of(Counted { stream, read, stop }, StreamKind::Stored);
        let (configuration, section, list) = begin(&mut events)?;
        let draft = Layout::of(&shape(configuration.as_ref(), section, true, &[]), &list)?;
        let at = |events: &Events<_>| events.here();
        with_file_size_errors(|| scratch.set_len(0).and_then(|()| scratch.set_len(draft.tail_offset())))
            .map_err(|source| io_error(at(&events), "extend the scratch file", source))?;
        let blocks = draft.ram_blocks(scratch, None).map_err(|error| Error::Destination {
            at: at(&events),
            what: "its blocks",
            source: error.into(),
        })?;
        let found = ram(&mut events, &blocks, pages)?;
        let ignored: Vec<BlockIndex> = if configuration.as_ref().is_some_and(|of| of.ignore_shared) {
            found.without_pages(&list)
        } else {
            Vec::new()
        };
        let footers = found.devices.has_footers();
        let shape = shape(configuration.as_ref(), section, footers, &ignored);
        let tail = Tail {
            switchover_start: found.switchover_start,
            devices: &found.devices,
            about: None,
            base: None,
        };
        Layout::of(&shape, &list)?.write_around(scratch, &blocks, &tail)?;
        let file = scratch
            .try_clone()
            .map_err(|source| io_error(at(&events), "open the scratch file again", source))?;
        StoredMachine::of_scratch(file, pages == Pages::Keep)
    }
}

/// The parts of a stream besides its pages.
struct Found {
    devices: DevicePart,
    switchover_start: bool,
    /// The blocks of which pages have arrived.
    arrived: PageBitmap,
}

impl Found {
    fn without_pages(&self, list: &BlockList) -> Vec<BlockIndex> {
        let is_missing = |index: &BlockIndex| !self.arrived.contains(number(*index));
        list.iter().map(|(index, _)| index).filter(is_missing).collect()
    }
}

/// Reads up to the block list.
fn begin<R: Read>(events: &mut Events<R>) -> Result<(Option<Configuration>, SectionId, BlockList), Error> {
    let mut configuration = None;
    loop {
        let event = events.next()?;
        match event {
            Event::Configuration(found) => configuration = found.cloned(),
            Event::Blocks { section, blocks } => return Ok((configuration, section, blocks.clone())),
            _ => {}
        }
    }
}

/// Reads everything after the block list.
fn ram<R: Read>(events: &mut Events<R>, blocks: &RamBlocks, pages: Pages) -> Result<Found, Error> {
    let mut batch = Batch::new(blocks, pages);
    let (mut with_data, mut switchover_start) = (false, false);
    let arrived = PageBitmap::new(blocks.len() as u64);
    loop {
        let at = events.here();
        let written = |result: io::Result<()>| result.map_err(|source| io_error(at, WRITE, source));
        match events.next()? {
            // Only a source with multifd marks its sync points like this.
            Event::SyncMode(SyncMode::Round) => {
                return Err(elsewhere(at));
            }
            Event::Page { block, page, bytes } => {
                with_data = true;
                arrived.set(number(block));
                written(batch.page(block, page, bytes))?;
            }
            Event::ZeroPage { block, page } => {
                arrived.set(number(block));
                written(batch.zero(block, page))?;
            }
            Event::Xbzrle { block, page, delta } => {
                batch
                    .change(block, page, |bytes| delta.apply(bytes).map_err(Changed::Delta))
                    .map_err(|error| error.at(at))?;
            }
            Event::Command(Command::SwitchoverStart) => switchover_start = true,
            Event::End(devices) => {
                written(batch.flush())?;
                // A source with multifd of a machine type up to 8.0 shows in no other way where its pages are.
                if !with_data {
                    return Err(elsewhere(at));
                }
                return Ok(Found { devices: *devices, switchover_start, arrived });
            }
            _ => {}
        }
    }
}

/// The error of a stream whose source had multifd on.
fn elsewhere(at: Place) -> Error {
    let (what, capability) =
        ("a stream whose pages went over other connections, so that this file lacks them", "multifd");
    Unsupported::Capability { what, capability }.at(at)
}

/// The bit of a block.
fn number(block: BlockIndex) -> multifd::ram::PageIndex {
    multifd::ram::PageIndex(block.0 as u64)
}

/// Why a page could not be changed.
enum Changed {
    Delta(Error),
    Io(io::Error),
}

impl From<io::Error> for Changed {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl Changed {
    fn at(self, at: Place) -> Error {
        match self {
            Self::Delta(error) => error,
            Self::Io(source) => io_error(at, WRITE, source),
        }
    }
}

fn shape<'a>(
    configuration: Option<&'a Configuration>,
    section: SectionId,
    footers: bool,
    ignored: &'a [BlockIndex],
) -> Shape<'a> {
    Shape { configuration, section, offset: 0, footers, ignored, sync_mode: None }
}

/// An error of the scratch file. `at` is how far the stream was read.
fn io_error(at: Place, doing: &'static str, source: io::Error) -> Error {
    Error::Io { at: Place { stream: StreamKind::File, ..at }, doing, source }
}

/// A stream whose bytes are counted, and that ends with an error when the command is cancelled.
struct Counted<'a, R> {
    stream: R,
    read: &'a AtomicU64,
    stop: &'a Stop,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.stop.is_stopped() {
            return Err(io::Error::other("it was cancelled"));
        }
        let count = self.stream.read(into)?;
        // Relaxed: it is only displayed.
        self.read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

const WRITE: &str = "write the scratch file";
