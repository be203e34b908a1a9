//! Prepares huge pages in a file in memory (tmpfs) where the file is written whole.
//!
//! In such a file, allocating a page costs more than filling it: each page is allocated, charged and inserted by
//! itself, with the file locked. Writing one page of a stretch and then *collapsing* the stretch into a huge page costs
//! a fraction and takes no lock of the file. It works on a file system that is not configured for huge pages (Linux
//! 6.1). It only saves time: if a step fails, the write that follows does the work. See
//! `docs/decisions/captures-are-copied-straight.md`.
//!
//! UNSAFETY: this file maps the file and gives advice on the mapping; nothing ever accesses the bytes.
#![expect(unsafe_code, reason = "advice on a mapping is given by its address")]

use std::{
    fs::File,
    io,
    ptr::NonNull,
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::{
    fs::fstatfs,
    mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap},
};

/// The size of a huge page in bytes.
pub(crate) const HUGE: u64 = 2 << 20;

/// A mapping of a part of a file in memory, used only for advice.
#[derive(Debug)]
pub(crate) struct HugeFile {
    /// The reserved range; the mapping of the file lies within it.
    reserved: NonNull<u8>,
    length: usize,
    /// The address of the byte at `start`.
    base: usize,
    /// Where the mapping begins in the file, and where it ends.
    start: u64,
    end: u64,
    /// Set after the system has refused. Orders nothing.
    refused: AtomicBool,
}

// SAFETY: the mapping lives until the drop, whichever thread does that, and nothing is read or written through it.
unsafe impl Send for HugeFile {}
// SAFETY: as above; advice may be given by several threads at once.
unsafe impl Sync for HugeFile {}

impl HugeFile {
    /// Maps the `length` bytes from `offset` on of a file in memory. `None` for any other file, or if the file is too
    /// short to have a huge page, or cannot be mapped.
    pub(crate) fn of(file: &File, offset: u64, length: u64) -> Option<Self> {
        if fstatfs(file).ok()?.f_type != libc::TMPFS_MAGIC {
            return None;
        }
        let start = offset.checked_next_multiple_of(HUGE)?;
        let end = offset.checked_add(length)? / HUGE * HUGE;
        let bytes = usize::try_from(end.checked_sub(start)?).ok().filter(|bytes| *bytes > 0)?;
        let length = bytes.checked_add(HUGE_LEN)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a null hint lets the kernel choose a range that nothing else uses.
        let reserved =
            unsafe { mmap_anonymous(std::ptr::null_mut(), length, ProtFlags::empty(), flags) }.ok()?;
        let reserved = NonNull::new(reserved.cast::<u8>())?;
        let base = reserved.addr().get().next_multiple_of(HUGE_LEN);
        let made = Self { reserved, length, base, start, end, refused: AtomicBool::new(false) };
        let (flags, protection) = (MapFlags::SHARED | MapFlags::FIXED, ProtFlags::READ | ProtFlags::WRITE);
        let at = reserved.as_ptr().with_addr(base).cast();
        // SAFETY: `base + bytes` lies within what was reserved just now, which nothing else uses, so what is replaced
        // there is our own.
        unsafe { mmap(at, bytes, protection, flags, file, start) }.ok()?;
        Some(made)
    }

    /// Makes the huge pages that lie completely within `length` bytes from `offset` on, after `write` has written the
    /// first page of each.
    pub(crate) fn prepare(&self, offset: u64, length: u64, mut write: impl FnMut(u64) -> io::Result<()>) {
        let first = offset.next_multiple_of(HUGE).max(self.start);
        let end = ((offset + length) / HUGE * HUGE).min(self.end);
        if first >= end || self.refused.load(Ordering::Relaxed) {
            return;
        }
        let mut at = first;
        while at < end {
            // The write of the whole stretch meets the same error again and reports it.
            if write(at).is_err() {
                return;
            }
            at += HUGE;
        }
        let (Ok(behind), Ok(length)) = (usize::try_from(first - self.start), usize::try_from(end - first))
        else {
            return;
        };
        let address = self.reserved.as_ptr().with_addr(self.base + behind);
        // SAFETY: the range lies within the mapping of the file, through which nothing is read or written, and the
        // advice does not change what the file holds.
        let advised = unsafe { libc::madvise(address.cast(), length, COLLAPSE) };
        if advised != 0 {
            let error = io::Error::last_os_error();
            if !self.refused.swap(true, Ordering::Relaxed) {
                tracing::debug!(%error, "no huge pages for the file");
            }
        }
    }
}

impl Drop for HugeFile {
    fn drop(&mut self) {
        // SAFETY: this range was reserved by us, and nothing refers into it.
        let unmapped = unsafe { munmap(self.reserved.as_ptr().cast(), self.length) };
        debug_assert!(unmapped.is_ok(), "a range that was mapped whole is unmapped whole");
    }
}

const HUGE_LEN: usize = 2 << 20;
/// From the kernel's headers, because `libc` has it only for the GNU C library.
const COLLAPSE: libc::c_int = linux_raw_sys::general::MADV_COLLAPSE.cast_signed();

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn file_in_memory_is_prepared_where_it_is_written_whole_and_keeps_what_it_holds() {
        let Ok(file) = tempfile::tempfile_in("/dev/shm") else { return };
        file.set_len(8 << 20).expect("a hole");
        let huge = HugeFile::of(&file, 1 << 20, 6 << 20).expect("a file in memory");
        let mut firsts = Vec::new();
        huge.prepare(1 << 20, 6 << 20, |at| {
            firsts.push(at);
            file.write_all_at(&[7; 4096], at)
        });
        assert_eq!(firsts, [2 << 20, 4 << 20]);
        let mut bytes = vec![1; 8 << 20];
        file.read_exact_at(&mut bytes, 0).expect("read");
        let set: Vec<usize> = (0..bytes.len()).step_by(4096).filter(|at| bytes[*at] != 0).collect();
        assert_eq!(set, [2 << 20, 4 << 20]);
    }

    #[test]
    fn stretch_without_a_whole_huge_page_is_left_alone() {
        let Ok(file) = tempfile::tempfile_in("/dev/shm") else { return };
        file.set_len(8 << 20).expect("a hole");
        let huge = HugeFile::of(&file, 0, 8 << 20).expect("a file in memory");
        huge.prepare(4096, HUGE, |at| panic!("{at} is written"));
        huge.prepare(0, HUGE - 1, |at| panic!("{at} is written"));
        assert!(HugeFile::of(&file, 4096, HUGE).is_none());
    }

    #[test]
    fn file_on_a_disk_is_no_file_in_memory() {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).expect("a file");
        file.set_len(8 << 20).expect("a hole");
        assert!(HugeFile::of(&file, 0, 8 << 20).is_none());
    }
}
