//! The source's side of the channels.
//!
//! ```text
//!   collect            dispatch                worker, packets (a thread a channel)
//! queue(page) ─▶ Batch ═══swap═══▶ ready ──next──▶ multifdsend_0 ─▶ Link
//!                  ▲                  │     └────▶ multifdsend_1 ─▶ Link
//!                  └────── free ◀─────┴── done ──────────┘
//! sync() ──────────────── raises the sync number ──▶ one SYNC on every channel
//! ```
//!
//! A sender that is [set up into](Sender::set_up_into) other blocks has no links: its channels copy (`copies.rs`).
//!
//! The collector belongs to one thread, the caller's. Batches have one owner at a time. No lock is held while bytes
//! are written. This module knows nothing of the main stream.

mod collect;
mod copies;
mod dispatch;
mod file_pages;
#[cfg(shuttle)]
pub mod model;
mod packets;
mod shared;
mod worker;
mod zero_copy;

use std::sync::{Arc, atomic::AtomicU64};

pub use collect::Synced;
use copies::{Copies, Targets};
use dispatch::Dispatch;
use packets::Packets;
use shared::Shared;

use crate::{
    batch::Batch,
    channel::{Connect, Stop, Watch},
    compress::Method,
    error::{Error, Result, Usage},
    options::SendOptions,
    ram::RamBlocks,
    sendable,
    stats::{ChannelCounters, ChannelStats},
    sync_types::{Builder, JoinHandle},
    wire::ChannelId,
};

/// Sends pages over N channels: the data plane of one outgoing migration.
///
/// Made with [`new`](Sender::new), connected once with [`set_up`](Sender::set_up), or given other blocks to copy into
/// with [`set_up_into`](Sender::set_up_into), fed with [`queue`](Sender::queue) and [`sync`](Sender::sync), ended with
/// [`finish`](Sender::finish). Dropped before, it cancels the migration and joins its threads.
#[derive(Debug)]
pub struct Sender {
    options: SendOptions,
    blocks: Arc<RamBlocks>,
    stop: Stop,
    hand: Batch,
    /// Of channels that copy instead of sending.
    targets: Option<Arc<Targets>>,
    shared: Option<Arc<Shared>>,
    threads: Vec<JoinHandle<()>>,
    /// Has the channels and the collector woken at the stop, for as long as the sender lives.
    watch: Option<Watch>,
}

impl Sender {
    /// A sender for `blocks`, not connected yet. `stop` ends it together with the rest of the migration.
    ///
    /// # Errors
    /// [`Usage`] if the options contradict each other, or a block ends inside a page: the wire carries whole pages, so its last bytes would be lost.
    pub fn new(options: SendOptions, blocks: Arc<RamBlocks>, stop: Stop) -> Result<Self> {
        options.check()?;
        sendable::check_whole_pages(&blocks)?;
        let hand = Batch::new(blocks.page_size());
        Ok(Self {
            options,
            blocks,
            stop,
            hand,
            targets: None,
            shared: None,
            threads: Vec::new(),
            watch: None,
        })
    }

    /// Starts the channels' threads, each of which connects. Returns at once; a connect that fails stops the
    /// migration. The main connection must be established before.
    ///
    /// # Errors
    /// [`Usage::UsedTwice`] the second time; [`Usage::SingleConnection`] if the destination takes one connection only;
    /// [`Usage::MayShrink`] if pages are to be packed and the memory of a block is a file that somebody
    /// [may cut shorter](crate::ram::Mapping::may_shrink); the system's error if it refuses a thread.
    ///
    /// **Warning:** TLS copies pages as well, and whether a connector encrypts is not known here: give it blocks that cannot
    /// shrink, or [`Memory::MappedRam`](crate::ram::Memory::MappedRam).
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
        self.start(dispatch, move |id, shared| {
            worker::run(id, shared, || Packets::connect(id, shared, &options, &*connector, &locked));
        })
    }

    /// Instead of [`set_up`](Sender::set_up): the channels connect to nobody, and copy each page to its place in
    /// `target`, blocks of the same names and lengths. Of each two blocks of one name one is in memory and the other in a
    /// file: this is how RAM is captured into a file, and restored out of it. A page goes straight between the two, by one
    /// call of the system for a run of neighbours, past the page cache where the block in the file
    /// [has a way](crate::ram::Places::past_cache). A page that is zero is [cleared](crate::ram::RamBlock::clear) in
    /// `target`. Everything else is as over connections; a cancel waits for the calls under way, of up to 8 MiB each.
    ///
    /// # Errors
    /// [`Usage::UsedTwice`] the second time; [`Usage::ForConnections`] if compression or `zero-copy-send` is on;
    /// [`Usage::OtherBlocks`] if the blocks do not fit; the system's error if it refuses a thread.
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

    /// Starts the channels' threads, each of which lives as `run` says.
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

    /// The blocks that it sends.
    pub fn blocks(&self) -> &Arc<RamBlocks> {
        &self.blocks
    }

    /// What stops it.
    pub fn stop(&self) -> &Stop {
        &self.stop
    }

    /// What each channel has carried so far; exact after a [`sync`](Sender::sync) and at the end.
    pub fn stats(&self) -> Vec<ChannelStats> {
        self.counters().stats()
    }

    /// The same counters for another thread to read, a progress display say.
    pub fn counters(&self) -> SendCounters {
        SendCounters(self.shared.clone())
    }

    /// Ends well: the destination has said that it has everything. Closes the channels and joins their threads.
    ///
    /// # Errors
    /// The error that stopped the migration before; [`Usage::Unsynced`] if pages were queued after the last
    /// [`sync`](Sender::sync), which stops it: they may not have left.
    pub fn finish(mut self) -> Result<Vec<ChannelStats>> {
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

    /// Joins the channels' threads, cancelling the migration if it has not ended. Harmless before
    /// [`set_up`](Sender::set_up) and when called again.
    pub fn clean_up(&mut self) {
        if self.shared.is_some() {
            tracing::debug!("multifd_send_terminate_threads");
            self.stop.cancel();
            self.join();
        }
    }

    fn join(&mut self) {
        for thread in self.threads.drain(..) {
            // One that panicked has failed the migration itself.
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
    /// What each channel has carried so far.
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
