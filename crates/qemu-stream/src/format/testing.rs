//! Shared tests of several formats: cut every encoding at every byte, decode noise.

use std::io::Cursor;

use super::*;
use crate::error::{Error, StreamKind};

/// A reader of bytes in memory.
pub(crate) fn reader(bytes: &[u8]) -> Reader<&[u8]> {
    Reader::with_capacity(bytes, StreamKind::Main, 128 << 10)
}

/// The bytes of a dump: hex digits, and literal text in quotes.
pub(crate) fn dump(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (i, part) in text.split('"').enumerate() {
        if i % 2 == 1 {
            bytes.extend(part.as_bytes());
            continue;
        }
        let digits: String = part.chars().filter(|c| !c.is_whitespace()).collect();
        bytes.extend(
            (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()),
        );
    }
    bytes
}

/// Asserts that `bytes` decode completely, and that they are refused as cut at every shorter length, except the lengths
/// in `whole`, at which a shorter value is complete.
pub(crate) fn assert_cut_is_refused<T: std::fmt::Debug>(
    bytes: &[u8],
    whole: &[usize],
    decode: impl Fn(&mut Reader<Cursor<Vec<u8>>>) -> Result<T, Error>,
) {
    let owned = |length: usize| {
        Reader::with_capacity(Cursor::new(bytes[..length].to_vec()), StreamKind::Main, 128 << 10)
    };
    let mut r = owned(bytes.len());
    decode(&mut r).unwrap();
    assert_eq!(r.position(), bytes.len() as u64);
    for length in (0..bytes.len()).filter(|length| !whole.contains(length)) {
        let error = decode(&mut owned(length)).unwrap_err();
        assert!(matches!(error, Error::Cut { .. }), "cut at {length}: {error}");
    }
}

pub(crate) fn section_name(name: &str) -> SectionName {
    SectionName::new(name).unwrap()
}

pub(crate) fn block_name(name: &str) -> multifd::ram::BlockName {
    multifd::ram::BlockName::new(name).unwrap()
}
