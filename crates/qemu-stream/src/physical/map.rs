//! Which piece of which block is at which guest-physical address.

use multifd::ram::{BlockIndex, BlockName, BlockOffset};

use super::{
    machine,
    range::{BadPlace, PhysicalAddress, PhysicalRange},
};
use crate::{
    format::{BlockEntry, BlockList},
    mapped_ram::StoredMachine,
};

/// A place of a block that the caller knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The address.
    pub start: PhysicalAddress,
    /// The name of the block.
    pub block: BlockName,
    /// Where the piece begins in the block.
    pub offset: BlockOffset,
    /// The length of the piece in bytes; `None`: up to the end of the block.
    pub length: Option<u64>,
}

/// Where RAM is. Its ranges are sorted and do not overlap, and begin and end with pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PhysicalMap {
    ranges: Vec<PhysicalRange>,
}

impl PhysicalMap {
    /// The map of a machine. `places` replace what is known of the blocks that they name.
    ///
    /// # Errors
    /// If the addresses are not known, or contradict each other.
    pub fn of(machine: &StoredMachine, places: &[Place]) -> Result<Self, BadPlace> {
        let list = machine.blocks();
        let mut ranges = Vec::new();
        for Place { start, block, offset, length } in places {
            let found = list.iter().find(|(_, entry)| entry.name == *block);
            let (index, entry) = found.ok_or_else(|| BadPlace::NoSuchBlock(block.clone()))?;
            let length = length.unwrap_or(entry.used_length.saturating_sub(offset.0));
            ranges.push(PhysicalRange { start: *start, length, block: index, offset: *offset });
        }
        let is_placed = |index: BlockIndex| places.iter().any(|place| is_named(list, index, &place.block));
        match machine::ranges(machine, &is_placed) {
            Ok(known) => ranges.extend(known),
            // The caller may have placed all there is.
            Err(error) if places.is_empty() => return Err(error),
            Err(_) => {}
        }
        Self::new(list, ranges)
    }

    /// The map of these ranges.
    ///
    /// # Errors
    /// If they overlap, leave their blocks, or are not whole pages.
    pub fn new(list: &BlockList, mut ranges: Vec<PhysicalRange>) -> Result<Self, BadPlace> {
        let page = list.page_size().bytes() as u64;
        for range in &ranges {
            check(list.entry(range.block), range)?;
            if [range.start.0, range.offset.0, range.length].iter().any(|number| !number.is_multiple_of(page))
            {
                return Err(BadPlace::Unaligned(range.start));
            }
        }
        ranges.sort_unstable_by_key(|range| range.start);
        for pair in ranges.windows(2) {
            if let [one, next] = pair
                && one.last() >= next.start
            {
                return Err(BadPlace::Overlap(next.start));
            }
        }
        Ok(Self { ranges })
    }

    /// The blocks of a machine that may be RAM and have no place, such as hot-plugged memory.
    pub fn unplaced<'a>(&'a self, machine: &'a StoredMachine) -> impl Iterator<Item = &'a BlockEntry> {
        let is_missing = |index: BlockIndex| self.ranges.iter().all(|range| range.block != index);
        let blocks = machine.blocks().iter();
        blocks
            .filter(move |(index, entry)| machine::may_be_ram(entry) && is_missing(*index))
            .map(|(_, entry)| entry)
    }

    /// The ranges, sorted by address.
    pub fn ranges(&self) -> &[PhysicalRange] {
        &self.ranges
    }

    /// The range that contains this address.
    pub fn find(&self, address: PhysicalAddress) -> Option<&PhysicalRange> {
        let after = self.ranges.partition_point(|range| range.start <= address);
        let range = self.ranges.get(after.checked_sub(1)?)?;
        (address <= range.last()).then_some(range)
    }

    /// The pieces of RAM within `length` bytes from `start` on, cut at both ends.
    pub fn pieces(&self, start: PhysicalAddress, length: u64) -> impl Iterator<Item = PhysicalRange> + '_ {
        let last = start.0.saturating_add(length.saturating_sub(1));
        let from = self.ranges.partition_point(|range| range.last() < start);
        let ranges = self.ranges.get(from..).unwrap_or_default().iter();
        let ranges = ranges.take_while(move |range| length > 0 && range.start.0 <= last);
        ranges.map(move |range| {
            let skipped = start.0.saturating_sub(range.start.0);
            let end = range.last().0.min(last);
            let first = range.start.0 + skipped;
            PhysicalRange {
                start: PhysicalAddress(first),
                length: end - first + 1,
                block: range.block,
                offset: BlockOffset(range.offset.0 + skipped),
            }
        })
    }

    /// The bytes of RAM in all ranges.
    pub fn total(&self) -> u64 {
        self.ranges.iter().map(|range| range.length).sum()
    }
}

fn is_named(list: &BlockList, index: BlockIndex, name: &BlockName) -> bool {
    list.entry(index).is_some_and(|entry| entry.name == *name)
}

/// Checks that a range is a piece of its block, and that its last address exists.
fn check(entry: Option<&BlockEntry>, range: &PhysicalRange) -> Result<(), BadPlace> {
    let PhysicalRange { start, length, offset, .. } = *range;
    let outside = |entry: Option<&BlockEntry>| BadPlace::Outside {
        start,
        length,
        offset,
        block: entry.map_or_else(|| BlockName::new("?").expect("a name"), |entry| entry.name.clone()),
        used_length: entry.map_or(0, |entry| entry.used_length),
    };
    let fits =
        entry.is_some_and(|entry| offset.0.checked_add(length).is_some_and(|end| end <= entry.used_length));
    let exists = length > 0 && start.0.checked_add(length - 1).is_some();
    if fits && exists { Ok(()) } else { Err(outside(entry)) }
}
