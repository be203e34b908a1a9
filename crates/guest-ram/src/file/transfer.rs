//! Transfers pages directly between guest memory and a file, with no buffer in between.
//!
//! The input is two blocks with the same name, one mapped and one in a file, and a run of pages. One system call moves
//! the run. The guest may write to the memory at the same time: a page that is torn in the file is dirty again. A
//! [`Transfer`] also knows which runs suit the target: where huge pages begin in it, and, for a file in memory, how to
//! make them.
//!
//! UNSAFETY: the system reads and writes guest memory by pointer and length of a [`GuestSlice`], which is not a
//! reference.
#![expect(unsafe_code, reason = "guest memory is handed to the system by its address")]

use std::{fs::File, io, os::fd::AsRawFd};

use rustix::io::Errno;

use super::{
    AlignedBuffer, DirectFile,
    huge::{HUGE, HugeFile},
};
use crate::{BlockOffset, GuestSlice, Memory, PageIndex, Places, RamBlock, places::Run};

/// The path from one block to the other, shared by all channels.
#[derive(Debug)]
pub struct Transfer {
    /// The number of pages from a boundary of the target to the block's first page.
    shift: u64,
    /// The number of pages of a stretch, a power of two.
    stretch: u64,
    huge: Option<HugeFile>,
}

/// Which side failed, and why.
#[derive(Debug)]
pub enum TransferError {
    /// The source could not be read.
    Read(io::Error),
    /// The target could not be written.
    Write(io::Error),
}

impl Transfer {
    /// Creates the transfer from `source` to `target`.
    ///
    /// # Errors
    /// The reason why there can be none.
    pub fn new(source: &RamBlock, target: &RamBlock) -> Result<Self, String> {
        if source.used_length() != target.used_length() {
            let (expected, found) = (source.used_length(), target.used_length());
            return Err(format!("expected {expected:#x} bytes in the target, found {found:#x}"));
        }
        let page_size = source.page_size();
        if page_size != target.page_size() {
            return Err(format!("expected pages of {page_size} in the target, found {}", target.page_size()));
        }
        let (start, huge) = match (source.memory(), target.memory()) {
            (Memory::Mapped(_), Memory::MappedRam(places)) if !places.is_writable() => {
                return Err("the target is in several files, or in a stream".into());
            }
            (Memory::Mapped(_), Memory::MappedRam(Places { file, offset, .. })) => {
                (*offset, HugeFile::of(file, *offset, target.used_length()))
            }
            (Memory::MappedRam(_), Memory::Mapped(mapping)) => {
                if !mapping.is_writable() {
                    return Err("the target is mapped for reading only".into());
                }
                let base = mapping.slice(0, 0).map_or(0, |slice| slice.as_ptr().addr());
                (base as u64, None)
            }
            (Memory::Mapped(_), Memory::Mapped(_)) => return Err("both sides are in memory".into()),
            (Memory::MappedRam(_), Memory::MappedRam(_)) => return Err("both sides are in files".into()),
        };
        let bytes = page_size.bytes() as u64;
        Ok(Self { shift: start / bytes, stretch: STRETCH / bytes, huge })
    }

    /// The number of pages of a stretch: the amount that is worth copying at once.
    pub fn stretch(&self) -> u64 {
        self.stretch
    }

    /// The first page from `page` on at which a stretch of the target begins. It may lie beyond the block.
    pub fn border(&self, page: PageIndex) -> u64 {
        let into = self.shift.wrapping_add(page.0) & (self.stretch - 1);
        if into == 0 { page.0 } else { page.0.saturating_add(self.stretch - into) }
    }

    /// Copies `count` pages from `first` on, and records that they may be nonzero.
    ///
    /// # Errors
    /// The system's error, and which side it concerns.
    ///
    /// # Panics
    /// If there are no such pages, or the transfer was made for other blocks.
    pub fn copy(
        &self,
        source: &RamBlock,
        target: &RamBlock,
        first: PageIndex,
        count: u64,
    ) -> Result<(), TransferError> {
        let BlockOffset(start) = source.offset_of(first).expect("a page of the block");
        match (source.memory(), target.memory()) {
            (Memory::Mapped(_), Memory::MappedRam(Places { since: Some(_), .. })) if !source.may_shrink() => {
                return differing(source, target, first, count);
            }
            (Memory::Mapped(_), Memory::MappedRam(Places { file, direct, offset, digests, .. })) => {
                let slice = source.slice(first, count).expect("pages of the block");
                if let Some(huge) = &self.huge
                    && !target.is_present(first)
                {
                    huge.prepare(offset + start, slice.len() as u64, |at| {
                        let behind = usize::try_from(at - offset - start).expect("within the slice");
                        write_at(file, slice.after(behind).up_to(source.page_size().bytes()), at).map(drop)
                    });
                }
                let written = all((file, direct.as_deref()), slice, offset + start, write_at);
                written.map_err(|error| match Errno::from_io_error(&error) {
                    // Guest memory that is mapped from a truncated file, or may not be accessed.
                    Some(Errno::FAULT) => TransferError::Read(source.explain_fault(first, count, error)),
                    _ => TransferError::Write(error),
                })?;
                if let Some(digests) = digests {
                    digests.note_slice(first, slice);
                }
            }
            (Memory::MappedRam(places), Memory::Mapped(_)) => {
                for Run { of, first, count } in places.runs(first, count) {
                    match of {
                        Some(places) if places.is_scattered() => {
                            from_stream(source, target, first, count)?;
                        }
                        Some(places) => from_file(source, places, target, first, count)?,
                        None => target.clear_run(first, count),
                    }
                }
            }
            _ => panic!("one side is in memory, the other in a file"),
        }
        target.note_written(first, count);
        Ok(())
    }
}

