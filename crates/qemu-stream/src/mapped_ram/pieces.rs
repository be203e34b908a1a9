//! Reads all present pages of blocks in files, by several threads.
//!
//! ```text
//! N threads: next group of 512 pages ── its runs of present pages, read in pieces ── the caller's closure, in any order
//! ```
//!
//! The threads end with the last group, with the first error of any of them, or with the stop. All are joined.

use std::{
    io,
    num::NonZero,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
};

use multifd::{
    Error, Result,
    channel::Stop,
    ram::{AlignedBuffer, BlockIndex, BlockOffset, PageDigests, PageIndex, RamBlock, RamBlocks, runs},
};

/// Reads all present pages in pieces and calls `then` with each, in any thread. If a piece cannot be read, its pages are
/// read one by one. `read` counts bytes. Returns the number of pages.
pub(super) fn each_piece(
    blocks: &RamBlocks,
    threads: NonZero<u8>,
    (read, stop): (&AtomicU64, &Stop),
    then: impl Fn(BlockIndex, &RamBlock, PageIndex, io::Result<&[u8]>) -> Result<()> + Sync,
) -> Result<u64> {
    // Relaxed, all of them: each number is taken once, in whatever order, and the end of a thread orders the rest.
    let (next, pages, failed) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let piece = |index, block: &RamBlock, first, count, buffer: &mut [u8]| -> Result<()> {
        let page = block.page_size().bytes();
        let length = usize::try_from(count).unwrap_or(usize::MAX).saturating_mul(page);
        let piece = buffer.get_mut(..length).expect("a piece fits the buffer");
        match block.load_direct(first, count, piece) {
            Ok(()) => then(index, block, first, Ok(piece))?,
            Err(_) => {
                for (at, bytes) in (first.0..).map(PageIndex).zip(piece.chunks_exact_mut(page)) {
                    let loaded = block.load_direct(at, 1, bytes);
                    then(index, block, at, loaded.map(|()| &*bytes))?;
                }
            }
        }
        read.fetch_add(length as u64, Ordering::Relaxed);
        pages.fetch_add(count, Ordering::Relaxed);
        Ok(())
    };
    let reads = || {
        let mut buffer = AlignedBuffer::new(PIECE);
        while let Some((index, block, group)) = group_of(blocks, next.fetch_add(1, Ordering::Relaxed)) {
            stop.check()?;
            for (first, count) in runs_of(block, group) {
                if failed.load(Ordering::Relaxed) {
                    return Ok(());
                }
                piece(index, block, first, count, &mut buffer)
                    .inspect_err(|_: &Error| failed.store(true, Ordering::Relaxed))?;
            }
        }
        Ok(())
    };
    thread::scope(|threads_of| {
        let spawn = |number| {
            let builder = thread::Builder::new().name(format!("pages {number}"));
            builder.spawn_scoped(threads_of, reads).map_err(|error| Error::io("start a thread", error))
        };
        let started: Vec<_> = (0..threads.get()).map(spawn).collect();
        let ended = started.into_iter().map(|started| {
            started?.join().unwrap_or_else(|_| Err(Error::other("read the file", "a thread panicked")))
        });
        // All are waited for; the first error is returned.
        ended.collect::<Vec<_>>().into_iter().collect::<Result<()>>()
    })?;
    Ok(pages.into_inner())
}

/// The error of a page that cannot be read.
pub(super) fn unread(block: &RamBlock, page: PageIndex, error: io::Error) -> Error {
    let offset = block.offset_of(page).unwrap_or(BlockOffset(u64::MAX));
    Error::io(format!("read block {:?} at offset {offset}", block.name()), error)
}

/// The group with this number among the groups of all blocks.
fn group_of(blocks: &RamBlocks, mut number: u64) -> Option<(BlockIndex, &RamBlock, u64)> {
    for (index, block) in blocks.iter() {
        let groups = block.pages().div_ceil(PageDigests::GROUP_PAGES);
        if number < groups {
            return Some((index, block, number));
        }
        number -= groups;
    }
    None
}

/// The runs of present pages in a group, in pieces that fit the buffer.
fn runs_of(block: &RamBlock, group: u64) -> impl Iterator<Item = (PageIndex, u64)> {
    let most = (PIECE / block.page_size().bytes()).max(1) as u64;
    let words = PageDigests::GROUP_PAGES / 64;
    let mut joined: Vec<(PageIndex, u64)> = Vec::new();
    for word in group * words..(group + 1) * words {
        let Ok(word) = usize::try_from(word) else { continue };
        for (first, count) in runs(word, block.present_word(word)) {
            match joined.last_mut() {
                Some((start, length)) if start.0 + *length == first.0 && *length + count <= most => {
                    *length += count;
                }
                _ => joined.push((first, count)),
            }
        }
    }
    joined.into_iter()
}

/// The number of bytes that are read at once: what stays in a processor's cache until its digest is made. It is a multiple of
/// 64 pages.
const PIECE: usize = 512 << 10;
