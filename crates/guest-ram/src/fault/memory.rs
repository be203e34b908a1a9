//! What is mapped where a block's memory is, and the range of it that is armed.

use std::ops::Range;

use crate::{
    BlockIndex, BlockName, BlockOffset, Mapping, Memory, PageIndex, RamBlock, RamBlocks, Shape,
    memory::areas::{Area, Areas},
};

use super::{FaultError, MemoryKind};

/// The armed memory of one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// The block's position.
    pub block: BlockIndex,
    /// The block's name.
    pub name: BlockName,
    /// The addresses, in the process whose memory it is. Whole host pages; the last one may reach beyond the block.
    pub addresses: Range<u64>,
    /// Bytes of a host page.
    pub host_page: u64,
    /// The kind of memory.
    pub kind: MemoryKind,
    /// Bytes of a page of the machine.
    pub page: u64,
    /// The number of pages of the block.
    pub pages: u64,
}

impl Region {
    /// The block's size in pages, and how many of them are in a host page.
    pub fn shape(&self) -> Shape {
        Shape { pages: self.pages, host_page: (self.host_page / self.page).max(1) }
    }

    /// The addresses of whole host pages; `None` if the bytes are not that.
    pub(super) fn range(&self, offset: BlockOffset, len: u64) -> Option<Range<u64>> {
        let start = self.addresses.start.checked_add(offset.0)?;
        let end = start.checked_add(len)?;
        let whole = offset.0.is_multiple_of(self.host_page) && len.is_multiple_of(self.host_page) && len > 0;
        (whole && end <= self.addresses.end).then_some(start..end)
    }
}

/// The regions of all blocks that can be armed: those in mapped memory that are not ignored.
///
/// # Errors
/// If a block's memory cannot be armed.
pub(super) fn regions(blocks: &RamBlocks) -> Result<Vec<Region>, FaultError> {
    regions_and(blocks, |_| {})
}

/// The same, and `see` is called with all areas.
pub(super) fn regions_and(
    blocks: &RamBlocks,
    see: impl FnOnce(&[(Range<u64>, Option<&Area>)]),
) -> Result<Vec<Region>, FaultError> {
    let wanted: Vec<_> =
        blocks.iter().filter_map(|(index, block)| Some((index, block, mapping(block)?))).collect();
    let ranges: Vec<_> = wanted.iter().map(|(_, block, mapping)| addresses(block, mapping)).collect();
    let areas = Areas::with_flags(&ranges).map_err(|source| FaultError::System {
        what: "find out what kind of memory the blocks are in (/proc/self/smaps)",
        source,
    })?;
    see(&ranges.iter().flat_map(|range| areas.parts(range)).collect::<Vec<_>>());
    let regions = wanted.iter().zip(&ranges).map(|((index, block, mapping), range)| {
        region(*index, block, mapping, range, &areas)
            .map_err(|why| FaultError::Unsuitable { name: block.name().clone(), why })
    });
    regions.collect()
}

pub(super) fn mapping(block: &RamBlock) -> Option<&Mapping> {
    match block.memory() {
        Memory::Mapped(mapping) if !block.is_ignored() && block.pages() > 0 => Some(mapping),
        Memory::Mapped(_) | Memory::MappedRam(_) => None,
    }
}

fn addresses(block: &RamBlock, mapping: &Mapping) -> Range<u64> {
    let start = mapping.slice(0, 0).map_or(0, |slice| slice.as_ptr().addr() as u64);
    start..start + block.pages() * block.page_size().bytes() as u64
}

fn region(
    block: BlockIndex,
    of: &RamBlock,
    mapping: &Mapping,
    range: &Range<u64>,
    areas: &Areas,
) -> Result<Region, String> {
    if !mapping.is_writable() {
        return Err("it is mapped for reading only".to_owned());
    }
    let mut found = None;
    for (part, area) in areas.parts(range) {
        let area = area.ok_or_else(|| format!("nothing is mapped at {:#x}", part.start))?;
        let kind = (kind(area), area.page_size);
        if *found.get_or_insert(kind) != kind {
            return Err(format!("at {:#x} begins memory of another kind", part.start));
        }
    }
    let (kind, host_page) = found.ok_or("nothing is mapped there")?;
    let base_page = rustix::param::page_size() as u64;
    if host_page < base_page || !host_page.is_power_of_two() {
        return Err(format!("the system reports pages of {host_page} bytes"));
    }
    let end = range.start + (range.end - range.start).next_multiple_of(host_page);
    if !range.start.is_multiple_of(host_page) {
        return Err(format!("it does not begin on a boundary of host pages of {host_page:#x} bytes"));
    }
    if end > range.start + mapping.owned_len() {
        return Err(format!(
            "it ends within a host page of {host_page:#x} bytes, and what follows may be other memory"
        ));
    }
    let (page, pages) = (of.page_size().bytes() as u64, of.pages());
    Ok(Region { block, name: of.name().clone(), addresses: range.start..end, host_page, kind, page, pages })
}

fn kind(area: &Area) -> MemoryKind {
    if area.page_size > rustix::param::page_size() as u64 {
        MemoryKind::Huge { private: !area.shared }
    } else if area.is_private_memory() {
        MemoryKind::Anonymous
    } else {
        MemoryKind::Shared
    }
}

/// Refuses memory in which a page exists, or of which that is not known.
///
/// # Errors
/// [`FaultError::NotEmpty`], or [`FaultError::Unsuitable`] if it is not known.
pub(super) fn refuse_contents(blocks: &RamBlocks) -> Result<(), FaultError> {
    for ((_, block), touched) in blocks.iter().zip(blocks.touched()) {
        if mapping(block).is_none() {
            continue;
        }
        let name = block.name().clone();
        let Some(touched) = touched else {
            let why = "it cannot be shown to be empty: use memory of this library, or name its file (Mapping::with_file)";
            return Err(FaultError::Unsuitable { name, why: why.to_owned() });
        };
        if let Some(page) = touched.next_set(PageIndex(0)) {
            let offset = block.offset_of(page).unwrap_or_default();
            return Err(FaultError::NotEmpty { name, offset });
        }
    }
    Ok(())
}
