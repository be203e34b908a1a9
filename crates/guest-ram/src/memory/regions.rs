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
/// Pages of a region that were never touched are found without reading them ([`RamBlock::touched`]): in private memory
/// without a file through the page table, in a region with a file through the file. Nothing needs to be declared: the
/// system is asked what is mapped at each region, and whether a `userfaultfd` fills its pages.
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
    let file = mapped.file_offset().map(|file| file.arc().clone());
    let base = NonNull::new(mapped.as_ptr()).expect("what is mapped is not at 0");
    // SAFETY: `base` and `len` are the mapping that `mapped` owns, or was given and vouches for, and `mapped` is kept
    // until the drop. `vm-memory` lends volatile access and atomics, no plain reference. Where write permission is
    // missing, `read_only` removes it from the mapping.
    let mapping = unsafe { Mapping::from_raw(base, len, mapped) };
    let mapping = if writable { mapping } else { mapping.read_only() };
    let mapping = if let Some(file) = file { mapping.with_file(&file) } else { mapping };
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

    /// Regression: regions were read whole, untouched pages as well.
    #[test]
    #[cfg_attr(miri, ignore = "the page table is the kernel's")]
    fn pages_of_a_region_that_were_never_touched_are_known_whatever_the_region_is_made_of() {
        use std::{fs::File, os::unix::fs::MetadataExt};

        use vm_memory::FileOffset;

        let memfd = || {
            let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
            let file = File::from(file);
            file.set_len(80 << 12).expect("sized");
            file
        };
        let file = memfd();
        let of_file = |start| Some(FileOffset::new(file.try_clone().expect("a descriptor"), start));
        let ranges = [
            (GuestAddress(0), 64 << 12, None),
            (GuestAddress(1 << 32), 64 << 12, of_file(0)),
            (GuestAddress(2 << 32), 16 << 12, of_file(64 << 12)),
        ];
        let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges_with_files(ranges).expect("memory");
        for (at, page) in [(0, 9), (1, 33), (1, 34), (2, 5)] {
            memory.write_obj(1_u8, GuestAddress((at << 32) + (page << 12))).expect("written");
        }
        let blocks = blocks_of(&memory, PageSize::KIB_4).expect("blocks");
        let touched = blocks.touched();
        let counts: Vec<_> =
            touched.iter().map(|pages| pages.as_ref().map(crate::PageBitmap::count)).collect();
        // The page table of private memory is asked from Linux 6.7 on.
        if counts[0].is_some() {
            assert_eq!(counts[0], Some(1));
            assert!(touched[0].as_ref().is_some_and(|pages| pages.contains(PageIndex(9))));
        }
        assert_eq!(counts[1..], [Some(2), Some(1)]);
        assert!(touched[2].as_ref().is_some_and(|pages| pages.contains(PageIndex(5))));
        assert_eq!(file.metadata().expect("known").blocks() / 8, 3, "nothing was allocated");
    }
}
