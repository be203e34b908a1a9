//! The note: information for a file's reader that the stream has no field for.
//!
//! ```text
//! header ─ bitmap ─┄ unused bytes ┄─ note ─ pages of block 0
//!
//! 0 "mfd-note" | 8 u32 version 1 | 12 u32 sync mode: 0 unknown, 1 legacy, 2 round | 16 u64 length of the stream | 24
//! ```
//!
//! It is stored between the first block's bitmap and its pages, which no reader of the stream reads: QEMU writes zeros
//! there and loads a file with a note like any other. A file without a note, or with an invalid note, is read without
//! this information.

use std::{fs::File, os::unix::fs::FileExt};

use super::BlockPlace;
use crate::format::{Put, SyncMode};

const MAGIC: [u8; 8] = *b"mfd-note";
const VERSION: u32 = 1;
const LENGTH: usize = 24;
const LEGACY: u32 = 1;
const ROUND: u32 = 2;

/// A note.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Note {
    /// How the source has marked the ends of dirty rounds, if known.
    pub(super) sync_mode: Option<SyncMode>,
    /// Bytes from the beginning of the stream to its end, to detect a truncated file.
    pub(super) length: u64,
}

impl Note {
    /// The number of bytes of a note.
    pub(super) const BYTES: u64 = LENGTH as u64;

    /// The position of the note; `None` if the first block leaves no room for it.
    pub(super) fn offset(places: &[BlockPlace]) -> Option<u64> {
        let first = places.first()?;
        let at = first.pages_offset.checked_sub(Self::BYTES)?;
        let bitmap_end = first.bitmap_offset.checked_add(first.bitmap_length())?;
        (at >= bitmap_end).then_some(at)
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(LENGTH);
        out.put(&MAGIC);
        out.put_u32(VERSION);
        out.put_u32(match self.sync_mode {
            None => 0,
            Some(SyncMode::Legacy) => LEGACY,
            Some(SyncMode::Round) => ROUND,
        });
        out.put_u64(self.length);
        out
    }

    /// The note of a file, if it has one.
    pub(super) fn read(file: &File, places: &[BlockPlace]) -> Option<Self> {
        let mut bytes = [0; LENGTH];
        file.read_exact_at(&mut bytes, Self::offset(places)?).ok()?;
        let (magic, rest) = bytes.split_first_chunk::<8>()?;
        let (version, rest) = rest.split_first_chunk::<4>()?;
        let (mode, rest) = rest.split_first_chunk::<4>()?;
        if *magic != MAGIC || u32::from_be_bytes(*version) != VERSION {
            return None;
        }
        let sync_mode = match u32::from_be_bytes(*mode) {
            LEGACY => Some(SyncMode::Legacy),
            ROUND => Some(SyncMode::Round),
            _ => None,
        };
        Some(Self { sync_mode, length: u64::from_be_bytes(*rest.first_chunk()?) })
    }
}
