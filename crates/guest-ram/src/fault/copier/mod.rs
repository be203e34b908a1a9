//! Copies memory as it is at one moment, while its guest continues to write to it.
//!
//! ```text
//! Copier::prepare ──▶ Prepared ── hold (guest is stopped) ──▶ Copier ── finish ──▶ memory is writable again
//! kernel ── write to a protected page ── ramcopyfault_N ─┐ claim, copy to a buffer, allow writes
//! Walk ───────────────────────────────── ramcopy_N ──────┴─▶ queue ── ramcopy_N ──▶ PageSink::store
//! ```
//!
//! The threads and what they wait for are in `docs/develop/concurrency.md`.

mod counts;
mod error;
mod memory;
#[cfg(shuttle)]
pub mod model;
mod options;
mod protect;
mod read;
mod sink;
mod state;
mod work;

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    thread::{Builder, JoinHandle},
    time::Duration,
};

use crate::{PageBitmap, RamBlocks, Shape, Walk, sync_types::RwLock};

use super::{Armed, FaultsFrom, Features, Modes, Region, Userfault, pager::ArmedMemory, turn};
use counts::Counts;
use memory::OwnMemory;
use state::Pages;
use work::Shared;

pub use counts::CopierStats;
pub use error::CopierError;
pub use options::CopierOptions;
pub use sink::{PageSink, StoreError};

/// Memory that is protected against writing while its guest runs. Writes are noted and let through.
///
/// Its drop ends the protection.
#[derive(Debug)]
pub struct Prepared(Copier);

/// Copies memory as it was at the [hold](Prepared::hold). A thread that writes to a page waits until the page was copied to a buffer.
///
/// However it ends, by an error of the sink, a panic, [`stop`](Self::stop) or its drop: all memory is writable again, and all writers
/// continue.
pub struct Copier {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl fmt::Debug for Copier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Copier").field("left", &self.left()).finish_non_exhaustive()
    }
}

impl Prepared {
    /// From now on, pages are copied as they are. The guest must be stopped: nothing may write to the memory during this call. It may
    /// continue when the call has returned, also with an error. Only what was written since the preparation costs time.
    ///
    /// # Errors
    /// If something has ended the copier. The memory is writable then.
    pub fn hold(self) -> Result<Copier, CopierError> {
        let shared = &self.0.shared;
        match shared.hold(walk(&shared.regions)) {
            // It may have ended before.
            Ok(()) => shared.pages.take_error()?,
            Err(error) => {
                shared.end(Some(error));
                shared.pages.take_error()?;
            }
        }
        let copier = self.0;
        for number in 0..copier.shared.options.threads {
            let is_first = number == 0;
            copier.start(&format!("ramcopy_{number}"), move |shared| {
                turn::lower(shared.options.niceness);
                if is_first {
                    shared.skip_holes();
                }
                shared.copy()
            })?;
        }
        Ok(copier)
    }

    /// What it has done so far.
    pub fn stats(&self) -> CopierStats {
        self.0.stats()
    }
}

impl Copier {
    /// The features that it needs: Linux 6.4.
    pub const NEEDS: Features = Features::of_bits(
        Features::PROTECT.bits() | Features::PROTECT_UNPOPULATED.bits() | Features::REMOVED.bits(),
    );

