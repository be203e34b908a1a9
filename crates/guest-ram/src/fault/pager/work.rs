//! What the threads of a pager do: read faults, load pages, place them, and decide about those that do not come.
//!
//! ```text
//! fault thread ── queue empty: wait ── read one message ── Pages::fault ──▶ queue ┐
//!      ▲                                    (gate: write)                         │
//!      └────────────────────────── load ── place (gate: read) ◀───────────────────┘
//! ```
//!
//! The gate is held for reading while pages are placed, and for writing while a message is read and noted. So a page whose memory
//! was discarded is not placed afterwards with its old contents: the thread that discards waits until the message was read.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::PoisonError,
    time::{Duration, Instant},
};

use super::{
    super::{FaultError, FaultEvent, MemoryKind, PlaceEnd, Placed, Region, panicked::message},
    counts::Counts,
    error::PagerError,
    load::{Answer, Dropped, LoadId, Task, Waits},
    memory::Serve,
    options::PagerOptions,
    pages::Pages,
    source::{Decision, Trouble, TroubleKind},
    staging::{HUGE, LoadBuffer},
    supply::{Contents, Placing, Supply},
};
use crate::{
    BlockIndex, BlockOffset, PageIndex, PageRun,
    sync_types::{RwLock, yield_now},
};

/// What the threads share.
pub(crate) struct Shared {
    pub(crate) memory: Box<dyn Serve>,
    pub(crate) source: Supply,
    pub(crate) regions: Vec<Region>,
    pub(crate) options: PagerOptions,
    pub(crate) pages: Pages,
    pub(crate) gate: RwLock<()>,
    pub(crate) counts: Counts,
}

