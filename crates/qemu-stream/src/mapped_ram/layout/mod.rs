//! The layout of a file that is going to be written, and the writing of everything but the pages.
//!
//! The input is configuration and block list. The output is the places of bitmaps and pages. A file is trusted only
//! when its tail exists, so the order is: head, pages, bitmaps, tail. Nothing here syncs the file; the writer decides
//! when it must be durable.

use std::{fs::File, sync::Arc};

use multifd::ram::{
    BlockIndex, DirectFile, Memory, PageBitmap, PageDigests, Places, RamBlock, RamBlocks,
    with_file_size_errors,
};

use rustix::fs::{FallocateFlags, fallocate};

use super::{
    BITMAP_PIECE, Base, BlockPlace, PAGES_ALIGNMENT, WORD,
    access::{io_error, write_at},
    appendix::{self, BaseName, Digested, Written},
    header,
    header::BlockHeader,
    note::Note,
};
use crate::{
    error::{Error, Usage},
    format::{
        BlockEntry, BlockList, Command, Configuration, CurrentBlock, DELTA_VERSION, DevicePart, Record,
        Section, SectionHead, SectionId, SyncMode, encode_footer, encode_header,
    },
};

/// The layout of a file that is going to be written.
///
/// **Warning:** the tail makes a file valid, so it must be written last: pages first, then
/// [`write_around`](Self::write_around), which has the right order, or [`write_head`](Self::write_head), each block's
/// [`write_bitmap`](Self::write_bitmap), [`write_tail`](Self::write_tail). A file with a tail but without pages or
/// bitmaps is read as a machine whose RAM is zero or has old contents. A file that is overwritten is first truncated to
/// its beginning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The bytes of the stream between the pages, each with its position.
    head: Vec<(u64, Vec<u8>)>,
    places: Vec<BlockPlace>,
    section: SectionId,
    blocks: BlockList,
    tail: u64,
    offset: u64,
    footers: bool,
    sync_mode: Option<SyncMode>,
}

/// The parameters of a layout besides its blocks.
#[derive(Clone, Debug)]
pub struct Shape<'a> {
    /// The configuration; it is marked as mapped-ram in any case. `None` for machine types up to 2.3.
    pub configuration: Option<&'a Configuration>,
    /// The RAM section's number, which must differ from those of the devices.
    pub section: SectionId,
    /// The offset of the file in its container; 0 for a separate file.
    pub offset: u64,
    /// Whether sections have footers: from machine type 2.4 on.
    pub footers: bool,
    /// Blocks that are not sent, because both sides share their memory (x-ignore-shared).
    pub ignored: &'a [BlockIndex],
    /// How the source has marked the ends of dirty rounds, if known; stored outside the stream.
    pub sync_mode: Option<SyncMode>,
}

/// The data after the RAM section's first part.
#[derive(Clone, Copy, Debug)]
pub struct Tail<'a> {
    /// Whether SWITCHOVER_START comes before END: machine types from 10.0 on.
    pub switchover_start: bool,
    /// The devices and their description.
    pub devices: &'a DevicePart,
    /// What is recorded about the capture after the machine, as JSON, at most 1 MiB: for
    /// [`StoredMachine::about`](super::StoredMachine::about). QEMU ignores it.
    pub about: Option<&'a str>,
    /// The base, if the file is a delta: pages whose bits are clear are those of the base. The blocks of a delta must have
    /// digests.
    pub base: Option<&'a BaseName>,
}

impl Layout {
    /// Creates the layout of a file that begins at `offset` of its container (0 for a separate file). The configuration
    /// is marked as mapped-ram in any case; `section` becomes the RAM section's number, which must differ from those of
    /// the devices.
    ///
    /// # Errors
    /// If the offset leaves no room, or the machine type is too old for such files.
    pub fn new(
        configuration: &Configuration,
        blocks: &BlockList,
        section: SectionId,
        offset: u64,
    ) -> Result<Self, Usage> {
        if !configuration.machine.has_footers() {
            let machine = configuration.machine.clone();
            return Err(Usage::Machine {
                machine,
                why: "has no configuration, so it cannot have capability mapped-ram",
            });
        }
        let shape = Shape {
            configuration: Some(configuration),
            section,
            offset,
            footers: true,
            ignored: &[],
            sync_mode: None,
        };
        Self::of(&shape, blocks)
    }

