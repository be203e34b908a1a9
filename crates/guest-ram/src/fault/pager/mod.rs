//! Serves the faults of armed memory out of a source of pages, and prefetches the rest.
//!
//! ```text
//! ramfault_N ── faults ──┐                     ┌── Armed::copy, zero ──▶ guest memory
//! ramprefetch_N ── Walk ─┴▶ Pages ─▶ PageSource┤
//! ramfaultwatch ── late loads ──▶ judge ◀──────┴── fails, panics
//! ```
//!
//! The threads and what they wait for are in `docs/develop/concurrency.md`.

mod arrive;
mod counts;
mod error;
mod load;
mod memory;
#[cfg(shuttle)]
pub mod model;
mod options;
mod pages;
mod push;
mod source;
mod staging;
mod supply;
mod work;

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread::{Builder, JoinHandle},
    time::Duration,
};

use crate::{BlockOffset, PageBitmap, PageIndex, PageRun, Walk, sync_types::RwLock};

use super::{Armed, FaultError, Features, Modes, Region, turn};
use counts::Counts;
pub(super) use memory::{ArmedMemory, Serve};
use pages::Pages;
use supply::Supply;
use work::Shared;

pub use counts::{PagerStats, ThreadWaits};
pub use error::PagerError;
pub use options::PagerOptions;
pub use source::{Decision, LoadError, PageSource, Trouble, TroubleKind};
pub use supply::RequestPages;

/// Serves the missing pages of armed memory until all are there.
///
/// If it ends early, by [`stop`](Self::stop), by its drop or by a decision, it poisons every page that is missing and may be
/// nonzero. So no access ever finds zeros instead of contents.
pub struct Pager {
    shared: Arc<Shared>,
    threads: Arc<Threads>,
}

/// The threads of a pager.
#[derive(Default)]
struct Threads {
    running: Mutex<Vec<JoinHandle<()>>>,
    replaced: AtomicUsize,
}

impl Threads {
    fn start(
        &self,
        shared: &Arc<Shared>,
        name: &str,
        work: impl FnOnce(&Shared) -> Result<(), FaultError> + Send + 'static,
    ) -> Result<(), PagerError> {
        let runs = shared.clone();
        shared.pages.thread_starts();
        match Builder::new().name(name.to_owned()).spawn(move || runs.run(work)) {
            Ok(thread) => {
                self.running.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
                Ok(())
            }
            Err(error) => {
                shared.pages.thread_ends();
                Err(PagerError::Thread(error))
            }
        }
    }

    /// Starts a thread in place of one whose source may never return.
    fn replace(&self, shared: &Arc<Shared>, for_fault: bool) {
        let number = self.replaced.fetch_add(1, Ordering::Relaxed);
        if number >= REPLACEMENTS {
            tracing::error!(
                number,
                "too many threads wait for a source that does not return: none is started any more"
            );
            return;
        }
        let started = match for_fault {
            true => self.start(shared, &format!("ramfault_r{number}"), serve),
            false => self.start(shared, &format!("ramprefetch_r{number}"), Shared::prefetch),
        };
        if let Err(error) = started {
            tracing::error!(%error, "a thread that waits for a source that does not return was not replaced");
        }
    }
}

impl fmt::Debug for Pager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pager").field("missing", &self.missing()).finish_non_exhaustive()
    }
}

impl Pager {
    /// The features that its memory must have.
    pub const NEEDS: Features = Features::of_bits(Features::POISON.bits() | Features::REMOVED.bits());

    /// Starts to serve memory that is armed for [missing](Modes::MISSING) pages. Threads that wait already are woken, so that they cause
    /// another fault: it may replace a pager of another process that was killed. Serve memory by one pager at a time.
    ///
    /// # Errors
    /// If the memory lacks [features](Self::NEEDS) or has other modes, the source cannot say what it contains, or no threads can
    /// be started. Nothing is armed then, and in the last case the missing pages are poisoned.
    pub fn start(
        armed: Armed,
        source: Arc<dyn PageSource>,
        options: PagerOptions,
    ) -> Result<Self, PagerError> {
        let contents = |region: &Region| {
            let contents = source.contents(region.block);
            contents.map_err(|source| PagerError::Contents { name: region.name.clone(), source })
        };
        let walk = |regions: &[Region], options: &PagerOptions| walk(regions, contents, options);
        Self::begin(armed, walk, Supply::Loaded(source.clone()), options)
    }

    fn begin(
        armed: Armed,
        walk: impl FnOnce(&[Region], &PagerOptions) -> Result<Walk, PagerError>,
        source: Supply,
        options: PagerOptions,
    ) -> Result<Self, PagerError> {
        let lacking = armed.features().lacking(Self::NEEDS);
        if lacking != Features::NONE {
            return Err(FaultError::Lacks { lacking, since: lacking.since() }.into());
        }
        let regions = armed.regions().to_vec();
        if armed.modes() != Modes::MISSING {
            let name = regions.first().map(|region| region.name.clone());
            let why = "a pager serves missing pages, and no other faults".to_owned();
            return name.map_or_else(
                || Err(FaultError::NotHandedOver { why: why.clone() }.into()),
                |name| Err(FaultError::Unsuitable { name, why: why.clone() }.into()),
            );
        }
        let walk = walk(&regions, &options)?;
        let memory = ArmedMemory::new(armed)?;
        for Region { block, addresses, .. } in &regions {
            memory.wake(*block, BlockOffset(0), addresses.end - addresses.start)?;
        }
        let shared = Arc::new(Shared {
            pages: Pages::new(walk, &regions),
            memory: Box::new(memory),
            source,
            regions,
            options,
            gate: RwLock::new(()),
            counts: Counts::default(),
        });
        let pager = Self { shared, threads: Arc::default() };
        pager.start_threads()?;
        Ok(pager)
    }

