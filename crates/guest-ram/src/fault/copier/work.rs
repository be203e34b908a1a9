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
    counts::Counts,
    error::CopierError,
    memory::Protect,
    options::CopierOptions,
    sink::PageSink,
    state::{Answer, Job, Pages, Piece},
};
use crate::{
    BlockIndex, BlockOffset, PageBitmap, PageIndex, PageRun, joined,
    sync_types::{Mutex, RwLock, yield_now},
};

/// What the threads share.
pub(super) struct Shared {
    pub(super) memory: Box<dyn Protect>,
    pub(super) regions: Vec<Region>,
    /// For each region: pages that may allow writes. Whole host pages. Changed under the gate.
    pub(super) noted: Vec<PageBitmap>,
    pub(super) sink: Arc<dyn PageSink>,
    pub(super) options: CopierOptions,
    /// The number of bytes that are copied while writers wait for the gate.
    pub(super) at_once: u64,
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
                    let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
                    // This thread serves what it has read: nobody else has to be woken.
                    self.read_held()?;
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
                    self.store(piece.run, &piece.bytes)?;
                    self.pages.stored(number, Some(piece.bytes));
                }
                Job::Walk => {
                    let runs = self.claim(most, (self.at_once / page).max(1), &mut buffer)?;
                    if runs.is_empty() {
                        continue;
                    }
                    runs.iter().try_for_each(|run| self.allow(*run))?;
                    let mut rest = &buffer[..];
                    for run in &runs {
                        let number = self.pages.store();
                        let (bytes, after) = rest.split_at(self.memory.len(*run).min(rest.len()));
                        self.store(*run, bytes)?;
                        self.pages.stored(number, None);
                        rest = after;
                    }
                    self.pages.copied();
                }
            }
        }
    }

    /// Claims pages, `most` of them in parts of `part`, and copies them to the buffer. The gate is released after each part, so that a
    /// writer waits for one part only.
    fn claim(&self, most: u64, part: u64, buffer: &mut Vec<u8>) -> Result<Vec<PageRun>, CopierError> {
        let mut runs: Vec<PageRun> = Vec::new();
        let (mut pages, mut len) = (0, 0);
        while pages < most {
            let _gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
            let Some(run) = self.pages.claim(part.min(most - pages), runs.is_empty()) else { break };
            let after = len + self.memory.len(run);
            if buffer.len() < after {
                buffer.resize(after, 0);
            }
            self.memory.load(run, buffer.get_mut(len..after).unwrap_or_default())?;
            (pages, len) = (pages + run.count, after);
            match runs.last_mut() {
                Some(last) if last.block == run.block && last.end() == run.first.0 => last.count += run.count,
                _ => runs.push(run),
            }
        }
        Ok(runs)
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
            let Some(touched) = self.memory.touched(region.block) else { continue };
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
                        yield_now();
                        continue;
                    }
                    Counts::add(&self.counts.noted, 1);
                    return Ok(());
                }
                Answer::Copy => {
                    let mut bytes = self.pages.buffer();
                    bytes.resize(self.memory.len(run), 0);
                    self.memory.load(run, &mut bytes)?;
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

    fn store(&self, run: PageRun, bytes: &[u8]) -> Result<(), CopierError> {
        let Some(region) = self.region(run.block) else { return Ok(()) };
        self.sink.store(run, bytes).map_err(|source| CopierError::Store {
            name: region.name.clone(),
            offset: BlockOffset(run.first.0 * region.page),
            source,
        })?;
        Counts::add(&self.counts.stored, run.count);
        Ok(())
    }

    /// Reads one message, if there is one. A write that is reported goes to `faults`.
    pub(super) fn read(&self) -> Result<(), CopierError> {
        let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        if self.read_held()? {
            // It is not a thread for faults that has read it.
            self.memory.notify();
        }
        Ok(())
    }

    /// Like [`read`](Self::read), and notifies nobody. Returns whether a write was reported. The gate is held for writing.
    pub(super) fn read_held(&self) -> Result<bool, CopierError> {
        let (mut events, mut is_reported) = (Vec::new(), false);
        self.memory.read(&mut events)?;
        for event in events {
            match event {
                FaultEvent::Fault { block, offset, kind: FaultKind::Protected, .. } => {
                    let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
                    faults.push_back((block, offset, Instant::now()));
                    is_reported = true;
                }
                FaultEvent::Fault { .. } => {}
                FaultEvent::Removed { block, offset, len } => self.removed(block, offset, len)?,
            }
        }
        Ok(is_reported)
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

    pub(super) fn region(&self, block: BlockIndex) -> Option<&Region> {
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

/// Pages that are claimed under one lock.
const STRETCH: usize = 1 << 18;
