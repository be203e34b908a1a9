//! `multifd inspect --extract`: the RAM of one block as raw bytes.
//!
//! In a file, pages that are not present become holes, and the system moves runs of pages; it shares them instead of
//! copying if it can. On standard output, holes are zeros.

use std::{
    error::Error,
    ffi::OsStr,
    fmt,
    fs::File,
    io::{self, Write},
    os::unix::{ffi::OsStrExt, fs::FileExt},
    path::Path,
};

use multifd::{
    channel::Stop,
    ram::{PageBitmap, PageIndex, RamBlock},
};
use qemu_stream::{
    format::BlockEntry,
    mapped_ram::{ReadPath, StoredMachine},
};
use rustix::{fs::copy_file_range, io::Errno};

use crate::{
    file_address::FileAddress,
    interrupt,
    new_file::NewFile,
    output::{
        outcome::{Failure, While},
        outlet::{self, shown},
    },
};

/// Writes the block named `name` to `out`, or to standard output if `out` is `-`.
pub(crate) fn run(
    address: &FileAddress,
    file: &StoredMachine,
    name: &OsStr,
    out: &Path,
    force: bool,
) -> Result<(), Failure> {
    let newest = file.newest();
    let found = file.blocks().iter().zip(newest.places()).find(|((_, entry), _)| is_named(entry, name));
    let Some(((index, _), place)) = found else { return Err(unknown(address, file, name).into()) };
    if place.is_ignored() {
        let doing = format!("cannot extract block {} of {address}", shown(name));
        return Err(While::new(doing, Shared).into());
    }
    let present = file.bitmap(index).map_err(|error| address.unreadable(error))?;
    let whereto = if out == Path::new("-") { "standard output".into() } else { shown(out) };
    let failed = |error: Cause| {
        Failure::from(While::new(format!("cannot extract block {} into {whereto}", shown(name)), error))
    };
    let stop = Stop::new();
    let page_size = place.page_size.bytes() as u64;
    let blocks = file.ram_blocks(|_, _| ReadPath::Cached).map_err(|error| address.unreadable(error))?;
    // What is in several files, or in a stream, is read page by page, too.
    let is_compared = file.has_digests() || !file.is_one_file();
    let compared = blocks.get(index).filter(|_| is_compared);
    let block = Block { file: newest.file(), at: place.pages_offset, compared, stop: &stop };
    if out == Path::new("-") {
        // Nothing would be left behind, so an interrupt may end the process.
        let mut out = outlet::bytes().map_err(|error| failed(error.into()))?;
        let written = stretches(&present, page_size, place.used_length)
            .try_for_each(|stretch| block.write(&stretch, &mut out))
            .and_then(|()| Ok(out.flush()?));
        return match written {
            // The reader has closed it (`| head`), so nobody wants the rest.
            Err(error) if is_closed(&*error) => Ok(()),
            written => written.map_err(failed),
        };
    }
    interrupt::cancels(&stop)?;
    interrupt::spares_large_files();
    let new = NewFile::create(out, 0, force)?;
    let target = new.file();
    // This makes the holes, and gives the file the exact length of the block.
    target.set_len(place.used_length).map_err(|error| failed(error.into()))?;
    // What the system moves is not compared.
    let mut shares = block.compared.is_none();
    for stretch in stretches(&present, page_size, place.used_length).filter(|stretch| stretch.present) {
        let copied = block.copy(&stretch, target, &mut shares);
        stop.check().map_err(Failure::of)?;
        copied.map_err(failed)?;
    }
    target.sync_all().map_err(|error| failed(error.into()))?;
    stop.check().map_err(Failure::of)?;
    Ok(new.name()?)
}

/// Whether `name` is the block's name, literally or as displayed.
fn is_named(entry: &BlockEntry, name: &OsStr) -> bool {
    entry.name.as_bytes() == name.as_bytes() || *entry.name.to_string() == *name
}

