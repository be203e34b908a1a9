//! Which pages are not copied yet, what waits to be stored, and how it ended. Each change is one step under one lock.
//!
//! ```text
//! noting ── hold ──▶ left ── claim ──▶ being copied ──▶ queue ──▶ being stored ──▶ stored
//!                      └── hole                   └─────────────────▲
//! ```

use std::{
    collections::{BTreeMap, VecDeque},
    sync::PoisonError,
    time::{Duration, Instant},
};

use super::error::CopierError;
use crate::{
    PageRun, Walk,
    sync_types::{Condvar, Mutex, MutexGuard},
};

#[derive(Default)]
pub(super) struct Pages {
    state: Mutex<State>,
    /// For threads that copy: there is something to do, or everything is stored. A writer is served faster if nobody else wakes.
    work: Condvar,
    /// For threads for faults: there is room in the queue.
    room: Condvar,
    /// For all others: everything has ended, the memory is disarmed, a thread has ended.
    over: Condvar,
}

#[derive(Default)]
struct State {
    /// What is not claimed yet. `None` before the hold.
    walk: Option<Walk>,
    /// Whether holes were skipped, so that the walk can begin.
    is_ready: bool,
    /// Whether the walk has nothing more.
    is_claimed: bool,
    /// Threads with claims whose pages are not in a buffer yet, or were not queued or stored.
    copying: usize,
    queue: VecDeque<Piece>,
    queued: u64,
    /// Buffers of pages that were stored, for the next ones.
    spare: Vec<Vec<u8>>,
    /// Since when each store runs.
    stores: BTreeMap<u64, Instant>,
    next: u64,
    threads: usize,
    is_ended: bool,
    is_disarmed: bool,
    error: Option<CopierError>,
}

/// Pages in a buffer.
pub(super) struct Piece {
    pub(super) run: PageRun,
    pub(super) bytes: Vec<u8>,
}

/// What is to be done about a write.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// Note it and let it through: nothing is held yet.
    Note,
    /// Copy the page, which is claimed now; then let it through.
    Copy,
    /// Somebody else has claimed it. It must be in a buffer before the write is let through.
    Claimed,
    Ended,
}

/// What a thread that copies does next.
pub(super) enum Job {
    /// Store these pages.
    Store(u64, Piece),
    /// Claim pages, and copy them.
    Walk,
    /// Everything is stored.
    Complete,
    Ended,
}

impl Pages {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on, pages are copied.
    pub(super) fn hold(&self, walk: Walk) {
        self.lock().walk = Some(walk);
    }

    /// The walk may begin.
    pub(super) fn ready(&self) {
        self.lock().is_ready = true;
        self.work.notify_all();
    }

    /// Somebody wants to write to this host page.
    pub(super) fn write(&self, run: PageRun) -> Answer {
        let mut state = self.lock();
        if state.is_ended {
            return Answer::Ended;
        }
        match state.walk.as_mut().map(|walk| walk.claim(run)) {
            None => Answer::Note,
            Some(false) => Answer::Claimed,
            Some(true) => {
                state.copying += 1;
                Answer::Copy
            }
        }
    }

    /// Claims the next pages. A thread that has claimed some calls [`copied`](Self::copied) when they are stored.
    pub(super) fn claim(&self, most: u64, is_first: bool) -> Option<PageRun> {
        let mut state = self.lock();
        let run = state.walk.as_mut()?.next_any(most);
        match run {
            Some(_) => state.copying += usize::from(is_first),
            None => state.is_claimed = true,
        }
        run
    }

    /// Claims host pages that are zero, which are not copied. Returns how many pages of the machine were not claimed before.
    pub(super) fn skip(&self, host_pages: impl Iterator<Item = PageRun>) -> u64 {
        let mut state = self.lock();
        let Some(walk) = state.walk.as_mut() else { return 0 };
        host_pages.filter(|run| walk.claim(*run)).map(|run| run.count).sum()
    }

    /// The first of these host pages that was not claimed yet. Its contents are lost: it is claimed for good, so that the copy never
    /// counts as complete, also if another thread is faster than the error.
    pub(super) fn claim_lost(&self, mut host_pages: impl Iterator<Item = PageRun>) -> Option<PageRun> {
        let mut state = self.lock();
        let walk = state.walk.as_mut()?;
        let lost = host_pages.find(|run| walk.claim(*run))?;
        state.copying += 1;
        Some(lost)
    }

    /// Whether pages are held.
    pub(super) fn is_held(&self) -> bool {
        self.lock().walk.is_some()
    }

    /// A buffer, with any contents.
    pub(super) fn buffer(&self) -> Vec<u8> {
        self.lock().spare.pop().unwrap_or_default()
    }

