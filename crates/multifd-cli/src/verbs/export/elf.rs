//! The ELF core file: head, one segment of notes, one segment for each range of RAM, at its physical address.

use qemu_stream::physical::PhysicalMemory;

use super::{
    note::{Architecture, Bytes},
    plan::{Piece, Plan},
};
use crate::output::outcome::{Failure, While};

/// The plan of a file with these notes.
pub(super) fn plan<'a>(
    memory: &'a PhysicalMemory,
    architecture: Architecture,
    notes: &[u8],
) -> Result<Plan<'a>, Failure> {
    let ranges = memory.map().ranges();
    let segments = u16::try_from(ranges.len() + 1).map_err(|_| {
        While::new(
            "cannot write an ELF file",
            format!("RAM is in {} ranges, expected at most 65,534", ranges.len()),
        )
    })?;
    let notes_at = u64::from(HEAD) + u64::from(SEGMENT) * u64::from(segments);
    let mut position = (notes_at + notes.len() as u64).next_multiple_of(PAGE);
    let mut head = Bytes::new(architecture.is_little());
    let order = if architecture.is_little() { 1 } else { 2 };
    head.raw(&[0x7f, b'E', b'L', b'F', CLASS_64, order, VERSION, 0]);
    head.zeros_to(16);
    head.u16(CORE);
    head.u16(architecture.elf());
    head.u32(VERSION.into());
    head.u64(0); // entry
    head.u64(HEAD.into()); // of the segments
    head.u64(0); // no sections
    head.u32(0); // flags
    head.u16(HEAD);
    head.u16(SEGMENT);
    head.u16(segments);
    head.u16(0);
    head.u16(0);
    head.u16(0);
    segment(&mut head, NOTE, notes_at, 0, notes.len() as u64);
    for range in ranges {
        segment(&mut head, LOAD, position, range.start.0, range.length);
        position += range.length;
    }
    let mut plan = Plan::default();
    plan.push(Piece::Bytes(head.into()));
    plan.push(Piece::Bytes(notes.to_vec()));
    plan.align(PAGE);
    ranges.iter().for_each(|range| plan.push(Piece::Memory(*range)));
    Ok(plan)
}

/// An entry of the table of segments. The virtual address is the physical one and the alignment 0, as in QEMU's own dumps: `crash`
/// takes a file with another alignment for one of netdump, and ends without a message.
fn segment(head: &mut Bytes, kind: u32, position: u64, address: u64, length: u64) {
    head.u32(kind);
    head.u32(0);
    head.u64(position);
    head.u64(address);
    head.u64(address);
    head.u64(length);
    head.u64(length);
    head.u64(0);
}

const CLASS_64: u8 = 2;
const VERSION: u8 = 1;
const CORE: u16 = 4;
const NOTE: u32 = 4;
const LOAD: u32 = 1;
const HEAD: u16 = 64;
const SEGMENT: u16 = 56;
const PAGE: u64 = 4096;
