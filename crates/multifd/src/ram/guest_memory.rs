//! Guest memory as `vm-memory` has it: its regions become RAM blocks, its bitmaps a dirty log. Feature `vm-memory`.
//!
//! The blocks share the regions' mappings and keep them alive; nothing is copied. Whatever writes through `vm-memory`
//! marks the region's bitmap by itself. What the vCPUs write it does not see: that is for the kernel's log.
//!
//! UNSAFETY: a mapping is made of the pointer and length that a region has of its own memory, which the region is kept
//! alive for.
#![expect(unsafe_code, reason = "a region's memory becomes a mapping")]

use std::{io, ptr::NonNull, sync::Arc};

use vm_memory::{
    Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
    bitmap::{AtomicBitmap, Bitmap},
};

use super::{
    BlockIndex, BlockName, BlockOffset, DirtyLog, DirtyPages, Identity, Mapping, Memory, PageBitmap,
    PageIndex, PageSize, RamBlock, RamBlocks, granule::Granules, runs, turn::Turn,
};
use crate::error::{Error, Result, Usage};

/// One RAM block for each region of `memory`, in the order of guest addresses, named by its address: `ram@0x100000000`.
///
/// A machine has them for all its life: the blocks that it has arrived in are those that it leaves from.
///
/// ```
/// use multifd::ram::{PageSize, RamBlock, blocks_of};
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
///
/// let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 2 << 20), (GuestAddress(1 << 32), 1 << 20)])?;
/// let blocks = blocks_of(&memory, PageSize::KIB_4)?;
/// assert_eq!((blocks.len(), blocks.total()), (2, 3 << 20));
/// assert!(blocks.find(b"ram@0x100000000").is_some());
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`Usage::Unreadable`] if a region is mapped without the right to read.
pub fn blocks_of<B>(memory: &GuestMemoryMmap<B>, page_size: PageSize) -> Result<RamBlocks>
where
    B: Bitmap + Send + Sync + 'static,
{
    let blocks = memory.iter().map(|region| {
        let address = region.start_addr().raw_value();
        let name = BlockName::new(format!("ram@{address:#x}")).expect("at most 22 bytes without NUL");
        block_of(region, name, page_size)
    });
    RamBlocks::new(blocks.collect::<Result<_>>()?)
}

/// A RAM block of one region, by a name of the caller's.
///
/// # Errors
/// As [`blocks_of`].
pub fn block_of<B>(region: &GuestRegionMmap<B>, name: BlockName, page_size: PageSize) -> Result<RamBlock>
where
    B: Bitmap + Send + Sync + 'static,
{
    let mapped = region.get_mmap();
    let may = |right: i32| mapped.prot() & right == right;
    if !may(libc::PROT_READ) {
        return Err(Usage::Unreadable(name).into());
    }
    let (len, writable) = (mapped.size(), may(libc::PROT_WRITE));
    let base = NonNull::new(mapped.as_ptr()).expect("what is mapped is not at 0");
    // SAFETY: `base` and `len` are the mapping that `mapped` owns, or was given and vouches for, and `mapped` is kept until
    // the drop. `vm-memory` lends volatile access and atomics, no plain reference. Where the right to write is missing,
    // `read_only` takes it from the mapping.
    let mapping = unsafe { Mapping::from_raw(base, len, mapped) };
    let mapping = if writable { mapping } else { mapping.read_only() };
    RamBlock::new(name, len as u64, page_size, Memory::Mapped(mapping))
}

/// A region's bitmap, if it has one.
pub trait RegionBitmap: Bitmap {
    /// The bitmap.
    fn bits(&self) -> Option<&AtomicBitmap>;
}

impl RegionBitmap for AtomicBitmap {
    fn bits(&self) -> Option<&AtomicBitmap> {
        Some(self)
    }
}

impl RegionBitmap for Option<AtomicBitmap> {
    fn bits(&self) -> Option<&AtomicBitmap> {
        self.as_ref()
    }
}

