//! Finds the end of a device part while it arrives, without knowledge of the devices.
//!
//! Bodies have no length, so the end is recognised by its shape: `[7e id] 00 06 length {`, followed by exactly `length`
//! bytes of JSON, whose devices fit everything before. Device data may contain that shape by chance or by malice: such
//! a place fails one of these tests, and the number of tests is bounded. Each byte is scanned once, each candidate is
//! parsed at most once.
//!
//! If the source does not close after its last byte, only this shape shows the end. A guest that plants a complete,
//! fitting description of a part of its own devices in device data can truncate its own state; it cannot harm others.

use super::{Description, DevicePart, DeviceSection, EarlyPart, Misfit, check_distinct, walk};
use crate::{
    error::{Malformed, Violation},
    format::limits,
};

const EOF: u8 = 0x00;
const FULL: u8 = 0x04;
const FOOTER_TYPE: u8 = 0x7e;
/// Type and id.
const FOOTER: usize = 5;
/// EOF, VMDESCRIPTION, length, the brace.
const MARK: usize = 7;

/// Searches the bytes collected so far for the end.
#[derive(Clone, Debug)]
pub struct EndFinder {
    footers: bool,
    early: EarlyPart,
    scanned: usize,
    /// Places that look like the end and whose JSON has not arrived completely; in most cases the list is empty.
    candidates: Vec<Candidate>,
    found: usize,
    parsed: u64,
    misfit: Option<Misfit>,
    /// The description that was found is not the source's.
    derived: bool,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    eof: usize,
    end: usize,
}

impl EndFinder {
    /// Creates a finder for a stream whose sections have `footers`.
    pub fn new(footers: bool) -> Self {
        let early = EarlyPart::default();
        let (candidates, misfit, derived) = (Vec::new(), None, false);
        Self { footers, early, scanned: 0, candidates, found: 0, parsed: 0, misfit, derived }
    }

    /// Sets the sections that arrived before the end of RAM. Their devices are described first. `collected` begins with
    /// the last pieces of their live sections.
    #[must_use]
    pub fn early(mut self, early: EarlyPart) -> Self {
        self.scanned = early.ends.len();
        self.early = early;
        self
    }

    /// The last pieces of the live sections.
    pub(crate) fn ends(&self) -> &[u8] {
        &self.early.ends
    }

    /// Checks whether `collected` ends with the end of the stream. It begins after the RAM section and may only grow
    /// from call to call. If it ends so, takes the bytes and splits them.
    ///
    /// # Errors
    /// If more places look like the end than any real device part has.
    pub fn find(&mut self, collected: &mut Vec<u8>) -> Result<Option<DevicePart>, Violation> {
        self.scan(collected)?;
        let ends = self.candidates.iter().copied().filter(|c| c.end == collected.len());
        let found = self.first_that_fits(&ends.collect::<Vec<_>>(), collected)?;
        // A candidate whose end has passed was false: nothing follows the true end.
        self.candidates.retain(|c| c.end > collected.len());
        Ok(found.map(|found| self.part(collected, found)))
    }

    /// Like [`find`](Self::find), but finds an end inside `collected`, too: the first that fits. Bytes after it are
    /// removed.
    ///
    /// # Errors
    /// As [`find`](Self::find).
    pub fn find_inside(&mut self, collected: &mut Vec<u8>) -> Result<Option<DevicePart>, Violation> {
        self.scan(collected)?;
        let (ended, open) = self.candidates.iter().partition::<Vec<_>, _>(|c| c.end <= collected.len());
        let found = self.first_that_fits(&ended, collected)?;
        self.candidates = open;
        Ok(found.map(|found| {
            collected.truncate(found.0.end);
            self.part(collected, found)
        }))
    }

    /// The first of these candidates whose description fits what is before it.
    fn first_that_fits(
        &mut self,
        candidates: &[Candidate],
        collected: &[u8],
    ) -> Result<Option<(Candidate, Vec<DeviceSection>)>, Violation> {
        for candidate in candidates {
            let Some(json) = collected.get(candidate.eof + DevicePart::END_HEAD..candidate.end) else {
                continue;
            };
            self.parsed += json.len() as u64;
            if self.parsed > limits::DESCRIPTIONS_PARSED {
                return Err(Violation::TooManyEnds { max: self.found });
            }
            let split = Description::parse(json).map_err(|e| Misfit::Json(e.to_string().into())).and_then(
                |description| {
                    let blob = collected.get(..candidate.eof).unwrap_or_default();
                    let sections = walk::split(&self.early, blob, &description, self.footers)?;
                    Ok((sections, description.is_derived()))
                },
            );
            match split {
                Ok((sections, derived)) => {
                    check_distinct(&sections)?;
                    self.derived = derived;
                    return Ok(Some((*candidate, sections)));
                }
                Err(misfit) => self.misfit = Some(misfit),
            }
        }
        Ok(None)
    }

