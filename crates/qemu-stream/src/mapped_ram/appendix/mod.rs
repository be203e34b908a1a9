//! The appendix: what a file has after its machine, for readers that know it. QEMU ignores it.
//!
//! ```text
//! head ─ bitmaps ─ pages ─ tail ─┃─ header ─ records ─ end mark
//!
//! header  0 "mfd-tail" | 8 u32 version 1 | 12 u32 number of records | 16 u64 bytes of the appendix
//!         24 u64 bytes of the stream before it | 32 zeros | 48 digest of the bytes before | 64
//! record  0 u32 kind | 4 u32 0 | 8 u64 bytes of the body | 16 digest of the body | 32 digest of the bytes before | 48 body
//!         kind 1: about the capture, JSON
//!         kind 2: digests of groups, see `digests`
//!         kind 3: digests of pages; its own digest is zero, because kind 2 has them group by group
//!         kind 4: the base of a delta, see `base`
//! mark    0 u64 bytes of the stream | 8 u64 bytes of the appendix | 16 "mfd-tend" | 24
//! ```
//!
//! The header is at the end of the machine. The end mark shows where that is in a file whose machine has no description, or a
//! guest's data that looks like one. Records of other kinds are skipped.

mod base;
mod digests;
mod record;
mod write;

use std::{fs::File, os::unix::fs::FileExt, sync::Arc};

use multifd::ram::Digest;

pub use base::BaseName;
pub(super) use digests::FileDigests;
pub(super) use write::{Digested, Written, write};

use record::{
    ABOUT, BASE, Body, END_MAGIC, GROUPS, HEADER, MAGIC, MARK, OF_HEADER, PAGES, RECORD, VERSION, array,
    check, fields, place,
};

use super::BlockPlace;
use crate::error::{Error, Malformed};

/// The appendix of a file.
#[derive(Debug)]
pub(super) struct Appendix {
    /// The number of its bytes.
    pub(super) length: u64,
    pub(super) about: Option<String>,
    pub(super) digests: Option<FileDigests>,
    /// The base, if the file is a delta.
    pub(super) base: Option<BaseName>,
}

/// The end of the stream that begins at `offset`, by the end mark of its file.
pub(super) fn marked_end(file: &File, length: u64, offset: u64) -> Option<u64> {
    let mut bytes = [0; MARK];
    file.read_exact_at(&mut bytes, length.checked_sub(MARK as u64)?).ok()?;
    let [stream, appendix, _] = fields(&bytes);
    let end = offset.checked_add(stream).filter(|_| bytes.ends_with(&END_MAGIC))?;
    (end.checked_add(appendix) == Some(length)).then_some(end)
}

impl Appendix {
    /// Reads the appendix after a stream from `offset` to `end`; `None` if the file, of `length` bytes, has none.
    ///
    /// # Errors
    /// If it is damaged, or the system cannot read it.
    pub(super) fn read(
        file: &Arc<File>,
        (offset, end): (u64, u64),
        length: u64,
        places: &[BlockPlace],
    ) -> Result<Option<Self>, Error> {
        let room = length.saturating_sub(end);
        if room < (HEADER + MARK) as u64 {
            return Ok(None);
        }
        let header: [u8; HEADER] = array(file, end)?;
        if !header.starts_with(&MAGIC) {
            return match marked_end(file, length, offset) {
                Some(marked) if marked == end => Err(Malformed::Damaged(OF_HEADER).at(place(end))),
                _ => Ok(None),
            };
        }
        let (checked, digest) = header.split_at(HEADER - Digest::BYTES);
        check(checked, digest, OF_HEADER, end)?;
        let [_, counts, bytes, stream] = fields(&header);
        let (version, records) = (counts >> 32, counts & u64::from(u32::MAX));
        if version != u64::from(VERSION) {
            // A later version of this library has other digests; the machine is the same.
            tracing::warn!(version, "the appendix of the file has an unknown version and is ignored");
            return Ok(None);
        }
        if bytes > room || stream != end - offset {
            let field = "length of the appendix";
            return Err(Malformed::TooLong { field: field.into(), max: room, found: bytes }.at(place(end)));
        }
        let mut found = Self { length: bytes, about: None, digests: None, base: None };
        let (mut at, last) = (end + HEADER as u64, end + bytes - MARK as u64);
        let (mut groups, mut pages) = (None, None);
        for _ in 0..records {
            let head: [u8; RECORD] = array(file, at)?;
            let (checked, digest) = head.split_at(RECORD - Digest::BYTES);
            check(checked, digest, "head of a record of the appendix", at)?;
            let [kind, body, high, low] = fields(checked);
            let start = at + RECORD as u64;
            let room = last.saturating_sub(start);
            if body > room {
                let field = "length of a record of the appendix";
                return Err(Malformed::TooLong { field: field.into(), max: room, found: body }.at(place(at)));
            }
            let digest = Digest::from_bytes((u128::from(high) << 64 | u128::from(low)).to_be_bytes());
            let record = Body { file, start, length: body, digest };
            match u32::try_from(kind >> 32) {
                Ok(ABOUT) => found.about = Some(record.text()?),
                Ok(GROUPS) => groups = Some(record),
                Ok(PAGES) => pages = Some((start, body)),
                Ok(BASE) => found.base = Some(BaseName::read(&record)?),
                _ => {}
            }
            at = start + body;
        }
        if let (Some(groups), Some(pages)) = (groups, pages) {
            found.digests = Some(FileDigests::read(&groups, pages, places)?);
        }
        Ok(Some(found))
    }

    /// What identifies the machine: a digest of everything that is read of the file, and of its bases. `None` without
    /// digests.
    pub(super) fn root(&self) -> Option<Digest> {
        Some(root(self.digests.as_ref()?.digest(), self.base.as_ref()))
    }
}

/// The root of a file with these digests of groups and this base.
fn root(groups: Digest, base: Option<&BaseName>) -> Digest {
    match base {
        None => groups,
        Some(base) => Digest::of(&[groups.to_bytes(), base.root.to_bytes()].concat()),
    }
}

#[cfg(test)]
mod tests;
