//! Writes an appendix.

use std::{fs::File, ops::Range};

use multifd::ram::{Digest, Memory, PageDigests, PageIndex, RamBlock, RamBlocks, with_file_size_errors};

use super::{
    BaseName,
    digests::{ALGORITHM, GROUP, GROUP_PAGES, frame, groups_of},
    record::{
        ABOUT, BASE, END_MAGIC, GROUPS, HEADER, MAGIC, MARK, MOST_ABOUT, PAGES, RECORD, VERSION, unread,
    },
    root,
};
use crate::{
    error::{Error, Usage},
    format::Put,
    mapped_ram::{
        BlockPlace,
        access::{io_error, write_at},
    },
};

/// Blocks, and the digests of the pages of each.
pub(in crate::mapped_ram) struct Digested<'a> {
    pub(in crate::mapped_ram) blocks: &'a RamBlocks,
    pub(in crate::mapped_ram) digests: Vec<&'a PageDigests>,
}

impl<'a> Digested<'a> {
    /// The digests that were recorded when the pages were written; `None` if they were not.
    pub(in crate::mapped_ram) fn of(blocks: &'a RamBlocks) -> Option<Self> {
        let digests = blocks.iter().map(|(_, block)| match block.memory() {
            Memory::MappedRam(places) => places.digests(),
            Memory::Mapped(_) => None,
        });
        Some(Self { blocks, digests: digests.collect::<Option<_>>()? })
    }
}

/// Writes an appendix after the stream, if there is something to write, and returns where the file ends then. The header
/// comes last: without it, the file has no appendix. A delta names its base.
pub(in crate::mapped_ram) fn write(
    file: &File,
    stream: Range<u64>,
    places: &[BlockPlace],
    digested: Option<&Digested<'_>>,
    about: Option<&str>,
    base: Option<&BaseName>,
) -> Result<Written, Error> {
    if base.is_some() && digested.is_none() {
        let why = "a delta, and so its blocks must have digests".to_owned();
        return Err(Usage::Value { what: "file", why }.into());
    }
    if about.is_none() && digested.is_none() {
        return Ok(Written { end: stream.end, root: None });
    }
    if let Some(about) = about.filter(|about| about.len() > MOST_ABOUT) {
        let why = format!("{:#x} bytes; expected at most {MOST_ABOUT:#x}", about.len());
        return Err(Usage::Value { what: "text about the capture", why }.into());
    }
    let mut records = Records { file, at: stream.end + HEADER as u64, count: 0 };
    let mut found = None;
    if let Some(about) = about {
        records.add(ABOUT, about.as_bytes())?;
    }
    if let Some(Digested { blocks, digests }) = digested {
        let start = records.skip(0);
        let mut pages = Pages { file, start, at: start, bytes: Vec::new() };
        let mut groups = Vec::new();
        groups.put_u32(ALGORITHM);
        groups.put_u32(u32::try_from(GROUP_PAGES).unwrap_or(u32::MAX));
        groups.put_u64(places.len() as u64);
        groups.put(&frame(file, stream.clone(), places)?.to_bytes());
        for (((_, block), of), place) in blocks.iter().zip(digests).zip(places) {
            let (mut present, mut count) = (Vec::new(), 0);
            for number in 0..groups_of(place) {
                if let Some(digest) = pages.add(block, of, number)? {
                    present.put_u64(number);
                    present.put(&digest.to_bytes());
                    count += 1;
                }
            }
            groups.put_u64(place.pages());
            groups.put_u64(count);
            groups.put(&present);
        }
        let length = pages.finish()?;
        records.head(start, PAGES, length, Digest::default())?;
        records.at = start + length;
        records.add(GROUPS, &groups)?;
        found = Some(root(Digest::of(&groups), base));
    }
    if let Some(base) = base {
        records.add(BASE, &base.encode()?)?;
    }
    let mut mark = Vec::with_capacity(MARK);
    let (length, bytes) = (stream.end - stream.start, records.at + MARK as u64 - stream.end);
    mark.put_u64(length);
    mark.put_u64(bytes);
    mark.put(&END_MAGIC);
    write_at(file, &mark, records.at, DOING)?;
    let mut header = Vec::with_capacity(HEADER);
    header.put(&MAGIC);
    header.put_u32(VERSION);
    header.put_u32(records.count);
    header.put_u64(bytes);
    header.put_u64(length);
    header.put(&[0; 16]);
    header.put(&Digest::of(&header).to_bytes());
    write_at(file, &header, stream.end, DOING)?;
    let end = stream.end + bytes;
    with_file_size_errors(|| file.set_len(end))
        .map_err(|source| io_error(source, end, "truncate the file"))?;
    Ok(Written { end, root: found })
}

