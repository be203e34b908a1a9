//! Queries this process's page table (`PAGEMAP_SCAN`, Linux 6.7).
//!
//! ```text
//! Mapping ─ addresses ─▶ scan ─ ranges of present pages ─▶ touched: PageBitmap
//!                                                                 no bit: zero, not read
//! ```
//!
//! Private memory that was never touched has no page and is zero. Reading it would make the system allocate a page,
//! with one fault each. The page table answers for terabytes at once.
//!
//! UNSAFETY: an ioctl is given pointers to a structure and to a buffer that outlive the call. The addresses that it
//! queries are only looked up.
#![expect(unsafe_code, reason = "an ioctl that no crate wraps")]

use std::{ffi::c_void, fs::File, io, ops::Range, os::fd::AsFd};

use linux_raw_sys::general::{PAGE_IS_PFNZERO, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, page_region, pm_scan_arg};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

use super::GuestSlice;
use crate::{PageBitmap, PageSize, dirty::mark};

/// Pages of `memory` that may be nonzero. Pages that are absent there must be zero.
///
/// The answer holds for the moment of the call: later writes must be covered by a dirty log that was on before.
///
/// # Errors
/// If the kernel cannot answer.
pub(crate) fn touched(memory: &GuestSlice<'_>, page_size: PageSize) -> io::Result<PageBitmap> {
    let start = memory.as_ptr().addr() as u64;
    let page = rustix::param::page_size() as u64;
    let range = start - start % page..(start + memory.len() as u64).next_multiple_of(page);
    let touched = PageBitmap::new(page_size.whole_pages_in(memory.len() as u64));
    let found = |run: Range<u64>| {
        mark(&touched, page_size, run.start.saturating_sub(start)..run.end.saturating_sub(start));
    };
    Regions::new(REGIONS).scan(&File::open(PAGEMAP)?, &range, &TOUCHED, found)?;
    Ok(touched)
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

    #[test]
    fn memory_whose_absent_pages_may_hold_something_is_not_asked_for() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(1 << 20).expect("sized");
        let shared = Mapping::of_file(&file, 0, 1 << 20, Access::ReadWrite).expect("mapped");
        assert!(block(shared, PageSize::KIB_4).touched().is_none());
    }
}
