//! A file in memory (tmpfs) that is to be made of huge pages, where it is written whole.
//!
//! A page of such a file costs more to come by than to fill: each is taken, charged and entered by itself, with the file
//! locked. A stretch of one page that is then *collapsed* into a huge page costs a fraction, and no lock of the file. It
//! works on a file system that is not set to give huge pages (Linux 6.1), and it only saves time: whatever fails
//! is left to the write that follows. See `docs/decisions/captures-are-copied-straight.md`.
//!
//! UNSAFETY: this file maps the file and gives advice on the mapping; nothing ever looks into it.
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

/// Bytes of a huge page.
pub(crate) const HUGE: u64 = 2 << 20;

/// A mapping of a part of a file in memory, for advice alone.
#[derive(Debug)]
pub(crate) struct HugeFile {
    /// What was reserved, the mapping of the file within it.
    reserved: NonNull<u8>,
    length: usize,
    /// The address of the byte at `start`.
    base: usize,
    /// Where the mapping begins in the file, and where it ends.
    start: u64,
    end: u64,
    /// Set once the system has refused. Orders nothing.
    refused: AtomicBool,
}

// SAFETY: the mapping lives until the drop, whichever thread does that, and nothing is read or written through it.
unsafe impl Send for HugeFile {}
// SAFETY: as above; advice may be given by several threads at once.
unsafe impl Sync for HugeFile {}

impl HugeFile {
    /// The `length` bytes from `offset` on of a file in memory; `None` of any other file, or if it is too short to have
    /// a huge page, or cannot be mapped.
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

    /// Makes the huge pages that lie whole within `length` bytes from `offset` on, after `write` has written the first
    /// page of each.
    pub(crate) fn prepare(&self, offset: u64, length: u64, mut write: impl FnMut(u64) -> io::Result<()>) {
        let first = offset.next_multiple_of(HUGE).max(self.start);
        let end = ((offset + length) / HUGE * HUGE).min(self.end);
        if first >= end || self.refused.load(Ordering::Relaxed) {
            return;
        }
        let mut at = first;
        while at < end {
            // An error is met again, and told, by the write of everything.
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
        let advised = unsafe { libc::madvise(address.cast(), length, libc::MADV_COLLAPSE) };
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
