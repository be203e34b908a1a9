//! Compares the pages of two machines with several threads.
//!
//! ```text
//! blocks of the same name ─ N threads: next 1 MiB in which a page of either is present ─ read both ─▶ one bit for each page
//! ```
//!
//! The threads end with the last piece, the first error of any of them, or the stop; they are joined before the call returns.

use std::{
    collections::HashMap,
    num::NonZero,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
};

use multifd::{
    channel::Stop,
    ram::{PageBitmap, PageIndex, RamBlock, RamBlocks},
};
use qemu_stream::mapped_ram::{ReadPath, StoredMachine};

use crate::output::outcome::{Failure, While};

/// Two machines whose pages are compared.
pub(super) struct Comparison {
    a: RamBlocks,
    b: RamBlocks,
}

/// The pages of a block that differ.
pub(super) struct Pages {
    pub(super) different: PageBitmap,
    page_size: u64,
}

impl Pages {
    /// Runs of pages that differ: offset and length in bytes.
    pub(super) fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut runs = self.different.set_runs().peekable();
        std::iter::from_fn(move || {
            let (first, mut count) = runs.next()?;
            // A run ends with its word.
            while let Some((_, more)) = runs.next_if(|(next, _)| next.0 == first.0 + count) {
                count += more;
            }
            Some((first.0 * self.page_size, count * self.page_size))
        })
    }
}

impl Comparison {
    pub(super) fn of(a: &StoredMachine, b: &StoredMachine) -> multifd::Result<Self> {
        let blocks = |of: &StoredMachine| of.ram_blocks(|_, _| ReadPath::Cached);
        Ok(Self { a: blocks(a)?, b: blocks(b)? })
    }

    /// Compares the blocks that both have, as far as both reach.
    pub(super) fn run(&self, threads: NonZero<u8>, stop: &Stop) -> Result<HashMap<String, Pages>, Failure> {
        let mut found = HashMap::new();
        for (_, a) in self.a.iter() {
            let b = self.b.find(a.name().as_bytes()).and_then(|index| self.b.get(index));
            if let Some(b) = b.filter(|b| b.page_size() == a.page_size()) {
                let different = PageBitmap::new(a.pages().min(b.pages()));
                compare(a, b, &different, threads, stop)?;
                let page_size = a.page_size().bytes() as u64;
                found.insert(a.name().to_string(), Pages { different, page_size });
            }
        }
        Ok(found)
    }
}

fn compare(
    a: &RamBlock,
    b: &RamBlock,
    different: &PageBitmap,
    threads: NonZero<u8>,
    stop: &Stop,
) -> Result<(), Failure> {
    let size = a.page_size().bytes();
    let piece = (PIECE / size).max(1) as u64;
    let pages = different.pages();
    // Relaxed, all of them: each number is taken once, and the end of a thread orders the rest.
    let (next, failed) = (AtomicU64::new(0), AtomicBool::new(false));
    let compares = || -> Result<(), Failure> {
        let (mut one, mut other) = (Vec::new(), Vec::new());
        loop {
            let first = next.fetch_add(1, Ordering::Relaxed).saturating_mul(piece);
            if first >= pages || failed.load(Ordering::Relaxed) {
                return Ok(());
            }
            stop.check().map_err(Failure::of)?;
            let count = piece.min(pages - first);
            let is_present = |block: &RamBlock| {
                let words = first / 64..(first + count).div_ceil(64);
                words.filter_map(|word| usize::try_from(word).ok()).any(|word| block.present_word(word) != 0)
            };
            if !is_present(a) && !is_present(b) {
                continue;
            }
            let length = usize::try_from(count).unwrap_or(usize::MAX).saturating_mul(size);
            for (block, bytes) in [(a, &mut one), (b, &mut other)] {
                bytes.resize(length, 0);
                block.load_direct(PageIndex(first), count, bytes).map_err(|error| {
                    While::new(format!("cannot read block {:?} at page {first}", block.name()), error)
                })?;
            }
            let pairs = one.chunks_exact(size).zip(other.chunks_exact(size));
            for (page, _) in (first..).zip(pairs).filter(|(_, (one, other))| one != other) {
                different.set(PageIndex(page));
            }
        }
    };
    thread::scope(|scope| {
        let started: Vec<_> = (0..threads.get())
            .map(|number| {
                let compares = || compares().inspect_err(|_| failed.store(true, Ordering::Relaxed));
                thread::Builder::new().name(format!("diff {number}")).spawn_scoped(scope, compares)
            })
            .collect();
        let ended = started.into_iter().map(|thread| match thread {
            Ok(thread) => thread.join().unwrap_or_else(|_| Err("a thread panicked".into())),
            Err(error) => Err(While::new("cannot start a thread", error).into()),
        });
        // All are joined; the first error is returned.
        ended.collect::<Vec<_>>().into_iter().collect()
    })
}

/// Bytes that are compared at once: a multiple of 64 pages.
const PIECE: usize = 4 << 20;