    /// Creates the layout of a file of any shape.
    ///
    /// # Errors
    /// If the offset leaves no room, page sizes differ, or a block is ignored and capability x-ignore-shared is off.
    pub fn of(shape: &Shape<'_>, blocks: &BlockList) -> Result<Self, Usage> {
        let &Shape { configuration, section, offset, footers, ignored, sync_mode } = shape;
        let page_size = blocks.page_size();
        let expected = configuration.map(Configuration::page_size).unwrap_or_default();
        if page_size != expected {
            let why = format!("{page_size}, but the configuration has {expected}");
            return Err(Usage::Value { what: "page size of the block list", why });
        }
        let ignore_shared = configuration.is_some_and(|configuration| configuration.ignore_shared);
        if !ignore_shared && !ignored.is_empty() {
            let why = "some are ignored, but the configuration lacks x-ignore-shared".to_owned();
            return Err(Usage::Value { what: "blocks", why });
        }
        let configuration =
            configuration.map(|configuration| Configuration { mapped_ram: true, ..configuration.clone() });
        let too_far = || Usage::Value { what: "offset", why: format!("{offset:#x} is too far") };
        let (mut head, mut places) = (Vec::new(), Vec::new());
        let mut piece = Vec::new();
        let mut at = offset;
        encode_header(configuration.as_ref(), &mut piece);
        Section::Start(SectionHead::ram(section)).encode(&mut piece);
        blocks.encode_total(&mut piece);
        for (index, entry) in blocks.iter() {
            entry.encode(ignore_shared, &mut piece);
            let bitmap_offset = at.checked_add(piece.len() as u64 + header::LENGTH).ok_or_else(too_far)?;
            let mut place =
                BlockPlace { bitmap_offset, pages_offset: 0, used_length: entry.used_length, page_size };
            let behind = bitmap_offset.checked_add(place.bitmap_length()).ok_or_else(too_far)?;
            place.pages_offset = behind.checked_next_multiple_of(PAGES_ALIGNMENT).ok_or_else(too_far)?;
            if ignored.contains(&index) {
                place.bitmap_offset = 0;
            }
            block_header(&place).encode(&mut piece);
            head.push((at, std::mem::take(&mut piece)));
            at = place.pages_offset.checked_add(entry.used_length).ok_or_else(too_far)?;
            places.push(place);
        }
        eos(blocks, section, footers, &mut piece);
        let tail = at.checked_add(piece.len() as u64).ok_or_else(too_far)?;
        head.push((at, piece));
        // The system represents file positions as signed 64-bit numbers.
        if tail > MAX_POSITION {
            return Err(too_far());
        }
        Ok(Self { head, places, section, blocks: blocks.clone(), tail, offset, footers, sync_mode })
    }

    /// The places of the blocks, in the order of the list.
    pub fn places(&self) -> &[BlockPlace] {
        &self.places
    }

    /// The place of one block.
    pub fn place(&self, block: BlockIndex) -> Option<&BlockPlace> {
        self.places.get(block.0)
    }

    /// The block list of the layout.
    pub fn blocks(&self) -> &BlockList {
        &self.blocks
    }

    /// The position of the tail: after all pages, so this is the length to reserve or map.
    pub fn tail_offset(&self) -> u64 {
        self.tail
    }

    /// Creates the blocks in the file, each at its place, with no page present yet. Channels use `direct`, if given.
    ///
    /// # Errors
    /// None that a layout's list could cause.
    pub fn ram_blocks(
        &self,
        file: &Arc<File>,
        direct: Option<&Arc<DirectFile>>,
    ) -> multifd::Result<RamBlocks> {
        self.ram_blocks_in(file, direct, |_, _, places| places)
    }

    /// Like [`ram_blocks`](Self::ram_blocks), and records a digest of every page that is written, 16 bytes of memory for
    /// each. [`write_around`](Self::write_around) stores them after the machine.
    ///
    /// # Errors
    /// As [`ram_blocks`](Self::ram_blocks).
    pub fn ram_blocks_with_digests(
        &self,
        file: &Arc<File>,
        direct: Option<&Arc<DirectFile>>,
    ) -> multifd::Result<RamBlocks> {
        self.ram_blocks_in(file, direct, |_, place, places| {
            places.with_digests(Some(Arc::new(PageDigests::new(place.pages(), place.page_size))))
        })
    }

    /// Like [`ram_blocks_with_digests`](Self::ram_blocks_with_digests), for a delta of `base`: a page whose bytes equal those of
    /// the base is not written. The [`Tail`] must have the [name](Base::name) of the base.
    ///
    /// # Errors
    /// If the pages of the base have another size.
    pub fn ram_blocks_since(
        &self,
        file: &Arc<File>,
        direct: Option<&Arc<DirectFile>>,
        base: &Base,
    ) -> multifd::Result<RamBlocks> {
        let (blocks, unwritten) = (base.blocks(), base.unwritten());
        let (expected, found) = (self.blocks.page_size(), blocks.page_size());
        if !blocks.is_empty() && expected != found {
            let error = Usage::Value { what: "base", why: format!("pages of {found}, expected {expected}") };
            return Err(multifd::Error::other("compare with the base", error));
        }
        self.ram_blocks_in(file, direct, |entry, place, places| {
            let digests = Arc::new(PageDigests::new(place.pages(), place.page_size));
            let places = places.with_digests(Some(digests));
            let of_base = blocks.find(entry.name.as_bytes()).and_then(|index| blocks.as_base(index));
            match of_base {
                Some(of_base) => places.since(of_base, unwritten),
                None => places,
            }
        })
    }

