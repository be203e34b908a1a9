//! Live sections: sections other than RAM that are sent in pieces while the guest runs. The format of a piece
//! determines its end.
//!
//! ```text
//! s390-storage_attributes   every piece: u64 1; the last one: u64 8, u64 1
//! spapr/htab        START   u32 shift of the table's length
//!             PART, END     u32 0 │ (u32 index │ u16 valid │ u16 invalid │ valid × 16 bytes)* │ 8 bytes 0
//!    with radix tables, each is one u32 0xffffffff
//! ```
//!
//! A piece is parsed with this grammar, not by searching for its end: its footer must be where the grammar puts it, or
//! the stream is refused. Records that were never observed are refused, too. So a wrong guess is an error and never a
//! different state of the machine.

use std::io::Read;

use crate::{
    error::{Error, Malformed, Unsupported, Violation},
    format::{Put, Reader, SectionHead, SectionId, SectionName, limits},
};

/// A section other than RAM that arrived in pieces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiveSection {
    /// Its name.
    pub name: SectionName,
    /// The number that distinguishes sections with this name.
    pub instance: u32,
    /// The version of its pieces.
    pub version: u32,
    /// The section's number, assigned by the source.
    pub id: SectionId,
    /// The number of its pieces, START and END included.
    pub pieces: u64,
    /// Bytes of the pieces' bodies.
    pub size: u64,
    grammar: Grammar,
    ended: bool,
}

/// The format of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Grammar {
    StorageAttributes,
    /// A hash table with this number of entries.
    HashTable(u64),
}

/// Which piece of a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    Start,
    Part,
    End,
}

impl LiveSection {
    /// The section that begins with this head; `None` if the format of its pieces is unknown.
    pub(super) fn of(head: &SectionHead) -> Option<Self> {
        let grammar = match (head.name.as_bytes(), head.version) {
            (b"s390-storage_attributes", 0) => Grammar::StorageAttributes,
            (b"spapr/htab", 1) => Grammar::HashTable(0),
            _ => return None,
        };
        let SectionHead { id, name, instance, version } = head.clone();
        Some(Self { name, instance, version, id, pieces: 0, size: 0, grammar, ended: false })
    }

    /// Whether its last piece has arrived.
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Reads the body of a piece and appends it to `out`, which may grow by `left` bytes.
    pub(super) fn body<R: Read>(
        &mut self,
        r: &mut Reader<R>,
        piece: Piece,
        out: &mut Vec<u8>,
        left: usize,
    ) -> Result<(), Error> {
        if self.ended {
            let (record, place) = ("PART or END", "after the END of its section");
            return Err(Violation::Misplaced { record, place }.at(r.here()));
        }
        let from = out.len();
        let mut body = Body { r, out, end: from.saturating_add(left), of: &self.name };
        match (self.grammar, piece) {
            (Grammar::StorageAttributes, _) => attributes(&mut body, piece)?,
            (Grammar::HashTable(_), Piece::Start) => self.grammar = Grammar::HashTable(entries(&mut body)?),
            (Grammar::HashTable(entries), _) => chunks(&mut body, entries)?,
        }
        self.pieces += 1;
        self.size += (out.len() - from) as u64;
        self.ended = piece == Piece::End;
        Ok(())
    }
}

/// A body while it is read: every field is kept unchanged.
struct Body<'a, R> {
    r: &'a mut Reader<R>,
    out: &'a mut Vec<u8>,
    end: usize,
    of: &'a SectionName,
}

impl<R: Read> Body<'_, R> {
    fn lend(&mut self, count: usize, what: &'static str) -> Result<&[u8], Error> {
        let from = self.out.len();
        if count > self.end.saturating_sub(from) {
            let max = limits::LIVE_PART as u64;
            let found = max + (from + count).saturating_sub(self.end) as u64;
            let field = format!("pieces of sections beside ram, last of \"{}\"", self.of);
            return Err(Malformed::too_long(field, max, found).at(self.r.here()));
        }
        self.out.put(self.r.lend(count, what)?);
        Ok(self.out.get(from..).unwrap_or_default())
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Error> {
        let mut array = [0; N];
        array.copy_from_slice(self.lend(N, what)?);
        Ok(array)
    }

    fn unknown(&self, found: u64) -> Error {
        Unsupported::LiveRecord { name: self.of.clone(), found }.at(self.r.place())
    }
}

/// Words; a guest without attributes sends two.
fn attributes<R: Read>(body: &mut Body<'_, R>, piece: Piece) -> Result<(), Error> {
    loop {
        match u64::from_be_bytes(body.array("a record of storage attributes")?) {
            ATTRIBUTES_EOS => return Ok(()),
            ATTRIBUTES_DONE if piece == Piece::End => {}
            other => return Err(body.unknown(other)),
        }
    }
}

/// START of a hash table: its number of entries.
fn entries<R: Read>(body: &mut Body<'_, R>) -> Result<u64, Error> {
    match u32::from_be_bytes(body.array("shift of the hash table")?) {
        NO_TABLE => Ok(0),
        shift if SHIFTS.contains(&shift) => Ok((1 << shift) / ENTRY as u64),
        other => {
            Err(Malformed::value("shift of the hash table", "0x12 to 0x2e or none", other).at(body.r.place()))
        }
    }
}

