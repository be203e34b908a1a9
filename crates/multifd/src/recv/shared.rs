//! The state that main, the acceptor and the channels' threads of a receiver share, and the end of the receiver.

use std::{
    sync::{
        Arc, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{arrived::Arrived, entry::Origin, roster::Roster};
use crate::{
    channel::{Context, Stop, Stream, Wake, Watch, deadline},
    compress::{DecoderMemory, Method},
    error::{Error, Result, Violation},
    options::ReceiveOptions,
    ram::PageSize,
    stats::{ChannelCounters, ChannelStats},
    sync_types::{AtomicBool, Condvar, Instant, JoinHandle, Mutex, MutexGuard, OnceLock},
    wire::ChannelId,
};

/// The state that main, the acceptor and the channels' threads share.
pub(super) struct Shared {
    /// Never changed.
    pub(super) options: ReceiveOptions,
    /// Has its own lock; see `docs/develop/concurrency.md`.
    pub(super) stop: Stop,
    /// The context of this side's connections.
    pub(super) context: Context,
    /// Set once, by main.
    pub(super) page_size: OnceLock<PageSize>,
    pub(super) arrived: OnceLock<Arrived>,
    /// Set by the options, or by the first packet with pages of any channel.
    pub(super) method: OnceLock<Method>,
    /// The memory of the decoders of all channels.
    pub(super) decoder_memory: DecoderMemory,
    /// Set by main when no page may be written any more. Used together with `filling`, see [`Shared::seal`].
    pub(super) sealed: AtomicBool,
    /// Each is set by its channel while the channel writes pages.
    pub(super) filling: Box<[AtomicBool]>,
    /// Each is written by its channel only.
    pub(super) counters: Box<[ChannelCounters]>,
    /// How often the pages of a channel began again: the greatest number of all channels. Relaxed: it orders nothing.
    pub(super) restarts: AtomicU64,
    pub(super) state: Mutex<State>,
    /// Notified at every change of the state.
    pub(super) changed: Condvar,
}

/// The part of the state that changes, under one lock.
#[derive(Default)]
pub(super) struct State {
    pub(super) roster: Roster,
    pub(super) source: Source,
    pub(super) gate: Gate,
    pub(super) main: Main,
    pub(super) acceptor: Acceptor,
    pub(super) life: Life,
}

/// What the source has reported about itself.
#[derive(Default)]
pub(super) struct Source {
    /// The number of channels that it announced on main.
    pub(super) announced: Option<u8>,
    /// Its main stream has shown that it has channels.
    pub(super) has_channels: bool,
    /// Its packet numbers are known to have no gaps.
    pub(super) numbers_are_exact: bool,
    /// It has switched to post-copy, and may return over a new main connection.
    pub(super) may_resume: bool,
    /// One of its connections has broken since, so the others are shut down until it returns.
    pub(super) is_broken: bool,
    /// It asks at each sync point which channels are lost, and sends their pages again.
    pub(super) tolerant: bool,
    /// The pages on all channels up to its last question.
    pub(super) confirmed: u64,
    pub(super) preempt: Preempt,
}

/// The connection of capability postcopy-preempt.
#[derive(Default)]
pub(super) struct Preempt {
    /// The source may open one connection that does not say what it is.
    pub(super) may_come: bool,
    /// A connection that has been silent for long is probably that one.
    pub(super) has_silent: bool,
    /// Reads that connection; taken by its thread.
    pub(super) reader: Option<PreemptReader>,
    /// That thread has taken it, and has not ended.
    pub(super) is_read: bool,
    /// Shuts down that connection, and those that are probably it.
    pub(super) wakes: Vec<Arc<dyn Wake>>,
}

/// Reads the connection of capability postcopy-preempt.
pub(super) type PreemptReader = Box<dyn FnOnce(&Arrived, Stream) -> Result<()> + Send>;

/// Which sync points have been passed.
#[derive(Default)]
pub(super) struct Gate {
    /// Sync points that main has passed.
    pub(super) released: u64,
    /// Main waits at the next sync point, and supervises the channels that it waits for. Stays set if the wait fails.
    pub(super) main_waits: bool,
}

/// The main connection, until the caller takes it.
#[derive(Default)]
pub(super) struct Main {
    pub(super) stream: Option<Stream>,
    pub(super) taken: bool,
    pub(super) watch: Option<Watch>,
    /// Shuts the connection down.
    pub(super) wake: Option<Arc<dyn Wake>>,
    /// The connection with which the source has returned.
    pub(super) resumed: Option<Resumed>,
}

/// A main connection with which the source has returned.
pub(super) struct Resumed {
    pub(super) origin: Origin,
    pub(super) stream: Stream,
    pub(super) watch: Watch,
    /// Shuts the connection down.
    pub(super) wake: Arc<dyn Wake>,
}

/// The thread that accepts connections, and the number of requests to accept all that are waiting.
#[derive(Default)]
pub(super) struct Acceptor {
    /// Wakes the acceptor, while there is one.
    pub(super) waker: Option<Arc<dyn Wake>>,
    pub(super) drains_asked: u64,
    pub(super) drains_done: u64,
}

/// The progress of the migration towards its end.
#[derive(Default)]
pub(super) struct Life {
    /// All of RAM has arrived: a copy of `Shared::sealed` under the lock.
    pub(super) sealed: bool,
    /// The source has closed main: the migration is about to fail.
    pub(super) source_closed: bool,
    pub(super) stopped: bool,
    /// The threads of connections and channels. Those that have ended are removed from time to time.
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

    /// Sequentially consistent, as is a channel's mark: either a channel that begins to write sees the seal and does not
    /// write, or the seal sees the channel's mark.
    pub(super) fn seal(&self) -> Result<()> {
        self.stop.check()?;
        self.check_confirmed()?;
        self.sealed.store(true, Ordering::SeqCst);
        self.lock().life.sealed = true;
        self.changed.notify_all();
        let writing = self.filling.iter().position(|flag| flag.load(Ordering::SeqCst));
        if let Some(id) = writing.and_then(|id| u8::try_from(id).ok()) {
            let error = Error::from(Violation::PagesAfterEnd { pages: 1 }).on_channel(ChannelId(id));
            return Err(self.stop.fail(error));
        }
        Ok(())
    }

    /// Waits until the source has closed every channel, for `limit` at most.
    pub(super) fn wait_ended(&self, limit: Duration) -> Guard<'_> {
        let end = deadline(limit);
        let mut state = self.lock();
        while state.roster.channels.iter().flatten().any(|place| !place.ended) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || state.life.stopped {
                tracing::debug!("the source left channels open");
                break;
            }
            state = self.wait_timeout(state, left);
        }
        state
    }

    /// Waits until the source has closed every channel, and closes the remaining ones after the time limit.
    pub(super) fn drain_channels(&self) {
        let state = self.wait_ended(self.options.drain_timeout);
        let wakers: Vec<_> =
            state.roster.channels.iter().flatten().filter_map(|place| place.wake.clone()).collect();
        drop(state);
        for waker in wakers {
            waker.wake();
        }
    }

    /// Keeps a thread in order to join it, and drops those that have ended.
    pub(super) fn keep(&self, thread: JoinHandle<()>) {
        let mut state = self.lock();
        state.life.threads.retain(|thread| !thread.is_finished());
        state.life.threads.push(thread);
    }

    /// Joins all threads and closes all connections, even if another thread still reads the counters.
    pub(super) fn join(&self) {
        loop {
            let Some(thread) = self.lock().life.threads.pop() else { break };
            // One that panicked has failed the migration itself.
            let _ = thread.join();
        }
        let mut state = self.lock();
        let wakes: Vec<_> =
            state.roster.channels.iter_mut().flatten().map(|place| place.wake.take()).collect();
        let connections = (
            state.main.stream.take(),
            state.main.resumed.take(),
            state.main.watch.take(),
            wakes,
            std::mem::take(&mut state.roster.waiting),
        );
        drop(state);
        drop(connections);
    }

    pub(super) fn stats(&self) -> Vec<ChannelStats> {
        let state = self.lock();
        let ids = (0..=u8::MAX).map(ChannelId);
        let places = ids.zip(&self.counters).zip(&state.roster.channels);
        places.filter(|(_, place)| place.is_some()).map(|((id, counters), _)| counters.snapshot(id)).collect()
    }
}

pub(super) struct WakeState(pub(super) Arc<Shared>);

impl Wake for WakeState {
    fn wake(&self) {
        self.0.lock().life.stopped = true;
        self.0.changed.notify_all();
    }
}
