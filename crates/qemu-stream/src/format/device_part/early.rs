//! The sections that are sent before the end of RAM, other than RAM: devices, and pieces of live sections.
//!
//! ```text
//! START ram … footer ─ 04 id name instance version body 7e id ─ … ─ PART ram ─ … ─ END ram ─ last pieces ─ devices
//!                      01 id name instance version body 7e id       02 id body 7e id           03 id body 7e id
//! ```
//!
//! `live.rs` describes the pieces of a live section. Nothing marks the end of a device. The description with their
//! lengths arrives at the end of the stream, and RAM cannot wait for it. So a body ends at the first footer of its
//! section after which valid data follows. Device data may contain such bytes by chance or by malice. Then the
//! description, whose first devices these are, does not fit at the end, and the whole stream is refused. Until then
//! only RAM of the same machine was written.

use std::{io::Read, ops::Range};

use super::{DeviceSection, LiveSection, check_distinct, live::Piece};
use crate::{
    error::{Error, Malformed, Place, Unsupported, Violation},
    format::{Reader, Section, SectionHead, SectionId, decode_footer, encode_footer, limits},
    refuse,
};

const START: u8 = 0x01;
const PART: u8 = 0x02;
const END: u8 = 0x03;
const FULL: u8 = 0x04;
const COMMAND: u8 = 0x08;
const FOOTER: u8 = 0x7e;
/// The bytes of type and id: of a footer, and the shortest data after one.
const HEAD: usize = 5;

/// The sections before the end of RAM, other than RAM, in the order of the stream, and the last pieces of live
/// sections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EarlyPart {
    pub(super) bytes: Vec<u8>,
    pub(super) sections: Vec<DeviceSection>,
    pub(super) live: Vec<LiveSection>,
    /// The ranges of `bytes` with pieces of live sections; adjacent pieces are one range.
    pieces: Vec<Range<usize>>,
    /// The pieces after the end of RAM.
    pub(super) ends: Vec<u8>,
    behind_ram: bool,
}

impl EarlyPart {
    /// The bytes of the sections before the end of RAM, as in the stream.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Reads the section whose head was just read. `ram` is the RAM section's number, if it has begun.
    ///
    /// # Errors
    /// If no end is found within the number of bytes allowed for such devices, or the stream has no footers.
    pub fn take<R: Read>(
        &mut self,
        r: &mut Reader<R>,
        head: &SectionHead,
        ram: Option<SectionId>,
        footers: bool,
    ) -> Result<(), Error> {
        let at = r.here();
        if !footers {
            return Err(Unsupported::EarlyDevice { name: head.name.clone() }.at(at));
        }
        Section::Full(head.clone()).encode(&mut self.bytes);
        let from = self.bytes.len();
        let mut footer = Vec::with_capacity(HEAD);
        encode_footer(head.id, &mut footer);
        loop {
            let arrived = r.arrived()?;
            let ordinary = arrived.iter().position(|byte| *byte == FOOTER).unwrap_or(arrived.len());
            if arrived.is_empty() {
                return Err(r.cut("the end of a device sent before ram"));
            }
            self.bytes.extend_from_slice(arrived.get(..ordinary).unwrap_or_default());
            r.consume(ordinary);
            let devices = self.bytes.len() - self.in_pieces();
            if devices > limits::EARLY_PART {
                let (max, found) = (limits::EARLY_PART as u64, devices as u64);
                return Err(Malformed::too_long("devices sent before ram", max, found).at(at));
            }
            if ordinary > 0 {
                continue;
            }
            if r.peek_bytes(HEAD)?.is_some_and(|bytes| bytes == footer) && self.follows_footer(r, ram)? {
                break;
            }
            self.bytes.push(FOOTER);
            r.consume(1);
        }
        let body = from..self.bytes.len();
        self.bytes.extend_from_slice(&footer);
        r.consume(HEAD);
        let SectionHead { id, name, instance, version } = head.clone();
        self.sections.push(DeviceSection { name, instance, version, id, body, early: true });
        check_distinct(&self.sections).map_err(|what| what.at(at))
    }

    /// Reads a section that arrives before the end of RAM, if it is not the RAM section. Returns the section if it is
    /// of a different kind. `at` is the place of its head.
    ///
    /// # Errors
    /// As [`take`](Self::take); if a section that is sent in pieces is unknown, or a piece of one is malformed.
    pub fn offer<R: Read>(
        &mut self,
        r: &mut Reader<R>,
        section: Section,
        at: Place,
        ram: SectionId,
        footers: bool,
    ) -> Result<Option<Section>, Error> {
        match section {
            Section::Full(head) => self.take(r, &head, Some(ram), footers)?,
            Section::Start(head) if !head.is_ram() => {
                let live = LiveSection::of(&head).ok_or_else(|| refuse::iterative_section(&head, at))?;
                if head.id == ram
                    || self.live.iter().any(|other| other.id == live.id || other.name == live.name)
                {
                    let place = "for a section or a number that was started before";
                    return Err(Violation::Misplaced { record: "START", place }.at(at));
                }
                self.live.push(live);
                self.piece(r, &Section::Start(head), Piece::Start, footers)?;
            }
            Section::Part(id) | Section::End(id) if id != ram => {
                if !self.live.iter().any(|live| live.id == id) {
                    return Err(Violation::UnknownSection { expected: ram, found: id }.at(at));
                }
                let piece = if matches!(section, Section::End(_)) { Piece::End } else { Piece::Part };
                self.piece(r, &section, piece, footers)?;
            }
            other => return Ok(Some(other)),
        }
        Ok(None)
    }

