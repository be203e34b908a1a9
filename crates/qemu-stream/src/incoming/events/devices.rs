//! Collects the device part until its end is found.
//!
//! The description shows it. Where none comes, the part ends where a source without return path closes; behind a source with
//! one only silence follows, which counts if the caller says that no description comes.

use crate::{
    error::{Error, Malformed, Place, Unsupported},
    format::{DevicePart, EarlyPart, EndFinder, limits},
};

/// The bytes behind the end of RAM, so far.
pub(super) struct Collected {
    finder: EndFinder,
    bytes: Vec<u8>,
    /// Of these, last pieces of sections that were sent before the end of RAM.
    ends: usize,
    footers: bool,
}

impl Collected {
    /// Behind the last pieces of `early`.
    pub(super) fn new(early: EarlyPart, footers: bool) -> Self {
        let finder = EndFinder::new(footers).early(early);
        let bytes = finder.ends().to_vec();
        Self { finder, ends: bytes.len(), bytes, footers }
    }

    /// Whether the bytes end as a device part without a description does.
    pub(super) fn may_have_ended(&self) -> bool {
        self.finder.may_have_ended(&self.bytes)
    }

    /// Refuses so many bytes more, at `at`.
    pub(super) fn check_room(&self, count: usize, at: Place) -> Result<(), Error> {
        let devices = self.bytes.len() - self.ends;
        if count > limits::DEVICE_PART - devices {
            let (max, found) = (limits::DEVICE_PART as u64, (devices + count) as u64);
            return Err(Malformed::too_long("device part", max, found).at(at));
        }
        Ok(())
    }

    /// Takes bytes that have come at `at`; the whole part if they are its last.
    pub(super) fn take(&mut self, bytes: &[u8], at: Place) -> Result<Option<DevicePart>, Error> {
        self.bytes.extend_from_slice(bytes);
        self.finder.look(&mut self.bytes).map_err(|what| what.at(at))
    }

    /// The part of a source that has closed at `at`. A source with a return path that closes has not waited for its answer: it is
    /// gone. Without footers, most places where a stream may be cut look like its end.
    pub(super) fn closed(
        self,
        at: Place,
        return_path: bool,
        suppress_vmdesc: bool,
    ) -> Result<DevicePart, Error> {
        if return_path || !(self.footers || suppress_vmdesc) {
            return Err(self.finder.missing(self.bytes.len()).at(at));
        }
        self.finder.without_description(self.bytes).map_err(|what| what.at(at))
    }

    /// The part of a source that sends nothing more, at `at`.
    pub(super) fn silent(self, at: Place, suppress_vmdesc: bool) -> Result<DevicePart, Error> {
        if suppress_vmdesc && self.footers {
            return self.finder.without_description(self.bytes).map_err(|what| what.at(at));
        }
        Err(Unsupported::NoDescription { length: self.bytes.len() as u64 }.at(at))
    }
}
