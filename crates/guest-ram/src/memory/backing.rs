//! Asks the file of a mapping which of its bytes exist, without reading the mapping.
//!
//! ```text
//! tmpfs, memfd, ext4 ── SEEK_DATA, SEEK_HOLE ──▶ parts with data
//! hugetlbfs ─────────── pread, if a page was allocated ──▶ huge pages with a byte that is not zero
//! ```
//!
//! Reading a hole through a shared mapping makes the system allocate a page, in the file, for good. A hole is zero, so it
//! need not be read. What was found by experiment (Linux 6.18):
//!
//! | | tmpfs, memfd | hugetlbfs | ext4 |
//! |---|---|---|---|
//! | `SEEK_DATA` | right: also for pages written through a mapping, swapped out, or allocated and never written | says that everything is data | right, and allocated blocks count as data |
//! | `mincore` | what is in memory, not what exists | only this process's page table: misses what others wrote | says what is cached |
//! | `pread` of a hole | allocates nothing | allocates nothing | allocates nothing |
//!
//! Other file systems are not asked: some answer from a server that does not have the written pages yet.
//!
//! The file is opened again, because a seek moves the position of a descriptor, which may be shared.

use std::{
    fs::File,
    io,
    ops::Range,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt},
    },
};

use rustix::{
    fs::{SeekFrom, fstatfs, major, minor, seek},
    io::Errno,
};

use super::areas::Area;

/// A file that can be asked.
#[derive(Debug)]
pub(crate) struct Backing {
    file: File,
    /// Device and inode.
    id: (u32, u32, u64),
    /// The size of its pages in bytes, if it is a file of huge pages.
    huge: Option<u64>,
}

impl Backing {
    /// Opens `file` once more; `None` if that is not allowed, or the file system cannot be asked.
    pub(crate) fn of(file: &File) -> Option<Self> {
        let found = file.metadata().ok().filter(std::fs::Metadata::is_file)?;
        let system = fstatfs(file).ok()?;
        let huge = match system.f_type {
            libc::HUGETLBFS_MAGIC => Some(u64::try_from(system.f_bsize).ok().filter(|bytes| *bytes > 0)?),
            libc::TMPFS_MAGIC | libc::EXT4_SUPER_MAGIC => None,
            _ => return None,
        };
        let id = (major(found.dev()), minor(found.dev()), found.ino());
        let file = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
        Some(Self { file, id, huge })
    }

    /// Whether the area is a mapping of this file.
    pub(crate) fn is_of(&self, area: &Area) -> bool {
        area.file == self.id
    }

    /// Calls `found` with parts of `range`, in bytes of the file, that together contain every byte that may be nonzero,
    /// and everything beyond the end of the file: a file that was truncated must not pass for zeros.
    ///
    /// # Errors
    /// If the file cannot be asked. Nothing is known then.
    pub(crate) fn data(&self, range: &Range<u64>, mut found: impl FnMut(Range<u64>)) -> io::Result<()> {
        let before = self.file.metadata()?.len();
        let inside = range.start..range.end.min(before);
        match self.huge {
            Some(page) => self.read(page, &inside, &mut found)?,
            None => self.seek(&inside, &mut found)?,
        }
        let end = self.file.metadata()?.len().min(before);
        if end < range.end {
            found(end.max(range.start)..range.end);
        }
        Ok(())
    }

    fn seek(&self, range: &Range<u64>, found: &mut impl FnMut(Range<u64>)) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            let data = match seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) if data < range.end => data,
                Ok(_) | Err(Errno::NXIO) => break,
                Err(error) => return Err(error.into()),
            };
            let hole = match seek(&self.file, SeekFrom::Hole(data)) {
                // The part was removed in between, or the file truncated.
                Ok(hole) if hole <= data => range.end,
                Ok(hole) => hole.min(range.end),
                Err(Errno::NXIO) => range.end,
                Err(error) => return Err(error.into()),
            };
            found(data..hole);
            at = hole;
        }
        Ok(())
    }

    /// Most huge pages that are used have a byte in their first part.
    fn read(&self, page: u64, range: &Range<u64>, found: &mut impl FnMut(Range<u64>)) -> io::Result<()> {
        let metadata = self.file.metadata()?;
        if metadata.blocks().saturating_mul(BLOCK) >= metadata.len() {
            found(range.clone());
            return Ok(());
        }
        // New memory, of which a lazy restore must not read a gigabyte of holes.
        if metadata.blocks() == 0 {
            return Ok(());
        }
        let mut buffer = vec![0; PIECE];
        let mut start = range.start / page * page;
        while start < range.end {
            let end = start.saturating_add(page);
            if self.has_bytes(start..end, &mut buffer)? {
                found(start.max(range.start)..end.min(range.end));
            }
            start = end;
        }
        Ok(())
    }

    fn has_bytes(&self, range: Range<u64>, buffer: &mut [u8]) -> io::Result<bool> {
        let (mut at, mut piece) = (range.start, FIRST);
        while at < range.end {
            let left = usize::try_from(range.end - at).unwrap_or(usize::MAX);
            let part = &mut buffer[..piece.min(left)];
            let read = match self.file.read_at(part, at) {
                Ok(0) => return Ok(false),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if part[..read].iter().fold(0, |any, byte| any | byte) != 0 {
                return Ok(true);
            }
            at += read as u64;
            piece = PIECE;
        }
        Ok(false)
    }
}

