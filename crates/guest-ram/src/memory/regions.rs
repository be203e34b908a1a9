//! Creates RAM blocks from the regions of `vm-memory`. Feature `vm-memory`.
//!
//! The blocks share the regions' mappings and keep them alive; nothing is copied.
//!
//! UNSAFETY: a mapping is made of the pointer and length of a region's own memory, and the region is kept alive for it.
#![expect(unsafe_code, reason = "a region's memory becomes a mapping")]

use std::ptr::NonNull;

use vm_memory::{
    Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, bitmap::Bitmap,
};

use super::Mapping;
use crate::{BlockName, Error, Memory, PageSize, RamBlock, RamBlocks};

/// Creates one RAM block for each region of `memory`, in the order of guest addresses. Its name contains the address:
/// `ram@0x100000000`.
///
/// Keep the blocks for the whole life of the machine: the blocks into which it migrated are those from which it
/// migrates later.
///
/// ```
/// use guest_ram::{PageSize, RamBlock, blocks_of};
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
/// [`Error::Unreadable`] if a region is mapped without read permission.
pub fn blocks_of<B>(memory: &GuestMemoryMmap<B>, page_size: PageSize) -> Result<RamBlocks, Error>
where
    B: Bitmap + Send + Sync + 'static,
{
    let blocks = memory.iter().map(|region| {
        let address = region.start_addr().raw_value();
        let name = BlockName::new(format!("ram@{address:#x}")).expect("at most 22 bytes without NUL");
        block_of(region, name, page_size)
    });
    RamBlocks::new(blocks.collect::<Result<_, Error>>()?)
}

/// Creates the RAM block of one region, with the name `name`.
///
/// # Errors
/// As [`blocks_of`].
pub fn block_of<B>(
    region: &GuestRegionMmap<B>,
    name: BlockName,
    page_size: PageSize,
) -> Result<RamBlock, Error>
where
    B: Bitmap + Send + Sync + 'static,
{
    let mapped = region.get_mmap();
    let may = |right: i32| mapped.prot() & right == right;
    if !may(libc::PROT_READ) {
        return Err(Error::Unreadable(name));
    }
    let (len, writable) = (mapped.size(), may(libc::PROT_WRITE));
    let base = NonNull::new(mapped.as_ptr()).expect("what is mapped is not at 0");
    // SAFETY: `base` and `len` are the mapping that `mapped` owns, or was given and vouches for, and `mapped` is kept
    // until the drop. `vm-memory` lends volatile access and atomics, no plain reference. Where write permission is
    // missing, `read_only` removes it from the mapping.
    let mapping = unsafe { Mapping::from_raw(base, len, mapped) };
    let mapping = if writable { mapping } else { mapping.read_only() };
    RamBlock::new(name, len as u64, page_size, Memory::Mapped(mapping))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, MmapRegion, bitmap::AtomicBitmap, mmap::MmapRegionBuilder};

    use super::*;
    use crate::{BlockIndex, PageIndex};

    fn memory() -> GuestMemoryMmap<AtomicBitmap> {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 12), (GuestAddress(1 << 32), 3 << 12)])
            .expect("memory")
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
