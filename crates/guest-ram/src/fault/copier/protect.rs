//! Write protection: of everything while the guest runs, of what was written at the hold, and its end page by page.
//!
//! ```text
//! protect_all ── writes are noted and allowed ── protect_noted, twice ── hold: what is noted then ── allow, when pages are in a buffer
//! ```
//!
//! The locks are those of `work.rs`. The memory may be discarded at any time, which makes the kernel refuse a call until the message
//! was read.

use std::{sync::PoisonError, time::Instant};

use super::{
    super::{PlaceEnd, Protection, Region},
    counts::{Counts, nanos},
    error::CopierError,
    work::Shared,
};
use crate::{BlockOffset, PageBitmap, PageIndex, PageRun, Walk, sync_types::yield_now};

impl Shared {
    /// Protects everything while the guest runs, then again what was written meanwhile.
    pub(super) fn protect_all(&self) -> Result<(), CopierError> {
        for region in &self.regions {
            let host = region.shape().host_page;
            let step = (PIECE / region.page).next_multiple_of(host);
            for first in (0..region.pages).step_by(usize::try_from(step).unwrap_or(usize::MAX)) {
                let count = (region.pages - first).min(step);
                let run = PageRun { block: region.block, first: PageIndex(first), count };
                while self.protect(run, Protection::Protected)? == PlaceEnd::Changing {
                    self.read()?;
                    yield_now();
                }
            }
        }
        for _ in 0..ROUNDS {
            self.protect_noted()?;
        }
        Ok(())
    }

    /// Protects again what was noted, run by run. Writes wait only for one run.
    fn protect_noted(&self) -> Result<(), CopierError> {
        for (region, noted) in self.regions.iter().zip(&self.noted) {
            for run in close(region, noted) {
                let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
                self.protect_run(region, noted, run)?;
            }
        }
        Ok(())
    }

    /// Protects a run, whose pages are no longer noted then. The gate is held for writing.
    fn protect_run(&self, region: &Region, noted: &PageBitmap, run: PageRun) -> Result<(), CopierError> {
        while self.protect(run, Protection::Protected)? == PlaceEnd::Changing {
            if self.read_held()? {
                self.memory.notify();
            }
            yield_now();
        }
        noted.clear_run(run.first, run.count.min(region.pages - run.first.0));
        Ok(())
    }

    /// Protects what was noted. From now on a write waits until its page was copied. The guest is stopped.
    pub(super) fn hold(&self, walk: Walk) -> Result<(), CopierError> {
        let begun = Instant::now();
        let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        // Memory that is discarded in the meantime is noted again.
        loop {
            let mut is_done = true;
            for (region, noted) in self.regions.iter().zip(&self.noted) {
                for run in close(region, noted) {
                    is_done = false;
                    Counts::add(&self.counts.held, run.count);
                    self.protect_run(region, noted, run)?;
                }
            }
            if is_done {
                break;
            }
        }
        self.pages.hold(walk);
        Counts::add(&self.counts.hold_nanos, nanos(begun.elapsed()));
        Ok(())
    }

    /// Allows writes to pages that are in a buffer.
    pub(super) fn allow(&self, run: PageRun) -> Result<(), CopierError> {
        while self.protect(run, Protection::Writable)? == PlaceEnd::Changing {
            self.read()?;
            yield_now();
        }
        Ok(())
    }

    pub(super) fn protect(&self, run: PageRun, protection: Protection) -> Result<PlaceEnd, CopierError> {
        let Some(region) = self.region(run.block) else { return Ok(PlaceEnd::All) };
        let offset = BlockOffset(run.first.0 * region.page);
        let len = (run.count * region.page).next_multiple_of(region.host_page);
        let end = self.memory.protect(run.block, offset, len, protection)?.end;
        if end != PlaceEnd::All && self.pages.is_ended() {
            // It is disarmed.
            return Ok(PlaceEnd::All);
        }
        match end {
            PlaceEnd::Gone => Err(CopierError::Replaced { name: region.name.clone(), offset }),
            end => Ok(end),
        }
    }
}

/// The runs of noted pages. Runs that are close are one, because a call costs more than some pages.
fn close(region: &Region, noted: &PageBitmap) -> Vec<PageRun> {
    let gap = GAP * region.shape().host_page;
    let mut runs: Vec<PageRun> = Vec::new();
    for (first, count) in noted.set_runs() {
        match runs.last_mut() {
            Some(last) if first.0 - (last.first.0 + last.count) <= gap => {
                last.count = first.0 + count - last.first.0;
            }
            _ => runs.push(PageRun { block: region.block, first, count }),
        }
    }
    runs
}

/// The number of bytes that are protected by one call while the guest runs.
const PIECE: u64 = 64 << 20;
/// Host pages between two noted ones that are protected with them.
const GAP: u64 = 16;
/// How often written pages are protected again while the guest runs.
const ROUNDS: usize = 2;
