//! Makes a machine of a stream.
//!
//! ```text
//! Configuration ─ Blocks ─▶ layout, scratch file as a hole ─ Page, ZeroPage, Xbzrle ─▶ places ─ End ─▶ head, bitmaps, devices
//!                                                             └─ in a file: positions; only what XBZRLE changes is copied
//! ```

use std::{
    fs::File,
    io::{self, Read},
    sync::{Arc, atomic::AtomicU64},
};

use multifd::{
    channel::Stop,
    ram::{BlockIndex, PageBitmap, with_file_size_errors},
};

use super::{
    ahead::InFile,
    batch::Batch,
    input::{Counted, Home, Input},
    pages::Pages,
};
use crate::{
    error::{Error, Place, StreamKind, Unsupported},
    format::{BlockList, Command, Configuration, DevicePart, Event, SectionId, SyncMode},
    incoming::Events,
    mapped_ram::{Layout, Scattered, Shape, StoredMachine, Tail},
};

/// Reads a stream that was stored one byte after the other, as QEMU writes it with `exec:cat > FILE`.
#[derive(Debug)]
#[must_use]
pub struct Unfold<R> {
    stream: Stream<R>,
    pages: Pages,
}

#[derive(Debug)]
enum Stream<R> {
    InOrder(R),
    InFile(InFile, Home),
}

impl Unfold<io::Empty> {
    /// Of the stream that begins at `begin` of `file`, which has to allow reads at any position. Two threads read it ahead, and end
    /// when [`run`](Self::run) does. Its pages are not copied but read from the file when they are needed, so it must not be
    /// changed as long as the machine is used.
    ///
    /// # Errors
    /// If the length of the file cannot be queried, or the system starts no thread.
    pub fn in_file(file: Arc<File>, begin: u64) -> io::Result<Self> {
        let ahead = InFile::new(&file, begin)?;
        Ok(Self { stream: Stream::InFile(ahead, Home { file, begin }), pages: Pages::Keep })
    }
}

impl<R: Read> Unfold<R> {
    /// Of this stream, which begins with QEMU's magic, and all of its pages.
    pub fn new(stream: R) -> Self {
        Self { stream: Stream::InOrder(stream), pages: Pages::Keep }
    }

    /// What is kept of its pages. Default: all.
    pub fn pages(mut self, pages: Pages) -> Self {
        self.pages = pages;
        self
    }

    /// Writes the machine as a mapped-ram file to `scratch`, an empty file that is open for reading and writing, and opens it
    /// there; pages of a stream [in a file](Unfold::in_file) stay there. `read` counts the bytes of the stream. A page that the
    /// stream does not have is zero.
    ///
    /// # Errors
    /// If the stream is malformed, incomplete, or has its pages on other connections (multifd); if the scratch file cannot be
    /// written, for example because its file system is full; if `stop` has cancelled it.
    pub fn run(self, scratch: &Arc<File>, read: &AtomicU64, stop: &Stop) -> Result<StoredMachine, Error> {
        let Self { stream, pages } = self;
        match stream {
            Stream::InOrder(mut stream) => {
                unfold(Counted { input: Input::InOrder(&mut stream), read, stop }, None, pages, scratch)
            }
            Stream::InFile(ahead, home) => {
                unfold(Counted { input: Input::InFile(ahead), read, stop }, Some(home), pages, scratch)
            }
        }
    }
}

/// Reads all of a stream. `home` is where its pages stay.
fn unfold(
    stream: Counted<'_>,
    home: Option<Home>,
    pages: Pages,
    scratch: &Arc<File>,
) -> Result<StoredMachine, Error> {
    let mut events = Events::of(stream, StreamKind::Stored);
    if home.is_some() {
        events = events.without_contents(Counted::skip);
    }
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
    let mut batch = Batch::new(&blocks, pages);
    if let Some(home) = home.as_ref().filter(|_| pages == Pages::Keep) {
        batch = batch.staying_in(home.file.clone());
    }
    let found = ram(&mut events, &mut batch, home.as_ref().map(|home| home.begin))?;
    let positions = batch.into_positions();
    let ignored: Vec<BlockIndex> = if configuration.as_ref().is_some_and(|of| of.ignore_shared) {
        found.without_pages(&list)
    } else {
        Vec::new()
    };
    let footers = found.devices.has_footers();
    let shape = shape(configuration.as_ref(), section, footers, &ignored);
    let tail =
        Tail { switchover_start: found.switchover_start, devices: &found.devices, about: None, base: None };
    Layout::of(&shape, &list)?.write_around(scratch, &blocks, &tail)?;
    let file =
        scratch.try_clone().map_err(|source| io_error(at(&events), "open the scratch file again", source))?;
    let machine = StoredMachine::of_scratch(file, pages == Pages::Keep)?;
    Ok(match home {
        Some(home) if pages == Pages::Keep => machine.with(Scattered::new(home.file, positions)),
        _ => machine,
    })
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
fn begin(events: &mut Events<Counted<'_>>) -> Result<(Option<Configuration>, SectionId, BlockList), Error> {
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

/// Reads everything after the block list. `begin` is where the stream begins in the file in which its pages stay.
fn ram(events: &mut Events<Counted<'_>>, batch: &mut Batch<'_>, begin: Option<u64>) -> Result<Found, Error> {
    let (mut with_data, mut switchover_start) = (false, false);
    let arrived = PageBitmap::new(batch.blocks().len() as u64);
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
                match begin {
                    Some(begin) => {
                        let length = batch.blocks().get(block).map_or(0, |block| block.page_size().bytes());
                        batch.page_at(block, page, begin + events.here().offset - length as u64);
                    }
                    None => written(batch.page(block, page, bytes))?,
                }
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

const WRITE: &str = "write the scratch file";
