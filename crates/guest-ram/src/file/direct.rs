//! Direct I/O: pages go between a private buffer and the disk and bypass the page cache.
//!
//! The system accepts only aligned calls: the buffer's address, the position in the file, the length. If one of them is
//! not aligned, or the file system refuses the call, the page cache is used instead. So the caller need not check. Both
//! ways may be mixed in one file: before the system bypasses its cache for a stretch, it writes back and drops what it
//! has cached of it.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::{
    fs::{AtFlags, OFlags, StatxFlags, fcntl_getfl, statx},
    io::Errno,
};

/// A second descriptor of an open file, for direct I/O.
#[derive(Debug)]
pub struct DirectFile {
    file: File,
    memory_alignment: u64,
    offset_alignment: u64,
    /// Set after the system has refused a call that meets the alignment.
    refused: AtomicBool,
}

impl DirectFile {
    /// Opens `file` once more for direct I/O, with the same access mode.
    ///
    /// # Errors
    /// If its file system does not support direct I/O, or the file may not be opened again.
    pub fn of(file: &File) -> io::Result<Self> {
        let flags = fcntl_getfl(file)?;
        // The file is opened through its descriptor, because its name may belong to another file by now.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let opened = OpenOptions::new()
            .read(!flags.contains(OFlags::WRONLY))
            .write(flags.intersects(OFlags::RDWR | OFlags::WRONLY))
            .custom_flags(OFlags::DIRECT.bits().cast_signed())
            .open(path);
        let file = opened.map_err(|error| match Errno::from_io_error(&error) {
            Some(Errno::INVAL) => unsupported(),
            _ => error,
        })?;
        let (memory_alignment, offset_alignment) = alignments(&file)?;
        Ok(Self { file, memory_alignment, offset_alignment, refused: AtomicBool::new(false) })
    }

    /// The required alignment of positions in the file, in bytes.
    pub fn offset_alignment(&self) -> u64 {
        self.offset_alignment
    }

    /// Writes `bytes` at `offset`, with direct I/O where possible, otherwise through `cached`.
    pub(crate) fn write_all_at(&self, cached: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            let direct = self.takes(bytes.as_ptr().addr(), bytes.len(), offset);
            let written = match self.either(direct, cached, |file| file.write_at(bytes, offset))? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                written => written,
            };
            bytes = &bytes[written..];
            offset += written as u64;
        }
        Ok(())
    }

    /// Fills `buffer` from `offset` on, with direct I/O where possible, otherwise through `cached`.
    pub(crate) fn read_exact_at(
        &self,
        cached: &File,
        mut buffer: &mut [u8],
        mut offset: u64,
    ) -> io::Result<()> {
        while !buffer.is_empty() {
            let direct = self.takes(buffer.as_ptr().addr(), buffer.len(), offset);
            let read = match self.either(direct, cached, |file| file.read_at(buffer, offset))? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => read,
            };
            buffer = &mut buffer[read..];
            offset += read as u64;
        }
        Ok(())
    }

    /// Makes a call that moves bytes between memory at `address` and the file at `offset`: with direct I/O where
    /// possible, otherwise through `cached`.
    pub(crate) fn call(
        &self,
        cached: &File,
        (address, length): (usize, usize),
        offset: u64,
        call: impl FnMut(&File) -> io::Result<usize>,
    ) -> io::Result<usize> {
        self.either(self.takes(address, length, offset), cached, call)
    }

    fn either(
        &self,
        direct: bool,
        cached: &File,
        mut call: impl FnMut(&File) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let mut direct = direct;
        loop {
            let error = match call(if direct { &self.file } else { cached }) {
                Ok(count) => return Ok(count),
                Err(error) => error,
            };
            match Errno::from_io_error(&error) {
                Some(Errno::INTR) => {}
                Some(Errno::INVAL | Errno::OPNOTSUPP) if direct => {
                    direct = false;
                    if !self.refused.swap(true, Ordering::Relaxed) {
                        tracing::warn!(%error, "direct-io is refused: the page cache is used instead");
                    }
                }
                _ => return Err(error),
            }
        }
    }

    fn takes(&self, address: usize, length: usize, offset: u64) -> bool {
        let multiple = |number: u64, of: u64| number.is_multiple_of(of);
        !self.refused.load(Ordering::Relaxed)
            && multiple(address as u64, self.memory_alignment)
            && multiple(length as u64, self.offset_alignment)
            && multiple(offset, self.offset_alignment)
    }
}

