//! The packet before the main stream.
//!
//! ```text
//! "mfHO" ─ version (u16) ─ number of blocks (u16) ─ length of the rest (u32) ─ block*
//! block = offset (u64), length (u64), length of the name (u8), name
//! ```
//!
//! Numbers are big-endian. The descriptors come with the first byte, one for each block, in the same order.

use std::{fs::File, os::fd::OwnedFd};

use super::SharedMemory;
use crate::{error::Violation, ram::BlockName};

/// The first bytes of the packet. No main stream and no channel begins like this.
pub(super) const MAGIC: [u8; 4] = *b"mfHO";
/// The bytes up to the blocks.
pub(super) const HEAD: usize = 12;
/// The number of descriptors that the system passes with one message.
pub(super) const MOST: usize = 253;
const VERSION: u16 = 1;
/// The bytes of a block with the longest name.
const LONGEST: usize = 17 + 255;

/// The head of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) blocks: usize,
    /// The length of what follows.
    pub(super) rest: usize,
}

/// The bytes of a packet, or `None` if it has too many blocks.
pub(super) fn encode(memory: &[SharedMemory]) -> Option<Vec<u8>> {
    let mut rest = Vec::new();
    for SharedMemory { block, offset, length, .. } in memory {
        rest.extend(offset.to_be_bytes());
        rest.extend(length.to_be_bytes());
        let name = block.as_bytes();
        rest.push(u8::try_from(name.len()).ok()?);
        rest.extend(name);
    }
    let count = u16::try_from(memory.len()).ok().filter(|count| usize::from(*count) <= MOST)?;
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_be_bytes());
    bytes.extend(count.to_be_bytes());
    bytes.extend(u32::try_from(rest.len()).ok()?.to_be_bytes());
    bytes.extend(rest);
    Some(bytes)
}

/// Reads the head, which begins with [`MAGIC`].
pub(super) fn head(bytes: [u8; HEAD]) -> Result<Head, Violation> {
    let [_, _, _, _, v0, v1, n0, n1, l0, l1, l2, l3] = bytes;
    let (version, blocks) = (u16::from_be_bytes([v0, v1]), usize::from(u16::from_be_bytes([n0, n1])));
    let rest = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
    if version != VERSION {
        return Err(bad(format!("version {version}, expected {VERSION}")));
    }
    if blocks > MOST || rest > blocks * LONGEST {
        return Err(bad(format!("{blocks} blocks in {rest:#x} bytes")));
    }
    Ok(Head { blocks, rest })
}

/// Reads what follows the head, with the descriptors.
pub(super) fn memory(
    head: Head,
    mut rest: &[u8],
    descriptors: Vec<OwnedFd>,
) -> Result<Vec<SharedMemory>, Violation> {
    if descriptors.len() != head.blocks {
        return Err(bad(format!("{} descriptors for {} blocks", descriptors.len(), head.blocks)));
    }
    let mut memory: Vec<SharedMemory> = Vec::new();
    for descriptor in descriptors {
        let block = block(&mut rest, File::from(descriptor)).ok_or_else(|| bad("a block is cut".into()))?;
        if memory.iter().any(|other| other.block == block.block) {
            return Err(bad(format!("block {:?} twice", block.block)));
        }
        memory.push(block);
    }
    if !rest.is_empty() {
        return Err(bad(format!("{:#x} bytes after the last block", rest.len())));
    }
    for SharedMemory { block, file, offset, length } in &memory {
        let size = file.metadata().ok().filter(std::fs::Metadata::is_file).map(|found| found.len());
        let size = size.ok_or_else(|| bad(format!("the descriptor of block {block:?} is no file")))?;
        if offset.checked_add(*length).is_none_or(|end| end > size) {
            let text = format!(
                "block {block:?} has {length:#x} bytes at offset {offset:#x} of a file of {size:#x} bytes"
            );
            return Err(bad(text));
        }
    }
    Ok(memory)
}

fn block(rest: &mut &[u8], file: File) -> Option<SharedMemory> {
    let mut take = |count: usize| {
        let (taken, left) = rest.split_at_checked(count)?;
        *rest = left;
        Some(taken)
    };
    let number = |bytes: &[u8]| bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
    let (offset, length) = (number(take(8)?), number(take(8)?));
    let name = usize::from(*take(1)?.first()?);
    let block = BlockName::new(take(name)?)?;
    Some(SharedMemory { block, file, offset, length })
}

fn bad(what: String) -> Violation {
    Violation::HandOver { what }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    fn file(length: u64) -> File {
        let file = File::from(memfd_create("memory", MemfdFlags::CLOEXEC).expect("a memfd"));
        file.set_len(length).expect("sized");
        file
    }

    fn shared(name: &str, offset: u64, length: u64) -> SharedMemory {
        let block = BlockName::new(name).expect("a name");
        SharedMemory { block, file: file(1 << 20), offset, length }
    }

    fn parsed(bytes: &[u8], descriptors: Vec<OwnedFd>) -> Result<Vec<SharedMemory>, Violation> {
        let (first, rest) = bytes.split_first_chunk().expect("a head");
        let head = head(*first)?;
        memory(head, rest.get(..head.rest).expect("the rest"), descriptors)
    }

    #[test]
    fn packet_is_read_as_it_was_written() {
        let memory = [shared("ram", 0x1000, 0x8000), shared("vram", 0, 1 << 20)];
        let bytes = encode(&memory).expect("few");
        let read = parsed(&bytes, vec![file(1 << 20).into(), file(1 << 20).into()]).expect("a packet");
        let parts = |memory: &[SharedMemory]| -> Vec<_> {
            memory.iter().map(|one| (one.block.clone(), one.offset, one.length)).collect()
        };
        assert_eq!(parts(&read), parts(&memory));
    }

    #[test]
    fn packet_that_is_none_is_refused_by_name() {
        let bytes = encode(&[shared("ram", 0x1000, 0x8000)]).expect("few");
        let with = |at: usize, byte: u8| {
            let mut bytes = bytes.clone();
            *bytes.get_mut(at).expect("there") = byte;
            bytes
        };
        let one = || vec![OwnedFd::from(file(0x9000))];
        assert!(parsed(&bytes, one()).is_ok());
        let twice = encode(&[shared("ram", 0, 1), shared("ram", 0, 1)]).expect("few");
        let null = vec![OwnedFd::from(File::open("/dev/null").expect("there"))];
        for (bytes, descriptors, expected) in [
            (with(5, 2), one(), "version 2, expected 1"),
            (with(6, 1), one(), "257 blocks"),
            (with(9, 9), one(), "bytes"),
            (bytes.clone(), Vec::new(), "0 descriptors for 1 blocks"),
            (twice, vec![file(1).into(), file(1).into()], "block \"ram\" twice"),
            (with(28, 4), one(), "a block is cut"),
            (with(28, 2), one(), "0x1 bytes after the last block"),
            (
                with(18, 0x20),
                one(),
                "block \"ram\" has 0x8000 bytes at offset 0x2000 of a file of 0x9000 bytes",
            ),
            (with(12, 0xff), one(), "at offset 0xff00000000001000"),
            (bytes.clone(), null, "the descriptor of block \"ram\" is no file"),
        ] {
            let error = parsed(&bytes, descriptors).expect_err(expected).to_string();
            assert!(error.contains(expected), "{expected}: {error}");
        }
        let many: Vec<_> = (0..=MOST).map(|number| shared(&format!("ram{number}"), 0, 1)).collect();
        assert!(encode(&many).is_none() && encode(many.get(1..).expect("one less")).is_some());
    }
}