    /// Puts pages that were copied into the queue. Waits while more than `ahead` bytes are in it.
    pub(super) fn queue(&self, piece: Piece, ahead: u64) {
        let len = piece.bytes.len() as u64;
        let full = |state: &mut State| {
            !state.is_ended && !state.queue.is_empty() && state.queued.saturating_add(len) > ahead
        };
        let state = self.lock();
        let mut state = self.room.wait_while(state, full).unwrap_or_else(PoisonError::into_inner);
        state.copying -= 1;
        if !state.is_ended {
            state.queued += len;
            state.queue.push_back(piece);
        }
        drop(state);
        self.work.notify_one();
    }

    /// The next job of a thread that copies. Waits for one.
    pub(super) fn job(&self) -> Job {
        let idle = |state: &mut State| {
            let is_walking = state.is_ready && !state.is_claimed;
            !state.is_ended && state.queue.is_empty() && !is_walking && !state.is_complete()
        };
        let state = self.lock();
        let mut state = self.work.wait_while(state, idle).unwrap_or_else(PoisonError::into_inner);
        if state.is_ended {
            return Job::Ended;
        }
        if let Some(piece) = state.queue.pop_front() {
            state.queued -= piece.bytes.len() as u64;
            let number = state.begin();
            drop(state);
            self.room.notify_all();
            return Job::Store(number, piece);
        }
        if state.is_complete() { Job::Complete } else { Job::Walk }
    }

    /// Pages that were copied are being stored. Returns the number of the store.
    pub(super) fn store(&self) -> u64 {
        self.lock().begin()
    }

    /// A store has ended. Its buffer may be used again. The thread asks for its next job, and so finds out whether everything is stored.
    pub(super) fn stored(&self, number: u64, buffer: Option<Vec<u8>>) {
        let mut state = self.lock();
        state.stores.remove(&number);
        if state.spare.len() < SPARE {
            state.spare.extend(buffer);
        }
    }

    /// All pages that a thread has claimed are stored. It asks for its next job then.
    pub(super) fn copied(&self) {
        self.lock().copying -= 1;
    }

    /// Whether a store takes longer than this.
    pub(super) fn is_silent(&self, limit: Duration) -> bool {
        self.lock().stores.values().any(|since| since.elapsed() > limit)
    }

    /// Waits for a time. Returns whether everything has ended.
    pub(super) fn pause(&self, time: Duration) -> bool {
        let state = self.over.wait_timeout_while(self.lock(), time, |state| !state.is_ended);
        state.unwrap_or_else(PoisonError::into_inner).0.is_ended
    }

    /// The first end. Later ones change nothing, and get `false`.
    pub(super) fn end(&self, error: Option<CopierError>) -> bool {
        let mut state = self.lock();
        if state.is_ended {
            if let Some(error) = error {
                tracing::debug!(%error, "after the end of a copier");
            }
            return false;
        }
        state.is_ended = true;
        state.error = error;
        state.queue.clear();
        drop(state);
        self.work.notify_all();
        self.room.notify_all();
        self.over.notify_all();
        true
    }

    pub(super) fn is_ended(&self) -> bool {
        self.lock().is_ended
    }

    pub(super) fn disarmed(&self) {
        self.lock().is_disarmed = true;
        self.over.notify_all();
    }

    /// Waits until it has ended and the memory is writable. Returns whether it has.
    pub(super) fn wait(&self, limit: Option<Duration>) -> bool {
        let is_running = |state: &mut State| !state.is_disarmed;
        let state = self.lock();
        match limit {
            None => {
                drop(self.over.wait_while(state, is_running));
                true
            }
            Some(limit) => {
                let state = self.over.wait_timeout_while(state, limit, is_running);
                state.unwrap_or_else(PoisonError::into_inner).0.is_disarmed
            }
        }
    }

    /// The reason of an early end, and whether it was one. The reason is returned once.
    pub(super) fn take_error(&self) -> Result<(), CopierError> {
        let mut state = self.lock();
        match state.error.take() {
            Some(error) => {
                state.error = Some(CopierError::Cancelled);
                Err(error)
            }
            None => Ok(()),
        }
    }

    /// The number of pages that are not claimed, or not stored.
    pub(super) fn left(&self) -> u64 {
        let state = self.lock();
        let queued = state.queue.iter().map(|piece| piece.run.count).sum::<u64>();
        state.walk.as_ref().map_or(0, Walk::left) + queued
    }

    pub(super) fn thread_starts(&self) {
        self.lock().threads += 1;
    }

    pub(super) fn thread_ends(&self) {
        self.lock().threads -= 1;
        self.over.notify_all();
    }

    /// Waits until all threads have ended. Returns whether they have.
    pub(super) fn wait_for_threads(&self, limit: Duration) -> bool {
        let state = self.over.wait_timeout_while(self.lock(), limit, |state| state.threads > 0);
        state.unwrap_or_else(PoisonError::into_inner).0.threads == 0
    }
}

impl State {
    fn begin(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        self.stores.insert(number, Instant::now());
        number
    }

    fn is_complete(&self) -> bool {
        self.is_claimed && self.copying == 0 && self.queue.is_empty() && self.stores.is_empty()
    }
}

/// The number of buffers that are kept.
const SPARE: usize = 4;
