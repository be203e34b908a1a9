//! Collects the device part until its end is found.
//!
//! The description shows the end. Without one, the part ends where a source without return path closes the connection. A source
//! with a return path becomes silent instead; the caller decides whether silence is the end.

use crate::{
    error::{Error, Malformed, Place, Unsupported},
    format::{DevicePart, EarlyPart, EndFinder, limits},
};

/// The bytes after the end of RAM that have arrived.
pub(super) struct Collected {
    finder: EndFinder,
    bytes: Vec<u8>,
    /// The length of the last pieces of live sections, which are the first of `bytes`.
    ends: usize,
    footers: bool,
}

impl Collected {
    /// Starts after the last pieces of `early`.
    pub(super) fn new(early: EarlyPart, footers: bool) -> Self {
        let finder = EndFinder::new(footers).early(early);
        let bytes = finder.ends().to_vec();
        Self { finder, ends: bytes.len(), bytes, footers }
    }

    /// Whether the bytes may be a complete device part without a description.
    pub(super) fn may_have_ended(&self) -> bool {
        self.finder.may_have_ended(&self.bytes)
    }

    /// Refuses `count` more bytes if the part would be too long. `at` is their place, for the error.
    pub(super) fn check_room(&self, count: usize, at: Place) -> Result<(), Error> {
        let devices = self.bytes.len() - self.ends;
        if count > limits::DEVICE_PART - devices {
            let (max, found) = (limits::DEVICE_PART as u64, (devices + count) as u64);
            return Err(Malformed::too_long("device part", max, found).at(at));
        }
        Ok(())
    }

    /// Appends the bytes that arrived at `at`. Returns the whole part if it is complete.
    pub(super) fn take(&mut self, bytes: &[u8], at: Place) -> Result<Option<DevicePart>, Error> {
        self.bytes.extend_from_slice(bytes);
        self.finder.find(&mut self.bytes).map_err(|what| what.at(at))
    }

    /// The part of a source that closed the connection at `at`. A source with a return path waits for a reply before it closes: if
    /// it closes here, it has failed. Without footers the end cannot be distinguished from most cuts.
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

    /// The part of a source that is silent since `at`.
    pub(super) fn silent(self, at: Place, suppress_vmdesc: bool) -> Result<DevicePart, Error> {
        if suppress_vmdesc && self.footers {
            return self.finder.without_description(self.bytes).map_err(|what| what.at(at));
        }
        Err(Unsupported::NoDescription { length: self.bytes.len() as u64 }.at(at))
    }
}