/// The dirty log that `vm-memory` keeps: what the VMM writes through its regions.
///
/// It says nothing of what vCPUs write; [merge](super::MergedLog) it with the kernel's log. Whoever has written marks the
/// page after that, as `vm-memory` does.
#[derive(Debug)]
pub struct AtomicBitmapLog<B = AtomicBitmap> {
    regions: Vec<(Arc<MmapRegion<B>>, Granules)>,
    page_size: PageSize,
    of: Identity,
    _turns: Vec<Turn>,
}

impl<B: RegionBitmap> AtomicBitmapLog<B> {
    /// The log of `memory`, whose regions are the memory of `blocks`: the region of each block is found by its address.
    ///
    /// # Errors
    /// [`Usage::DirtyBitmap`] if a block's memory is no region, or its region has no bitmap, or one of pages that are no
    /// power of two; [`Error::Io`](crate::Error::Io) with [`io::ErrorKind::ResourceBusy`] if another log reads the bitmaps.
    pub fn new(memory: &GuestMemoryMmap<B>, blocks: &RamBlocks) -> Result<Self> {
        let page_size = blocks.page_size();
        let pairs = blocks.iter().map(|(_, block)| {
            let refused = |why| Usage::DirtyBitmap { name: block.name().clone(), why };
            let start = block.slice(PageIndex(0), 0).map(|slice| slice.as_ptr());
            let region = memory
                .iter()
                .map(GuestRegionMmap::get_mmap)
                .find(|region| start == Some(region.as_ptr()))
                .ok_or_else(|| refused("no region begins where its memory does"))?;
            if region.size() as u64 != block.used_length() {
                return Err(refused("the region of its memory has another length"));
            }
            let bits = region.bitmap().bits().ok_or_else(|| refused("its region has none"))?;
            let size = granule(bits).filter(|_| bits.byte_size() >= region.size());
            let size = size.ok_or_else(|| {
                refused("expected one of pages that are a power of two and cover the region")
            })?;
            Ok((region, Granules { start: BlockOffset(0), size }))
        });
        let regions: Vec<(Arc<MmapRegion<B>>, Granules)> = pairs.collect::<Result<_, Usage>>()?;
        let bitmaps = regions.iter().filter_map(|(region, _)| region.bitmap().bits());
        let turns =
            bitmaps.map(|bits| Turn::take(std::ptr::from_ref(bits).addr())).collect::<io::Result<_>>();
        let turns = turns.map_err(|error| Error::io("read the dirty bitmaps of guest memory", error))?;
        Ok(Self { regions, page_size, of: blocks.identity(), _turns: turns })
    }
}

/// The bytes of a bit. A bitmap does not tell; at most one power of two fits, or the one bit covers all.
fn granule(bits: &AtomicBitmap) -> Option<u64> {
    let (size, len) = (bits.byte_size() as u64, bits.len() as u64);
    (0..u64::BITS - 1).map(|shift| 1 << shift).find(|granule| size.div_ceil(*granule) == len)
}

impl<B: RegionBitmap> DirtyLog for AtomicBitmapLog<B> {
    fn begin(&mut self, blocks: &RamBlocks) -> io::Result<()> {
        self.of.check(blocks)
    }

    fn take(&mut self, block: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()> {
        let (region, granules) = &self.regions[block.0];
        if let Some(bits) = region.bitmap().bits() {
            granules.mark(into.bits(), self.page_size, bits.get_and_reset());
        }
        Ok(())
    }

    fn put_back(&mut self, block: BlockIndex, from: &PageBitmap) {
        let (region, _) = &self.regions[block.0];
        let page = self.page_size.bytes();
        for (first, count) in from.words().enumerate().flat_map(|(index, word)| runs(index, word)) {
            let in_memory = |pages: u64| usize::try_from(pages).expect("the region is in memory") * page;
            region.bitmap().mark_dirty(in_memory(first.0), in_memory(count));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use vm_memory::{Bytes, GuestAddress, MmapRegion, mmap::MmapRegionBuilder};

    use super::*;

    const BLOCK: BlockIndex = BlockIndex(0);

    fn memory() -> GuestMemoryMmap<AtomicBitmap> {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 12), (GuestAddress(1 << 32), 3 << 12)])
            .expect("memory")
    }