    fn ram_blocks_in(
        &self,
        file: &Arc<File>,
        direct: Option<&Arc<DirectFile>>,
        with: impl Fn(&BlockEntry, &BlockPlace, Places) -> Places,
    ) -> multifd::Result<RamBlocks> {
        let blocks = self.blocks.entries().iter().zip(&self.places).map(|(entry, place)| {
            let none = PageBitmap::new(place.pages());
            let places = Places::new(file.clone(), place.pages_offset, none).past_cache(direct.cloned());
            let places = with(entry, place, places);
            let memory = Memory::MappedRam(places);
            RamBlock::new(entry.name.clone(), entry.used_length, place.page_size, memory)
        });
        Ok(RamBlocks::new(blocks.collect::<Result<_, multifd::ram::Error>>()?)?)
    }

    /// Writes everything but the pages, which are in place already, and truncates the file at the end. The bitmaps are
    /// those of `blocks`, which [`ram_blocks`](Self::ram_blocks) has made. Returns the length of the file. Before this
    /// call no reader loads the file; after it, the file is complete. If the blocks have digests, they are stored after the
    /// machine.
    ///
    /// # Errors
    /// As [`write`](Self::write); if the blocks are not those of the layout.
    pub fn write_around(&self, file: &File, blocks: &RamBlocks, tail: &Tail<'_>) -> Result<u64, Error> {
        Ok(self.write_with_root(file, blocks, tail)?.end)
    }

    /// Like [`write_around`](Self::write_around), and returns also what identifies the machine.
    pub(super) fn write_with_root(
        &self,
        file: &File,
        blocks: &RamBlocks,
        tail: &Tail<'_>,
    ) -> Result<Written, Error> {
        let named = |(_, block): (BlockIndex, &RamBlock)| (block.name().clone(), block.used_length());
        let listed = self.blocks.entries().iter().map(|entry| (entry.name.clone(), entry.used_length));
        if !blocks.iter().map(named).eq(listed) {
            return Err(Usage::Blocks("they differ from those that the file was created for".into()).into());
        }
        for (_, block) in blocks.iter().filter(|_| tail.base.is_some()) {
            block.settle().map_err(|source| io_error(source, self.offset, "write pages that became zero"))?;
        }
        let end = self.write_stream(file, tail, |index, place| {
            let (block, words) = (blocks.get(index), usize::try_from(place.bitmap_words()));
            (0..words.unwrap_or(usize::MAX))
                .map(move |word| block.map_or(0, |block| block.present_word(word)))
        })?;
        let digested = Digested::of(blocks);
        appendix::write(file, self.offset..end, &self.places, digested.as_ref(), tail.about, tail.base)
    }

    /// Like [`write_around`](Self::write_around), with the caller's bitmaps. They are requested block by block, except
    /// for blocks that are left out of the file: bit i of word i / 64, least significant first, is page i. Where no bit is
    /// set the bitmap becomes a hole in the file, if the file system supports holes, so that a sparse machine of terabytes
    /// needs space only for its pages.
    ///
    /// # Errors
    /// If the number of words of a bitmap is not the [number](BlockPlace::bitmap_words) that the block needs; if the
    /// devices have footers and the file has not (or the reverse), or one of them has the RAM section's number; if the
    /// system cannot write.
    pub fn write<W>(
        &self,
        file: &File,
        tail: &Tail<'_>,
        bitmap: impl FnMut(BlockIndex, &BlockPlace) -> W,
    ) -> Result<u64, Error>
    where
        W: IntoIterator<Item = u64, IntoIter: ExactSizeIterator>,
    {
        let end = self.write_stream(file, tail, bitmap)?;
        Ok(appendix::write(file, self.offset..end, &self.places, None, tail.about, tail.base)?.end)
    }

    /// Writes the stream without its pages, and returns where it ends.
    fn write_stream<W>(
        &self,
        file: &File,
        tail: &Tail<'_>,
        mut bitmap: impl FnMut(BlockIndex, &BlockPlace) -> W,
    ) -> Result<u64, Error>
    where
        W: IntoIterator<Item = u64, IntoIter: ExactSizeIterator>,
    {
        self.check_tail(tail)?;
        self.write_head(file)?;
        if tail.base.is_some() {
            // Everything else is laid out like a whole machine.
            let at = self.offset + VERSION_AT;
            write_at(file, &DELTA_VERSION.to_be_bytes(), at, "write the version")?;
        }
        for (index, place) in (0..).map(BlockIndex).zip(&self.places) {
            if !place.is_ignored() {
                self.write_bitmap(file, index, bitmap(index, place).into_iter())?;
            }
        }
        self.write_tail(file, tail)
    }

