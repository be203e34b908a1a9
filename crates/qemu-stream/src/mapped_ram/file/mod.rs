//! Reads one mapped-ram file, a whole machine or a delta: everything but the pages, which are read from their places later.
//!
//! The file may be ours or QEMU's and is untrusted until it is checked: every place that it names must lie in it and
//! after the one before, so that no two overlap. Bytes after the end of the machine are ignored, as QEMU does. A file
//! without this end is refused: it was being written when its
//! writer died, and its bitmaps are not valid.

mod devices;

use std::{
    fs::File,
    io::{self, Read},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use multifd::ram::{BlockIndex, BlockName, Digest, PageBitmap, PageDigests, PageSize};

use devices::Devices;

use super::{
    BITMAP_PIECE, BlockPlace, WORD,
    access::io_error,
    appendix::{Appendix, BaseName, FileDigests, marked_end},
    header::BlockHeader,
    note::Note,
};
use crate::{
    error::{Error, Malformed, Place, StreamKind, Unsupported, Usage, Violation},
    format::{
        BlockEntry, BlockList, Command, Configuration, CurrentBlock, DevicePart, EarlyPart, ListReader,
        Reader, Record, Section, SectionId, SyncMode, decode_footer, decode_header_of_file, footer_follows,
    },
    refuse,
};

/// One file of a machine: a whole machine, or a delta. Its bitmaps say which pages *this file* has.
#[derive(Debug)]
pub struct ChainFile {
    file: Arc<File>,
    path: PathBuf,
    configuration: Option<Configuration>,
    section: SectionId,
    blocks: BlockList,
    places: Vec<BlockPlace>,
    switchover_start: bool,
    sync_mode: Option<SyncMode>,
    devices: DevicePart,
    trailing: u64,
    /// Where the stream begins and ends.
    stream: Range<u64>,
    is_delta: bool,
    /// Whether pages that are read are compared with their digests.
    compares: bool,
    appendix: Option<Appendix>,
}

impl ChainFile {
    /// Reads a file that may be damaged: without its appendix, unless it is a delta, which has its base there.
    pub(super) fn read_damaged(file: File, offset: u64, path: &Path) -> Result<Self, Error> {
        let mut read = Self::read_stream(file, offset, path)?;
        if read.is_delta {
            read.read_appendix()?;
            read.compares = false;
        }
        Ok(read)
    }

    /// Reads a file with its digests, and compares everything but the pages with them.
    pub(super) fn read(file: File, offset: u64, path: &Path) -> Result<Self, Error> {
        let mut read = Self::read_stream(file, offset, path)?;
        read.read_appendix()?;
        if let Some(digests) = read.file_digests() {
            digests.check_frame(&read.file, read.stream.clone(), &read.places)?;
        }
        Ok(read)
    }

    /// Reads a base of a file that may be damaged. It is not compared, but it must be the right one.
    pub(super) fn read_damaged_base(file: File, offset: u64, path: &Path) -> Result<Self, Error> {
        let mut read = Self::read_stream(file, offset, path)?;
        read.read_appendix()?;
        read.compares = false;
        Ok(read)
    }

    fn read_appendix(&mut self) -> Result<(), Error> {
        let Self { file, stream, places, .. } = &*self;
        let length =
            file.metadata().map_err(|source| io_error(source, stream.start, "find its length"))?.len();
        let appendix = Appendix::read(file, (stream.start, stream.end), length, places)?;
        let base = appendix.as_ref().and_then(|appendix| appendix.base.as_ref());
        if self.is_delta && (base.is_none() || appendix.as_ref().is_none_or(|found| found.digests.is_none()))
        {
            let at = Place { stream: StreamKind::File, offset: stream.end };
            return Err(Malformed::Damaged("appendix of a delta, which names its base").at(at));
        }
        self.trailing -= appendix.as_ref().map_or(0, |appendix| appendix.length);
        self.compares = appendix.as_ref().is_some_and(|appendix| appendix.digests.is_some());
        self.appendix = appendix;
        Ok(())
    }

    fn read_stream(file: File, offset: u64, path: &Path) -> Result<Self, Error> {
        let length = file.metadata().map_err(|source| io_error(source, offset, "find its length"))?.len();
        let mut parser = Parser {
            r: Reader::with_capacity(Cursor { file: &file, at: 0 }, StreamKind::File, BUFFER),
            file: &file,
            length,
            footers: true,
            early: EarlyPart::default(),
        };
        parser.jump(offset);
        let (is_delta, configuration) = parser.configuration()?;
        let section = parser.start()?;
        let (blocks, places) = parser.blocks(configuration.as_ref())?;
        parser.first_eos(&blocks, section)?;
        let switchover_start = parser.rest_of_ram(&blocks, section)?;
        let note = Note::read(&file, &places);
        let end = note.and_then(|note| offset.checked_add(note.length));
        let end = end.or_else(|| marked_end(&file, length, offset));
        let Parser { r, footers, early, .. } = parser;
        let devices = Devices { file: &file, at: r.position(), length, footers, early };
        let (devices, end) = devices.read(end)?;
        let trailing = length.saturating_sub(end);
        let sync_mode = note.and_then(|note| note.sync_mode);
        Ok(Self {
            path: path.to_owned(),
            configuration,
            section,
            blocks,
            places,
            switchover_start,
            sync_mode,
            devices,
            trailing,
            stream: offset..end,
            is_delta,
            compares: false,
            appendix: None,
            file: Arc::new(file),
        })
    }

    /// The path at which it was opened; empty if there was none.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the machine begins in the file, in bytes.
    pub fn offset(&self) -> u64 {
        self.stream.start
    }

    /// Whether the file has only the pages that differ from its base.
    pub fn is_delta(&self) -> bool {
        self.is_delta
    }

    /// The base of a delta; `None` for a whole machine.
    pub fn base(&self) -> Option<&BaseName> {
        self.appendix.as_ref()?.base.as_ref().filter(|_| self.is_delta)
    }

    /// What identifies the machine: a digest of everything that is read of the file, and of its bases. `None` without
    /// digests, or if the file was opened as damaged. A digest of this library finds accidents, not an attacker.
    pub fn root(&self) -> Option<Digest> {
        self.appendix.as_ref()?.root()
    }

    /// The configuration; `None` for machine types up to 2.3.
    pub fn configuration(&self) -> Option<&Configuration> {
        self.configuration.as_ref()
    }

    pub(super) fn sync_mode(&self) -> Option<SyncMode> {
        self.sync_mode
    }

    pub(super) fn section(&self) -> SectionId {
        self.section
    }

    /// The block list.
    pub fn blocks(&self) -> &BlockList {
        &self.blocks
    }

    /// The places of the blocks, in the order of the list.
    pub fn places(&self) -> &[BlockPlace] {
        &self.places
    }

    /// Where one block lies.
    pub fn place(&self, block: BlockIndex) -> Option<&BlockPlace> {
        self.places.get(block.0)
    }

    pub(super) fn switchover_start(&self) -> bool {
        self.switchover_start
    }

    pub(super) fn devices(&self) -> &DevicePart {
        &self.devices
    }

    /// What the writer has recorded about the capture, as JSON; `None` if it has recorded nothing, as QEMU.
    pub fn about(&self) -> Option<&str> {
        self.appendix.as_ref()?.about.as_deref()
    }

    /// Whether pages are compared with digests when they are read.
    pub fn has_digests(&self) -> bool {
        self.file_digests().is_some()
    }

    /// The number of bytes in the file after the machine and its digests, usually 0. QEMU and this library ignore them: a
    /// copy may have been filled up to a whole number of blocks. The file may also have been written over a longer one.
    pub fn trailing_bytes(&self) -> u64 {
        self.trailing
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn shared_file(&self) -> &Arc<File> {
        &self.file
    }

    /// Reads which pages of a block are in this file. In a whole machine other pages are zero, in a delta they are those of
    /// the base, regardless of the bytes in the file. The memory of the result grows with the pages that are present, not
    /// with the length of the block.
    ///
    /// # Errors
    /// If there is no such block or the system cannot read.
    pub fn bitmap(&self, block: BlockIndex) -> Result<PageBitmap, Error> {
        let place = self.place(block).ok_or(Usage::NoSuchPage { block: block.0, page: 0 })?;
        let present = PageBitmap::new(place.pages());
        if place.is_ignored() {
            return Ok(present);
        }
        let mut bytes = vec![0; BITMAP_PIECE];
        let (mut at, mut first) = (place.bitmap_offset, 0);
        let end = at + place.bitmap_length();
        while at < end {
            let length = usize::try_from(end - at).unwrap_or(BITMAP_PIECE).min(BITMAP_PIECE);
            bytes.resize(length, 0);
            self.file
                .read_exact_at(&mut bytes, at)
                .map_err(|source| io_error(source, at, "read a bitmap"))?;
            // The bits after the last page have no meaning.
            present.merge_at(first, bytes.chunks_exact(WORD).map(word));
            at += length as u64;
            first += length / WORD;
        }
        Ok(present)
    }

    pub(super) fn file_digests(&self) -> Option<&FileDigests> {
        self.appendix.as_ref()?.digests.as_ref().filter(|_| self.compares)
    }

    /// Where the stream begins and ends in the file.
    pub(super) fn stream(&self) -> Range<u64> {
        self.stream.clone()
    }

    /// The digests of a block's pages.
    pub(super) fn digests_of(&self, block: BlockIndex) -> Option<PageDigests> {
        self.file_digests()?.of(&self.file, block, self.place(block)?)
    }
}

/// Reads a stream with fixed places.
struct Parser<'a> {
    r: Reader<Cursor<'a>>,
    file: &'a File,
    length: u64,
    footers: bool,
    early: EarlyPart,
}

impl Parser<'_> {
    fn jump(&mut self, to: u64) {
        self.r.jump(Cursor { file: self.file, at: to }, to);
    }

    fn configuration(&mut self) -> Result<(bool, Option<Configuration>), Error> {
        let (is_delta, configuration) = decode_header_of_file(&mut self.r)?;
        if configuration.as_ref().is_some_and(|configuration| !configuration.mapped_ram) {
            return Err(without_places(self.r.here()));
        }
        Ok((is_delta, configuration))
    }

    /// The head of the RAM section.
    fn start(&mut self) -> Result<SectionId, Error> {
        loop {
            let at = self.r.here();
            match Section::decode(&mut self.r)? {
                Section::Start(head) if head.is_ram() => {
                    head.check_ram(at)?;
                    return Ok(head.id);
                }
                Section::Start(head) => return Err(refuse::iterative_section(&head, at)),
                Section::Full(head) => self.early.take(&mut self.r, &head, None, true)?,
                // They have no effect in a file and do no harm.
                Section::Command(Command::OpenReturnPath | Command::Ping(_)) => {}
                Section::Command(command) => return Err(refuse::command(&command, at)),
                other => return Err(misplaced(&other, "before the start of ram", at)),
            }
        }
    }

    fn blocks(
        &mut self,
        configuration: Option<&Configuration>,
    ) -> Result<(BlockList, Vec<BlockPlace>), Error> {
        let page_size = configuration.map(Configuration::page_size).unwrap_or_default();
        let ignore_shared = configuration.is_some_and(|configuration| configuration.ignore_shared);
        let mut list = ListReader::begin(&mut self.r, page_size, ignore_shared)?;
        let mut places = Vec::new();
        while let Some(entry) = list.next(&mut self.r)? {
            let at = self.r.here();
            let header = BlockHeader::decode(&mut self.r, entry);
            // Without a configuration only this shows that the next bytes are no header.
            let header = header.map_err(|error| match error {
                Error::Unsupported { what: Unsupported::MappedRamVersion { .. }, .. }
                    if configuration.is_none() =>
                {
                    without_places(at)
                }
                other => other,
            })?;
            let header_end = self.r.position();
            let place = place(entry, &header, page_size, header_end, self.length, ignore_shared, at)?;
            let next = place.pages_offset + place.used_length;
            self.r.jump(Cursor { file: self.file, at: next }, next);
            places.push(place);
        }
        Ok((list.finish(), places))
    }

    /// Reads the end of START, which shows whether there are footers.
    fn first_eos(&mut self, blocks: &BlockList, section: SectionId) -> Result<(), Error> {
        self.footers = false;
        self.eos(blocks, section)?;
        self.footers = footer_follows(&mut self.r)?;
        if self.footers { decode_footer(section, &mut self.r) } else { Ok(()) }
    }

    /// Reads the body of a part of the RAM section: only its end.
    fn eos(&mut self, blocks: &BlockList, section: SectionId) -> Result<(), Error> {
        let at = self.r.here();
        let record = match Record::decode(&mut self.r, blocks, &mut CurrentBlock::default())? {
            Record::Eos if self.footers => return decode_footer(section, &mut self.r),
            Record::Eos => return Ok(()),
            Record::Zero(..) => "ZERO",
            Record::Page(..) => "PAGE",
            Record::Xbzrle(..) => "XBZRLE",
            Record::MultifdFlush => "MULTIFD_FLUSH",
        };
        Err(Violation::Misplaced { record, place: "in a mapped-ram file" }.at(at))
    }

    /// Reads all parts up to the last; returns whether SWITCHOVER_START was among them.
    fn rest_of_ram(&mut self, blocks: &BlockList, section: SectionId) -> Result<bool, Error> {
        let mut switchover_start = false;
        loop {
            let at = self.r.here();
            let found = Section::decode(&mut self.r)?;
            let Some(found) = self.early.offer(&mut self.r, found, at, section, self.footers)? else {
                continue;
            };
            match found {
                Section::Part(_) => self.eos(blocks, section)?,
                Section::End(_) => {
                    self.eos(blocks, section)?;
                    self.early.finish(&mut self.r, self.footers)?;
                    return Ok(switchover_start);
                }
                Section::Command(Command::SwitchoverStart) => switchover_start = true,
                Section::Command(Command::OpenReturnPath | Command::Ping(_)) => {}
                Section::Command(command) => return Err(refuse::command(&command, at)),
                other => return Err(misplaced(&other, "before the end of ram", at)),
            }
        }
    }
}

