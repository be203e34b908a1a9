//! Searches guest-physical memory with several threads.
//!
//! ```text
//! round: N threads ─ next piece of 512 KiB ─ read, with as much of what follows as the pattern may reach ─▶ places in it
//!        all have ended ─▶ places in order ─▶ the caller's closure ─▶ next round
//! ```
//!
//! A piece without present pages is zero, and is read only if the pattern is. The threads of a round end with its last piece, its
//! first error, or the stop; they are joined before the closure is called.

use std::{
    num::NonZero,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use memchr::memmem::Finder;
use multifd::channel::Stop;
use qemu_stream::physical::{PhysicalAddress, PhysicalMemory, PhysicalRange};

use crate::output::outcome::{Failure, While};

/// A search for bytes.
pub(in crate::verbs) struct Search<'a> {
    memory: &'a PhysicalMemory,
    finder: Finder<'a>,
    /// Whether the pattern is zeros only.
    is_zero: bool,
    threads: NonZero<u8>,
}

impl<'a> Search<'a> {
    /// For `pattern`, which has at least one byte.
    pub(in crate::verbs) fn new(memory: &'a PhysicalMemory, pattern: &'a [u8], threads: NonZero<u8>) -> Self {
        let is_zero = pattern.iter().all(|byte| *byte == 0);
        Self { memory, finder: Finder::new(pattern), is_zero, threads }
    }

    /// Calls `found` with the places of each round, in order, until it returns `false`. Places may overlap.
    pub(in crate::verbs) fn run(
        &self,
        stop: &Stop,
        mut found: impl FnMut(&[PhysicalAddress]) -> Result<bool, Failure>,
    ) -> Result<(), Failure> {
        let mut pieces = self.pieces().filter(|piece| self.may_match(piece)).peekable();
        while pieces.peek().is_some() {
            let round: Vec<_> = pieces.by_ref().take(self.pieces_of_a_round()).collect();
            let places = self.round(&round, stop)?;
            if !places.is_empty() && !found(&places)? {
                break;
            }
        }
        Ok(())
    }

    /// All of RAM, in pieces.
    fn pieces(&self) -> impl Iterator<Item = PhysicalRange> {
        self.memory.map().ranges().iter().flat_map(|range| {
            let starts = (range.start.0..=range.last().0).step_by(PIECE);
            starts.flat_map(|start| {
                let length = (range.last().0 - start + 1).min(PIECE as u64);
                self.memory.map().pieces(PhysicalAddress(start), length)
            })
        })
    }

    /// Of a short pattern, every byte may be a place.
    fn pieces_of_a_round(&self) -> usize {
        if self.is_zero || self.finder.needle().len() < SHORT { FEW } else { ROUND }
    }

    fn may_match(&self, piece: &PhysicalRange) -> bool {
        self.is_zero || self.memory.present(&self.extended(piece), u64::MAX).next().is_some()
    }

    /// The piece and what follows it in the same range, as far as a place in the piece may reach.
    fn extended(&self, piece: &PhysicalRange) -> PhysicalRange {
        let reach = self.finder.needle().len().saturating_sub(1) as u64;
        let last = self.memory.map().find(piece.start).map_or(piece.last(), |range| range.last());
        let length = (piece.length + reach).min(last.0 - piece.start.0 + 1);
        PhysicalRange { length, ..*piece }
    }

    fn round(&self, pieces: &[PhysicalRange], stop: &Stop) -> Result<Vec<PhysicalAddress>, Failure> {
        // Relaxed: each number is taken once, and the end of a thread orders the rest.
        let next = AtomicUsize::new(0);
        let search = || -> Result<Vec<PhysicalAddress>, Failure> {
            let (mut buffer, mut found) = (Vec::new(), Vec::new());
            while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                stop.check().map_err(Failure::of)?;
                self.search(piece, &mut buffer, &mut found)?;
            }
            Ok(found)
        };
        let mut found = Vec::new();
        thread::scope(|scope| {
            let started: Vec<_> = (0..self.threads.get())
                .map(|number| {
                    thread::Builder::new().name(format!("find {number}")).spawn_scoped(scope, search)
                })
                .collect();
            let mut ended = Ok(());
            for thread in started {
                let places = match thread {
                    Ok(thread) => thread.join().unwrap_or_else(|_| Err("a thread panicked".into())),
                    Err(error) => Err(While::new("cannot start a thread", error).into()),
                };
                match places {
                    Ok(places) => found.extend(places),
                    Err(error) => ended = ended.and(Err(error)),
                }
            }
            ended
        })?;
        found.sort_unstable();
        Ok(found)
    }

    fn search(
        &self,
        piece: &PhysicalRange,
        buffer: &mut Vec<u8>,
        found: &mut Vec<PhysicalAddress>,
    ) -> Result<(), Failure> {
        let extended = self.extended(piece);
        buffer.resize(usize::try_from(extended.length).unwrap_or(usize::MAX), 0);
        self.memory
            .read(piece.start, buffer)
            .map_err(|error| While::new(format!("cannot read the memory at {}", piece.start), error))?;
        let mut at = 0;
        while let Some(rest) = buffer.get(at..)
            && let Some(place) = self.finder.find(rest)
        {
            at += place;
            if at as u64 >= piece.length {
                break;
            }
            found.push(PhysicalAddress(piece.start.0 + at as u64));
            at += 1;
        }
        Ok(())
    }
}

/// Bytes of a piece: whole pages, and what stays in a processor's cache.
const PIECE: usize = 512 << 10;
/// Pieces of a round: enough that a slow one delays the others little.
const ROUND: usize = 2048;
/// The same, if there may be a place at every byte: their addresses need 128 MiB.
const FEW: usize = 32;
/// Bytes of a pattern that is unlikely to be everywhere.
const SHORT: usize = 4;
