//! A guest that runs here while its RAM follows.

use std::{fmt, sync::Arc, thread::JoinHandle, time::Duration};

use multifd::{
    Error, Result,
    channel::Stop,
    live::RunState,
    ram::{PagerStats, RamBlocks, ThreadWaits},
};

use super::{
    field::Field,
    finished::{Done, Finished},
};

/// The guest is ours, and its RAM follows. While this value exists, an access to a page that has not come waits. When it is dropped
/// before all pages have arrived, those that are missing are poisoned: an access to one fails, and never finds zeros.
#[must_use = "if it is dropped, the guest loses the pages that have not come"]
pub struct Running {
    field: Arc<Field>,
    blocks: Arc<RamBlocks>,
    stop: Stop,
    guest: RunState,
    thread: Option<JoinHandle<Result<Done>>>,
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running").field("missing", &self.stats().missing).finish_non_exhaustive()
    }
}

impl Running {
    pub(super) fn new(
        field: Arc<Field>,
        blocks: Arc<RamBlocks>,
        stop: Stop,
        guest: RunState,
        thread: Option<JoinHandle<Result<Done>>>,
    ) -> Self {
        Self { field, blocks, stop, guest, thread }
    }

    /// The machine's blocks.
    pub fn blocks(&self) -> &Arc<RamBlocks> {
        &self.blocks
    }

    /// Whether the guest must run: a guest that was paused at the source stays paused.
    pub fn run_state(&self) -> RunState {
        self.guest
    }

    /// The pages that are missing, and how long threads of the guest have waited for those that came.
    pub fn stats(&self) -> PagerStats {
        self.field.stats()
    }

    /// How long each thread of the guest has waited so far, as far as the kernel names it.
    pub fn threads(&self) -> Vec<ThreadWaits> {
        self.field.threads()
    }

    /// Whether the connection is broken, and the source is waited for.
    pub fn is_paused(&self) -> bool {
        self.field.state.is_paused()
    }

    /// Waits until no more pages come: all have, or the source is gone for good. `false` if `limit` has passed before.
    pub fn wait(&self, limit: Option<Duration>) -> bool {
        self.field.state.wait_ended(limit)
    }

    /// Waits until all pages have arrived, and the source knows that. A source whose connection breaks at the very end returns to ask: it
    /// is waited for, for 10 s at most. The guest is complete meanwhile, and [`wait`](Self::wait) does not wait for that.
    ///
    /// # Errors
    /// Why no more pages come. The guest is ours nevertheless, and this value stays: until it is dropped, the guest's threads wait at the
    /// pages that are missing.
    pub fn finish(&mut self) -> Result<Finished> {
        let ended = self.thread.take().map(JoinHandle::join);
        match ended {
            Some(Ok(Ok(Done::Finished(finished)))) => Ok(finished),
            Some(Ok(Ok(Done::Complete(_)))) => Err(Error::Cancelled),
            Some(Ok(Err(error))) => Err(error),
            Some(Err(_)) => Err(Error::text("the thread that reads the main stream has panicked")),
            None => Err(self.stop.error().unwrap_or(Error::Cancelled)),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.stop.cancel();
            let _ = thread.join();
        }
        self.field.abandon();
    }
}
