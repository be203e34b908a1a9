//! The connection of capability postcopy-preempt: bare records of RAM, in a thread of its own.
//!
//! ```text
//! source ─ record* ─ [EOS] ─▶ Preempt::read ─▶ Arrived        RUN on main ─▶ begin     END on main ─▶ settle
//! ```
//!
//! A source answers requests for pages on it. This side sends no requests, so a QEMU sends nothing here but the EOS of 7.2; other
//! sources may send pages. They belong to the guest that was stopped, so they are read only after the switch. The records have
//! their own current block. The source closes the connection after SHUT, and takes it for broken if it is closed earlier here.

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use multifd::{
    Arrived, Receiver,
    channel::{Stop, Stream, Wake},
};

use super::counts::MainPages;
use crate::{
    error::{Error, StreamKind, Violation},
    format::{BlockIndex, BlockList, CurrentBlock, Reader, Record},
};

/// What main and the thread of the connection share.
#[derive(Debug, Default)]
pub(super) struct Preempt {
    state: Mutex<State>,
    /// Notified at every change of the state, when the reader has read all that has arrived, and at the stop.
    changed: Condvar,
    // Relaxed: they order nothing.
    normal: AtomicU64,
    zero: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    /// The source's blocks, and for each of them the block that was made for it; from the switch on.
    blocks: Option<Arc<(BlockList, Vec<BlockIndex>)>>,
    /// No more pages come on the connection.
    ended: bool,
    /// Main has ended: no page may be written any more.
    sealed: bool,
    stopped: bool,
}

/// Wakes the waits at the stop.
struct Stopped(Arc<Preempt>);

impl Wake for Stopped {
    fn wake(&self) {
        self.0.lock().stopped = true;
        self.0.changed.notify_all();
    }
}

impl Preempt {
    /// The pages that arrived.
    pub(super) fn pages(&self) -> MainPages {
        MainPages { normal: self.normal.load(Ordering::Relaxed), zero: self.zero.load(Ordering::Relaxed) }
    }

    /// The guest of the source is stopped for good: its pages are read from now on.
    pub(super) fn begin(&self, blocks: BlockList, order: Vec<BlockIndex>) {
        self.lock().blocks = Some(Arc::new((blocks, order)));
        self.changed.notify_all();
    }

    /// The source has returned over new connections. No earlier one is read any more.
    pub(super) fn resume(&self) {
        self.lock().ended = false;
    }

    /// Main has ended: if pages are missing and there is a connection, waits until they have arrived, at most for `limit`. No
    /// page is written after it.
    pub(super) fn settle(self: &Arc<Self>, receiver: &Receiver, arrived: &Arrived, limit: Duration) {
        let _watch = receiver.stop().watch(Arc::new(Stopped(self.clone())));
        let begun = Instant::now();
        let mut state = self.lock();
        while !state.ended && receiver.may_have_preempt() && !state.stopped && !arrived.is_complete() {
            let left = limit.saturating_sub(begun.elapsed());
            if left.is_zero() {
                break;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.sealed = true;
    }

    /// Reads the connection to its end.
    ///
    /// # Errors
    /// If a record is malformed or of another kind, or a page cannot be written.
    pub(super) fn read(
        self: &Arc<Self>,
        arrived: &Arrived,
        stream: Stream,
        stop: &Stop,
    ) -> multifd::Result<()> {
        let _watch = stop.watch(Arc::new(Stopped(self.clone())));
        let failed = |error: Error| multifd::Error::other("the connection of postcopy-preempt", error);
        let mut r = Reader::new(stream, StreamKind::Preempt);
        // A source that ends as in pre-copy closes it without a byte.
        let read = match r.peek().map_err(failed)? {
            None => Ok(()),
            Some(_) => match self.wait_begun() {
                Some(known) => self.records(arrived, &mut r, &known.0, &known.1),
                None => Ok(()),
            },
        };
        // An error ends the wait of main by the stop, so that main finds it and not only the missing pages.
        if read.is_ok() {
            self.end();
        }
        read
    }

    fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    fn records(
        &self,
        arrived: &Arrived,
        r: &mut Reader<Stream>,
        blocks: &BlockList,
        order: &[BlockIndex],
    ) -> multifd::Result<()> {
        let failed = |error: Error| multifd::Error::other("the connection of postcopy-preempt", error);
        let mut current = CurrentBlock::default();
        let here = |block: BlockIndex| order.get(block.0).copied().unwrap_or(block);
        let mut ended = false;
        while r.peek().map_err(failed)?.is_some() {
            let at = r.here();
            let misplaced = |record, place| failed(Violation::Misplaced { record, place }.at(at));
            let record = Record::decode(r, blocks, &mut current).map_err(failed)?;
            match record {
                _ if ended => return Err(misplaced("a ram record", "after EOS on this connection")),
                Record::Zero(block, page) => {
                    // A page after the end of main is there already, because otherwise it would be missing. The lock is held
                    // meanwhile, so that none is written after `settle` has returned.
                    let state = self.lock();
                    if !state.sealed {
                        arrived.clear(here(block), page)?;
                        self.zero.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Record::Page(block, page) => {
                    let bytes = r.lend(blocks.page_size().bytes(), "a page").map_err(failed)?;
                    let state = self.lock();
                    if !state.sealed {
                        arrived.store(here(block), page, bytes)?;
                        self.normal.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Record::Eos => {
                    ended = true;
                    self.end();
                }
                Record::Xbzrle(..) => return Err(misplaced("XBZRLE", "after the switch to post-copy")),
                Record::MultifdFlush => return Err(misplaced("MULTIFD_FLUSH", "on this connection")),
            }
            if r.is_drained() {
                self.changed.notify_all();
            }
        }
        Ok(())
    }

    /// Waits for the switch; `None` if the migration ends before.
    fn wait_begun(&self) -> Option<Arc<(BlockList, Vec<BlockIndex>)>> {
        let mut state = self.lock();
        loop {
            if let Some(known) = &state.blocks {
                return Some(known.clone());
            }
            if state.stopped {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
