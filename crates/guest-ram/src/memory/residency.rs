//! Finds the pages of mapped memory that may be nonzero, without reading them.
//!
//! ```text
//! Mapping ─ addresses ─▶ areas ─┬─ private memory ─▶ scan of the page table ─┐
//!                               ├─ mapping of its file ─▶ data of the file ──┼─▶ touched: PageBitmap
//!                               └─ anything else ─▶ all pages ───────────────┘       no bit: zero, not read
//! ```
//!
//! Memory that was never touched is zero. Reading it would make the system allocate a page, with one fault each: in a
//! shared mapping for good. Page table (`PAGEMAP_SCAN`, Linux 6.7) and file answer for terabytes at once. What is mapped
//! at an address is not assumed but looked up, unless the mapping vouches for it: another part may have been mapped over
//! it, or a `userfaultfd` may fill it.
//!
//! UNSAFETY: an ioctl is given pointers to a structure and to a buffer that outlive the call. The addresses that it
//! queries are only looked up.
#![expect(unsafe_code, reason = "an ioctl that no crate wraps")]

use std::{ffi::c_void, fs::File, io, ops::Range, os::fd::AsFd};

use linux_raw_sys::general::{PAGE_IS_PFNZERO, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, page_region, pm_scan_arg};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

use super::{GuestSlice, Mapping, areas::Areas};
use crate::{PageBitmap, PageSize, dirty::mark};

/// The addresses of all pages of the system with bytes of `memory`.
pub(crate) fn addresses(memory: &GuestSlice<'_>) -> Range<u64> {
    let start = memory.as_ptr().addr() as u64;
    let page = rustix::param::page_size() as u64;
    start - start % page..(start + memory.len() as u64).next_multiple_of(page)
}

/// Pages of `memory`, a part of `mapping`, that may be nonzero; all others are zero. `None` if that is known of none.
/// `areas` are those of the memory, if the system lists them.
///
/// The answer holds for the moment of the call: later writes must be covered by a dirty log that was on before.
///
/// # Errors
/// If the kernel cannot answer.
pub(crate) fn touched(
    memory: &GuestSlice<'_>,
    mapping: &Mapping,
    page_size: PageSize,
    areas: Option<&Areas>,
) -> io::Result<Option<PageBitmap>> {
    let (start, range) = (memory.as_ptr().addr() as u64, addresses(memory));
    let touched = PageBitmap::new(page_size.whole_pages_in(memory.len() as u64));
    let found = |run: Range<u64>| {
        mark(&touched, page_size, run.start.saturating_sub(start)..run.end.saturating_sub(start));
    };
    if mapping.is_absent_zero() {
        in_page_table(&range, found)?;
        return Ok(Some(touched));
    }
    let Some(areas) = areas else { return Ok(None) };
    let mut is_known = false;
    for (part, area) in areas.parts(&range) {
        match (area, mapping.backing()) {
            (Some(area), _) if area.is_private_memory() && !area.filled => {
                in_page_table(&part, found)?;
                is_known = true;
            }
            (Some(area), Some(file)) if file.is_of(area) && !area.filled => {
                let at = part.start - area.range.start + area.offset;
                let to_address = |offset: u64| offset - at + part.start;
                let in_file = at..at + (part.end - part.start);
                file.data(&in_file, |data| found(to_address(data.start)..to_address(data.end)))?;
                // Pages that were written here are only here.
                if !area.shared {
                    in_page_table(&part, found)?;
                }
                is_known = true;
            }
            _ => found(part),
        }
    }
    Ok(is_known.then_some(touched))
}

/// What is mapped at these addresses; `None` if the system does not say.
pub(crate) fn areas_of(addresses: &[Range<u64>]) -> Option<Areas> {
    let areas = Areas::with_flags(addresses).inspect_err(|error| {
        tracing::debug!(%error, "the areas of memory cannot be queried: pages are read instead");
    });
    areas.ok()
}

fn in_page_table(range: &Range<u64>, found: impl FnMut(Range<u64>)) -> io::Result<()> {
    Regions::new(REGIONS).scan(&File::open(PAGEMAP)?, range, &TOUCHED, found)
}

/// Selects pages that have memory of their own, in RAM or in swap. The shared page of zeros does not count.
const TOUCHED: Wanted = Wanted {
    flags: 0,
    inverted: PAGE_IS_PFNZERO as u64,
    all_of: PAGE_IS_PFNZERO as u64,
    any_of: (PAGE_IS_PRESENT | PAGE_IS_SWAPPED) as u64,
};

