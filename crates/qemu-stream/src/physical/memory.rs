//! Reads memory by guest-physical addresses.

use std::io;

use multifd::ram::{PageIndex, RamBlocks};

use super::{
    map::PhysicalMap,
    range::{PhysicalAddress, PhysicalRange},
};
use crate::mapped_ram::{ReadPath, StoredMachine};

/// The memory of a stored machine. Threads can read it at the same time.
#[derive(Debug)]
pub struct PhysicalMemory {
    map: PhysicalMap,
    blocks: RamBlocks,
    page: u64,
}

impl PhysicalMemory {
    /// The memory of this machine, with this map.
    ///
    /// # Errors
    /// If its bitmaps cannot be read, or its pages were only [counted](crate::stored::Pages::Count).
    pub fn new(machine: &StoredMachine, map: PhysicalMap) -> multifd::Result<Self> {
        let blocks = machine.ram_blocks(|_, _| ReadPath::Cached)?;
        Ok(Self { map, blocks, page: machine.blocks().page_size().bytes() as u64 })
    }

    /// Where RAM is.
    pub fn map(&self) -> &PhysicalMap {
        &self.map
    }

    /// Reads memory from `start` on. Pages that are not present are zero.
    ///
    /// # Errors
    /// If some of it is not RAM; the kind is [`AddrNotAvailable`](io::ErrorKind::AddrNotAvailable). If the system cannot read, or
    /// a page differs from its digest.
    pub fn read(&self, start: PhysicalAddress, into: &mut [u8]) -> io::Result<()> {
        let mut next = start;
        let mut rest = into;
        let wanted = rest.len() as u64;
        for piece in self.map.pieces(start, wanted) {
            if piece.start != next {
                break;
            }
            let length = usize::try_from(piece.length).unwrap_or(usize::MAX);
            let (bytes, after) = rest.split_at_mut(length.min(rest.len()));
            self.read_piece(&piece, bytes)?;
            next = PhysicalAddress(next.0.wrapping_add(piece.length));
            rest = after;
        }
        if rest.is_empty() {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::AddrNotAvailable, format!("there is no RAM at {next}")))
    }

    /// Reads a piece of one range: whole pages directly, the rest through a page.
    fn read_piece(&self, piece: &PhysicalRange, into: &mut [u8]) -> io::Result<()> {
        let Some(block) = self.blocks.get(piece.block) else { return Err(io::ErrorKind::NotFound.into()) };
        let page = usize::try_from(self.page).unwrap_or(usize::MAX);
        let mut at = piece.offset.0;
        let mut rest = into;
        let mut one = Vec::new();
        while !rest.is_empty() {
            let (first, inside) = (PageIndex(at / self.page), usize::try_from(at % self.page).unwrap_or(0));
            let whole = if inside == 0 { rest.len() / page } else { 0 };
            let length = if whole > 0 {
                let (pages, after) = rest.split_at_mut(whole * page);
                block.load_direct(first, whole as u64, pages)?;
                let length = pages.len();
                rest = after;
                length
            } else {
                one.resize(page, 0);
                block.load(first, &mut one)?;
                let length = (page - inside).min(rest.len());
                let (bytes, after) = rest.split_at_mut(length);
                bytes.copy_from_slice(one.get(inside..inside + length).unwrap_or_default());
                rest = after;
                length
            };
            at += length as u64;
        }
        Ok(())
    }

    /// The pieces of a range that are in present pages, each of at most `most` bytes, or a page. All between them is zero.
    pub fn present<'a>(
        &'a self,
        range: &PhysicalRange,
        most: u64,
    ) -> impl Iterator<Item = PhysicalRange> + use<'a> {
        let (range, page) = (*range, self.page);
        let most = (most / page).max(1);
        let block = self.blocks.get(range.block);
        let mut at = range.offset.0 / page;
        let end = (range.offset.0 + range.length).div_ceil(page);
        std::iter::from_fn(move || {
            let block = block?;
            while at < end {
                let word = usize::try_from(at / 64).ok()?;
                let bits = block.present_word(word) >> (at % 64);
                if bits != 0 {
                    at += u64::from(bits.trailing_zeros());
                    break;
                }
                at = (at / 64 + 1) * 64;
            }
            if at >= end {
                return None;
            }
            let first = at;
            while at < end && at - first < most {
                let bits = block.present_word(usize::try_from(at / 64).ok()?) >> (at % 64);
                let count = u64::from(bits.trailing_ones());
                let count = count.min(most - (at - first)).min(end - at);
                at += count;
                if count == 0 {
                    break;
                }
            }
            let offset = (first * page).max(range.offset.0);
            let end = (at * page).min(range.offset.0 + range.length);
            Some(PhysicalRange {
                start: PhysicalAddress(range.start.0 + (offset - range.offset.0)),
                length: end - offset,
                block: range.block,
                offset: multifd::ram::BlockOffset(offset),
            })
        })
    }
}