    fn start_threads(&self) -> Result<(), PagerError> {
        let PagerOptions { fault_threads, prefetch_threads, .. } = self.shared.options;
        for number in 0..fault_threads {
            self.threads.start(&self.shared, &format!("ramfault_{number}"), serve)?;
        }
        for number in 0..prefetch_threads {
            self.threads.start(&self.shared, &format!("ramprefetch_{number}"), Shared::prefetch)?;
        }
        let (threads, shared) = (self.threads.clone(), self.shared.clone());
        self.threads.start(&self.shared, "ramfaultwatch", move |watches| {
            watches.watch(|for_fault| threads.replace(&shared, for_fault))
        })
    }

    /// What it has done so far.
    pub fn stats(&self) -> PagerStats {
        self.shared.counts.stats(self.missing(), self.shared.pages.poisoned().0)
    }

    /// How long each thread of the guest has waited, as far as the kernel has named it; the first 1024 of them.
    pub fn threads(&self) -> Vec<ThreadWaits> {
        self.shared.counts.threads()
    }

    /// The number of pages that are still missing; those without contents do not count. 0 after an early end.
    pub fn missing(&self) -> u64 {
        self.shared.pages.missing()
    }

    /// Waits until all pages are there, disarms the memory, and ends the threads. The wait also ends with [`stop`](Self::stop) and
    /// with a [decision to stop](Decision::Stop). It can be called by several threads and several times.
    ///
    /// # Errors
    /// [`PagerError::Incomplete`] if `limit` has passed; the pager continues. [`PagerError::Poisoned`] if everything else is
    /// there. Otherwise the reason of the early end, the first time it is asked for, later [`PagerError::Cancelled`].
    pub fn finish(&self, limit: Option<Duration>) -> Result<PagerStats, PagerError> {
        if !self.shared.pages.wait_until_done(limit) {
            return Err(PagerError::Incomplete { missing: self.missing() });
        }
        let is_complete = self.shared.pages.is_complete();
        self.end(None);
        if !is_complete {
            return Err(self.shared.pages.take_error().unwrap_or(PagerError::Cancelled));
        }
        let (pages, first) = self.shared.pages.poisoned();
        let Some((block, page)) = first else { return Ok(self.stats()) };
        let region = self.shared.regions.iter().find(|region| region.block == block);
        match region {
            Some(Region { name, page: bytes, .. }) => {
                let offset = BlockOffset(page.0 * bytes);
                Err(PagerError::Poisoned { pages, name: name.clone(), offset })
            }
            None => Ok(self.stats()),
        }
    }

    /// Ends it now. Pages that are missing are poisoned.
    pub fn stop(&self) {
        self.end(Some(PagerError::Cancelled));
    }

    fn end(&self, error: Option<PagerError>) {
        self.shared.end(error);
        self.shared.pages.wait_until_disarmed();
        let limit = self.shared.options.end_limit;
        let all = self.shared.pages.wait_for_threads(limit);
        let threads =
            std::mem::take(&mut *self.threads.running.lock().unwrap_or_else(PoisonError::into_inner));
        if !all {
            let left = threads.iter().filter(|thread| !thread.is_finished());
            let left: Vec<_> = left.map(|thread| thread.thread().name().unwrap_or_default()).collect();
            tracing::warn!(threads = ?left, ?limit, "a source of pages has not returned: its threads are left behind");
        }
        for thread in threads {
            if all || thread.is_finished() {
                // Its panics were caught.
                let _ = thread.join();
            }
        }
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The work of a thread for faults.
fn serve(shared: &Shared) -> Result<(), FaultError> {
    turn::serve_soon();
    shared.serve()
}

/// All pages with contents, the working set first.
fn walk(
    regions: &[Region],
    contents: impl Fn(&Region) -> Result<Option<PageBitmap>, PagerError>,
    options: &PagerOptions,
) -> Result<Walk, PagerError> {
    let blocks = regions.iter().map(|region| region.block.0 + 1).max().unwrap_or(0);
    let (mut shapes, mut first, mut there) = (Vec::new(), Vec::new(), Vec::new());
    for index in 0..blocks {
        // A block that is not armed has no pages here.
        let region = regions.iter().find(|region| region.block.0 == index);
        let shape = region.map_or(crate::Shape { pages: 0, host_page: 1 }, Region::shape);
        let zero = PageBitmap::new(shape.pages);
        if let Some(contents) = region.map(&contents).transpose()?.flatten() {
            zero.fill();
            for (page, count) in contents.set_runs() {
                let end = (page.0 + count).min(shape.pages);
                if page.0 < end {
                    zero.clear_run(page, end - page.0);
                }
            }
        }
        let start = PageBitmap::new(shape.pages);
        for PageRun { first, count, .. } in options.working_set.iter().filter(|run| run.block.0 == index) {
            let end = first.0.saturating_add(*count).min(shape.pages);
            if first.0 < end {
                start.set_run(PageIndex(first.0), end - first.0);
            }
        }
        shapes.push(shape);
        first.push(start);
        there.push(zero);
    }
    Ok(Walk::new(&shapes, &first, &there))
}

/// The number of threads that are replaced. More of them wait only if a source is silent, and the judge gives up page by page.
const REPLACEMENTS: usize = 64;