/// Which pages a scan reports, in the kernel's own bits.
#[derive(Debug)]
pub(crate) struct Wanted {
    /// What else is done to the reported pages.
    pub(crate) flags: u64,
    /// The categories below that a page must *not* be in.
    pub(crate) inverted: u64,
    /// The categories that a page must all be in.
    pub(crate) all_of: u64,
    /// The categories of which a page must be in at least one, if any are given.
    pub(crate) any_of: u64,
}

/// A buffer in which the kernel lists ranges of pages. It is reused for each call.
#[derive(Debug)]
pub(crate) struct Regions(Box<[page_region]>);

impl Regions {
    /// Creates space for `count` ranges of 24 bytes each.
    pub(crate) fn new(count: usize) -> Self {
        Self(vec![page_region { start: 0, end: 0, categories: 0 }; count].into())
    }

    /// Calls `found` with the addresses of the pages in `range` that match `wanted`.
    ///
    /// # Errors
    /// The kernel's error; it may be `PermissionDenied`.
    pub(crate) fn scan(
        &mut self,
        pagemap: &File,
        range: &Range<u64>,
        wanted: &Wanted,
        mut found: impl FnMut(Range<u64>),
    ) -> io::Result<()> {
        let mut start = range.start;
        while start < range.end {
            let mut scan = Scan(pm_scan_arg {
                size: size_of::<pm_scan_arg>() as u64,
                flags: wanted.flags,
                start,
                end: range.end,
                walk_end: 0,
                vec: self.0.as_mut_ptr().expose_provenance() as u64,
                vec_len: self.0.len() as u64,
                max_pages: 0,
                category_inverted: wanted.inverted,
                category_mask: wanted.all_of,
                category_anyof_mask: wanted.any_of,
                // Adjacent pages that differ in these categories are reported separately.
                return_mask: wanted.all_of & !wanted.inverted,
            });
            // SAFETY: the descriptor is a pagemap; the kernel fills at most `vec_len` ranges, which `self.0` has room
            // for and nobody else accesses.
            let (filled, end) = unsafe { ioctl(pagemap.as_fd(), &mut scan) }?;
            for region in self.0.iter().take(filled) {
                found(region.start..region.end);
            }
            if end <= start {
                return Err(io::Error::other(format!(
                    "the scan of pages from {start:#x} on makes no progress"
                )));
            }
            start = end;
        }
        Ok(())
    }
}

struct Scan(pm_scan_arg);

// SAFETY: the structure belongs to this ioctl number; the caller guarantees what its pointer points to.
unsafe impl Ioctl for &mut Scan {
    /// The number of ranges filled, and the address at which the walk ended.
    type Output = (usize, u64);

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        PAGEMAP_SCAN
    }

    fn as_ptr(&mut self) -> *mut c_void {
        (&raw mut self.0).cast()
    }

    unsafe fn output_from_ptr(filled: IoctlOutput, arg: *mut c_void) -> rustix::io::Result<Self::Output> {
        // SAFETY: it is the pointer that `as_ptr` returned.
        let arg = unsafe { arg.cast::<pm_scan_arg>().read() };
        Ok((usize::try_from(filled).unwrap_or(0), arg.walk_end))
    }
}