/// What was written.
pub(in crate::mapped_ram) struct Written {
    /// Where the file ends.
    pub(in crate::mapped_ram) end: u64,
    /// What identifies the machine, if it has digests.
    pub(in crate::mapped_ram) root: Option<Digest>,
}

/// Writes records one after the other.
struct Records<'a> {
    file: &'a File,
    at: u64,
    count: u32,
}

impl Records<'_> {
    fn add(&mut self, kind: u32, body: &[u8]) -> Result<(), Error> {
        let at = self.skip(body.len() as u64);
        self.put(at, kind, body)
    }

    /// Leaves room for a record, and returns where its body begins.
    fn skip(&mut self, body: u64) -> u64 {
        let start = self.at + RECORD as u64;
        self.at = start + body;
        self.count += 1;
        start
    }

    /// Writes a record whose body begins at `start`.
    fn put(&self, start: u64, kind: u32, body: &[u8]) -> Result<(), Error> {
        self.head(start, kind, body.len() as u64, Digest::of(body))?;
        write_at(self.file, body, start, DOING)
    }

    fn head(&self, start: u64, kind: u32, length: u64, digest: Digest) -> Result<(), Error> {
        let mut head = Vec::with_capacity(RECORD);
        head.put_u32(kind);
        head.put_u32(0);
        head.put_u64(length);
        head.put(&digest.to_bytes());
        head.put(&Digest::of(&head).to_bytes());
        write_at(self.file, &head, start - RECORD as u64, DOING)
    }
}

/// Writes the digests of pages.
struct Pages<'a> {
    file: &'a File,
    start: u64,
    at: u64,
    bytes: Vec<u8>,
}

impl Pages<'_> {
    /// Adds the digests of a group's pages, and returns the digest of the group; `None` if none of them is present.
    fn add(&mut self, block: &RamBlock, digests: &PageDigests, group: u64) -> Result<Option<Digest>, Error> {
        let first = group * GROUP_PAGES;
        let words =
            (first / 64..(first + GROUP_PAGES) / 64).map(|word| usize::try_from(word).unwrap_or(usize::MAX));
        if words.map(|word| block.present_word(word)).all(|word| word == 0) {
            return Ok(None);
        }
        let start = self.bytes.len();
        for page in (first..first + GROUP_PAGES).map(PageIndex) {
            let digest = if block.is_present(page) {
                digests.get(page).map_err(|error| unread(error, self.at))?.unwrap_or_default()
            } else {
                Digest::default()
            };
            self.bytes.put(&digest.to_bytes());
        }
        let digest = Digest::of(self.bytes.get(start..).unwrap_or_default());
        if self.bytes.len() >= PIECE {
            self.flush()?;
        }
        Ok(Some(digest))
    }

    fn flush(&mut self) -> Result<(), Error> {
        write_at(self.file, &self.bytes, self.at, DOING)?;
        self.at += self.bytes.len() as u64;
        self.bytes.clear();
        Ok(())
    }

    /// The number of bytes that were written.
    fn finish(mut self) -> Result<u64, Error> {
        self.flush()?;
        Ok(self.at - self.start)
    }
}

const DOING: &str = "write the appendix";
/// The number of bytes that are written at once.
const PIECE: usize = 64 * GROUP;
