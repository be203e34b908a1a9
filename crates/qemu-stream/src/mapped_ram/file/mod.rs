//! Reads a mapped-ram file: everything but the pages, which are read from their places later.
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
    sync::Arc,
};

use multifd::ram::{
    BlockIndex, BlockName, DirectFile, Memory, PageBitmap, PageDigests, PageSize, Places, RamBlock, RamBlocks,
};

use devices::Devices;

use super::{
    BITMAP_PIECE, BlockPlace, WORD,
    access::io_error,
    appendix::{Appendix, FileDigests, marked_end},
    header::BlockHeader,
    note::Note,
};
use crate::{
    error::{Error, Malformed, Place, StreamKind, Unsupported, Usage, Violation},
    format::{
        BlockEntry, BlockList, Command, Configuration, CurrentBlock, DevicePart, EarlyPart, ListReader,
        Reader, Record, Section, SectionId, SyncMode, decode_footer, decode_header, footer_follows,
    },
    refuse,
};

/// A complete mapped-ram file.
#[derive(Debug)]
pub struct MappedRamFile {
    file: Arc<File>,
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
    appendix: Option<Appendix>,
}

impl MappedRamFile {
    /// Reads the file whose stream begins at `offset`, and checks everything but the pages. If the file has digests, they
    /// must fit; each page is compared with its digest when it is read.
    ///
    /// # Errors
    /// If it is not a mapped-ram file, incomplete, hostile, damaged, or the system cannot read it.
    pub fn open(file: File, offset: u64) -> Result<Self, Error> {
        let mut machine = Self::open_damaged(file, offset)?;
        let Self { file, stream, places, .. } = &machine;
        let length = file.metadata().map_err(|source| io_error(source, offset, "find its length"))?.len();
        let appendix = Appendix::read(file, (stream.start, stream.end), length, places)?;
        if let Some(digests) = appendix.as_ref().and_then(|appendix| appendix.digests.as_ref()) {
            digests.check_frame(file, stream.clone(), places)?;
        }
        machine.trailing -= appendix.as_ref().map_or(0, |appendix| appendix.length);
        machine.appendix = appendix;
        Ok(machine)
    }

    /// Like [`open`](Self::open), and ignores digests: for a file that is known to be damaged, to save what can be read.
    ///
    /// # Errors
    /// If it is not a mapped-ram file, incomplete, hostile, or the system cannot read it.
    pub fn open_damaged(file: File, offset: u64) -> Result<Self, Error> {
        let length = file.metadata().map_err(|source| io_error(source, offset, "find its length"))?.len();
        let mut parser = Parser {
            r: Reader::with_capacity(Cursor { file: &file, at: 0 }, StreamKind::File, BUFFER),
            file: &file,
            length,
            footers: true,
            early: EarlyPart::default(),
        };
        parser.jump(offset);
        let configuration = parser.configuration()?;
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
            configuration,
            section,
            blocks,
            places,
            switchover_start,
            sync_mode,
            devices,
            trailing,
            stream: offset..end,
            appendix: None,
            file: Arc::new(file),
        })
    }

    /// The configuration; `None` for machine types up to 2.3.
    pub fn configuration(&self) -> Option<&Configuration> {
        self.configuration.as_ref()
    }

    /// How the source has marked the ends of dirty rounds, if the file contains this. A file written by QEMU does not,
    /// nor a file of a machine that arrived without channels.
    pub fn sync_mode(&self) -> Option<SyncMode> {
        self.sync_mode
    }

    /// The RAM section's number.
    pub fn section(&self) -> SectionId {
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

    /// Whether the stream has SWITCHOVER_START.
    pub fn switchover_start(&self) -> bool {
        self.switchover_start
    }

    /// The devices and their description.
    pub fn devices(&self) -> &DevicePart {
        &self.devices
    }

    /// What the writer has recorded about the capture, as JSON; `None` if it has recorded nothing, as QEMU.
    pub fn about(&self) -> Option<&str> {
        self.appendix.as_ref()?.about.as_deref()
    }

    /// Whether the file has digests, so that damage is found. A file of QEMU has none, unless they were
    /// [added](super::Verify::add).
    pub fn has_digests(&self) -> bool {
        self.file_digests().is_some()
    }

    /// The number of bytes in the file after the machine and its digests, usually 0. QEMU and this library ignore them: a copy may have been
    /// filled up to a whole number of blocks. The file may also have been written over a longer one.
    pub fn trailing_bytes(&self) -> u64 {
        self.trailing
    }

    /// The file, to read pages from.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Reads which pages of a block are present. Other pages are zero, regardless of the bytes in the file. The memory of
    /// the result grows with the pages that are present, not with the length of the block.
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
}