fn unknown(address: &FileAddress, file: &StoredMachine, name: &OsStr) -> While {
    let names: Vec<String> = file.blocks().entries().iter().map(|entry| entry.name.to_string()).collect();
    let why = format!("expected one of {}, found {}", names.join(", "), shown(name));
    While::new(format!("no such block in {address}"), why)
}

/// The block's memory was shared and is not in the file; zeros instead would be wrong.
#[derive(Debug)]
struct Shared;

impl fmt::Display for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "its memory is shared and was left out of the file (x-ignore-shared); copy the shared memory itself instead",
        )
    }
}

impl Error for Shared {}

/// A block's pages in the file of its machine.
struct Block<'a> {
    file: &'a File,
    at: u64,
    /// The same pages, which are compared with their digests when they are read.
    compared: Option<&'a RamBlock>,
    stop: &'a Stop,
}

impl Block<'_> {
    /// Moves a stretch to its place in `target`, by the system as long as `shares` is true.
    fn copy(&self, stretch: &Stretch, target: &File, shares: &mut bool) -> Result<(), Cause> {
        let (mut done, mut buffer) = (0, Vec::new());
        while done < stretch.length && !self.stop.is_stopped() {
            let (at, rest) = (stretch.start + done, stretch.length - done);
            let moved = if *shares {
                self.share(target, at, rest, shares)
            } else {
                self.read(&mut buffer, at, rest).and_then(|piece| {
                    target.write_all_at(piece, at)?;
                    Ok(piece.len() as u64)
                })
            };
            done += moved.map_err(|error| broken(at, error))?;
        }
        Ok(())
    }

    /// Makes the system move up to `rest` bytes. 0 bytes are not an error: the caller tries again, or `shares` is now
    /// false.
    fn share(&self, target: &File, at: u64, rest: u64, shares: &mut bool) -> io::Result<u64> {
        let (mut from, mut to) = (self.at + at, at);
        let length = usize::try_from(rest).unwrap_or(SHARED).min(SHARED);
        match copy_file_range(self.file, Some(&mut from), target, Some(&mut to), length) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(copied) => Ok(copied as u64),
            Err(Errno::INTR) => Ok(0),
            // Not supported between these two files, or on this system.
            Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                *shares = false;
                Ok(0)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Writes a stretch; zeros if it is not present.
    fn write(&self, stretch: &Stretch, out: &mut impl Write) -> Result<(), Cause> {
        let (mut done, mut buffer) = (0, Vec::new());
        while done < stretch.length {
            let (at, rest) = (stretch.start + done, stretch.length - done);
            let piece = if stretch.present {
                self.read(&mut buffer, at, rest)
            } else {
                buffer.resize(usize::try_from(rest).unwrap_or(PIECE).min(PIECE), 0);
                Ok(&*buffer)
            };
            let written = piece.and_then(|piece| out.write_all(piece).map(|()| piece.len() as u64));
            done += written.map_err(|error| broken(at, error))?;
        }
        Ok(())
    }

    /// Reads up to `rest` bytes from offset `at` of the block on.
    fn read<'b>(&self, buffer: &'b mut Vec<u8>, at: u64, rest: u64) -> io::Result<&'b [u8]> {
        buffer.resize(usize::try_from(rest).unwrap_or(PIECE).min(PIECE), 0);
        let Some(block) = self.compared else {
            self.file.read_exact_at(buffer, self.at + at)?;
            return Ok(buffer);
        };
        // Stretches of present pages are whole pages.
        let page_size = block.page_size().bytes() as u64;
        block.load_direct(PageIndex(at / page_size), buffer.len() as u64 / page_size, buffer)?;
        Ok(buffer)
    }
}

