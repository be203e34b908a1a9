//! What the threads of a copier do: serve writes, copy pages, store them.
//!
//! ```text
//! fault thread ── wait ── read one message (gate: write) ─▶ faults ─▶ note and allow (gate: read)      before the hold
//!                                                               └──▶ claim and copy (gate: read), allow, queue   after it
//! thread ── queue: store ── otherwise: claim and copy (gate: read), allow, store
//! ```
//!
//! The gate is held for reading while a write is noted and allowed, and while pages are claimed and copied to a buffer; for writing
//! while a message is read, and at the hold. So:
//!
//! - at the hold, every page that allows writes is noted;
//! - who had the gate for writing knows that all pages claimed before are in buffers.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use super::{
    super::{FaultEvent, FaultKind, PlaceEnd, Protection, Region, panicked::message},
    counts::{Counts, nanos},
    error::CopierError,
    options::CopierOptions,
    read::read,
    sink::PageSink,
    state::{Answer, Job, Pages, Piece},
};
use crate::{
    BlockIndex, BlockOffset, PageBitmap, PageIndex, PageRun, RamBlocks, Walk,
    fault::pager::{ArmedMemory, Serve},
    joined,
    sync_types::{Mutex, RwLock, yield_now},
};

/// What the threads share.
pub(super) struct Shared {
    pub(super) memory: ArmedMemory,
    pub(super) blocks: Arc<RamBlocks>,
    pub(super) regions: Vec<Region>,
    /// For each region: pages that may allow writes. Whole host pages. Changed under the gate.
    pub(super) noted: Vec<PageBitmap>,
    pub(super) sink: Arc<dyn PageSink>,
    pub(super) options: CopierOptions,
    pub(super) gate: RwLock<()>,
    pub(super) pages: Pages,
    /// Writes that were reported and not served yet, each with the moment at which it was read.
    pub(super) faults: Mutex<VecDeque<(BlockIndex, BlockOffset, Instant)>>,
    pub(super) counts: Counts,
}

