//! The connection of capability postcopy-preempt: bare records of RAM, in a thread of its own.
//!
//! ```text
//! source ─ record* ─ [EOS] ─▶ Preempt::read ─▶ Arrived        RUN on main ─▶ begin     END on main ─▶ settle
//! ```
//!
//! A source answers requests for pages on it. This side sends no requests, so a QEMU sends nothing here but the EOS of 7.2; other
//! sources may send pages. They belong to the guest that was stopped, so they are read only after the switch. The records have
//! their own current block. The source closes the connection after SHUT, and takes it for broken if it is closed earlier here.
//!
//! If the guest runs here, requests are sent, and pages come. A connection that ends without EOS before main does has lost pages that the
//! source takes for sent: it is broken, and so all connections are, and the source returns.

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use multifd::{
    Arrived, Fault, Receiver,
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
    /// The guest runs here, and has requested pages.
    early: bool,
    /// No more pages come on the connection.
    ended: bool,
    /// What has broken the connection: pages may be lost.
    broken: Option<multifd::Error>,
    /// Main has ended: no page may be written any more.
    sealed: bool,
    stopped: bool,
}

/// How the source has ended the connection.
enum End {
    Eos,
    /// Without EOS, as QEMU 10.0 does after SHUT.
    Closed,
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

    /// The guest of the source is stopped for good: its pages are read from now on. `early`: it runs here.
    pub(super) fn begin(&self, blocks: BlockList, order: Vec<BlockIndex>, early: bool) {
        let mut state = self.lock();
        (state.blocks, state.early) = (Some(Arc::new((blocks, order))), early);
        drop(state);
        self.changed.notify_all();
    }

    /// The source has returned over new connections. No earlier one is read any more.
    pub(super) fn resume(&self) {
        let mut state = self.lock();
        (state.ended, state.broken) = (false, None);
    }

    /// Main has ended: if pages are missing and there is a connection, waits until they have arrived, at most for `limit`. No
    /// page is written after it.
    ///
    /// # Errors
    /// If they are missing because the connection has broken: the source can return.
    pub(super) fn settle(
        self: &Arc<Self>,
        receiver: &Receiver,
        arrived: &Arrived,
        limit: Duration,
    ) -> multifd::Result<()> {
        let _watch = receiver.stop().watch(Arc::new(Stopped(self.clone())));
        let begun = Instant::now();
        let mut state = self.lock();
        while !state.ended
            && state.broken.is_none()
            && receiver.may_have_preempt()
            && !state.stopped
            && !arrived.is_complete()
        {
            let left = limit.saturating_sub(begun.elapsed());
            if left.is_zero() {
                break;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        if let Some(error) = state.broken.clone().filter(|_| !arrived.is_complete()) {
            return Err(error);
        }
        state.sealed = true;
        Ok(())
    }

    /// Reads the connection to its end.
    ///
    /// # Errors
    /// If a record is malformed or of another kind, or a page cannot be written; if the connection has broken while the guest runs here.
    pub(super) fn read(
        self: &Arc<Self>,
        arrived: &Arrived,
        stream: Stream,
        stop: &Stop,
    ) -> multifd::Result<()> {
        let _watch = stop.watch(Arc::new(Stopped(self.clone())));
        let mut r = Reader::new(stream, StreamKind::Preempt);
        let first = r.peek().map_err(failed);
        let read = first.and_then(|first| match (self.wait_begun(), first) {
            (Some(known), Some(_)) => self.records(arrived, &mut r, &known.0, &known.1),
            // A source that ends as in pre-copy closes it without a byte.
            (_, None) | (None, Some(_)) => Ok(End::Closed),
        });
        let mut state = self.lock();
        let read = match read {
            // Nothing was requested, so nothing is lost.
            Ok(End::Closed) if !state.early || state.sealed || state.stopped => Ok(()),
            Ok(End::Closed) => Err(failed(Error::Cut { at: r.here(), expected: "EOS" })),
            Ok(End::Eos) => Ok(()),
            Err(error) => Err(error),
        };
        // Other errors end the wait of main by the stop, so that main finds them and not only the missing pages.
        match &read {
            Ok(()) => state.ended = true,
            Err(error) if error.fault() == Fault::Connection => state.broken = Some(error.clone()),
            Err(_) => {}
        }
        drop(state);
        self.changed.notify_all();
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
    ) -> multifd::Result<End> {
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
        Ok(if ended { End::Eos } else { End::Closed })
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

fn failed(error: Error) -> multifd::Error {
    error.while_doing("the connection of postcopy-preempt")
}