/// Whether an error, or its cause, is that nobody reads what was written.
fn is_closed(error: &(dyn Error + 'static)) -> bool {
    let mut causes = multifd::error::chain(error).filter_map(|cause| cause.downcast_ref::<io::Error>());
    causes.any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

/// The error, and its position in the block.
fn broken(at: u64, error: io::Error) -> Cause {
    let error = match error.kind() {
        io::ErrorKind::UnexpectedEof => "the file ends there; another program made it shorter".into(),
        _ => Cause::from(error),
    };
    While::new(format!("cannot copy the block at offset {at:#x}"), error).into()
}

type Cause = Box<dyn Error + Send + Sync>;

/// Adjacent pages of one kind, in bytes from the start of the block.
#[derive(Debug, PartialEq, Eq)]
struct Stretch {
    present: bool,
    start: u64,
    length: u64,
}

/// The whole block in order, with alternating present and absent stretches. Bytes after the last whole page are absent.
fn stretches(present: &PageBitmap, page_size: u64, used_length: u64) -> impl Iterator<Item = Stretch> + '_ {
    let mut runs = present.set_runs().map(|(first, count)| (first.0, first.0 + count)).peekable();
    let mut start = 0;
    std::iter::from_fn(move || {
        if start >= used_length {
            return None;
        }
        let page = start / page_size;
        let run = runs.next_if(|(first, _)| *first == page);
        let end = match run {
            Some((_, mut end)) => {
                while let Some((_, further)) = runs.next_if(|(first, _)| *first == end) {
                    end = further;
                }
                end * page_size
            }
            None => runs.peek().map_or(used_length, |(first, _)| first * page_size),
        };
        let stretch = Stretch { present: run.is_some(), start, length: end - start };
        start = end;
        Some(stretch)
    })
}

/// Bytes that the system moves in one call; the stop is checked in between.
const SHARED: usize = 64 << 20;
/// Bytes that are read and written at once.
const PIECE: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn stretch(present: bool, start: u64, length: u64) -> Stretch {
        Stretch { present, start, length }
    }

    fn bitmap(pages: u64, words: &[u64]) -> PageBitmap {
        let present = PageBitmap::new(pages);
        present.merge(words.iter().copied());
        present
    }

    #[test]
    fn stretches_cross_words_and_cover_the_block_to_its_last_byte() {
        let page = 4096;
        let words = [1 << 63 | 1, 0b11];
        let found: Vec<Stretch> = stretches(&bitmap(130, &words), page, 130 * page + 5).collect();
        let expected = [
            stretch(true, 0, page),
            stretch(false, page, 62 * page),
            stretch(true, 63 * page, 3 * page),
            stretch(false, 66 * page, 64 * page + 5),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn full_block_is_one_stretch_and_an_empty_one_none() {
        let found: Vec<Stretch> = stretches(&PageBitmap::full(128), 4096, 128 * 4096).collect();
        assert_eq!(found, [stretch(true, 0, 128 * 4096)]);
        let found: Vec<Stretch> = stretches(&bitmap(64, &[u64::MAX]), 4096, 64 * 4096 + 7).collect();
        assert_eq!(found, [stretch(true, 0, 64 * 4096), stretch(false, 64 * 4096, 7)]);
        assert_eq!(stretches(&PageBitmap::new(0), 4096, 0).next(), None);
        assert_eq!(stretches(&PageBitmap::new(0), 4096, 9).collect::<Vec<_>>(), [stretch(false, 0, 9)]);
    }

    #[test]
    fn stretches_are_what_the_bits_say() {
        let words = [0x0123_4567_89ab_cdef, u64::MAX, 0, 0xf000_0000_0000_000f];
        let (mut pages, present) = (Vec::new(), bitmap(256, &words));
        for stretch in stretches(&present, 1, 256) {
            assert_eq!(stretch.start, pages.len() as u64, "in order, nothing left out");
            pages.extend((0..stretch.length).map(|_| stretch.present));
        }
        let expected: Vec<bool> = (0..256).map(|page| words[page / 64] >> (page % 64) & 1 == 1).collect();
        assert_eq!(pages, expected);
    }
}