impl Shared {
    /// Runs the work of a thread. A panic or an error of it ends the copier.
    pub(super) fn run(&self, work: impl FnOnce(&Self) -> Result<(), CopierError>) {
        match catch_unwind(AssertUnwindSafe(|| work(self))) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => self.end(Some(error)),
            Err(panic) => self.end(Some(CopierError::Panicked(message(&*panic)))),
        }
        self.pages.thread_ends();
    }

    /// The work of a thread for faults.
    pub(super) fn serve(&self) -> Result<(), CopierError> {
        while !self.pages.is_ended() {
            let next = self.faults.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            match next {
                Some((block, offset, since)) => self.write(block, offset, since)?,
                None => {
                    self.memory.wait()?;
                    self.read()?;
                }
            }
        }
        Ok(())
    }

    /// The work of a thread that copies and stores.
    pub(super) fn copy(&self) -> Result<(), CopierError> {
        let page = self.regions.first().map_or(1, |region| region.page);
        let most = (self.options.bytes / page).max(1);
        let mut buffer = Vec::new();
        loop {
            match self.pages.job() {
                Job::Ended => return Ok(()),
                Job::Complete => {
                    self.end(None);
                    return Ok(());
                }
                Job::Store(number, piece) => {
                    self.store(number, piece.run, &piece.bytes)?;
                }
                Job::Walk => {
                    let run = {
                        let _gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
                        let Some(run) = self.pages.claim(most) else { continue };
                        self.load(run, &mut buffer)?;
                        run
                    };
                    self.allow(run)?;
                    let number = self.pages.store();
                    self.store(number, run, &buffer)?;
                }
            }
        }
    }

    /// The work of the thread that watches: it ends the copier if a store takes too long.
    pub(super) fn watch(&self) -> Result<(), CopierError> {
        let silence = self.options.silence;
        let tick = (silence / 4).max(Duration::from_millis(1));
        while !self.pages.pause(tick) {
            if self.pages.is_silent(silence) {
                return Err(CopierError::Silent(silence));
            }
        }
        Ok(())
    }

    /// Claims holes of shared memory after the hold. Nobody can have filled one of them without a fault, which copies it first.
    /// Pages are copied after that.
    pub(super) fn skip_holes(&self) {
        for region in self.regions.iter().filter(|region| !region.kind.is_private()) {
            let touched = self.blocks.get(region.block).and_then(crate::RamBlock::touched);
            let Some(touched) = touched else { continue };
            let host = region.shape().host_page;
            for (first, count) in joined(touched.clear_runs()) {
                let (from, end) = (first.0.next_multiple_of(host), first.0 + count);
                let end = if end == region.pages { end } else { end - end % host };
                for start in (from..end).step_by(STRETCH) {
                    let run = PageRun {
                        block: region.block,
                        first: PageIndex(start),
                        count: (end - start).min(STRETCH as u64),
                    };
                    let skipped = self.pages.skip(host_pages(region, run));
                    Counts::add(&self.counts.holes, skipped);
                }
            }
        }
        self.pages.ready();
    }

    /// Serves a write to a protected page.
    fn write(&self, block: BlockIndex, offset: BlockOffset, since: Instant) -> Result<(), CopierError> {
        let Some(region) = self.region(block) else { return Ok(()) };
        let (host, first) = (region.shape().host_page, offset.0 / region.page);
        let run =
            PageRun { block, first: PageIndex(first), count: host.min(region.pages.saturating_sub(first)) };
        // The last host page may have bytes after the block's last page.
        let run = if run.count == 0 { PageRun { count: host, ..run } } else { run };
        loop {
            let gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
            match self.pages.write(run) {
                Answer::Ended => return Ok(()),
                Answer::Note => {
                    self.note(region, run);
                    if self.protect(run, Protection::Writable)? == PlaceEnd::Changing {
                        drop(gate);
                        self.read()?;
                        continue;
                    }
                    Counts::add(&self.counts.noted, 1);
                    return Ok(());
                }
                Answer::Copy => {
                    let mut bytes = Vec::new();
                    self.load(run, &mut bytes)?;
                    drop(gate);
                    self.allow(run)?;
                    self.counts.answered(since.elapsed());
                    Counts::add(&self.counts.first, run.count);
                    self.pages.queue(Piece { run, bytes }, self.options.ahead);
                    return Ok(());
                }
                Answer::Claimed => {
                    drop(gate);
                    // See the head of this file: it is in a buffer then.
                    drop(self.gate.write().unwrap_or_else(PoisonError::into_inner));
                    self.allow(run)?;
                    self.counts.answered(since.elapsed());
                    return Ok(());
                }
            }
        }
    }

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
            self.read_held()?;
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
    fn allow(&self, run: PageRun) -> Result<(), CopierError> {
        while self.protect(run, Protection::Writable)? == PlaceEnd::Changing {
            self.read()?;
            yield_now();
        }
        Ok(())
    }

    fn protect(&self, run: PageRun, protection: Protection) -> Result<PlaceEnd, CopierError> {
        let Some(region) = self.region(run.block) else { return Ok(PlaceEnd::All) };
        let offset = BlockOffset(run.first.0 * region.page);
        let len = (run.count * region.page).next_multiple_of(region.host_page);
        let end = self.memory.armed.protect(run.block, offset, len, protection)?.end;
        if end != PlaceEnd::All && self.pages.is_ended() {
            // It is disarmed.
            return Ok(PlaceEnd::All);
        }
        match end {
            PlaceEnd::Gone => Err(CopierError::Replaced { name: region.name.clone(), offset }),
            end => Ok(end),
        }
    }

    /// Fills `buffer` with pages that are held.
    fn load(&self, run: PageRun, buffer: &mut Vec<u8>) -> Result<(), CopierError> {
        let block = self.blocks.block(run.block);
        let block = block.map_err(|error| CopierError::Panicked(error.to_string()))?;
        let Some(memory) = block.slice(run.first, run.count) else { return Ok(()) };
        buffer.resize(memory.len(), 0);
        read(&memory, buffer).map_err(|source| CopierError::Unreadable {
            name: block.name().clone(),
            offset: block.offset_of(run.first).unwrap_or_default(),
            source,
        })
    }

    fn store(&self, number: u64, run: PageRun, bytes: &[u8]) -> Result<(), CopierError> {
        let Some(region) = self.region(run.block) else { return Ok(()) };
        self.sink.store(run, bytes).map_err(|source| CopierError::Store {
            name: region.name.clone(),
            offset: BlockOffset(run.first.0 * region.page),
            source,
        })?;
        Counts::add(&self.counts.stored, run.count);
        self.pages.stored(number);
        Ok(())
    }

    /// Reads one message, if there is one. A write that is reported goes to `faults`.
    fn read(&self) -> Result<(), CopierError> {
        let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        self.read_held()
    }

    /// Like [`read`](Self::read). The gate is held for writing.
    fn read_held(&self) -> Result<(), CopierError> {
        let mut events = Vec::new();
        self.memory.armed.read_some(1, &mut events)?;
        for event in events {
            match event {
                FaultEvent::Fault { block, offset, kind: FaultKind::Protected, .. } => {
                    let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
                    faults.push_back((block, offset, Instant::now()));
                    drop(faults);
                    // It may not be a thread for faults that has read it.
                    self.memory.notify();
                }
                FaultEvent::Fault { .. } => {}
                FaultEvent::Removed { block, offset, len } => self.removed(block, offset, len)?,
            }
        }
        Ok(())
    }

    /// Memory was discarded.
    fn removed(&self, block: BlockIndex, offset: BlockOffset, len: u64) -> Result<(), CopierError> {
        let Some(region) = self.region(block) else { return Ok(()) };
        let first = (offset.0 - offset.0 % region.host_page) / region.page;
        let end = (offset.0 + len).next_multiple_of(region.host_page) / region.page;
        let end = end.min(region.pages);
        if first >= end {
            return Ok(());
        }
        let run = PageRun { block, first: PageIndex(first), count: end - first };
        if !self.pages.is_held() {
            // The kernel drops the protection with the page.
            self.note(region, run);
            return Ok(());
        }
        match self.pages.claim_lost(host_pages(region, run)) {
            Some(lost) => Err(CopierError::Discarded {
                name: region.name.clone(),
                offset: BlockOffset(lost.first.0 * region.page),
            }),
            None => Ok(()),
        }
    }

    fn note(&self, region: &Region, run: PageRun) {
        let index = self.regions.iter().position(|other| other.block == region.block);
        if let Some(noted) = index.and_then(|index| self.noted.get(index)) {
            let count = run.count.min(region.pages.saturating_sub(run.first.0));
            if count > 0 {
                noted.set_run(run.first, count);
            }
        }
    }

    /// Ends everything, and makes the memory writable. The first call does that; others return at once.
    pub(super) fn end(&self, error: Option<CopierError>) {
        if !self.pages.end(error) {
            return;
        }
        // It wakes all writers.
        self.memory.disarm();
        self.pages.disarmed();
        self.memory.stop();
    }

    fn region(&self, block: BlockIndex) -> Option<&Region> {
        self.regions.iter().find(|region| region.block == block)
    }
}

/// The host pages of a run.
fn host_pages(region: &Region, run: PageRun) -> impl Iterator<Item = PageRun> + use<> {
    let host = region.shape().host_page;
    run.host_pages(host).map(move |first| PageRun {
        first: PageIndex(first),
        count: (run.end() - first).min(host),
        ..run
    })
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
/// Pages that are claimed under one lock.
const STRETCH: usize = 1 << 18;
