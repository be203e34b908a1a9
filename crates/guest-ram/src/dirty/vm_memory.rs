//! The dirty log of `vm-memory`'s own bitmaps. Feature `vm-memory`.
//!
//! All code that writes through `vm-memory` marks the region's bitmap automatically. It does not see what the vCPUs
//! write; the kernel's log does.

use std::{io, sync::Arc};

use vm_memory::{
    GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
    bitmap::{AtomicBitmap, Bitmap},
};

use super::{DirtyLog, DirtyPages, coarse::CoarseBits, sole_reader::SoleReader};
use crate::{BlockIndex, BlockOffset, Error, Identity, PageBitmap, PageIndex, PageSize, RamBlocks, runs};

/// A bitmap type of a region that may have dirty bits.
pub trait RegionBitmap: Bitmap {
    /// The bitmap, if the region has one.
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

/// The dirty log that `vm-memory` keeps: writes of the VMM through its regions.
///
/// It does not contain writes of vCPUs: [merge](super::MergedLog) it with the kernel's log. A writer must mark the page
/// after the write, as `vm-memory` does.
#[derive(Debug)]
pub struct AtomicBitmapLog<B = AtomicBitmap> {
    regions: Vec<(Arc<MmapRegion<B>>, CoarseBits)>,
    page_size: PageSize,
    of: Identity,
    _sole_readers: Vec<SoleReader>,
}

impl<B: RegionBitmap> AtomicBitmapLog<B> {
    /// Creates the log of `memory`, whose regions are the memory of `blocks`. The region of each block is found by its
    /// address.
    ///
    /// # Errors
    /// [`Error::DirtyBitmap`] within an error of [`io::ErrorKind::InvalidInput`] if a block's memory is not a region,
    /// or its region has no bitmap, or the bitmap has pages that are not a power of two;
    /// [`io::ErrorKind::ResourceBusy`] if another log reads the bitmaps.
    pub fn new(memory: &GuestMemoryMmap<B>, blocks: &RamBlocks) -> io::Result<Self> {
        let page_size = blocks.page_size();
        let pairs = blocks.iter().map(|(_, block)| {
            let refused = |why| Error::DirtyBitmap { name: block.name().clone(), why };
            let start = block.slice(PageIndex(0), 0).map(|slice| slice.as_ptr());
            let region = memory
                .iter()
                .map(GuestRegionMmap::get_mmap)
                .find(|region| start == Some(region.as_ptr()))
                .ok_or_else(|| refused("no memory region begins at the address of the block"))?;
            if region.size() as u64 != block.used_length() {
                return Err(refused("its memory region has a different length"));
            }
            let bits =
                region.bitmap().bits().ok_or_else(|| refused("its memory region has no dirty bitmap"))?;
            let size = bytes_of_a_bit(bits).filter(|_| bits.byte_size() >= region.size());
            let size = size.ok_or_else(|| {
                refused(
                    "expected bits for pages whose size is a power of two, and which cover the memory region",
                )
            })?;
            Ok((region, CoarseBits { start: BlockOffset(0), size }))
        });
        let regions: Vec<(Arc<MmapRegion<B>>, CoarseBits)> = pairs
            .collect::<Result<_, Error>>()
            .map_err(|refused| io::Error::new(io::ErrorKind::InvalidInput, refused))?;
        let bitmaps = regions.iter().filter_map(|(region, _)| region.bitmap().bits());
        let sole_readers = bitmaps.map(|bits| SoleReader::of(std::ptr::from_ref(bits).addr()));
        let sole_readers = sole_readers.collect::<io::Result<_>>()?;
        Ok(Self { regions, page_size, of: blocks.identity(), _sole_readers: sole_readers })
    }
}

/// The number of bytes that one bit covers. The bitmap does not report it. At most one power of two fits, or one bit
/// covers everything.
fn bytes_of_a_bit(bits: &AtomicBitmap) -> Option<u64> {
    let (size, len) = (bits.byte_size() as u64, bits.len() as u64);
    (0..u64::BITS - 1).map(|shift| 1 << shift).find(|bytes| size.div_ceil(*bytes) == len)
}

impl<B: RegionBitmap> DirtyLog for AtomicBitmapLog<B> {
    fn begin(&mut self, blocks: &RamBlocks) -> io::Result<()> {
        self.of.check(blocks)
    }

    fn take(&mut self, block: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()> {
        let (region, coarse) = &self.regions[block.0];
        if let Some(bits) = region.bitmap().bits() {
            coarse.mark(into.bits(), self.page_size, bits.get_and_reset());
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

    use vm_memory::{Bytes, GuestAddress, mmap::MmapRegionBuilder};

    use super::*;
    use crate::blocks_of;

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
}
