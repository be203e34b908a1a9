//! The kernel's description of itself: a note that Linux keeps in its memory for tools that read dumps.
//!
//! ```text
//! u32 11 | u32 length | u32 0 | "VMCOREINFO\0" | 0 | "OSRELEASE=6.1.0…\n" …
//! ```

use multifd::channel::Stop;
use qemu_stream::physical::{PhysicalAddress, PhysicalMemory};

use super::note::Architecture;
use crate::{
    output::outcome::Failure,
    verbs::find::{search::Search, threads},
};

/// The text of the note; `None` if the guest has none.
pub(super) fn find(
    memory: &PhysicalMemory,
    architecture: Architecture,
    stop: &Stop,
) -> Result<Option<Vec<u8>>, Failure> {
    let mut text = None;
    Search::new(memory, NAME_AND_TEXT, threads(None)).run(stop, |places| {
        text = places.iter().find_map(|place| read(memory, architecture, *place));
        Ok(text.is_none())
    })?;
    Ok(text)
}

/// The text of the note whose name is at `place`. A place without a valid head may be a copy in a buffer of somebody else.
fn read(memory: &PhysicalMemory, architecture: Architecture, place: PhysicalAddress) -> Option<Vec<u8>> {
    let start = place.0.checked_sub(HEAD as u64)?;
    let mut head = [0; HEAD];
    memory.read(PhysicalAddress(start), &mut head).ok()?;
    let number = |at: usize| {
        let mut bytes: [u8; 4] = head.get(at..at + 4)?.try_into().ok()?;
        if architecture.is_little() {
            bytes.reverse();
        }
        Some(u32::from_be_bytes(bytes))
    };
    let length = usize::try_from(number(4)?).ok().filter(|length| (MARK.len()..=MOST).contains(length))?;
    if number(0)? != NAME_LENGTH || number(8)? != 0 {
        return None;
    }
    let mut text = vec![0; length];
    memory.read(PhysicalAddress(place.0 + TEXT_AT), &mut text).ok()?;
    let printable = |byte: &u8| matches!(byte, b' '..=b'~' | b'\n');
    text.iter().all(printable).then_some(text)
}

/// The name, and how the text begins.
const NAME_AND_TEXT: &[u8] = b"VMCOREINFO\0\0OSRELEASE=";
const MARK: &[u8] = b"OSRELEASE=";
const HEAD: usize = 12;
const NAME_LENGTH: u32 = 11;
const TEXT_AT: u64 = 12;
/// Linux has a page for it.
const MOST: usize = 64 << 10;
