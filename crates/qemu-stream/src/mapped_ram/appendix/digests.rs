//! The digests in an appendix.
//!
//! ```text
//! kind 2  0 u32 algorithm 1, XXH3-128 | 4 u32 pages of a group, 512 | 8 u64 number of blocks | 16 digest of the frame | 32
//!         for each block: u64 pages | u64 number of groups | for each group: digest of its part of kind 3, 0 without pages
//! kind 3  for each group with pages, in order: 512 digests, 0 for pages that are not present and after the last page
//! ```
//!
//! The frame is all of the stream but the pages: head, bitmaps with the unused bytes after them, and tail.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt, sync::Arc};

use multifd::ram::{BlockIndex, Digest, DigestOfPieces, DigestStore, PageDigests};

use super::{Body, fields, place};
use crate::{
    error::{Error, Malformed},
    mapped_ram::BlockPlace,
};

pub(super) const ALGORITHM: u32 = 1;
/// The number of bytes of a group's digests.
pub(super) const GROUP: usize = 512 * Digest::BYTES;
pub(super) const GROUP_PAGES: u64 = PageDigests::GROUP_PAGES;
const _: () =
    assert!(GROUP as u64 == GROUP_PAGES * Digest::BYTES as u64, "the format has 512 pages in a group");
/// Bytes before the first block.
pub(super) const START: usize = 32;
/// The greatest length of the record: enough for 128 TiB of RAM in pages of 4 KiB.
const MOST: usize = 1 << 30;

/// The digests of a file.
#[derive(Debug)]
pub(in crate::mapped_ram) struct FileDigests {
    frame: Digest,
    blocks: Vec<Arc<[Group]>>,
}

/// Where the digests of a group are in the file, and their digest; `None` if none of its pages is present.
type Group = Option<(u64, Digest)>;

impl FileDigests {
    /// Reads the record of groups. The pages' digests are the `length` bytes from `start` on.
    pub(super) fn read(
        groups: &Body<'_>,
        (start, length): (u64, u64),
        places: &[BlockPlace],
    ) -> Result<Self, Error> {
        // A hole in a file costs its maker nothing: no more is read than the machine in it needs.
        let needed = places.iter().map(|place| 16 + Digest::BYTES as u64 * groups_of(place)).sum::<u64>();
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
            if pages != of.pages() || count != groups_of(of) {
                return Err(mismatch("pages of a block with digests", of.pages(), pages));
            }
            let mut groups = Vec::new();
            for _ in 0..count {
                let digest = take(&mut rest)
                    .ok_or_else(|| mismatch("length of the digests of groups", needed, bytes.len() as u64))?;
                let present = digest != Digest::default();
                groups.push(present.then_some((at, digest)));
                at += if present { GROUP as u64 } else { 0 };
            }
            of_blocks.push(groups.into());
        }
        if at != start + length {
            return Err(mismatch("length of the digests of pages", at - start, length));
        }
        Ok(Self { frame, blocks: of_blocks })
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

/// The digest of everything in the stream but its pages.
pub(super) fn frame(file: &File, stream: Range<u64>, places: &[BlockPlace]) -> Result<Digest, Error> {
    let mut digest = DigestOfPieces::default();
    let mut start = stream.start;
    let ends = places.iter().map(|place| (place.pages_offset, place.pages_offset + place.used_length));
    let mut bytes = Vec::with_capacity(PIECE);
    for (end, next) in ends.chain([(stream.end, stream.end)]) {
        while start < end {
            let length = usize::try_from(end - start).unwrap_or(PIECE).min(PIECE);
            bytes.resize(length, 0);
            file.read_exact_at(&mut bytes, start).map_err(|error| super::unread(error, start))?;
            digest.write(&bytes);
            start += length as u64;
        }
        start = next;
    }
    Ok(digest.finish())
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
        let group = usize::try_from(group).ok().and_then(|group| self.groups.get(group));
        let Some((at, digest)) = group.copied().flatten() else { return Ok(Vec::new()) };
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