    /// Reads the last pieces of the live sections, which follow directly after the END of RAM.
    ///
    /// # Errors
    /// If one is missing or malformed.
    pub fn finish<R: Read>(&mut self, r: &mut Reader<R>, footers: bool) -> Result<(), Error> {
        while self.last_piece(r, footers)?.is_some() {}
        Ok(())
    }

    /// Takes the last piece of one live section, and returns its head; `None` if all have ended.
    ///
    /// # Errors
    /// If there is something else, or it is malformed.
    pub(crate) fn last_piece<R: Read>(
        &mut self,
        r: &mut Reader<R>,
        footers: bool,
    ) -> Result<Option<Section>, Error> {
        self.behind_ram = true;
        let Some(open) = self.live.iter().find(|live| !live.has_ended()) else { return Ok(None) };
        let at = r.here();
        let found = Section::decode(r)?;
        match found {
            Section::End(id) if self.live.iter().any(|live| live.id == id) => {
                self.piece(r, &found, Piece::End, footers)?;
                Ok(Some(found))
            }
            _ => {
                let (name, id, found) = (open.name.clone(), open.id, found.name());
                Err(Violation::Unfinished { name, id, found }.at(at))
            }
        }
    }

    /// The last pieces of live sections as they stand in the stream, behind the end of RAM.
    pub(crate) fn ends(&self) -> &[u8] {
        &self.ends
    }

    /// Reads a piece of a known section. Its head was just read.
    fn piece<R: Read>(
        &mut self,
        r: &mut Reader<R>,
        head: &Section,
        piece: Piece,
        footers: bool,
    ) -> Result<(), Error> {
        let (Section::Start(SectionHead { id, .. }) | Section::Part(id) | Section::End(id)) = head else {
            return Ok(());
        };
        let kept = self.in_pieces() + self.ends.len();
        let out = if self.behind_ram { &mut self.ends } else { &mut self.bytes };
        let from = out.len();
        head.encode(out);
        let left = limits::LIVE_PART.saturating_sub(kept + out.len() - from);
        for live in self.live.iter_mut().filter(|live| live.id == *id) {
            live.body(r, piece, out, left)?;
        }
        if footers {
            decode_footer(*id, r)?;
            encode_footer(*id, out);
        }
        let to = out.len();
        if self.behind_ram {
            return Ok(());
        }
        match self.pieces.last_mut().filter(|last| last.end == from) {
            Some(last) => last.end = to,
            None => self.pieces.push(from..to),
        }
        Ok(())
    }

    /// The number of bytes of live sections before the end of RAM.
    fn in_pieces(&self) -> usize {
        self.pieces.iter().map(Range::len).sum()
    }

    /// The position of the next device in the bytes before the end of RAM, from `at` on.
    pub(super) fn behind_live(&self, at: usize) -> usize {
        self.pieces.iter().find(|piece| piece.start == at).map_or(at, |piece| piece.end)
    }

    /// Whether the data after the next footer may follow a device before the end of RAM.
    fn follows_footer<R: Read>(&self, r: &mut Reader<R>, ram: Option<SectionId>) -> Result<bool, Error> {
        let Some(&[kind, a, b, c, d]) = r.peek_bytes(2 * HEAD)?.and_then(|bytes| bytes.get(HEAD..)) else {
            return Ok(false);
        };
        let id = SectionId(u32::from_be_bytes([a, b, c, d]));
        match kind {
            PART | END => Ok(ram == Some(id) || self.live.iter().any(|live| live.id == id)),
            // Number and length of the command; a command that is not supported is refused by name when it is read.
            COMMAND => Ok(a == 0 && (1..=11).contains(&b)),
            START | FULL => {
                let length =
                    r.peek_bytes(2 * HEAD + 1)?.and_then(|bytes| bytes.last().copied()).unwrap_or_default();
                let name = r.peek_bytes(2 * HEAD + 1 + usize::from(length))?;
                let name = name.and_then(|bytes| bytes.get(2 * HEAD + 1..)).unwrap_or_default();
                Ok(!name.is_empty() && name.iter().all(|byte| (b' '..=b'~').contains(byte)))
            }
            _ => Ok(false),
        }
    }
}