/// The number of bytes that are read first of a huge page.
const FIRST: usize = 4 << 10;
/// The number of bytes that are read at once after that: it stays in the processor's cache.
const PIECE: usize = 256 << 10;
/// The unit of a file's allocated size in bytes.
const BLOCK: u64 = 512;

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};

    use super::*;
    use crate::{Access, Mapping};

    fn memfd() -> File {
        File::from(memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd"))
    }

    /// Start and end of each part with data.
    fn data(file: &File, range: Range<u64>) -> Vec<(u64, u64)> {
        let mut parts = Vec::new();
        let backing = Backing::of(file).expect("a file that can be asked");
        backing.data(&range, |part| parts.push((part.start, part.end))).expect("answered");
        parts
    }

    #[test]
    #[cfg_attr(miri, ignore = "the answer is the kernel's")]
    fn bytes_written_through_a_mapping_or_a_call_are_data_and_asking_allocates_nothing() {
        for file in [memfd(), tempfile::tempfile().expect("a file")] {
            if Backing::of(&file).is_none() {
                multifd_testkit::lacks("a folder for temporary files on ext4 or tmpfs");
                continue;
            }
            file.set_len(1 << 20).expect("sized");
            let mapping = Mapping::of_file(&file, 0, 1 << 20, Access::ReadWrite).expect("mapped");
            mapping.slice(5 << 12, 1).expect("inside").copy_from(&[7]);
            file.write_all_at(&[7; 10], 12 << 12).expect("written");
            let allocated = file.metadata().expect("known").blocks();
            assert_eq!(data(&file, 0..1 << 20), [(5 << 12, 6 << 12), (12 << 12, 13 << 12)]);
            assert_eq!(data(&file, 6 << 12..12 << 12), []);
            assert_eq!(data(&file, (5 << 12) + 9..(5 << 12) + 10), [((5 << 12) + 9, (5 << 12) + 10)]);
            assert_eq!(file.metadata().expect("known").blocks(), allocated);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "the answer is the kernel's")]
    fn page_that_was_allocated_first_and_written_later_is_data() {
        let file = memfd();
        file.set_len(1 << 20).expect("sized");
        fallocate(&file, FallocateFlags::empty(), 0, 1 << 20).expect("allocated");
        let mapping = Mapping::of_file(&file, 0, 1 << 20, Access::ReadWrite).expect("mapped");
        mapping.slice(7 << 12, 1).expect("inside").copy_from(&[1]);
        assert_eq!(data(&file, 0..1 << 20), [(7 << 12, 8 << 12)]);
    }

    #[test]
    #[cfg_attr(miri, ignore = "the answer is the kernel's")]
    fn what_lies_beyond_the_end_of_a_truncated_file_does_not_pass_for_zeros() {
        let file = memfd();
        file.set_len(5 << 12).expect("sized");
        assert_eq!(data(&file, 0..16 << 12), [(5 << 12, 16 << 12)]);
        assert_eq!(data(&file, 8 << 12..16 << 12), [(8 << 12, 16 << 12)]);
    }

    #[test]
    #[cfg_attr(miri, ignore = "the answer is the kernel's")]
    fn position_of_the_descriptor_does_not_move() {
        let mut file = memfd();
        file.write_all(&[1; 9000]).expect("written");
        file.seek(io::SeekFrom::Start(77)).expect("moved");
        let _ = data(&file, 0..9000);
        assert_eq!(file.stream_position().expect("known"), 77);
    }

    #[test]
    #[cfg_attr(miri, ignore = "the answer is the kernel's")]
    fn device_and_file_system_that_cannot_be_asked_have_no_answer() {
        for path in ["/dev/zero", "/proc/self/maps"] {
            assert!(Backing::of(&File::open(path).expect("opened")).is_none(), "{path}");
        }
    }

    /// Skipped where no huge pages are set aside (`/proc/sys/vm/nr_hugepages`, at least 8 of 2 MiB).
    #[test]
    #[cfg_attr(miri, ignore = "the answer is the kernel's")]
    fn huge_pages_with_a_byte_anywhere_are_data_and_asking_allocates_none() {
        const HUGE: u64 = 2 << 20;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        let Ok(file) = memfd_create("guest", flags).map(File::from) else {
            multifd_testkit::lacks("huge pages of 2 MiB");
            return;
        };
        file.set_len(8 * HUGE).expect("sized");
        let Ok(mapping) = Mapping::of_file(&file, 0, 8 * HUGE, Access::ReadWrite) else {
            multifd_testkit::lacks("fewer than 8 huge pages are set aside");
            return;
        };
        assert_eq!(data(&file, 0..8 * HUGE), []);
        mapping.slice(HUGE, 1).expect("inside").copy_from(&[7]);
        mapping.slice(4 * HUGE - 1, 1).expect("inside").copy_from(&[7]);
        mapping.slice(6 * HUGE, 1).expect("inside").copy_from(&[0]);
        let allocated = file.metadata().expect("known").blocks();
        assert_eq!(allocated * BLOCK, 3 * HUGE);
        assert_eq!(data(&file, 0..8 * HUGE), [(HUGE, 2 * HUGE), (3 * HUGE, 4 * HUGE)]);
        assert_eq!(file.metadata().expect("known").blocks(), allocated);
    }
}