    /// Protects the memory of all mapped blocks that are not [ignored](crate::RamBlock::ignored), while its guest runs. The time
    /// depends on the size of the memory.
    ///
    /// Writes of vCPUs, of threads of this process and of its system calls are noticed. **Warning:** those of other processes,
    /// of other mappings, and of devices that write by physical address (VFIO, direct I/O in progress, fixed buffers of `io_uring`) are not.
    ///
    /// # Errors
    /// If this process may not serve page faults, with the remedy; if the kernel lacks something; if memory is shared and its
    /// [sole writer](CopierOptions::sole_writer) was not declared; if another `userfaultfd`, such as that of a dirty log of the page
    /// table, has the memory. Nothing is protected then.
    pub fn prepare(
        blocks: &Arc<RamBlocks>,
        sink: Arc<dyn PageSink>,
        options: CopierOptions,
    ) -> Result<Prepared, CopierError> {
        let userfault = Userfault::open(Self::NEEDS, FaultsFrom::Everything)?;
        let armed = Armed::arm(userfault, blocks.clone(), Modes::WRITES)?;
        let regions = armed.regions().to_vec();
        if let Some(shared) = regions.iter().find(|region| !region.kind.is_private())
            && !options.sole_writer
        {
            return Err(CopierError::Shared { name: shared.name.clone() });
        }
        let shared = Shared {
            memory: Box::new(OwnMemory { armed: ArmedMemory::new(armed)?, blocks: blocks.clone() }),
            noted: regions.iter().map(|region| PageBitmap::new(region.pages)).collect(),
            regions,
            sink,
            options,
            at_once: AT_ONCE,
            gate: RwLock::new(()),
            pages: Pages::default(),
            faults: Default::default(),
            counts: Counts::default(),
        };
        let copier = Self { shared: Arc::new(shared), threads: Mutex::default() };
        for number in 0..copier.shared.options.fault_threads {
            copier.start(&format!("ramcopyfault_{number}"), |shared| {
                turn::serve_soon();
                shared.serve()
            })?;
        }
        copier.start("ramcopywatch", Shared::watch)?;
        match copier.shared.protect_all() {
            Ok(()) => {}
            Err(error) => copier.shared.end(Some(error)),
        }
        copier.shared.pages.take_error()?;
        Ok(Prepared(copier))
    }

    fn start(
        &self,
        name: &str,
        work: impl FnOnce(&Shared) -> Result<(), CopierError> + Send + 'static,
    ) -> Result<(), CopierError> {
        let shared = self.shared.clone();
        shared.pages.thread_starts();
        match Builder::new().name(name.to_owned()).spawn(move || shared.run(work)) {
            Ok(thread) => {
                self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
                Ok(())
            }
            Err(error) => {
                self.shared.pages.thread_ends();
                Err(CopierError::Thread(error))
            }
        }
    }

    /// What it has done so far.
    pub fn stats(&self) -> CopierStats {
        self.shared.counts.stats()
    }

    /// The number of pages that are not copied yet, or wait to be stored.
    pub fn left(&self) -> u64 {
        self.shared.pages.left()
    }

    /// Waits until everything is stored, and ends the threads. The memory is writable without faults then. The wait also ends with
    /// [`stop`](Self::stop).
    ///
    /// # Errors
    /// [`CopierError::Incomplete`] if `limit` has passed; the copier continues. Otherwise the reason of the early end, the first time it
    /// is asked for, later [`CopierError::Cancelled`].
    pub fn finish(&self, limit: Option<Duration>) -> Result<CopierStats, CopierError> {
        if !self.shared.pages.wait(limit) {
            return Err(CopierError::Incomplete { missing: self.left() });
        }
        self.join();
        self.shared.pages.take_error()?;
        Ok(self.stats())
    }

    /// Ends it now.
    pub fn stop(&self) {
        self.shared.end(Some(CopierError::Cancelled));
        self.join();
    }

    fn join(&self) {
        let limit = self.shared.options.end_limit;
        let all = self.shared.pages.wait_for_threads(limit);
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            if all || thread.is_finished() {
                // Its panics were caught.
                let _ = thread.join();
            } else {
                let name = thread.thread().name().unwrap_or_default().to_owned();
                tracing::warn!(name, ?limit, "a sink of pages has not returned: its thread is left behind");
            }
        }
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        self.stop();
    }
}

/// All pages.
fn walk(regions: &[Region]) -> Walk {
    let blocks = regions.iter().map(|region| region.block.0 + 1).max().unwrap_or(0);
    let shapes: Vec<Shape> = (0..blocks)
        .map(|index| {
            let region = regions.iter().find(|region| region.block.0 == index);
            region.map_or(Shape { pages: 0, host_page: 1 }, Region::shape)
        })
        .collect();
    let none: Vec<_> = shapes.iter().map(|shape| PageBitmap::new(shape.pages)).collect();
    Walk::new(&shapes, &none, &none)
}

/// The number of bytes that are copied while writers wait: some ten microseconds.
const AT_ONCE: u64 = 64 << 10;