    /// Writes everything before the tail except bitmaps and pages.
    fn write_head(&self, file: &File) -> Result<(), Error> {
        self.head.iter().try_for_each(|(at, piece)| write_at(file, piece, *at, "write the head"))
    }

    fn write_bitmap(
        &self,
        file: &File,
        block: BlockIndex,
        mut words: impl ExactSizeIterator<Item = u64>,
    ) -> Result<(), Error> {
        let place = self.place(block).ok_or(Usage::NoSuchPage { block: block.0, page: 0 })?;
        if words.len() as u64 != place.bitmap_words() {
            let why = format!("expected {:#x} words, found {:#x}", place.bitmap_words(), words.len());
            return Err(Usage::Value { what: "bitmap", why }.into());
        }
        // Zeros may not stay what they are: an older machine in the file may have had bits there.
        let is_hole = make_hole(file, place.bitmap_offset, place.bitmap_length());
        let mut at = place.bitmap_offset;
        let mut bytes = Vec::with_capacity(BITMAP_PIECE);
        while words.len() > 0 {
            let start = bytes.len();
            words.by_ref().take(HOLE / WORD).for_each(|word| bytes.extend(encode(word)));
            let is_zero = bytes.iter().skip(start).all(|byte| *byte == 0);
            let skipped = if is_hole && is_zero { bytes.len() - start } else { 0 };
            bytes.truncate(bytes.len() - skipped);
            if skipped > 0 || bytes.len() + HOLE > BITMAP_PIECE || words.len() == 0 {
                write_at(file, &bytes, at, "write a bitmap")?;
                at += (bytes.len() + skipped) as u64;
                bytes.clear();
            }
        }
        Ok(())
    }

    fn check_tail(&self, tail: &Tail<'_>) -> Result<(), Usage> {
        tail.devices.check_beside(self.section)?;
        if tail.devices.has_footers() != self.footers {
            let why = "have footers and the file has none, or have none and the file has them".to_owned();
            return Err(Usage::Value { what: "devices", why });
        }
        Ok(())
    }

    /// Writes the tail and truncates the file after it; returns the length of the file.
    fn write_tail(&self, file: &File, tail: &Tail<'_>) -> Result<u64, Error> {
        let mut bytes = tail.devices.early().to_vec();
        if tail.switchover_start {
            Section::Command(Command::SwitchoverStart).encode(&mut bytes);
        }
        Section::End(self.section).encode(&mut bytes);
        eos(&self.blocks, self.section, self.footers, &mut bytes);
        write_at(file, &bytes, self.tail, "write the end of ram")?;
        let devices_at = self.tail + bytes.len() as u64;
        write_at(file, tail.devices.as_bytes(), devices_at, "write the devices")?;
        let end = devices_at + tail.devices.as_bytes().len() as u64;
        let note = Note { sync_mode: self.sync_mode, length: end - self.offset };
        if let Some(at) = Note::offset(&self.places) {
            write_at(file, &note.encode(), at, "write the note")?;
        }
        with_file_size_errors(|| file.set_len(end))
            .map_err(|source| io_error(source, end, "truncate the file"))?;
        Ok(end)
    }
}

#[expect(clippy::little_endian_bytes, reason = "the only little-endian field in either format")]
fn encode(word: u64) -> [u8; WORD] {
    word.to_le_bytes()
}

/// Makes a part of the file a hole, which reads as zeros. `false` if the file system cannot do it.
fn make_hole(file: &File, at: u64, length: u64) -> bool {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    length > 0 && fallocate(file, flags, at, length).is_ok()
}

/// Bytes of a bitmap that become a hole if none of their bits is set: the usual block size of file systems.
const HOLE: usize = 4 << 10;
/// A position that no file reaches, with room for the tail.
const MAX_POSITION: u64 = 1 << 62;
/// Where the header has the version of the stream.
const VERSION_AT: u64 = 4;

fn block_header(place: &BlockPlace) -> BlockHeader {
    let page_size = place.page_size.bytes() as u64;
    BlockHeader { page_size, bitmap_offset: place.bitmap_offset, pages_offset: place.pages_offset }
}

/// The end of a part of the RAM section: EOS and footer.
fn eos(blocks: &BlockList, section: SectionId, footers: bool, out: &mut Vec<u8>) {
    // An EOS has no page, so no list can refuse it.
    let _ = Record::Eos.encode(blocks, &mut CurrentBlock::default(), out);
    if footers {
        encode_footer(section, out);
    }
}

#[cfg(test)]
mod tests;
