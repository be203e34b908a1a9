//! The digests in an appendix.
//!
//! ```text
//! kind 2  0 u32 algorithm 1, XXH3-128 | 4 u32 pages of a group, 512 | 8 u64 number of blocks | 16 digest of the frame | 32
//!         for each block: u64 pages | u64 number of groups with pages | for each of them, in order: u64 its number
//!             | digest of its part of kind 3
//! kind 3  for each group with pages, in order: 512 digests, 0 for pages that are not present and after the last page
//! ```
//!
//! Nothing is written for groups without a present page, so a sparse machine of terabytes costs little.
//!
//! The frame is all of the stream that is read, without the pages: head, bitmaps, note and tail.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt, sync::Arc};

use multifd::ram::{BlockIndex, Digest, DigestOfPieces, DigestStore, PageDigests};

use super::record::{Body, fields, place, unread};
use crate::{
    error::{Error, Malformed},
    mapped_ram::{BlockPlace, note::Note},
};

pub(super) const ALGORITHM: u32 = 1;
/// The number of bytes of a group's digests.
pub(super) const GROUP: usize = 512 * Digest::BYTES;
pub(super) const GROUP_PAGES: u64 = PageDigests::GROUP_PAGES;
const _: () =
    assert!(GROUP as u64 == GROUP_PAGES * Digest::BYTES as u64, "the format has 512 pages in a group");
/// Bytes before the first block.
const START: usize = 32;
/// Bytes for a group.
const ENTRY: usize = 8 + Digest::BYTES;
/// More than the head of a block and of its machine have.
const HEAD: u64 = 64 << 10;
/// The greatest length of the record: enough for 128 TiB of RAM in pages of 4 KiB.
const MOST: usize = 1 << 30;

/// The digests of a file.
#[derive(Debug)]
pub(in crate::mapped_ram) struct FileDigests {
    /// The digest of all that follows here, and so of all digests.
    digest: Digest,
    frame: Digest,
    blocks: Vec<Arc<[Group]>>,
}

/// A group with a present page.
#[derive(Clone, Copy, Debug)]
struct Group {
    number: u64,
    /// Where the digests of its pages are in the file.
    at: u64,
    /// Their digest.
    digest: Digest,
}

impl FileDigests {
    /// Reads the record of groups. The pages' digests are the `length` bytes from `start` on.
    pub(super) fn read(
        groups: &Body<'_>,
        (start, length): (u64, u64),
        places: &[BlockPlace],
    ) -> Result<Self, Error> {
        // A hole in a file costs its maker nothing: no more is read than the machine in it needs.
        let needed = places.iter().map(|place| 16 + ENTRY as u64 * groups_of(place)).sum::<u64>();
        let most = usize::try_from(needed).unwrap_or(MOST).saturating_add(START).min(MOST);
        let bytes = groups.bytes(most, "digests of groups")?;
        let mismatch = |field: &'static str, expected: u64, found: u64| {
            Malformed::value(field, expected.to_string(), found).at(place(groups.start))
        };
        let [kind, blocks] = fields(&bytes);
        let expected = u64::from(ALGORITHM) << 32 | GROUP_PAGES;
        if kind != expected {
            return Err(mismatch("kind of digests", expected, kind));
        }
        if blocks != places.len() as u64 {
            return Err(mismatch("number of blocks with digests", places.len() as u64, blocks));
        }
        let mut rest = bytes.get(16..).unwrap_or_default();
        let frame = take(&mut rest).unwrap_or_default();
        let (mut of_blocks, mut at) = (Vec::with_capacity(places.len()), start);
        for of in places {
            let [pages, count] = fields(rest);
            rest = rest.get(16..).unwrap_or_default();
            if pages != of.pages() {
                return Err(mismatch("pages of a block with digests", of.pages(), pages));
            }
            let mut groups: Vec<Group> = Vec::new();
            for _ in 0..count {
                let cut = || mismatch("length of the digests of groups", needed, bytes.len() as u64);
                let (number, after) = rest.split_first_chunk().ok_or_else(cut)?;
                rest = after;
                let (number, digest) = (u64::from_be_bytes(*number), take(&mut rest).ok_or_else(cut)?);
                let least = groups.last().map_or(0, |last| last.number + 1);
                if number < least || number >= groups_of(of) {
                    return Err(mismatch("number of a group with digests", least, number));
                }
                groups.push(Group { number, at, digest });
                at += GROUP as u64;
            }
            of_blocks.push(groups.into());
        }
        if at != start + length {
            return Err(mismatch("length of the digests of pages", at - start, length));
        }
        Ok(Self { digest: groups.digest, frame, blocks: of_blocks })
    }

    /// The digest of all digests.
    pub(super) fn digest(&self) -> Digest {
        self.digest
    }

    /// The digests of a block's pages, which are read when needed.
    pub(in crate::mapped_ram) fn of(
        &self,
        file: &Arc<File>,
        block: BlockIndex,
        place: &BlockPlace,
    ) -> Option<PageDigests> {
        let groups = self.blocks.get(block.0)?.clone();
        let store = Store { file: file.clone(), groups };
        Some(PageDigests::stored(place.pages(), place.page_size, Box::new(store)))
    }

    /// Refuses a file whose head, bitmaps or devices differ from their digest.
    pub(in crate::mapped_ram) fn check_frame(
        &self,
        file: &File,
        stream: Range<u64>,
        places: &[BlockPlace],
    ) -> Result<(), Error> {
        let at = stream.start;
        if frame(file, stream, places)? == self.frame {
            return Ok(());
        }
        Err(Malformed::Damaged("head, bitmaps or devices of the machine").at(place(at)))
    }
}

