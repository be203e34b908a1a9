//! What main, the acceptor and the channels' threads of a receiver share, and its end.

use std::{
    sync::{Arc, PoisonError, atomic::Ordering},
    time::Duration,
};

use super::{
    arrived::Arrived,
    entry::{Entry, Newcomer, Origin},
};
use crate::{
    channel::{Context, Stop, Stream, Wake, Watch, deadline},
    compress::Method,
    error::{Error, Result, Violation},
    options::ReceiveOptions,
    ram::PageSize,
    stats::{ChannelCounters, ChannelStats},
    sync_types::{AtomicBool, Condvar, Instant, JoinHandle, Mutex, MutexGuard, OnceLock},
    wire::{ChannelId, VmUuid},
};

/// What main, the acceptor and the channels' threads share.
pub(super) struct Shared {
    /// Never changes.
    pub(super) options: ReceiveOptions,
    /// Locked within; see `docs/develop/concurrency.md`.
    pub(super) stop: Stop,
    /// Of this side's connections.
    pub(super) context: Context,
    /// Set once, by main.
    pub(super) page_size: OnceLock<PageSize>,
    pub(super) arrived: OnceLock<Arrived>,
    /// Set by the options, or by the first packet with pages of any channel.
    pub(super) method: OnceLock<Method>,
    /// Set by main when no page may be written any more; with `filling`, see [`Shared::seal`].
    pub(super) sealed: AtomicBool,
    /// Each set by its channel while it writes pages.
    pub(super) filling: Box<[AtomicBool]>,
    /// Each written by its channel only.
    pub(super) counters: Box<[ChannelCounters]>,
    pub(super) state: Mutex<State>,
    /// Notified at every change of the state.
    pub(super) changed: Condvar,
}

#[derive(Default)]
pub(super) struct State {
    /// By id.
    pub(super) channels: Vec<Option<Entry>>,
    /// Channels that came before main.
    pub(super) early: Vec<Newcomer>,
    /// Main has come, or the caller has said what it says: channels are admitted.
    pub(super) opened: bool,
    /// Connections that were dropped because they came from another host than main.
    pub(super) foreign: u64,
    /// The UUID of this side, or of the first channel.
    pub(super) uuid: Option<VmUuid>,
    /// Connections that have not said yet what they are.
    pub(super) unidentified: Vec<Origin>,
    /// There is one connection only: what becomes of it becomes of the migration.
    pub(super) single: bool,
    pub(super) main: Option<Stream>,
    pub(super) main_taken: bool,
    pub(super) main_watch: Option<Watch>,
    /// The source is known to have channels.
    pub(super) has_channels: bool,
    /// The packet numbers of the source are known to have no gaps.
    pub(super) numbers_are_exact: bool,
    /// The number of channels that the source announced on main.
    pub(super) announced: Option<u8>,
    /// Sync points that main has passed.
    pub(super) released: u64,
    /// Main stands at the next one, and looks after those that it waits for. It does so to the end if that fails.
    pub(super) main_waits: bool,
    /// Connections accepted so far.
    pub(super) accepted: u64,
    /// Where main comes from, once it has come.
    pub(super) main_from: Option<Origin>,
    /// Connections that were dropped before the first sync point without having said what they are.
    pub(super) lost: Vec<Origin>,
    /// What wakes the acceptor, while there is one.
    pub(super) acceptor: Option<Arc<dyn Wake>>,
    pub(super) drain_asked: u64,
    pub(super) drain_done: u64,
    /// Everything has come: a copy of `Shared::sealed` under the lock.
    pub(super) sealed: bool,
    /// The source has closed main: the migration is about to fail.
    pub(super) source_closed: bool,
    pub(super) stopped: bool,
    pub(super) threads: Vec<JoinHandle<()>>,
}

pub(super) type Guard<'a> = MutexGuard<'a, State>;

impl Shared {
    pub(super) fn lock(&self) -> Guard<'_> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wait<'a>(&self, state: Guard<'a>) -> Guard<'a> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wait_timeout<'a>(&self, state: Guard<'a>, limit: Duration) -> Guard<'a> {
        self.changed.wait_timeout(state, limit).unwrap_or_else(PoisonError::into_inner).0
    }

    pub(super) fn is_sealed(&self) -> bool {
        self.sealed.load(Ordering::SeqCst)
    }

    /// Sequentially consistent, as is a channel's mark: a channel that begins to write either sees the seal and
    /// does not, or is seen here.
    pub(super) fn seal(&self) -> Result<()> {
        self.stop.check()?;
        self.sealed.store(true, Ordering::SeqCst);
        self.lock().sealed = true;
        self.changed.notify_all();
        let writing = self.filling.iter().position(|flag| flag.load(Ordering::SeqCst));
        if let Some(id) = writing.and_then(|id| u8::try_from(id).ok()) {
            let error = Error::from(Violation::PagesAfterEnd { pages: 1 }).on_channel(ChannelId(id));
            return Err(self.stop.fail(error));
        }
        Ok(())
    }

    /// Waits until the source has closed every channel, for `limit` at the most.
    pub(super) fn wait_ended(&self, limit: Duration) -> Guard<'_> {
        let end = deadline(limit);
        let mut state = self.lock();
        while state.channels.iter().flatten().any(|place| !place.ended) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || state.stopped {
                tracing::debug!("the source left channels open");
                break;
            }
            state = self.wait_timeout(state, left);
        }
        state
    }

    /// Waits until the source has closed every channel, and closes those that it leaves open.
    pub(super) fn drain_channels(&self) {
        let state = self.wait_ended(self.options.drain_timeout);
        let wakers: Vec<_> = state.channels.iter().flatten().filter_map(|place| place.wake.clone()).collect();
        drop(state);
        for waker in wakers {
            waker.wake();
        }
    }

    /// Keeps a thread to be joined, and lets go of those that have ended.
    pub(super) fn keep(&self, thread: JoinHandle<()>) {
        let mut state = self.lock();
        state.threads.retain(|thread| !thread.is_finished());
        state.threads.push(thread);
    }

    /// Joins all threads and lets go of all connections, whoever still looks at the counters.
    pub(super) fn join(&self) {
        loop {
            let Some(thread) = self.lock().threads.pop() else { break };
            // One that panicked has failed the migration itself.
            let _ = thread.join();
        }
        let mut state = self.lock();
        let wakes: Vec<_> = state.channels.iter_mut().flatten().map(|place| place.wake.take()).collect();
        let connections =
            (state.main.take(), state.main_watch.take(), wakes, std::mem::take(&mut state.early));
        drop(state);
        drop(connections);
    }

    pub(super) fn stats(&self) -> Vec<ChannelStats> {
        let state = self.lock();
        let here = (0..=u8::MAX).zip(&state.channels).filter(|(_, place)| place.is_some());
        here.map(|(id, _)| self.counters[usize::from(id)].snapshot(ChannelId(id))).collect()
    }
}

pub(super) struct WakeState(pub(super) Arc<Shared>);

impl Wake for WakeState {
    fn wake(&self) {
        self.0.lock().stopped = true;
        self.0.changed.notify_all();
    }
}
