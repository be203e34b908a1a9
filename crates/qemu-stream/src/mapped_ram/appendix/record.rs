//! Headers, records and their numbers.

use std::{fs::File, io, os::unix::fs::FileExt};

use multifd::ram::Digest;

use crate::{
    error::{Error, Malformed, Place, StreamKind},
    mapped_ram::access::{data_in, io_error},
};

pub(super) const MAGIC: [u8; 8] = *b"mfd-tail";
pub(super) const END_MAGIC: [u8; 8] = *b"mfd-tend";
pub(super) const VERSION: u32 = 1;
pub(super) const HEADER: usize = 64;
pub(super) const RECORD: usize = 48;
pub(super) const MARK: usize = 24;
pub(super) const ABOUT: u32 = 1;
pub(super) const GROUPS: u32 = 2;
pub(super) const PAGES: u32 = 3;
pub(super) const BASE: u32 = 4;
pub(super) const OF_HEADER: &str = "header of the appendix";
/// The greatest length of the text about a capture, in bytes.
pub(super) const MOST_ABOUT: usize = 1 << 20;

/// The body of a record.
pub(super) struct Body<'a> {
    pub(super) file: &'a File,
    pub(super) start: u64,
    pub(super) length: u64,
    pub(super) digest: Digest,
}

impl Body<'_> {
    /// Its bytes, of which there are at most `most`.
    pub(super) fn bytes(&self, most: usize, what: &'static str) -> Result<Vec<u8>, Error> {
        let at = place(self.start);
        // A hole costs the writer of a file nothing.
        let data = data_in(self.file).map_err(|error| unread(error, self.start))?;
        let most = usize::try_from(data).map_or(most, |data| most.min(data));
        let length = usize::try_from(self.length).ok().filter(|length| *length <= most);
        let Some(length) = length else {
            return Err(
                Malformed::TooLong { field: what.into(), max: most as u64, found: self.length }.at(at)
            );
        };
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, self.start).map_err(|error| unread(error, self.start))?;
        check(&bytes, &self.digest.to_bytes(), what, self.start)?;
        Ok(bytes)
    }

    pub(super) fn text(&self) -> Result<String, Error> {
        let bytes = self.bytes(MOST_ABOUT, "text about the capture")?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// Refuses bytes that differ from their digest.
pub(super) fn check(bytes: &[u8], digest: &[u8], what: &'static str, at: u64) -> Result<(), Error> {
    if Digest::of(bytes).to_bytes() == *digest { Ok(()) } else { Err(Malformed::Damaged(what).at(place(at))) }
}

/// The 64-bit fields at the beginning of some bytes; 0 beyond their end.
pub(super) fn fields<const N: usize>(bytes: &[u8]) -> [u64; N] {
    let mut fields = [0; N];
    for (field, bytes) in fields.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *field = u64::from_be_bytes(*bytes);
    }
    fields
}

pub(super) fn array<const N: usize>(file: &File, at: u64) -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    file.read_exact_at(&mut bytes, at).map_err(|error| unread(error, at))?;
    Ok(bytes)
}

pub(super) fn unread(source: io::Error, at: u64) -> Error {
    io_error(source, at, "read the appendix")
}

pub(super) fn place(offset: u64) -> Place {
    Place { stream: StreamKind::File, offset }
}
