//! The kdump file (diskdump, header version 6), with pages as they are.
//!
//! ```text
//! block 0  "KDUMP   " | 8 version | 12 utsname | 408 time | 424 status | 428 block size | 432 blocks of the sub-header | 436 of bitmaps
//!          440 pages | 444 … | 452 written | 456 … | 460 processors
//! block 1  phys_base | 8 level, split | 16 … | 32 VMCOREINFO: position, length | 48 notes: position, length | 64 … | 96 pages │ notes
//! bitmaps  page is RAM │ page is in the file: the same
//! table    for each page of RAM: u64 position | u32 length | u32 compression, 0 | u64 0
//! pages    a page of zeros for all that are zero, then all others
//! ```

use std::io;

use qemu_stream::physical::{PhysicalAddress, PhysicalMemory, PhysicalRange};

use super::{
    described::Described,
    note::{Architecture, Bytes},
    plan::{Piece, Plan, Table},
};
use crate::output::outcome::{Failure, While};

/// The plan of a file with these notes.
pub(super) fn plan<'a>(
    memory: &'a PhysicalMemory,
    architecture: Architecture,
    described: &Described,
) -> Result<Plan<'a>, Failure> {
    let refused = |why: String| While::new("cannot write a kdump file; use the format elf", why);
    if let Some(size) = described.value("PAGESIZE=").filter(|size| *size != PAGE) {
        return Err(refused(format!("the kernel has pages of {size} bytes, expected {PAGE}")).into());
    }
    let ranges = memory.map().ranges();
    if ranges.iter().any(|range| !range.start.0.is_multiple_of(PAGE) || !range.length.is_multiple_of(PAGE)) {
        return Err(refused(format!("RAM does not consist of pages of {PAGE} bytes")).into());
    }
    let pages = ranges.last().map_or(0, |range| range.last().0 / PAGE + 1);
    let bitmap_blocks = pages.div_ceil(8 * PAGE);
    let sub_blocks = (SUB_HEAD + described.notes.len() as u64).div_ceil(PAGE);
    let table_at = PAGE * (1 + sub_blocks + 2 * bitmap_blocks);
    let total = memory.map().total() / PAGE;
    let first_data = (table_at + total * ENTRY).next_multiple_of(PAGE);
    let table = Descriptors { memory, first_data, total, little: architecture.is_little() };

    let mut plan = Plan::default();
    let counts = Counts { pages, bitmap_blocks, sub_blocks, ram: total };
    plan.push(Piece::Bytes(head(architecture, described, &counts)));
    plan.push(Piece::Bytes(sub_head(architecture, described, pages)));
    plan.align(PAGE);
    for _ in 0..2 {
        plan.push(Piece::Table(Box::new(Bitmap { memory, length: bitmap_blocks * PAGE })));
    }
    plan.push(Piece::Table(Box::new(table)));
    plan.align(PAGE);
    plan.push(Piece::Zeros(PAGE));
    for range in ranges {
        for start in (range.start.0..=range.last().0).step_by(STRETCH) {
            let length = (range.last().0 - start + 1).min(STRETCH as u64);
            for stretch in memory.map().pieces(PhysicalAddress(start), length) {
                let present = memory.present(&stretch, u64::MAX).map(|piece| piece.length).sum();
                plan.push(Piece::Packed(stretch, present));
            }
        }
    }
    Ok(plan)
}

struct Counts {
    pages: u64,
    bitmap_blocks: u64,
    sub_blocks: u64,
    ram: u64,
}

fn head(architecture: Architecture, described: &Described, counts: &Counts) -> Vec<u8> {
    let mut head = Bytes::new(architecture.is_little());
    let low = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
    head.raw(b"KDUMP   ");
    head.u32(VERSION);
    // Readers take no name of an architecture if another name is empty.
    let release = described.text("OSRELEASE=").unwrap_or_else(|| UNKNOWN.to_owned());
    let names = ["Linux", UNKNOWN, &release, UNKNOWN, architecture.name(), UNKNOWN];
    for (number, text) in (1..).zip(names) {
        head.raw(text.as_bytes().get(..text.len().min(NAME - 1)).unwrap_or_default());
        head.zeros_to(NAMES_AT + number * NAME);
    }
    head.zeros_to(TIME_AT);
    head.u64(0);
    head.u64(0);
    head.u32(0); // status: not compressed
    head.u32(low(PAGE));
    head.u32(low(counts.sub_blocks));
    head.u32(low(2 * counts.bitmap_blocks));
    head.u32(low(counts.pages));
    head.u32(low(counts.ram));
    head.u32(0);
    head.u32(low(counts.ram));
    head.u32(0);
    head.u32(described.processors);
    head.zeros_to(PAGE_BYTES);
    head.into()
}