impl Shared {
    /// Runs the work of a thread. A panic or an error of it ends the pager.
    pub(crate) fn run(&self, work: impl FnOnce(&Self) -> Result<(), FaultError>) {
        match catch_unwind(AssertUnwindSafe(|| work(self))) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => self.end(Some(error.into())),
            Err(panic) => self.end(Some(PagerError::Panicked(message(&*panic)))),
        }
        self.pages.thread_ends();
    }

    /// The work of a thread for faults.
    pub(crate) fn serve(&self) -> Result<(), FaultError> {
        let mut buffer = LoadBuffer::aligned();
        while !self.pages.is_ended() {
            match self.pages.queued() {
                Some(task) if self.execute(task, &mut buffer)? => return Ok(()),
                Some(_) => {}
                None => {
                    self.memory.wait()?;
                    self.read()?;
                }
            }
        }
        Ok(())
    }

    /// The work of a thread that prefetches.
    pub(crate) fn prefetch(&self) -> Result<(), FaultError> {
        let is_private = |region: &Region| region.kind == MemoryKind::Anonymous;
        let moves = self.memory.takes() && self.regions.iter().any(is_private);
        let mut buffer = if moves { LoadBuffer::staged() } else { LoadBuffer::aligned() };
        let page = self.regions.first().map_or(1, |region| region.page);
        let bytes = self.options.prefetch_bytes.unwrap_or(if moves { HUGE as u64 } else { PREFETCH });
        while let Some(task) = self.pages.prefetch((bytes / page).max(1)) {
            if self.execute(task, &mut buffer)? {
                break;
            }
        }
        Ok(())
    }

    /// The work of the thread that watches: silent sources, and loads that are repeated.
    /// `replace` starts a thread in place of one whose source may never return.
    pub(crate) fn watch(&self, replace: impl Fn(bool)) -> Result<(), FaultError> {
        let silence = self.options.silence;
        let tick = (silence / 4).max(Duration::from_millis(1));
        while !self.pages.pause(tick) {
            for _ in 0..self.pages.due(Instant::now()) {
                self.memory.notify();
            }
            // Otherwise nobody would see that a thread of the guest waits.
            if self.pages.are_stuck(self.options.fault_threads, silence) {
                while self.read()? {}
            }
            for late in self.pages.late(silence) {
                let (run, since) = (late.run, late.since);
                let kind = TroubleKind::Silent;
                let trouble =
                    Trouble { run, kind, since, is_awaited: late.is_awaited, decided: late.decided };
                match self.judge(&trouble) {
                    Decision::Wait => {}
                    Decision::Poison => {
                        self.give_up(late.id, run)?;
                        if let Some(for_fault) = self.pages.replace(late.id) {
                            replace(for_fault);
                        }
                    }
                    Decision::Stop => self.end(Some(PagerError::Stopped { trouble: trouble.to_string() })),
                }
            }
        }
        Ok(())
    }

    /// Reads one message. Returns whether there was one.
    fn read(&self) -> Result<bool, FaultError> {
        let mut events = Vec::new();
        {
            let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
            self.memory.read(&mut events)?;
            for event in &events {
                if let FaultEvent::Removed { block, offset, len } = *event {
                    self.removed(block, offset, len);
                }
            }
        }
        for event in &events {
            let FaultEvent::Fault { block, offset, thread, .. } = *event else { continue };
            let Some(region) = self.region(block) else { continue };
            Counts::add(&self.counts.faults, 1);
            match self.pages.fault(block, PageIndex(offset.0 / region.page), thread) {
                Answer::Load(_) | Answer::Underway | Answer::Ended => {}
                Answer::Zero(run) => {
                    let waits = Waits::of(thread, Instant::now());
                    self.zero(run)?;
                    Counts::add(&self.counts.zero, 1);
                    self.counts.answered(waits);
                }
                Answer::Poisoned(run) => {
                    let (offset, len) = self.bytes(run);
                    self.memory.wake(block, BlockOffset(offset), len)?;
                    // Another thread is placing the poison; until then, this fault comes again.
                    yield_now();
                }
            }
        }
        Ok(!events.is_empty())
    }

    /// Reads a message because nothing can be placed before. What it leads to is for other threads.
    fn read_between(&self) -> Result<(), FaultError> {
        if self.read()? {
            self.memory.notify();
        } else {
            // Another thread has read it and is noting it.
            yield_now();
        }
        Ok(())
    }

    fn removed(&self, block: BlockIndex, offset: BlockOffset, len: u64) {
        // Of shared memory, the same message says that contents were dropped, or only that they are not mapped here.
        let Some(region) = self.region(block).filter(|region| region.kind.is_private()) else { return };
        let unit = region.page * region.shape().host_page;
        let first = offset.0.div_ceil(unit) * region.shape().host_page;
        let end = match offset.0 + len {
            end if end >= region.pages * region.page => region.pages,
            end => end / unit * region.shape().host_page,
        };
        if first < end {
            let count = self.pages.removed(PageRun { block, first: PageIndex(first), count: end - first });
            Counts::add(&self.counts.removed, count);
        }
    }

    /// Returns whether another thread has replaced this one.
    fn execute(&self, task: Task, buffer: &mut LoadBuffer) -> Result<bool, FaultError> {
        let Task { id, run, for_fault } = task;
        if let Supply::Pushed { requests, .. } = &self.source {
            // Before the request: its pages may come at once.
            self.pages.requested(id);
            requests.request(run);
            return Ok(false);
        }
        let host_page = self.region(run.block).map_or(1, |region| region.shape().host_page);
        match self.load(run, buffer) {
            Ok(bytes) => self.place(task, run, Placing::Own(bytes))?,
            Err(kind) if run.count <= host_page => self.trouble(id, run, kind)?,
            // One of the pages is at fault, and only that one.
            Err(kind) => {
                tracing::debug!(?run, ?kind, "pages cannot be loaded together: they are loaded one by one");
                for first in run.host_pages(host_page) {
                    let count = host_page.min(run.end() - first);
                    let part = PageRun { first: PageIndex(first), count, ..run };
                    match self.load(part, buffer) {
                        Ok(bytes) => self.place(task, part, Placing::Own(bytes))?,
                        Err(kind) => self.trouble(id, part, kind)?,
                    }
                }
            }
        }
        let (waits, is_replaced) = self.pages.ended(id);
        self.counts.answered(waits);
        tracing::trace!(?run, for_fault, "pages are there");
        Ok(is_replaced)
    }

    fn load<'a>(&self, run: PageRun, buffer: &'a mut LoadBuffer) -> Result<&'a mut [u8], TroubleKind> {
        let (_, len) = self.bytes(run);
        let page = self.region(run.block).map_or(1, |region| region.page);
        let (len, known) =
            (usize::try_from(len).unwrap_or(0), usize::try_from(run.count * page).unwrap_or(0));
        let buffer = buffer.bytes(len);
        buffer.get_mut(known..).unwrap_or_default().fill(0);
        let Supply::Loaded(source) = &self.source else { return Ok(buffer) };
        match catch_unwind(AssertUnwindSafe(|| source.load(run, buffer))) {
            Ok(loaded) => loaded.map(|()| buffer).map_err(TroubleKind::Failed),
            Err(panic) => Err(TroubleKind::Panicked(message(&*panic))),
        }
    }

    /// Places the pages of a part of a load.
    pub(super) fn place(&self, task: Task, part: PageRun, mut what: Placing<'_>) -> Result<(), FaultError> {
        let Some(region) = self.region(part.block) else { return Ok(()) };
        let unit = region.page * region.shape().host_page;
        let (start, len) = self.bytes(part);
        let (mut at, mut placed) = (start, 0);
        while at < start + len {
            let first = at / unit * region.shape().host_page;
            let rest = PageRun { first: PageIndex(first), count: part.end() - first, ..part };
            let gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
            let Some((run, dropped)) = self.pages.first_wanted(task.id, rest) else { return Ok(()) };
            let (run_start, run_len) = self.bytes(run);
            let range = |offset: u64| usize::try_from(offset - start).unwrap_or(usize::MAX);
            let most = range(run_start + run_len);
            let is_huge = match &what {
                Placing::Own(bytes) if dropped.is_none() => {
                    self.is_huge(region, at, bytes.get(range(at)..most).unwrap_or_default())
                }
                _ => false,
            };
            // Small pieces, so that whoever reads a message does not wait long. A huge page is moved faster than these are copied.
            let piece = if is_huge { HUGE as u64 } else { PIECE.max(region.host_page) };
            let end = (run_start + run_len).min(at + piece);
            let (block, offset) = (part.block, BlockOffset(at));
            let result = match (dropped, &mut what) {
                (None, Placing::Own(bytes)) => {
                    let piece = bytes.get_mut(range(at)..range(end)).unwrap_or_default();
                    match is_huge {
                        true => self.memory.take(block, offset, piece),
                        false => self.memory.copy(block, offset, piece),
                    }
                }
                (None, Placing::Lent(Contents::Bytes(bytes))) => {
                    let piece = bytes.get(range(at)..range(end)).unwrap_or_default();
                    self.memory.copy(block, offset, piece)
                }
                (None, Placing::Lent(Contents::Zero)) | (Some(Dropped::Removed), _) => {
                    self.memory.zero(block, offset, end - at)
                }
                (Some(Dropped::GivenUp), _) => Ok(Placed { bytes: end - at, end: PlaceEnd::All }),
            };
            drop(gate);
            let result = match result {
                Ok(result) => result,
                Err(FaultError::ProcessEnded) => return Err(FaultError::ProcessEnded),
                // Such as memory that has run out.
                Err(error) => {
                    let rest = PageRun { first: PageIndex(first), count: part.end() - first, ..part };
                    if self.keeps_trying(task.id, rest, &error) {
                        continue;
                    }
                    return self.trouble(task.id, rest, TroubleKind::Failed(error.into()));
                }
            };
            at += result.bytes;
            if dropped.is_none() {
                placed += result.bytes;
            }
            at += self.after(part.block, at, result.end, true)?;
        }
        let counter = if task.for_fault { &self.counts.loaded } else { &self.counts.prefetched };
        Counts::add(counter, placed / region.page);
        Ok(())
    }

    /// Whether pages that were pushed and cannot be placed are placed again: nobody sends them a second time. Waits before.
    fn keeps_trying(&self, id: LoadId, run: PageRun, error: &FaultError) -> bool {
        if matches!(self.source, Supply::Loaded(_)) || self.pages.is_ended() {
            return false;
        }
        let (since, is_awaited, decided) = self.pages.history(id);
        let kind = TroubleKind::Failed(error.to_string().into());
        let waits = self.judge(&Trouble { run, kind, since, is_awaited, decided }) == Decision::Wait;
        if waits {
            Counts::add(&self.counts.retries, 1);
            self.pages.pause(self.options.retry);
        }
        waits
    }

    /// Whether the bytes, and the place at this offset, begin with a whole huge page that can be moved.
    fn is_huge(&self, region: &Region, at: u64, bytes: &[u8]) -> bool {
        region.kind == MemoryKind::Anonymous
            && bytes.len() >= HUGE
            && bytes.as_ptr().addr().is_multiple_of(HUGE)
            && (region.addresses.start + at).is_multiple_of(HUGE as u64)
            && self.memory.takes()
    }

    /// Does what the end of a call requires. Returns how many bytes are skipped.
    fn after(&self, block: BlockIndex, at: u64, end: PlaceEnd, counted: bool) -> Result<u64, FaultError> {
        let Some(region) = self.region(block) else { return Ok(0) };
        let pages = (region.host_page / region.page).max(1);
        match end {
            PlaceEnd::All => Ok(0),
            PlaceEnd::Exists => {
                if counted {
                    Counts::add(&self.counts.existed, pages);
                }
                self.memory.wake(block, BlockOffset(at), region.host_page)?;
                Ok(region.host_page)
            }
            PlaceEnd::Changing => self.read_between().map(|()| 0),
            PlaceEnd::Gone => {
                if counted {
                    Counts::add(&self.counts.gone, pages);
                }
                Ok(region.host_page)
            }
        }
    }

    fn zero(&self, run: PageRun) -> Result<(), FaultError> {
        self.repeat(run, |offset, len| self.memory.zero(run.block, offset, len))
    }

    fn poison(&self, run: PageRun) -> Result<(), FaultError> {
        self.repeat(run, |offset, len| {
            let placed = self.memory.poison(run.block, offset, len)?;
            if placed.end == PlaceEnd::Exists {
                // It was placed in time.
                let region = self.region(run.block);
                let page = region.map_or(0, |region| (offset.0 + placed.bytes) / region.page);
                self.pages.exists(run.block, PageIndex(page));
            }
            Ok(placed)
        })
    }

    fn repeat(
        &self,
        run: PageRun,
        call: impl Fn(BlockOffset, u64) -> Result<Placed, FaultError>,
    ) -> Result<(), FaultError> {
        let (mut at, len) = self.bytes(run);
        let end = at + len;
        while at < end {
            let placed = call(BlockOffset(at), end - at)?;
            at += placed.bytes;
            at += self.after(run.block, at, placed.end, false)?;
        }
        Ok(())
    }

    /// Pages cannot be had.
    fn trouble(&self, id: LoadId, run: PageRun, kind: TroubleKind) -> Result<(), FaultError> {
        // The source refuses because it was told to.
        if self.pages.is_ended() {
            return Ok(());
        }
        let (since, is_awaited, decided) = self.pages.history(id);
        let trouble = Trouble { run, kind, since, is_awaited, decided };
        match self.judge(&trouble) {
            Decision::Wait => {
                Counts::add(&self.counts.retries, 1);
                self.pages.retry(id, run, self.options.retry);
            }
            Decision::Poison => self.give_up(id, run)?,
            Decision::Stop => self.end(Some(PagerError::Stopped { trouble: trouble.to_string() })),
        }
        Ok(())
    }

    fn judge(&self, trouble: &Trouble) -> Decision {
        let decided = catch_unwind(AssertUnwindSafe(|| (self.options.judge)(trouble)));
        let decision = decided.unwrap_or_else(|panic| {
            tracing::error!(panic = message(&*panic), "the judge of a pager panicked: the pager stops");
            Decision::Stop
        });
        tracing::warn!(%trouble, ?decision, "pages of the guest do not come");
        decision
    }

    pub(super) fn give_up(&self, id: LoadId, run: PageRun) -> Result<(), FaultError> {
        let runs = {
            let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
            self.pages.give_up(id, run)
        };
        runs.into_iter().try_for_each(|run| self.poison(run))
    }

    /// Ends everything: poisons what is missing, and disarms. The first call does that; others return at once.
    pub(crate) fn end(&self, error: Option<PagerError>) {
        let missing = {
            let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
            self.pages.end(error)
        };
        let Some(missing) = missing else { return };
        match missing.into_iter().try_for_each(|run| self.poison(run)) {
            Ok(()) | Err(FaultError::ProcessEnded) => self.memory.disarm(),
            Err(error) => {
                tracing::error!(%error, "missing pages cannot be poisoned: the memory stays armed, and who accesses them waits");
                self.memory.stay_armed();
            }
        }
        self.pages.disarmed();
        self.memory.stop();
        if let Supply::Loaded(source) = &self.source {
            source.stop();
        }
    }

    pub(super) fn region(&self, block: BlockIndex) -> Option<&Region> {
        self.regions.iter().find(|region| region.block == block)
    }

    /// The bytes of these pages: offset and length, whole host pages.
    fn bytes(&self, run: PageRun) -> (u64, u64) {
        let Some(region) = self.region(run.block) else { return (0, 0) };
        (run.first.0 * region.page, (run.count * region.page).next_multiple_of(region.host_page))
    }
}

/// The number of bytes that are placed while no message is read.
const PIECE: u64 = 64 << 10;
/// The number of bytes that are prefetched at once, if their pages are copied.
const PREFETCH: u64 = 256 << 10;