    fn part(
        &mut self,
        collected: &mut Vec<u8>,
        (Candidate { eof, .. }, sections): (Candidate, Vec<DeviceSection>),
    ) -> DevicePart {
        DevicePart {
            early: std::mem::take(&mut self.early.bytes),
            bytes: std::mem::take(collected),
            eof,
            json: Some(eof + DevicePart::END_HEAD),
            sections,
            live: std::mem::take(&mut self.early.live),
            footers: self.footers,
            derived: self.derived,
        }
    }

    /// The length of the device part without a description at the beginning of `collected`, which zeros follow, in the
    /// number needed to fill a block of a disk, for example. `None` if the bytes before the zeros are no such part.
    pub fn end_before_zeros(&self, collected: &[u8]) -> Option<usize> {
        let data = collected.len() - collected.iter().rev().take_while(|byte| **byte == 0).count();
        // EOF is a zero, and so may be the last bytes of the last footer's number.
        (data..=collected.len()).take(FOOTER + 1).find(|end| {
            let collected = collected.get(..*end).unwrap_or_default();
            self.may_have_ended(collected) && self.is_closed(collected)
        })
    }

    /// Whether `collected` ends like a device part without a description: with a footer and EOF. Without footers it is
    /// only a byte 0, which proves little.
    pub fn may_have_ended(&self, collected: &[u8]) -> bool {
        let Some((&EOF, blob)) = collected.split_last() else { return false };
        match blob.split_last_chunk::<FOOTER>() {
            _ if blob.len() == self.early.ends.len() => true,
            Some((_, last)) if self.footers => last[0] == FOOTER_TYPE,
            _ => !self.footers && blob.get(self.early.ends.len()) == Some(&FULL),
        }
    }

    /// The device part of a stream that has ended after `collected` without a description.
    ///
    /// # Errors
    /// If no device part ends so: its last footer must belong to one of its sections.
    pub fn without_description(self, collected: Vec<u8>) -> Result<DevicePart, Malformed> {
        if !self.may_have_ended(&collected) || !self.is_closed(&collected) {
            return Err(self.missing(collected.len()));
        }
        let eof = collected.len().saturating_sub(1);
        Ok(DevicePart {
            early: self.early.bytes,
            bytes: collected,
            eof,
            json: None,
            sections: self.early.sections,
            live: self.early.live,
            footers: self.footers,
            derived: false,
        })
    }

    /// Whether the last footer belongs to a section in `collected`, or there are no sections or no footers.
    pub(super) fn is_closed(&self, collected: &[u8]) -> bool {
        let (from, eof) = (self.early.ends.len(), collected.len().saturating_sub(1));
        !self.footers || eof == from || collected.get(from..eof).is_some_and(opens_last)
    }

    /// The error of a stream that ends after `length` bytes without an end in them.
    pub fn missing(self, length: usize) -> Malformed {
        Malformed::NoDescription { length: length as u64, last: self.misfit }
    }

    /// Records the places that look like the end in the bytes since the last scan.
    fn scan(&mut self, collected: &[u8]) -> Result<(), Violation> {
        while let Some(mark) = collected.get(self.scanned..self.scanned + MARK) {
            let eof = self.scanned;
            self.scanned += 1;
            let &[0x00, 0x06, a, b, c, d, b'{'] = mark else { continue };
            let length = u32::from_be_bytes([a, b, c, d]);
            let behind_footer =
                eof.checked_sub(FOOTER).and_then(|at| collected.get(at)) == Some(&FOOTER_TYPE);
            if length > limits::DESCRIPTION || (self.footers && eof > self.early.ends.len() && !behind_footer)
            {
                continue;
            }
            self.found += 1;
            if self.found > limits::ENDS {
                return Err(Violation::TooManyEnds { max: limits::ENDS });
            }
            let Some(end) = usize::try_from(length).ok().map(|length| eof + DevicePart::END_HEAD + length)
            else {
                continue;
            };
            self.candidates.push(Candidate { eof, end });
        }
        Ok(())
    }
}

/// Whether the section that the last footer closes begins somewhere before.
fn opens_last(blob: &[u8]) -> bool {
    let Some((blob, &[_, a, b, c, d])) = blob.split_last_chunk() else { return false };
    let head = [FULL, a, b, c, d];
    let named = |rest: &[u8]| {
        let name = rest.split_first().and_then(|(length, rest)| rest.get(..usize::from(*length)));
        name.is_some_and(|name| !name.is_empty() && name.iter().all(|byte| (b' '..=b'~').contains(byte)))
    };
    blob.windows(FOOTER)
        .enumerate()
        .any(|(at, bytes)| bytes == head && blob.get(at + FOOTER..).is_some_and(named))
}