fn sub_head(architecture: Architecture, described: &Described, pages: u64) -> Vec<u8> {
    let notes_at = PAGE + SUB_HEAD;
    let mut head = Bytes::new(architecture.is_little());
    head.u64(described.value("NUMBER(phys_base)=").unwrap_or(0));
    head.u32(LEVEL);
    head.u32(0);
    head.u64(0);
    head.u64(0);
    let (at, length) =
        described.vmcoreinfo.clone().map_or((0, 0), |text| (notes_at + text.start, text.end - text.start));
    head.u64(at);
    head.u64(length);
    head.u64(if described.notes.is_empty() { 0 } else { notes_at });
    head.u64(described.notes.len() as u64);
    head.u64(0);
    head.u64(0);
    head.u64(0);
    head.u64(pages);
    head.u64(pages);
    head.raw(&described.notes);
    head.into()
}

/// A bit for each page, least significant first: whether it is RAM.
struct Bitmap<'a> {
    memory: &'a PhysicalMemory,
    length: u64,
}

impl Table for Bitmap<'_> {
    fn length(&self) -> u64 {
        self.length
    }

    fn make(&self, write: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        for block in 0..self.length / PAGE {
            let mut bytes = vec![0_u8; PAGE_BYTES];
            let start = PhysicalAddress(block * 8 * PAGE * PAGE);
            for piece in self.memory.map().pieces(start, 8 * PAGE * PAGE) {
                let first = (piece.start.0 - start.0) / PAGE;
                for page in first..first + piece.length / PAGE {
                    let byte = usize::try_from(page / 8).ok().and_then(|at| bytes.get_mut(at));
                    byte.into_iter().for_each(|byte| *byte |= 1 << (page % 8));
                }
            }
            write(&bytes)?;
        }
        Ok(())
    }
}

/// Where each page of RAM is in the file.
struct Descriptors<'a> {
    memory: &'a PhysicalMemory,
    /// Where the page of zeros is.
    first_data: u64,
    /// Pages of RAM.
    total: u64,
    little: bool,
}

impl Descriptors<'_> {
    fn entry(position: u64, little: bool, out: &mut Vec<u8>) {
        let mut entry = Bytes::new(little);
        entry.u64(position);
        entry.u32(PAGE_LENGTH);
        entry.u32(0);
        entry.u64(0);
        out.extend(Vec::from(entry));
    }

    fn of_range(
        &self,
        range: &PhysicalRange,
        next: &mut u64,
        write: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut out = Vec::new();
        let mut put = |position, out: &mut Vec<u8>| -> io::Result<()> {
            Self::entry(position, self.little, out);
            if out.len() >= TABLE_PIECE {
                write(out)?;
                out.clear();
            }
            Ok(())
        };
        let mut at = range.start.0;
        for piece in self.memory.present(range, u64::MAX) {
            for _ in (at..piece.start.0).step_by(PAGE_BYTES) {
                put(self.first_data, &mut out)?;
            }
            for _ in (0..piece.length).step_by(PAGE_BYTES) {
                put(*next, &mut out)?;
                *next += PAGE;
            }
            at = piece.start.0 + piece.length;
        }
        for _ in (at..range.start.0 + range.length).step_by(PAGE_BYTES) {
            put(self.first_data, &mut out)?;
        }
        write(&out)
    }
}

impl Table for Descriptors<'_> {
    fn length(&self) -> u64 {
        self.total * ENTRY
    }

    fn make(&self, write: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        let mut next = self.first_data + PAGE;
        self.memory.map().ranges().iter().try_for_each(|range| self.of_range(range, &mut next, write))
    }
}

const VERSION: u32 = 6;
/// Pages are left out only if they are zero.
const LEVEL: u32 = 1;
const PAGE_LENGTH: u32 = 4096;
const PAGE: u64 = 4096;
const PAGE_BYTES: usize = 4096;
const ENTRY: u64 = 24;
const SUB_HEAD: u64 = 104;
/// The length of a name in `struct new_utsname`, and where the first one begins.
const NAME: usize = 65;
const NAMES_AT: usize = 12;
const UNKNOWN: &str = "unknown";
const TIME_AT: usize = 408;
/// Bytes of memory that a thread writes.
const STRETCH: usize = 64 << 20;
/// Bytes of the table that are written at once.
const TABLE_PIECE: usize = 1 << 20;