/// The required alignment of address and position. Systems report it from Linux 6.1 on. Before that, a page is assumed,
/// which suits all disks.
fn alignments(file: &File) -> io::Result<(u64, u64)> {
    let found = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
    if found.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        return Ok((UNASKED, UNASKED));
    }
    match (found.stx_dio_mem_align, found.stx_dio_offset_align) {
        (0, _) | (_, 0) => Err(unsupported()),
        (memory, offset) => Ok((memory.into(), offset.into())),
    }
}

fn unsupported() -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, "its file system has no direct I/O")
}

/// The alignment in bytes where the system does not report one.
const UNASKED: u64 = 4 << 10;
#[cfg(test)]
mod tests {
    use super::*;
    use crate::AlignedBuffer;

    fn file() -> File {
        tempfile::tempfile().expect("a file")
    }

    /// A file that accepts only calls aligned to 64 KiB.
    fn coarse(file: &File) -> DirectFile {
        let file = file.try_clone().expect("a descriptor");
        DirectFile { file, memory_alignment: 1, offset_alignment: 64 << 10, refused: AtomicBool::new(false) }
    }

    #[test]
    fn what_is_not_aligned_is_not_taken() {
        let direct = coarse(&file());
        assert!(direct.takes(1, 64 << 10, 128 << 10));
        assert!(!direct.takes(1, 4 << 10, 128 << 10));
        assert!(!direct.takes(1, 64 << 10, 132 << 10));
        direct.refused.store(true, Ordering::Relaxed);
        assert!(!direct.takes(1, 64 << 10, 128 << 10));
    }

    #[test]
    fn bytes_read_back_as_written_however_they_are_aligned() {
        let file = file();
        let Ok(direct) = DirectFile::of(&file) else {
            panic!("the folder for temporary files has no direct I/O");
        };
        let mut buffer = AlignedBuffer::new(64 << 10);
        for (byte, value) in buffer.iter_mut().zip((0..251).cycle()) {
            *byte = value;
        }
        for (range, offset) in [(0..64 << 10, 0), (0..4096, 1 << 20), (4096..8192, 7), (3..5000, 4096)] {
            direct.write_all_at(&file, &buffer[range.clone()], offset).expect("written");
            let mut found = AlignedBuffer::new(64 << 10);
            direct.read_exact_at(&file, &mut found[range.clone()], offset).expect("read");
            assert_eq!(found[range.clone()], buffer[range.clone()]);
            let mut found = vec![0; range.len()];
            file.read_exact_at(&mut found, offset).expect("read through the cache");
            assert_eq!(found, buffer[range]);
        }
    }

    #[test]
    fn end_of_the_file_is_an_error_wherever_it_is() {
        let file = file();
        let direct = DirectFile::of(&file).expect("direct I/O");
        for length in [0, 4096, 5000] {
            file.set_len(length).expect("cut");
            let mut buffer = AlignedBuffer::new(8192);
            let error = direct.read_exact_at(&file, &mut buffer, 0).expect_err("cut");
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[test]
    fn refusal_that_should_not_be_is_met_once_and_the_cache_used() {
        let (file, direct) = (file(), coarse(&file()));
        let found = direct.either(true, &file, |way| {
            if way.as_raw_fd() == file.as_raw_fd() { Ok(7) } else { Err(Errno::INVAL.into()) }
        });
        assert_eq!(found.expect("by way of the cache"), 7);
        assert!(!direct.takes(0, 64 << 10, 0));
    }
}