/// PART and END of a hash table: chunks of a table with `entries` entries.
fn chunks<R: Read>(body: &mut Body<'_, R>, entries: u64) -> Result<(), Error> {
    match u32::from_be_bytes(body.array("head of a piece of the hash table")?) {
        NO_TABLE => return Ok(()),
        0 => {}
        other => return Err(body.unknown(other.into())),
    }
    loop {
        let [i, j, k, l, v, w, x, y] = body.array("chunk of the hash table")?;
        let index = u32::from_be_bytes([i, j, k, l]);
        let (valid, invalid) = (u16::from_be_bytes([v, w]), u16::from_be_bytes([x, y]));
        if (index, valid, invalid) == (0, 0, 0) {
            return Ok(());
        }
        let behind = u64::from(index) + u64::from(valid) + u64::from(invalid);
        if behind > entries {
            let field = "end of a chunk of the hash table";
            return Err(Malformed::too_long(field, entries, behind).at(body.r.place()));
        }
        let mut left = usize::from(valid) * ENTRY;
        while left > 0 {
            let count = left.min(limits::AHEAD);
            body.lend(count, "entries of the hash table")?;
            left -= count;
        }
    }
}

/// Nothing more in this piece.
const ATTRIBUTES_EOS: u64 = 0x1;
/// Nothing more at all.
const ATTRIBUTES_DONE: u64 = 0x8;
/// Sent instead of a shift or of a piece's head: the guest has radix tables.
const NO_TABLE: u32 = 0xffff_ffff;
/// The valid shifts of a hash table.
const SHIFTS: std::ops::RangeInclusive<u32> = 18..=46;
/// Bytes of an entry.
const ENTRY: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::testing::{dump, reader, section_name};

    fn section(name: &str, version: u32) -> Option<LiveSection> {
        LiveSection::of(&SectionHead { id: SectionId(9), name: section_name(name), instance: 0, version })
    }

    /// Reads these pieces, the last one as END. Returns the bytes that were kept.
    fn read(name: &str, version: u32, pieces: &[&str], left: usize) -> Result<Vec<u8>, Error> {
        let mut section = section(name, version).expect("known");
        let mut out = Vec::new();
        for (at, piece) in pieces.iter().enumerate() {
            let bytes = dump(piece);
            let mut r = reader(&bytes);
            let kind = match at {
                0 => Piece::Start,
                _ if at + 1 == pieces.len() => Piece::End,
                _ => Piece::Part,
            };
            section.body(&mut r, kind, &mut out, left)?;
            assert_eq!(r.position(), bytes.len() as u64, "{piece}: the piece ends there");
        }
        assert_eq!((section.pieces, section.size), (pieces.len() as u64, out.len() as u64));
        Ok(out)
    }

    /// As sent by QEMU 10.0.2: of a guest that made two entries by hypercall, of one without entries, and of a machine
    /// without attributes.
    #[test]
    fn pieces_that_were_seen_are_kept_to_the_byte() {
        let entry = "00 00 00 00 00 00 00 01 00 00 00 00 00 00 00 10";
        let part =
            format!("00000000 00000018 0001 0000 {entry} 00000800 0001 0000 {entry} 00000000 0000 0000");
        for (name, version, pieces) in [
            ("spapr/htab", 1, vec!["00000015", &part, "00000000 00000000 0000 0000"]),
            ("spapr/htab", 1, vec!["ffffffff", "ffffffff"]),
            ("s390-storage_attributes", 0, vec!["0000000000000001", "0000000000000008 0000000000000001"]),
        ] {
            let expected: Vec<u8> = pieces.iter().flat_map(|piece| dump(piece)).collect();
            assert_eq!(read(name, version, &pieces, 1 << 20).expect("read"), expected, "{name}");
        }
    }

    #[test]
    fn pieces_that_were_never_seen_are_refused() {
        assert!(section("spapr/htab", 2).is_none() && section("spapr/htab", 0).is_none());
        assert!(section("s390-storage_attributes", 1).is_none() && section("moo", 0).is_none());
        for (name, version, pieces, told) in [
            ("s390-storage_attributes", 0, vec!["0000000000000004"], "record 0x4 is not known"),
            ("s390-storage_attributes", 0, vec!["0000000000000008"], "record 0x8 is not known"),
            ("spapr/htab", 1, vec!["00000011"], "shift of the hash table"),
            ("spapr/htab", 1, vec!["0000002f"], "shift of the hash table"),
            ("spapr/htab", 1, vec!["00000015", "00000001"], "record 0x1 is not known"),
            // 2 MiB have 2^17 entries.
            (
                "spapr/htab",
                1,
                vec!["00000015", "00000000 0001ffff 0001 0001"],
                "end of a chunk of the hash table",
            ),
            (
                "spapr/htab",
                1,
                vec!["ffffffff", "00000000 00000000 0001 0000"],
                "end of a chunk of the hash table",
            ),
            ("spapr/htab", 1, vec!["00000015", "00000000 00000000 0001 0000"], "ends"),
            ("spapr/htab", 1, vec!["00000015", "00"], "ends"),
        ] {
            let error = read(name, version, &pieces, 1 << 20).expect_err("refused");
            assert!(
                error.to_string().contains(told) || matches!(error, Error::Cut { .. }),
                "{pieces:?}: {error}"
            );
        }
    }

    #[test]
    fn pieces_are_bounded_together_and_end_once() {
        let pieces = ["00000015", "00000000 00000000 0000 0000"];
        let error = read("spapr/htab", 1, &pieces, 8).expect_err("too long");
        assert!(error.to_string().contains("pieces of sections beside ram"), "{error}");
        let mut section = section("spapr/htab", 1).expect("known");
        let body = dump("ffffffff");
        section.body(&mut reader(&body), Piece::Start, &mut Vec::new(), 64).expect("read");
        section.body(&mut reader(&body), Piece::End, &mut Vec::new(), 64).expect("read");
        assert!(section.has_ended());
        let error = section.body(&mut reader(&body), Piece::Part, &mut Vec::new(), 64).expect_err("ended");
        assert!(matches!(error, Error::Violation { .. }), "{error}");
    }
}
