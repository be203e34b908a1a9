//! The devices at the end of a file, and where they end.
//!
//! QEMU stops reading where its devices end and ignores what follows in the file: a copy may have been filled up to whole
//! blocks, or written over a longer file. So the end of the file is not the end of the machine. The end is, in this
//! order: where the note puts it; the end of the file, if a description that fits ends there; the end of the first
//! description that fits, as in a stream. A description inside of device data, planted by a guest, is found only if the file
//! has further bytes after its true end.
//!
//! Without a description only the note shows the end. A file of QEMU has no note: its devices must be the last bytes, or
//! the last before zeros.

use std::{fs::File, os::unix::fs::FileExt};

use crate::{
    error::{Error, Malformed, Place, StreamKind},
    format::{DevicePart, EarlyPart, EndFinder, limits},
    mapped_ram::access::{data_in, io_error},
};

/// The end of a file, from the devices on.
pub(super) struct Devices<'a> {
    pub(super) file: &'a File,
    /// Where they begin.
    pub(super) at: u64,
    /// The length of the file.
    pub(super) length: u64,
    pub(super) footers: bool,
    pub(super) early: EarlyPart,
}

impl Devices<'_> {
    /// Reads the devices, which end at `noted` if the note can be trusted. Returns also where they end.
    pub(super) fn read(&self, noted: Option<u64>) -> Result<(DevicePart, u64), Error> {
        let most = self.most()?;
        let ends_with_brace = self.length > self.at && self.bytes(self.length - 1, 1)? == b"}";
        let at_end = ends_with_brace.then_some(self.length);
        for end in [noted, at_end].into_iter().flatten().filter(|end| *end <= self.length) {
            if let Some(bytes) = self.collect(end, most)?
                && let Some(part) = self.looked(|finder| finder.find(&mut bytes.clone()))?
            {
                return Ok((part, end));
            }
        }
        let mut finder = self.finder();
        let mut bytes = finder.ends().to_vec();
        let before = bytes.len();
        let mut at = self.at;
        while at < self.length {
            let room = most - (bytes.len() - before) as u64;
            if room == 0 {
                return Err(self.too_long(most));
            }
            let piece = (self.length - at).min(PIECE).min(room);
            bytes.extend(self.bytes(at, piece)?);
            at += piece;
            if let Some(part) = finder.find_inside(&mut bytes).map_err(|what| what.at(self.place()))? {
                let length = (part.as_bytes().len() - before) as u64;
                return Ok((part, self.at + length));
            }
        }
        self.without_description(finder, bytes, noted)
    }

    /// The devices of a file without a description, all of whose bytes are `bytes`.
    fn without_description(
        &self,
        finder: EndFinder,
        mut bytes: Vec<u8>,
        noted: Option<u64>,
    ) -> Result<(DevicePart, u64), Error> {
        let before = finder.ends().len();
        let end = match noted {
            Some(end) => end.checked_sub(self.at).and_then(|length| usize::try_from(length).ok()),
            None if self.footers => finder.end_before_zeros(&bytes).map(|end| end - before),
            None => None,
        };
        let missing = finder.clone().missing(bytes.len() - before);
        let Some(length) = end.filter(|length| before + length <= bytes.len()) else {
            return Err(self.no_end(missing));
        };
        bytes.truncate(before + length);
        let part = finder.without_description(bytes).map_err(|missing| self.no_end(missing))?;
        Ok((part, self.at + length as u64))
    }

    fn finder(&self) -> EndFinder {
        EndFinder::new(self.footers).early(self.early.clone())
    }

    fn looked(
        &self,
        look: impl FnOnce(&mut EndFinder) -> Result<Option<DevicePart>, crate::error::Violation>,
    ) -> Result<Option<DevicePart>, Error> {
        look(&mut self.finder()).map_err(|what| what.at(self.place()))
    }

    /// The last pieces of live sections and all bytes up to `end`; `None` if they are too many.
    fn collect(&self, end: u64, most: u64) -> Result<Option<Vec<u8>>, Error> {
        let Some(length) = end.checked_sub(self.at).filter(|length| *length <= most) else { return Ok(None) };
        let mut bytes = self.finder().ends().to_vec();
        bytes.extend(self.bytes(self.at, length)?);
        Ok(Some(bytes))
    }

    fn bytes(&self, at: u64, length: u64) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        let read = self.file.read_exact_at(&mut bytes, at);
        read.map_err(|source| io_error(source, at, "read the devices"))?;
        Ok(bytes)
    }

    /// The greatest number of bytes that are read. Zeros that a hole has cost the writer of the file nothing, so there may be
    /// only some of them.
    fn most(&self) -> Result<u64, Error> {
        let data =
            data_in(self.file).map_err(|source| io_error(source, self.at, "find its size on the disk"))?;
        Ok(data.saturating_add(HOLES).min(limits::DEVICE_PART as u64))
    }

    fn too_long(&self, most: u64) -> Error {
        let field = if most < limits::DEVICE_PART as u64 {
            "device part, in a file that is mostly holes (copy it without holes: cp --sparse=never)"
        } else {
            "device part"
        };
        Malformed::too_long(field, most, self.length - self.at).at(self.place())
    }

    fn no_end(&self, missing: Malformed) -> Error {
        let Malformed::NoDescription { length, last } = missing else { return missing.at(self.place()) };
        let at = Place { stream: StreamKind::File, offset: self.length };
        Malformed::NoEndInFile { length, last }.at(at)
    }

    fn place(&self) -> Place {
        Place { stream: StreamKind::File, offset: self.at }
    }
}

/// Bytes that are read between two searches for the end.
const PIECE: u64 = 256 << 10;
/// Bytes of holes among the devices.
const HOLES: u64 = 16 << 20;
