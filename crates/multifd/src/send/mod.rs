//! The source's side of the channels.
//!
//! ```text
//!   collect            dispatch                worker, packets (one thread per channel)
//! queue(page) ─▶ Batch ═══swap═══▶ ready ──next──▶ multifdsend_0 ─▶ Link
//!                  ▲                  │     └────▶ multifdsend_1 ─▶ Link
//!                  └────── free ◀─────┴── done ──────────┘
//! sync() ──────────────── increments the sync number ──▶ one SYNC on every channel
//! ```
//!
//! A sender that is [set up into](Sender::set_up_into) other blocks has no links: its channels copy (`copies.rs`).
//!
//! The collector runs in the caller's thread. Each batch has one owner at a time. No lock is held while bytes are
//! written. This module does not know the main stream.

mod collect;
mod copies;
mod dispatch;
mod file_pages;
mod given;
mod lost;
#[cfg(shuttle)]
pub mod model;
mod packets;
mod serve;
mod serving;
mod shared;
mod worker;
mod zero_copy;

use std::{
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

pub use collect::Synced;
use copies::{Copies, Targets};
use dispatch::Dispatch;
use packets::Packets;
use shared::Shared;

use crate::{
    batch::Batch,
    channel::{ClosedChannels, Connect, Stop, Watch},
    compress::Method,
    error::{Error, Result, Usage},
    options::SendOptions,
    ram::RamBlocks,
    sendable,
    stats::{ChannelCounters, ChannelStats},
    sync_types::{Builder, JoinHandle, OnceLock},
    wire::ChannelId,
};

/// Sends pages over N channels: the data plane of one outgoing migration.
///
/// Create it with [`new`](Sender::new). Connect it once with [`set_up`](Sender::set_up), or give it other blocks to
/// copy into with [`set_up_into`](Sender::set_up_into). Then call [`queue`](Sender::queue) and [`sync`](Sender::sync),
/// and at the end [`finish`](Sender::finish). If it is dropped before that, it cancels the migration and joins its
/// threads.
#[derive(Debug)]
pub struct Sender {
    options: SendOptions,
    blocks: Arc<RamBlocks>,
    stop: Stop,
    hand: Batch,
    /// The targets of channels that copy instead of sending.
    targets: Option<Arc<Targets>>,
    shared: Option<Arc<Shared>>,
    threads: Vec<JoinHandle<()>>,
    /// Fails the stop if the destination closes a channel before all of RAM has been sent.
    closed: Option<ClosedChannels>,
    /// Wakes the channels and the collector at the stop, as long as the sender exists.
    watch: Option<Watch>,
}

impl Sender {
    /// Creates a sender for `blocks`, not connected yet. `stop` ends it together with the rest of the migration.
    ///
    /// # Errors
    /// [`Usage`] if the options contradict each other, `stop` belongs to another migration, or a block ends inside a page: the wire carries whole pages, so
    /// its last bytes would be lost.
    pub fn new(options: SendOptions, blocks: Arc<RamBlocks>, stop: Stop) -> Result<Self> {
        options.check()?;
        sendable::check_whole_pages(&blocks)?;
        stop.take()?;
        let hand = Batch::new(blocks.page_size());
        Ok(Self {
            options,
            blocks,
            stop,
            hand,
            targets: None,
            shared: None,
            threads: Vec::new(),
            closed: None,
            watch: None,
        })
    }

    /// Starts the channels' threads, each of which connects. Returns at once; a connect that fails stops the migration.
    /// The main connection must be established before.
    ///
    /// # Errors
    /// [`Usage::UsedTwice`] the second time; [`Usage::SingleConnection`] if the destination accepts only one
    /// connection; [`Usage::MayShrink`] if pages are to be compressed and the memory of a block is a file that another
    /// process [may truncate](crate::ram::Mapping::may_shrink); the system's error if it cannot start a thread.
    ///
    /// **Warning:** TLS copies pages as well, but this function does not know whether a connector encrypts. With TLS,
    /// use blocks that cannot shrink, or [`Memory::MappedRam`](crate::ram::Memory::MappedRam).
    pub fn set_up(&mut self, connector: Arc<dyn Connect>) -> Result<()> {
        if self.shared.is_some() {
            return Err(Usage::UsedTwice.into());
        }
        if connector.is_single() {
            return Err(Usage::SingleConnection(connector.target()).into());
        }
        if self.options.method != Method::None {
            sendable::check_may_be_copied(&self.blocks)?;
        }
        let (channels, page_size) = (self.options.channels, self.blocks.page_size());
        let dispatch = Dispatch::new(channels, page_size, self.options.zero_copy_send);
        let (options, locked) = (self.options.clone(), Arc::new(zero_copy::Shared::default()));
        let watched = self.closed.as_ref().map(ClosedChannels::watched);
        self.start(dispatch, move |id, shared| {
            worker::run(id, shared, || {
                Packets::connect(id, shared, &options, &*connector, &locked, watched.as_ref())
            });
        })
    }

    /// Starts channels that copy, instead of [`set_up`](Sender::set_up): they do not connect, and copy each page to its
    /// place in `target`, which has blocks of the same names and lengths. Of each two blocks with the same name, one is
    /// in memory and the other in a file: this is how RAM is captured into a file, and restored from it. A page goes
    /// directly between the two, with one system call per run of adjacent pages, with direct I/O if the block in the
    /// file [has it](crate::ram::Places::past_cache). A page that is zero is [cleared](crate::ram::RamBlock::clear) in
    /// `target`. Everything else works as over connections. A cancel waits for the pending calls, of up to 8 MiB each.
    ///
    /// # Errors
    /// [`Usage::UsedTwice`] the second time; [`Usage::ForConnections`] if compression or `zero-copy-send` is on;
    /// [`Usage::OtherBlocks`] if the blocks do not fit; the system's error if it cannot start a thread.
    pub fn set_up_into(&mut self, target: Arc<RamBlocks>) -> Result<()> {
        if self.shared.is_some() {
            return Err(Usage::UsedTwice.into());
        }
        if self.options.method != Method::None {
            return Err(Usage::ForConnections("multifd-compression").into());
        }
        if self.options.zero_copy_send {
            return Err(Usage::ForConnections("zero-copy-send").into());
        }
        let targets = Arc::new(Targets::new(&self.blocks, target)?);
        self.hand = Batch::with_room(targets.room());
        let dispatch = Dispatch::for_copies(self.options.channels, targets.room());
        self.targets = Some(targets.clone());
        self.start(dispatch, move |id, shared| {
            worker::run(id, shared, || Ok(Copies::begin(id, shared, &targets)));
        })
    }

    /// Starts the channels' threads; each of them executes `run`.
    fn start(
        &mut self,
        dispatch: Dispatch,
        run: impl Fn(ChannelId, &Shared) + Clone + Send + 'static,
    ) -> Result<()> {
        self.stop.check()?;
        let channels = self.options.channels;
        let shared = Arc::new(Shared {
            blocks: self.blocks.clone(),
            stop: self.stop.clone(),
            dispatch,
            given: OnceLock::new(),
            packet_num: AtomicU64::new(0),
            counters: std::iter::repeat_with(ChannelCounters::default).take(channels.into()).collect(),
        });
        self.watch = Some(self.stop.watch(Arc::new(WakeDispatch(shared.clone()))));
        self.shared = Some(shared.clone());
        for id in (0..channels).map(ChannelId) {
            let (shared, run) = (shared.clone(), run.clone());
            let thread = Builder::new()
                .name(format!("multifdsend_{id}"))
                .spawn(move || run(id, &shared))
                .map_err(|error| self.stop.fail(Error::io("start a channel's thread", error)))?;
            self.threads.push(thread);
        }
        Ok(())
    }

    /// Waits until every channel has connected and sent its initial packet.
    ///
    /// # Errors
    /// The error that stopped the migration, such as a connect that failed.
    pub fn wait_connected(&self) -> Result<()> {
        let shared = self.shared()?;
        shared.dispatch.wait_connected(&shared.stop)
    }

    /// The number of channels.
    pub fn channels(&self) -> u8 {
        self.options.channels
    }

    pub(crate) fn stall_timeout(&self) -> Option<Duration> {
        self.options.stall_timeout
    }

    /// The blocks that it sends.
    pub fn blocks(&self) -> &Arc<RamBlocks> {
        &self.blocks
    }

    /// The stop of the migration.
    pub fn stop(&self) -> &Stop {
        &self.stop
    }

    /// The counters of each channel. They are exact after a [`sync`](Sender::sync) and at the end.
    pub fn stats(&self) -> Vec<ChannelStats> {
        self.counters().stats()
    }

    /// The same counters, readable from another thread, such as a progress display.
    pub fn counters(&self) -> SendCounters {
        SendCounters(self.shared.clone())
    }

    /// Fails the migration as soon as the destination closes a channel, until [`all_sent`](Self::all_sent). Call it before
    /// [`set_up`](Self::set_up).
    ///
    /// # Errors
    /// If the system cannot start a thread.
    pub(crate) fn fail_when_closed(&mut self) -> Result<()> {
        let stop = self.stop.clone();
        // The channel's own thread, which knows more, has half of the time.
        let closed = ClosedChannels::start(2 * worker::GRACE, move |id, peer| {
            stop.fail(packets::closed(peer).on_channel(id));
        });
        self.closed = Some(closed.map_err(|error| Error::io("watch the channels", error))?);
        Ok(())
    }

    /// All of RAM has been sent, and the last [`sync`](Self::sync) made: the destination may close the channels from now on. Call it
    /// before the end of the main stream is sent. [`finish`](Self::finish) does it as well.
    pub fn all_sent(&mut self) {
        self.closed = None;
    }

    /// Ends the migration normally: the destination has confirmed that it has everything. Closes the channels and joins
    /// their threads.
    ///
    /// # Errors
    /// The error that stopped the migration before; [`Usage::Unsynced`] if pages were queued after the last
    /// [`sync`](Sender::sync): they may not have left, so this stops the migration.
    pub fn finish(mut self) -> Result<Vec<ChannelStats>> {
        self.all_sent();
        let handed_over = self.shared.as_ref().is_some_and(|shared| shared.dispatch.is_unsynced());
        if handed_over || !self.hand.is_empty() {
            self.stop.check()?;
            return Err(self.stop.fail(Usage::Unsynced.into()));
        }
        self.stop.finish();
        self.join();
        self.stop.check()?;
        Ok(self.stats())
    }

    /// Joins the channels' threads; cancels the migration if it has not ended. Does nothing before
    /// [`set_up`](Sender::set_up) and when called again.
    pub fn clean_up(&mut self) {
        if self.shared.is_some() {
            tracing::debug!("multifd_send_terminate_threads");
            self.stop.cancel();
            self.closed = None;
            self.join();
        }
    }

    fn join(&mut self) {
        for thread in self.threads.drain(..) {
            // A thread that panicked has failed the migration itself.
            let _ = thread.join();
        }
    }

    fn ready(&self) -> Result<()> {
        if self.shared.is_none() { Err(Usage::TooEarly("the sender").into()) } else { self.stop.check() }
    }

    fn shared(&self) -> Result<&Shared> {
        self.shared.as_deref().ok_or_else(|| Usage::TooEarly("the sender").into())
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.clean_up();
    }
}

/// Reads the counters of a [`Sender`] from any thread.
#[derive(Clone)]
pub struct SendCounters(Option<Arc<Shared>>);

impl std::fmt::Debug for SendCounters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("SendCounters").field(&self.stats()).finish()
    }
}

impl SendCounters {
    /// The counters of each channel.
    pub fn stats(&self) -> Vec<ChannelStats> {
        let counters = self.0.iter().flat_map(|shared| &shared.counters);
        (0..=u8::MAX).map(ChannelId).zip(counters).map(|(id, counters)| counters.snapshot(id)).collect()
    }
}

struct WakeDispatch(Arc<Shared>);

impl crate::channel::Wake for WakeDispatch {
    fn wake(&self) {
        self.0.dispatch.wake();
    }
}