const PAGEMAP_SCAN: Opcode = opcode::read_write::<pm_scan_arg>(b'f', 16);
/// Ranges that the kernel lists at once.
pub(crate) const REGIONS: usize = 1024;
/// The page table of this process.
pub(crate) const PAGEMAP: &str = "/proc/self/pagemap";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Access, BlockName, Mapping, Memory, PageIndex, RamBlock};

    fn block(memory: Mapping, page_size: PageSize) -> RamBlock {
        let (name, length) = (BlockName::new("ram").expect("a name"), memory.len());
        RamBlock::new(name, length, page_size, Memory::Mapped(memory)).expect("a block")
    }

    fn write(block: &RamBlock, page: u64) {
        block.slice(PageIndex(page), 1).expect("there").copy_from(&vec![0; block.page_size().bytes()]);
    }

    /// `None` where the kernel is older than 6.7.
    fn touched_or_old(block: &RamBlock) -> Option<PageBitmap> {
        let touched = block.touched();
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let mut parts = release.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
        let version = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
        assert_eq!(touched.is_some(), version >= (6, 7), "kernel {release}");
        touched
    }

    #[test]
    #[cfg_attr(miri, ignore = "the page table is the kernel's")]
    fn pages_that_were_written_are_touched_and_terabytes_that_were_not_are_told_of_at_once() {
        for page_size in [PageSize::KIB_4, PageSize::KIB_64] {
            let block = block(Mapping::anonymous(1 << 40).expect("1 TiB, not reserved"), page_size);
            let last = block.pages() - 1;
            for page in [0, 700, last] {
                write(&block, page);
            }
            let Some(touched) = touched_or_old(&block) else { return };
            assert!([0, 700, last].iter().all(|page| touched.contains(PageIndex(*page))));
            // The system may use huge pages.
            assert!(touched.count() <= 3 * 512);
            assert!(!touched.contains(PageIndex(block.pages() / 2)));
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "the page table is the kernel's")]
    fn a_page_that_was_only_read_is_not_touched() {
        let block = block(Mapping::anonymous(64 << 20).expect("memory"), PageSize::KIB_4);
        for page in (0..block.pages()).map(PageIndex) {
            assert!(block.slice(page, 1).expect("there").is_zero());
        }
        write(&block, 5);
        let Some(touched) = touched_or_old(&block) else { return };
        assert!(touched.contains(PageIndex(5)) && touched.count() <= 512, "{} pages", touched.count());
    }

    fn memfd(pages: u64) -> File {
        let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
        let file = File::from(file);
        file.set_len(pages << 12).expect("sized");
        file
    }

    fn pages(touched: &PageBitmap) -> Vec<u64> {
        (0..touched.pages()).filter(|page| touched.contains(PageIndex(*page))).collect()
    }

    fn allocated(file: &File) -> u64 {
        std::os::unix::fs::MetadataExt::blocks(&file.metadata().expect("known")) / 8
    }

    /// Regression: every page of a sparse memfd was read, which made the system allocate all of them.
    #[test]
    #[cfg_attr(miri, ignore = "the file is the kernel's")]
    fn holes_of_a_shared_file_are_untouched_wherever_the_mapping_begins_and_who_wrote_the_pages() {
        let file = memfd(64);
        let other = Mapping::of_file(&file, 0, 64 << 12, Access::ReadWrite).expect("mapped");
        other.slice(20 << 12, 1).expect("inside").copy_from(&[1]);
        for (first, expected) in [(0, vec![20, 33]), (16, vec![4, 17]), (21, vec![12])] {
            let memory = Mapping::of_file(&file, first << 12, (64 - first) << 12, Access::ReadWrite);
            let block = block(memory.expect("mapped"), PageSize::KIB_4);
            write(&block, 33 - first);
            assert_eq!(pages(&block.touched().expect("known")), expected);
            assert_eq!(block.may_hold().count(), expected.len() as u64);
            assert_eq!(allocated(&file), 2);
        }
        let coarse = block(other, PageSize::KIB_16);
        assert_eq!(pages(&coarse.touched().expect("known")), [5, 8]);
    }

    #[test]
    #[cfg_attr(miri, ignore = "the file is the kernel's")]
    fn page_written_in_a_private_mapping_of_a_file_is_touched_and_so_is_every_page_of_the_file() {
        use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

        let file = memfd(16);
        std::os::unix::fs::FileExt::write_all_at(&file, &[1; 10], 9 << 12).expect("written");
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses a range that nothing else uses.
        let base = unsafe { mmap(std::ptr::null_mut(), 16 << 12, rights, MapFlags::PRIVATE, &file, 0) };
        let base = std::ptr::NonNull::new(base.expect("mapped").cast()).expect("not null");
        // SAFETY: it stays mapped until the end of the test.
        let memory = unsafe { Mapping::from_raw(base, 16 << 12, ()) };
        let unnamed = block(memory, PageSize::KIB_4);
        assert!(unnamed.touched().is_none(), "nobody has said which file it is");
        // SAFETY: as above.
        let memory = unsafe { Mapping::from_raw(base, 16 << 12, ()) }.with_file(&file);
        let named = block(memory, PageSize::KIB_4);
        write(&named, 3);
        // The scan needs Linux 6.7.
        if let Some(touched) = named.touched() {
            assert_eq!(pages(&touched), [3, 9]);
        }
        // SAFETY: as above.
        let memory = unsafe { Mapping::from_raw(base, 16 << 12, ()) }.with_file(&memfd(16));
        assert!(block(memory, PageSize::KIB_4).touched().is_none(), "it is another file");
        drop((unnamed, named));
        // SAFETY: the range is ours, and its mappings are dropped.
        unsafe { munmap(base.as_ptr().cast(), 16 << 12) }.expect("unmapped");
    }

    /// Regression: memory that the embedder has mapped was read whole unless it declared by an unsafe call what it is.
    #[test]
    #[cfg_attr(miri, ignore = "the page table is the kernel's")]
    fn private_memory_of_the_embedder_is_known_unless_something_fills_it() {
        let ours = std::sync::Arc::new(Mapping::anonymous(64 << 12).expect("memory"));
        let all = ours.slice(0, 64 << 12).expect("inside");
        let base = std::ptr::NonNull::new(all.as_ptr()).expect("not null");
        // SAFETY: no huge pages, so that one page is one page; the contents do not change.
        unsafe { rustix::mm::madvise(all.as_ptr().cast(), all.len(), rustix::mm::Advice::LinuxNoHugepage) }
            .expect("advised");
        // SAFETY: the mapping is kept alive, and no reference to its memory is made.
        let foreign = || unsafe { Mapping::from_raw(base, 64 << 12, ours.clone()) };
        let seen = block(foreign(), PageSize::KIB_4);
        write(&seen, 5);
        let Some(touched) = touched_or_old(&seen) else { return };
        assert_eq!(pages(&touched), [5]);
        // A device's memory, or any other file, mapped over a part of it.
        let (flags, rights) =
            (rustix::mm::MapFlags::SHARED | rustix::mm::MapFlags::FIXED, rustix::mm::ProtFlags::READ);
        let at = all.after(8 << 12).as_ptr().cast();
        // SAFETY: the range lies within our own mapping, whose bytes nobody needs.
        unsafe { rustix::mm::mmap(at, 2 << 12, rights, flags, memfd(2), 0) }.expect("mapped");
        assert_eq!(pages(&seen.touched().expect("known")), [5, 8, 9]);
    }

    #[test]
    #[cfg_attr(miri, ignore = "the page table is the kernel's")]
    fn memory_whose_missing_pages_a_userfaultfd_fills_counts_as_touched() {
        use linux_raw_sys::general::{
            UFFD_API, UFFDIO_REGISTER_MODE_MISSING, uffdio_api, uffdio_range, uffdio_register,
        };

        // SAFETY: a call without pointers; 1 asks for faults of user space only, which needs no privilege.
        let descriptor = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | 1) };
        if descriptor < 0 {
            multifd_testkit::lacks("the right to make a userfaultfd");
            return;
        }
        let descriptor = i32::try_from(descriptor).expect("a descriptor");
        let memory = std::sync::Arc::new(Mapping::anonymous(16 << 12).expect("memory"));
        let all = memory.slice(0, 16 << 12).expect("inside");
        let mut api = uffdio_api { api: UFFD_API.into(), features: 0, ioctls: 0 };
        // SAFETY: the structure is the one that this call takes.
        assert_eq!(unsafe { libc::ioctl(descriptor, UFFDIO_API, &raw mut api) }, 0);
        let range = uffdio_range { start: all.as_ptr().addr() as u64, len: all.len() as u64 };
        let mode = UFFDIO_REGISTER_MODE_MISSING.into();
        let mut register = uffdio_register { range, mode, ioctls: 0 };
        // SAFETY: the structure is the one that this call takes, and the range is ours.
        assert_eq!(unsafe { libc::ioctl(descriptor, UFFDIO_REGISTER, &raw mut register) }, 0);
        let base = std::ptr::NonNull::new(all.as_ptr()).expect("not null");
        // SAFETY: the mapping is kept alive, and no reference to its memory is made.
        let foreign = unsafe { Mapping::from_raw(base, 16 << 12, memory.clone()) };
        let block = block(foreign, PageSize::KIB_4);
        assert!(block.touched().is_none());
        assert_eq!(block.may_hold().count(), 16);
        // SAFETY: the descriptor is ours.
        unsafe { libc::close(descriptor) };
        assert_eq!(touched_or_old(&block).map_or(0, |touched| touched.count()), 0);
    }

    const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
    const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;

    #[test]
    #[cfg_attr(miri, ignore = "the page table is the kernel's")]
    fn shared_memory_without_a_file_to_ask_counts_as_touched() {
        let file = memfd(16);
        let mapped =
            std::sync::Arc::new(Mapping::of_file(&file, 0, 16 << 12, Access::ReadWrite).expect("mapped"));
        let base = mapped.slice(0, 0).and_then(|slice| std::ptr::NonNull::new(slice.as_ptr()));
        // SAFETY: the mapping is kept alive, and no reference to its memory is made.
        let foreign = unsafe { Mapping::from_raw(base.expect("not null"), 16 << 12, mapped.clone()) };
        assert!(block(foreign, PageSize::KIB_4).touched().is_none());
    }
}