/// Copies those pages that differ from the base of the target. They are copied into a buffer first, because the guest may
/// write to them: what was compared is what is written.
fn differing(
    source: &RamBlock,
    target: &RamBlock,
    first: PageIndex,
    count: u64,
) -> Result<(), TransferError> {
    by_pieces(source, first, count, |at, piece, bytes| {
        piece.copy_to(bytes);
        target.store_direct(at, bytes).map_err(TransferError::Write)
    })
}

/// Copies pages that are in a stream, through a buffer.
fn from_stream(
    source: &RamBlock,
    target: &RamBlock,
    first: PageIndex,
    count: u64,
) -> Result<(), TransferError> {
    by_pieces(target, first, count, |at, piece, bytes| {
        let pages = (bytes.len() / source.page_size().bytes()) as u64;
        source.load_direct(at, pages, bytes).map_err(TransferError::Read)?;
        piece.copy_from(bytes);
        Ok(())
    })
}

/// Calls `each` with the first page of each piece of a run in memory, the piece, and a buffer of its length.
fn by_pieces(
    memory: &RamBlock,
    first: PageIndex,
    count: u64,
    mut each: impl FnMut(PageIndex, GuestSlice<'_>, &mut [u8]) -> Result<(), TransferError>,
) -> Result<(), TransferError> {
    let mut slice = memory.slice(first, count).expect("pages of the block");
    let (mut buffer, mut at) = (AlignedBuffer::new(PIECE.min(slice.len())), first);
    while slice.len() > 0 {
        let piece = slice.up_to(PIECE.min(slice.len()));
        let bytes = buffer.get_mut(..piece.len()).expect("a piece fits the buffer");
        each(at, piece, bytes)?;
        at = PageIndex(at.0 + (piece.len() / memory.page_size().bytes()) as u64);
        slice = slice.after(piece.len());
    }
    Ok(())
}

/// Copies pages that are in one file.
fn from_file(
    source: &RamBlock,
    places: &Places,
    target: &RamBlock,
    first: PageIndex,
    count: u64,
) -> Result<(), TransferError> {
    let Places { file, direct, offset, digests, .. } = places;
    let BlockOffset(start) = source.offset_of(first).expect("a page of the block");
    let slice = target.slice(first, count).expect("pages of the block");
    let read = all((file, direct.as_deref()), slice, offset + start, read_at);
    read.map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::FAULT) => TransferError::Write(target.explain_fault(first, count, error)),
        _ => TransferError::Read(places.explain(error)),
    })?;
    let differs = digests.as_ref().map(|digests| digests.first_difference_in(first, slice));
    match differs.transpose().map_err(TransferError::Read)?.flatten() {
        None => Ok(()),
        Some(page) => Err(TransferError::Read(source.damaged(places, page))),
    }
}

/// Moves all of `slice`, to or from offset `at` of the file, with direct I/O if there is a descriptor for it.
fn all(
    (file, direct): (&File, Option<&DirectFile>),
    mut slice: GuestSlice<'_>,
    mut at: u64,
    call: fn(&File, GuestSlice<'_>, u64) -> io::Result<usize>,
) -> io::Result<()> {
    while slice.len() > 0 {
        let moved = match direct {
            None => call(file, slice, at),
            Some(direct) => {
                direct.call(file, (slice.as_ptr().addr(), slice.len()), at, |file| call(file, slice, at))
            }
        };
        match moved {
            Ok(moved) => {
                slice = slice.after(moved);
                at += moved as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn write_at(file: &File, slice: GuestSlice<'_>, at: u64) -> io::Result<usize> {
    let at = position(at)?;
    // SAFETY: the slice lies inside the mapping that it borrows, so the system may read all of it.
    let written = unsafe { libc::pwrite64(file.as_raw_fd(), slice.as_ptr().cast(), slice.len(), at) };
    moved(written, io::ErrorKind::WriteZero)
}

fn read_at(file: &File, slice: GuestSlice<'_>, at: u64) -> io::Result<usize> {
    assert!(slice.is_writable(), "memory mapped for reading is not read into");
    let at = position(at)?;
    // SAFETY: the slice lies inside the mapping that it borrows, which is writable, and is not a reference.
    let read = unsafe { libc::pread64(file.as_raw_fd(), slice.as_ptr().cast(), slice.len(), at) };
    moved(read, io::ErrorKind::UnexpectedEof)
}

fn position(at: u64) -> io::Result<libc::off64_t> {
    at.try_into().map_err(|_| io::ErrorKind::FileTooLarge.into())
}

fn moved(count: isize, nothing: io::ErrorKind) -> io::Result<usize> {
    match usize::try_from(count) {
        Ok(0) => Err(nothing.into()),
        Ok(count) => Ok(count),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// The distance between two boundaries in bytes. It is a few huge pages, so that no two channels fill the same one, and
/// the system makes several at once.
const STRETCH: u64 = 4 * HUGE;
/// The number of bytes that are compared at once: a multiple of every page size.
const PIECE: usize = 512 << 10;