/// How the pages of a block in a file are read.
#[derive(Clone, Debug)]
pub enum ReadPath {
    /// Through the page cache, into a private buffer.
    Cached,
    /// With direct I/O, by channels; as [`Cached`](Self::Cached) over main.
    Direct(Arc<DirectFile>),
    /// Not read: channels send from a mapping of the file, without a copy. Requires channels that neither compress nor
    /// encrypt.
    Mapped,
}

impl MappedRamFile {
    pub(super) fn file_digests(&self) -> Option<&FileDigests> {
        self.appendix.as_ref()?.digests.as_ref()
    }

    /// Where the stream begins and ends in the file.
    pub(super) fn stream(&self) -> Range<u64> {
        self.stream.clone()
    }

    /// The digests of a block's pages.
    pub(super) fn digests_of(&self, block: BlockIndex) -> Option<PageDigests> {
        self.file_digests()?.of(&self.file, block, self.place(block)?)
    }

    /// Creates the blocks in the file with the pages that are present, to be sent or copied. `path` returns for each
    /// how its pages are read. Blocks that were left out are [ignored](RamBlock::ignored). If the file has digests, a page
    /// that differs from its digest cannot be read, and no block is [mapped](ReadPath::Mapped): what a mapping shows may differ
    /// from what was compared.
    ///
    /// # Errors
    /// If the bitmaps cannot be read or the file cannot be mapped.
    pub fn ram_blocks(
        &self,
        path: impl FnMut(&BlockEntry, &BlockPlace) -> ReadPath,
    ) -> multifd::Result<RamBlocks> {
        self.ram_blocks_in(path, |block| self.digests_of(block).map(Arc::new))
    }

    /// Like [`ram_blocks`](Self::ram_blocks), with these digests.
    pub(super) fn ram_blocks_in(
        &self,
        mut path: impl FnMut(&BlockEntry, &BlockPlace) -> ReadPath,
        digests: impl Fn(BlockIndex) -> Option<Arc<PageDigests>>,
    ) -> multifd::Result<RamBlocks> {
        let mut blocks = Vec::new();
        for ((index, entry), place) in self.blocks.iter().zip(&self.places) {
            let present =
                self.bitmap(index).map_err(|error| multifd::Error::other("read a bitmap", error))?;
            let (name, length) = (entry.name.clone(), entry.used_length);
            let digests = digests(index);
            let has_digests = digests.is_some();
            let places = Places::new(self.file.clone(), place.pages_offset, present).with_digests(digests);
            let places = match path(entry, place) {
                ReadPath::Cached => places,
                ReadPath::Direct(direct) => places.past_cache(Some(direct)),
                ReadPath::Mapped if has_digests => places,
                ReadPath::Mapped => places
                    .map(length)
                    .map_err(|error| multifd::Error::io(format!("map block {name:?} of the file"), error))?,
            };
            let block = RamBlock::new(name, length, place.page_size, Memory::MappedRam(places))?;
            blocks.push(if place.is_ignored() { block.ignored() } else { block });
        }
        Ok(RamBlocks::new(blocks)?)
    }
}

/// Refuses places that are not those of the block.
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

    fn configuration(&mut self) -> Result<Option<Configuration>, Error> {
        let configuration = decode_header(&mut self.r)?;
        if configuration.as_ref().is_some_and(|configuration| !configuration.mapped_ram) {
            return Err(without_places(self.r.here()));
        }
        Ok(configuration)
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