    fn taken<B: RegionBitmap>(log: &mut AtomicBitmapLog<B>, block: usize, pages: u64) -> Vec<u64> {
        let into = PageBitmap::new(pages);
        log.take(BlockIndex(block), &mut DirtyPages::new(&into)).expect("taken");
        (0..pages).filter(|page| into.contains(PageIndex(*page))).collect()
    }

    #[test]
    fn block_and_region_are_the_same_bytes_and_outlive_each_other() {
        let memory = memory();
        let blocks = blocks_of(&memory, PageSize::KIB_4).expect("blocks");
        memory.write_slice(&[7; 4096], GuestAddress((1 << 32) + 0x1000)).expect("written");
        drop(memory);
        let mut page = [0; 4096];
        blocks.block(BlockIndex(1)).expect("there").load(PageIndex(1), &mut page).expect("loaded");
        assert_eq!(page, [7; 4096]);
    }

    #[test]
    fn page_written_through_the_region_is_taken_once_and_again_when_put_back() {
        let memory = memory();
        let blocks = blocks_of(&memory, PageSize::KIB_4).expect("blocks");
        let mut log = AtomicBitmapLog::new(&memory, &blocks).expect("a log");
        memory.write_slice(&[1; 2], GuestAddress(0x4fff)).expect("written");
        memory.write_obj(1_u8, GuestAddress((1 << 32) + 0x2000)).expect("written");
        assert_eq!(taken(&mut log, 0, 64), [4, 5]);
        assert_eq!(taken(&mut log, 1, 3), [2]);
        assert_eq!(taken(&mut log, 0, 64), [0; 0]);
        let back = PageBitmap::new(64);
        back.set_run(PageIndex(62), 2);
        log.put_back(BLOCK, &back);
        assert_eq!(taken(&mut log, 0, 64), [62, 63]);
    }

    #[test]
    fn bitmap_of_greater_pages_marks_every_page_in_one() {
        let bitmap = AtomicBitmap::new(64 << 12, NonZeroUsize::new(16 << 10).expect("not 0"));
        let region = MmapRegionBuilder::new_with_bitmap(64 << 12, Some(bitmap))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
            .build();
        let region = GuestRegionMmap::new(region.expect("mapped"), GuestAddress(0)).expect("a region");
        let memory = GuestMemoryMmap::from_regions(vec![region]).expect("memory");
        let blocks = blocks_of(&memory, PageSize::KIB_4).expect("blocks");
        let mut log = AtomicBitmapLog::new(&memory, &blocks).expect("a log");
        memory.write_obj(1_u8, GuestAddress(0x6000)).expect("written");
        assert_eq!(taken(&mut log, 0, 64), [4, 5, 6, 7]);
    }

    #[test]
    fn blocks_of_another_memory_are_refused() {
        let blocks = blocks_of(&memory(), PageSize::KIB_4).expect("blocks");
        for ranges in [
            &[(GuestAddress(0), 64 << 12)][..],
            &[(GuestAddress(0), 64 << 12), (GuestAddress(1 << 32), 3 << 12)],
        ] {
            let other = GuestMemoryMmap::<AtomicBitmap>::from_ranges(ranges).expect("memory");
            let refused = AtomicBitmapLog::new(&other, &blocks).expect_err("refused").to_string();
            assert!(refused.starts_with(r#"block "ram@0x0": the dirty bitmap"#), "{refused}");
        }
        let without = GuestMemoryMmap::<Option<AtomicBitmap>>::new();
        assert!(AtomicBitmapLog::new(&without, &blocks).is_err());
    }

    #[test]
    fn region_mapped_for_reading_gives_a_block_that_nothing_is_received_into() {
        let map = |rights| {
            let region: MmapRegion = MmapRegionBuilder::new(4096)
                .with_mmap_prot(rights)
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
                .build()
                .expect("mapped");
            let region = GuestRegionMmap::new(region, GuestAddress(0)).expect("a region");
            block_of(&region, BlockName::new("rom").expect("a name"), PageSize::KIB_4)
        };
        let rom = map(libc::PROT_READ).expect("a block");
        assert!(!rom.slice(PageIndex(0), 1).expect("there").is_writable());
        assert!(map(libc::PROT_NONE).is_err());
    }
}