/// The digest of the frame of a stream.
pub(super) fn frame(file: &File, stream: Range<u64>, places: &[BlockPlace]) -> Result<Digest, Error> {
    let mut digest = DigestOfPieces::default();
    let mut bytes = Vec::with_capacity(PIECE);
    for Range { mut start, end } in parts(stream, places) {
        while start < end {
            let length = usize::try_from(end - start).unwrap_or(PIECE).min(PIECE);
            bytes.resize(length, 0);
            file.read_exact_at(&mut bytes, start).map_err(|error| unread(error, start))?;
            digest.write(&bytes);
            start += length as u64;
        }
    }
    Ok(digest.finish())
}

/// The parts of a stream that are its frame.
fn parts(stream: Range<u64>, places: &[BlockPlace]) -> Vec<Range<u64>> {
    let (mut parts, mut start) = (Vec::new(), stream.start);
    for place in places {
        let end = match place.is_ignored() {
            // Its header has no end in the file that is known here.
            true => start.saturating_add(HEAD),
            false => place.bitmap_offset.saturating_add(place.bitmap_length()),
        };
        parts.push(start..end.min(place.pages_offset));
        start = place.pages_offset.saturating_add(place.used_length);
    }
    parts.extend(Note::offset(places).map(|at| at..at + Note::BYTES));
    parts.push(start..stream.end);
    parts
}

/// The number of groups of a block.
pub(super) fn groups_of(place: &BlockPlace) -> u64 {
    place.pages().div_ceil(GROUP_PAGES)
}

fn take(rest: &mut &[u8]) -> Option<Digest> {
    let (first, after) = rest.split_first_chunk()?;
    *rest = after;
    Some(Digest::from_bytes(*first))
}

#[derive(Debug)]
struct Store {
    file: Arc<File>,
    groups: Arc<[Group]>,
}

impl DigestStore for Store {
    fn group(&self, group: u64) -> io::Result<Vec<Digest>> {
        let Ok(found) = self.groups.binary_search_by_key(&group, |group| group.number) else {
            return Ok(Vec::new());
        };
        let Some(Group { at, digest, .. }) = self.groups.get(found).copied() else { return Ok(Vec::new()) };
        let mut bytes = vec![0; GROUP];
        self.file.read_exact_at(&mut bytes, at)?;
        if Digest::of(&bytes) != digest {
            let damaged = Malformed::Damaged("digests of pages").at(place(at));
            return Err(io::Error::new(io::ErrorKind::InvalidData, damaged));
        }
        Ok(bytes.as_chunks().0.iter().map(|bytes| Digest::from_bytes(*bytes)).collect())
    }
}

/// The number of bytes that are read at once.
const PIECE: usize = 256 << 10;