/// Checks the place of a block: after its header, bitmap before pages, pages in the file. Because the next entry
/// follows the pages, nothing can overlap.
fn place(
    entry: &BlockEntry,
    header: &BlockHeader,
    page_size: PageSize,
    header_end: u64,
    file_length: u64,
    ignore_shared: bool,
    at: Place,
) -> Result<BlockPlace, Error> {
    let BlockHeader { page_size: found, bitmap_offset, pages_offset } = *header;
    if found != page_size.bytes() as u64 {
        let field = format!("block \"{}\": page size of the mapped-ram header", entry.name);
        return Err(Malformed::value(field, format!("{:#x}", page_size.bytes()), found).at(at));
    }
    let place = BlockPlace { bitmap_offset, pages_offset, used_length: entry.used_length, page_size };
    let refused = |name: &BlockName, what, offset, expected: String| {
        Err(Violation::Placement { block: name.clone(), what, at: offset, expected }.at(at))
    };
    // A block that is not sent has no bitmap.
    let ignored = ignore_shared && place.is_ignored();
    if bitmap_offset < header_end && !ignored {
        return refused(&entry.name, "bitmap", bitmap_offset, format!("after its header at {header_end:#x}"));
    }
    let bitmap_end = match bitmap_offset.checked_add(place.bitmap_length()) {
        _ if ignored => header_end,
        Some(end) => end,
        None => return refused(&entry.name, "bitmap", bitmap_offset, "inside the file".to_owned()),
    };
    if pages_offset % page_size.bytes() as u64 != 0 {
        let expected = format!("a multiple of {:#x}", page_size.bytes());
        return refused(&entry.name, "pages", pages_offset, expected);
    }
    if pages_offset < bitmap_end {
        let expected = format!("after the bitmap's end at {bitmap_end:#x}");
        return refused(&entry.name, "pages", pages_offset, expected);
    }
    match pages_offset.checked_add(entry.used_length) {
        Some(end) if end <= file_length => Ok(place),
        _ => {
            refused(&entry.name, "pages", pages_offset, format!("inside the file of {file_length:#x} bytes"))
        }
    }
}

/// The error of a stream that was written to a file one byte after the other, as to a connection.
fn without_places(at: Place) -> Error {
    let what = "migration stream in a file, without places for pages";
    Unsupported::NeedsCapability { what, capability: "mapped-ram" }.at(at)
}

fn misplaced(section: &Section, place: &'static str, at: Place) -> Error {
    Violation::Misplaced { record: section.name(), place }.at(at)
}

fn word(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
}

/// Reads from a position of a file, without moving the file's own position.
struct Cursor<'a> {
    file: &'a File,
    at: u64,
}

impl Read for Cursor<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(into, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

/// Enough for an entry and its header; little is read in vain before a jump.
const BUFFER: usize = 4 << 10;

#[cfg(test)]
mod tests;
