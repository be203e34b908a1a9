//! The memory of a guest that runs early, and its faults.

use std::{
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
    time::Duration,
};

use multifd::{
    Arrived, Error, PlaceLate, Result,
    channel::{SharedWriter, Stop, Stream},
    error::chain,
    ram::{
        self, BlockIndex, PageBitmap, PageIndex, PageRun, Pager, PagerError, PagerStats, RamBlocks,
        ThreadWaits,
    },
};

use super::{
    options::EarlyOptions,
    state::{Phase, State},
};
use crate::{
    error::Error as StreamError,
    incoming::{Loaded, RunEarly},
};

/// The memory, its faults, and how far the machine is.
#[derive(Debug)]
pub(in crate::arrival) struct Field {
    own: Weak<Self>,
    pub(super) state: Arc<State>,
    /// Until the memory is armed.
    options: Mutex<Option<EarlyOptions>>,
    landing: Mutex<Option<ram::Landing>>,
    pager: OnceLock<Pager>,
}

impl Field {
    pub(in crate::arrival) fn new() -> Arc<Self> {
        Arc::new_cyclic(|own| Self {
            own: own.clone(),
            state: Arc::default(),
            options: Mutex::default(),
            landing: Mutex::default(),
            pager: OnceLock::new(),
        })
    }

    pub(in crate::arrival) fn connected(&self, writer: SharedWriter) {
        self.state.connected(writer);
    }

    /// The connection has broken: waits for the source to return.
    pub(in crate::arrival) fn again(
        &self,
        error: StreamError,
        limit: Option<Duration>,
        wait: impl FnOnce(Option<Duration>) -> Result<Stream>,
    ) -> Result<Stream, StreamError> {
        let has_switched = self.pager.get().is_some();
        let limit = match has_switched {
            true => {
                tracing::warn!("{INTERRUPTED}: {}", chain(&error));
                limit
            }
            // It is not here. Most sources know that as well, and do not return.
            false => {
                tracing::warn!("{CUT}: {}", chain(&error));
                Some(limit.map_or(ANSWERS, |limit| limit.min(ANSWERS)))
            }
        };
        self.state.paused();
        // Why the wait has ended is known to the stop, unless the source was too late.
        let Ok(returned) = wait(limit) else { return Err(error) };
        let Ok((stream, writer)) = returned.share() else { return Err(error) };
        self.state.connected(writer);
        Ok(stream)
    }

    pub(in crate::arrival) fn set_options(&self, options: EarlyOptions) {
        *lock(&self.options) = Some(options);
    }

    pub(super) fn confirm(&self) -> Result<(), Phase> {
        self.state.confirm()
    }

    pub(super) fn refuse(&self, error: Error) -> bool {
        self.state.refuse(error)
    }

    pub(super) fn stats(&self) -> PagerStats {
        self.pager.get().map(Pager::stats).unwrap_or_default()
    }

    pub(super) fn threads(&self) -> Vec<ThreadWaits> {
        self.pager.get().map(Pager::threads).unwrap_or_default()
    }

    /// Waits until every page is there, and disarms the memory.
    pub(super) fn finish(&self) -> Result<PagerStats, PagerError> {
        let stats = self.pager.get().map_or_else(|| Ok(PagerStats::default()), |pager| pager.finish(None));
        *lock(&self.landing) = None;
        stats
    }

    /// Gives up what is missing: it is poisoned.
    pub(super) fn abandon(&self) {
        if let Some(pager) = self.pager.get() {
            pager.stop();
        }
        *lock(&self.landing) = None;
    }
}

impl RunEarly for Field {
    fn blocks(&self, blocks: &Arc<RamBlocks>) -> Result<()> {
        self.state.blocks(blocks);
        let from = lock(&self.options).as_ref().map(|options| options.faults_from);
        let from = from.ok_or_else(|| Error::text("load_early was not called"))?;
        let landing = ram::Landing::prepare(blocks.clone(), from);
        *lock(&self.landing) = Some(landing.map_err(unarmed)?);
        Ok(())
    }

    fn discard(&self, block: BlockIndex, first: PageIndex, count: u64) -> Result<()> {
        match &*lock(&self.landing) {
            Some(landing) => landing.discard(block, first, count).map_err(unarmed),
            None => Ok(()),
        }
    }

    fn arm(&self, arrived: &Arrived) -> Result<()> {
        let mut landing = lock(&self.landing);
        let (Some(landing), Some(options)) = (landing.as_mut(), lock(&self.options).take()) else {
            return Err(Error::text("the memory was armed before"));
        };
        let missing = arrived.blocks().iter().map(|(index, block)| {
            let missing = PageBitmap::new(block.pages());
            if !block.is_ignored() {
                let here = arrived.received(index);
                here.into_iter()
                    .flat_map(PageBitmap::clear_runs)
                    .for_each(|(first, count)| missing.set_run(first, count));
            }
            missing
        });
        let missing: Vec<_> = missing.collect();
        let pager =
            Pager::pushed(landing.arm().map_err(unarmed)?, &missing, self.state.clone(), options.pager);
        let pager = pager.map_err(|error| Error::other("serve the page faults of the guest", error))?;
        if self.pager.set(pager).is_err() {
            return Err(Error::text("the memory was armed before"));
        }
        let own = self.own.upgrade().ok_or(Error::Cancelled)?;
        arrived.place_late(own)
    }

    fn switched(&self, loaded: Loaded, pongs: Vec<u32>) {
        self.state.switched(loaded, pongs);
    }

    fn continues(&self) {
        self.state.answers();
        if let Some(pager) = self.pager.get() {
            pager.request_again();
        }
    }

    fn decided(&self, stop: &Stop) -> Result<()> {
        self.state.wait_decided(stop)
    }

    fn fails(&self) -> bool {
        self.state.fails()
    }

    fn refused(&self) -> Option<Error> {
        self.state.refused()
    }
}

impl PlaceLate for Field {
    fn place(&self, run: PageRun, bytes: &[u8]) -> Result<()> {
        self.pager.get().map_or(Ok(()), |pager| pager.push(run, bytes)).map_err(unplaced)
    }

    fn zero(&self, run: PageRun) -> Result<()> {
        self.pager.get().map_or(Ok(()), |pager| pager.push_zero(run)).map_err(unplaced)
    }
}

const CUT: &str = "the connection to the source broke when it was about to switch to post-copy; the guest is not here, and the source gets that answer \
                   if it returns";
/// How long a source that may take its guest to be here is waited for.
const ANSWERS: Duration = Duration::from_secs(30);
const INTERRUPTED: &str = "the connection to the source is broken after its switch to post-copy; the guest runs on the pages that are here, and \
                           waits for the others until the source returns";

fn lock<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unarmed(error: ram::FaultError) -> Error {
    Error::other("prepare the memory for a guest that runs before its pages have arrived", error)
}

fn unplaced(error: PagerError) -> Error {
    Error::other("place pages beside the running guest", error)
}
