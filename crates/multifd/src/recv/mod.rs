//! The destination's side of the channels.
//!
//! ```text
//!    accept               (a thread for each channel) worker ─▶ decode ─▶ place
//! Listener ─▶ identify ─┬▶ multifdrecv_0: head ─▶ block, pages ─▶ guest RAM or file ─┐
//!                       ├▶ multifdrecv_1: head ─▶ …                                  ├─▶ gate
//!                       └▶ main stream ─▶ the caller ── sync() ──────────────────────┘
//! ```
//!
//! Every value from a peer is checked against a bound before it is used. This module knows only the first four bytes of the
//! main stream, which distinguish main from a channel.

#![warn(clippy::indexing_slicing)]

mod accept;
mod admit;
mod arrived;
mod crowd;
mod decode;
mod entry;
mod gate;
mod identify;
mod late;
mod lost;
#[cfg(shuttle)]
#[expect(clippy::indexing_slicing, reason = "a model fails by a panic")]
pub mod model;
mod packet_reader;
mod place;
mod resumed;
mod roster;
mod shared;
mod wait_main;
mod walk;
mod worker;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

pub use arrived::{Arrived, MayMiss};
pub use late::PlaceLate;
use roster::Roster;
use shared::{Shared, State, WakeState};

use crate::{
    channel::{Context, Link, Listen, Stop, Stream, Watch},
    compress::DecoderMemory,
    error::{Error, Result, Usage},
    options::{ChannelCount, ChannelsFrom, ReceiveOptions},
    ram::{self, Memory, PageSize, RamBlocks},
    stats::{ChannelCounters, ChannelStats},
    sync_types::{AtomicBool, Builder, Condvar, Mutex, OnceLock},
    wire::{ChannelId, VmUuid, limits},
};

/// Receives pages over N channels: the data plane of one incoming migration.
///
/// It gets connections from a [listener](Receiver::listen) or [one by one](Receiver::add), and returns the main connection
/// to the caller. The caller reports what the main stream contains: [page size](Receiver::set_page_size),
/// [blocks](Receiver::set_blocks), [sync points](Receiver::sync), the [end of RAM](Receiver::seal). A receiver that is
/// dropped before [`finish`](Receiver::finish) cancels the migration and joins its threads.
pub struct Receiver {
    shared: Arc<Shared>,
    /// Wakes all waits at the stop, as long as the receiver lives.
    watches: Vec<Watch>,
    stop_taken: Result<()>,
}

impl std::fmt::Debug for Receiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Receiver")
            .field("options", &self.shared.options)
            .field("stop", &self.shared.stop)
            .finish_non_exhaustive()
    }
}

impl Receiver {
    /// A receiver without connections. `stop` ends it together with the other parts of the migration. If `stop` belongs to
    /// another migration, [`listen`](Receiver::listen) and [`wait_main`](Receiver::wait_main) fail.
    pub fn new(options: ReceiveOptions, stop: Stop) -> Self {
        let stop_taken = stop.take();
        // The other migration must not end with this receiver.
        let stop = if stop_taken.is_ok() { stop } else { Stop::new() };
        let most = usize::from(options.channels.most());
        let uuid = options.uuid;
        let method = options.method.map_or_else(OnceLock::new, OnceLock::from);
        let shared = Arc::new(Shared {
            context: Context::new(&stop).stall_timeout(options.stall_timeout),
            decoder_memory: DecoderMemory::new(options.decompression_memory),
            options,
            stop: stop.clone(),
            page_size: OnceLock::new(),
            arrived: OnceLock::new(),
            method,
            sealed: AtomicBool::new(false),
            restarts: AtomicU64::new(0),
            filling: std::iter::repeat_with(AtomicBool::default).take(most).collect(),
            counters: std::iter::repeat_with(ChannelCounters::default).take(most).collect(),
            state: Mutex::new(State { roster: Roster { uuid, ..Roster::default() }, ..State::default() }),
            changed: Condvar::new(),
        });
        // First, so that a thread that is woken later finds the state stopped.
        let watches = vec![stop.watch(Arc::new(WakeState(shared.clone())))];
        Self { shared, watches, stop_taken }
    }

    /// Accepts connections from `listener` in a thread of its own, until the migration is over.
    ///
    /// # Errors
    /// [`Usage::UsedTwice`] the second time; [`Usage::StopTaken`]; [`Usage::SingleConnection`] if the listener accepts one
    /// connection only and channels are expected; [`Usage::ChannelsFrom`] if they may come from an empty list of hosts; the
    /// system's error if the thread cannot be started.
    pub fn listen(&mut self, listener: Box<dyn Listen>) -> Result<()> {
        self.stop_taken.clone()?;
        if self.shared.options.channels_from == ChannelsFrom::Hosts(Vec::new()) {
            return Err(Usage::ChannelsFrom { found: String::new() }.into());
        }
        if let (true, ChannelCount::Exact(1..)) = (listener.is_single(), self.shared.options.channels) {
            return Err(Usage::SingleConnection(listener.address()).into());
        }
        let waker = listener.waker();
        {
            let mut state = self.shared.lock();
            if state.acceptor.waker.is_some() {
                return Err(Usage::UsedTwice.into());
            }
            state.acceptor.waker = Some(waker.clone());
            state.roster.single = listener.is_single();
        }
        self.watches.push(self.shared.stop.watch(waker));
        let shared = self.shared.clone();
        // What the threads log belongs to the caller's span, which shows the migration if there are several.
        let span = tracing::Span::current();
        let thread = Builder::new()
            .name("multifdaccept".into())
            .spawn(move || {
                span.in_scope(|| accept::run(&shared, listener));
                shared.lock().acceptor.waker = None;
                shared.changed.notify_all();
            })
            .map_err(|error| self.shared.stop.fail(Error::io("start the acceptor's thread", error)))?;
        self.shared.keep(thread);
        Ok(())
    }

    /// The context for connections that the caller accepts and [adds](Receiver::add).
    pub fn context(&self) -> Context {
        self.shared.context.clone()
    }

    /// Adds one connection, main or channel, that the caller has accepted and created with this receiver's
    /// [context](Receiver::context).
    pub fn add(&self, link: Box<dyn Link>) {
        identify::identify_in_thread(&self.shared, link, self.context());
    }

    /// Waits for the main connection. Without a channel it waits for [`accept_timeout`](ReceiveOptions::accept_timeout), by
    /// default without limit, because a destination may wait for its source for days. When a channel has connected, main is
    /// also expected within `stall_timeout`; if this is off, within `greeting_timeout` and `channels_timeout` together.
    ///
    /// # Errors
    /// [`Error::NoSource`] and [`Error::Stalled`] if main does not connect in time; [`Error::TooManyRefused`] if
    /// [`max_refused`](ReceiveOptions::max_refused) connections were refused; the error that stopped the migration; [`Usage::UsedTwice`] the
    /// second time; [`Usage::StopTaken`].
    pub fn wait_main(&self) -> Result<Stream> {
        self.stop_taken.clone()?;
        self.shared.wait_main()
    }

    /// Sets the page size from the main stream's configuration. Channels wait for it.
    ///
    /// # Errors
    /// [`Usage::UsedTwice`] if a different one was set before.
    pub fn set_page_size(&self, page_size: PageSize) -> Result<()> {
        let mut state = self.shared.lock();
        if *self.shared.page_size.get_or_init(|| page_size) != page_size {
            return Err(Usage::UsedTwice.into());
        }
        let opened = self.shared.open(&mut state);
        drop(state);
        self.shared.finish_opening(opened)
    }

    /// Sets the number of channels that the source has announced, 0 if multifd is off. From then on [`ChannelCount::Auto`]
    /// means this number. Call it before the first sync point.
    ///
    /// # Errors
    /// [`Violation::AnnouncedChannels`](crate::error::Violation::AnnouncedChannels) if the options have [another
    /// number](ChannelCount::Exact), [`Violation::ChannelId`](crate::error::Violation::ChannelId) if a channel with a
    /// greater id has connected,
    /// [`Usage::UsedTwice`] if another number was announced before.
    pub fn expect_channels(&self, channels: u8) -> Result<()> {
        self.shared.expect_channels(channels)
    }

    /// Reports that the source has at least one channel, because its main stream shows it: a MULTIFD_FLUSH before the end
    /// of START. If the number of channels is unknown, the first sync points then wait for a channel.
    pub fn expect_any_channels(&self) {
        self.shared.lock().source.has_channels = true;
    }

    /// Reports that the source numbers its packets from 0 on without gaps, over all channels: QEMU 9.0 and later, and a
    /// source that announces its channels. Each sync point then checks that all packets have arrived.
    pub fn expect_exact_packet_nums(&self) {
        self.shared.lock().source.numbers_are_exact = true;
    }

    /// Reports that the source may open one more connection, after main and its channels, that does not say what it is:
    /// capability `postcopy-preempt`. QEMU 7.2 opens it together with main, and may send nothing on it until the end. `read`
    /// is called when the connection has delivered its first bytes, or has ended, in a thread of this receiver and with the
    /// blocks that were set. Its error fails the migration, unless that has ended, or the connection broke and the source [may
    /// return](Self::expect_resumed). The connection is shut down when the migration ends. Call it again after the source has
    /// [returned](Self::wait_resumed), because the source then opens this connection again.
    pub fn expect_preempt(&self, read: impl FnOnce(&Arrived, Stream) -> Result<()> + Send + 'static) {
        let mut state = self.shared.lock();
        state.source.preempt.may_come = true;
        state.source.preempt.reader = Some(Box::new(read));
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Whether the connection of `postcopy-preempt` may still deliver something: `read` of
    /// [`expect_preempt`](Self::expect_preempt) has not returned, or was not called although the connection may be there.
    pub fn may_have_preempt(&self) -> bool {
        let state = self.shared.lock();
        let mut others = state.roster.unidentified.iter().map(|entry| &entry.origin);
        let preempt = &state.source.preempt;
        let may_come = preempt.reader.is_some()
            && (preempt.has_silent || others.any(|origin| self.shared.may_be_missed(&state, origin)));
        may_come || preempt.is_read
    }

    /// Reports that the source has switched to post-copy, and that it may return over a new main connection when this one has
    /// broken. If it returns while this one seems to be intact, this one is shut down: the source has given it up.
    pub fn expect_resumed(&self) {
        self.shared.expect_resumed();
    }

    /// Waits until the source has returned over a new main connection, which begins with a request for the pages that have
    /// arrived. `limit`: how long it may take; `None` is no limit. The connection of `postcopy-preempt` is closed and no longer
    /// read when this returns.
    ///
    /// # Errors
    /// [`Error::TimedOut`], and the error that stopped the migration. [`Usage::TooEarly`] before
    /// [`expect_resumed`](Self::expect_resumed).
    pub fn wait_resumed(&self, limit: Option<Duration>) -> Result<Stream> {
        self.shared.wait_resumed(limit)
    }

    /// The source asks which channels are lost, at a sync point that was [passed](Self::sync): the reply must name the result. From now
    /// on, until the [switch to post-copy](Self::expect_resumed), a channel whose connection breaks is lost and no error, unless it is
    /// the last one: sync points do not wait for it, and the source sends its pages again.
    pub fn round(&self) -> Vec<ChannelId> {
        self.shared.round()
    }

    /// Reports that the source has lost a channel. Its connection is shut down, and the next sync point does not wait for its SYNC.
    ///
    /// # Errors
    /// [`Violation::LostChannel`](crate::error::Violation::LostChannel) if the source has not [asked](Self::round) before, there is no
    /// such channel, it was reported before, or it is the last one.
    pub fn lose(&self, channel: ChannelId) -> Result<()> {
        self.shared.lose(channel)
    }

    /// Sets the blocks that the source has announced. Pages are only written to these.
    ///
    /// # Errors
    /// [`Usage::UsedTwice`] the second time, [`Usage::ReadOnly`] if one is mapped for reading, [`MixedPageSizes`](ram::Error::MixedPageSizes) if they do not have the page size set.
    pub fn set_blocks(&self, blocks: Arc<RamBlocks>) -> Result<()> {
        let read_only = |memory: &Memory| matches!(memory, Memory::Mapped(mapping) if !mapping.is_writable());
        if let Some((_, block)) = blocks.iter().find(|(_, block)| read_only(block.memory())) {
            return Err(Usage::ReadOnly(block.name().clone()).into());
        }
        // Channels read the page size with the lock held: one that continues because of this call finds the blocks, too.
        let mut state = self.shared.lock();
        if !blocks.is_empty() {
            let expected = *self.shared.page_size.get_or_init(|| blocks.page_size());
            if expected != blocks.page_size() {
                return Err(ram::Error::MixedPageSizes(expected, blocks.page_size()).into());
            }
        }
        let arrived = Arrived::new(blocks);
        self.shared.arrived.set(arrived).map_err(|_| Error::from(Usage::UsedTwice))?;
        let opened = self.shared.open(&mut state);
        drop(state);
        self.shared.finish_opening(opened)
    }

    /// Main has reached its next sync point: waits until every channel has, then lets them all continue. The first sync
    /// points also wait until all channels are connected.
    ///
    /// # Errors
    /// [`Violation::EndedEarly`](crate::error::Violation::EndedEarly) if a channel has ended before this point,
    /// [`Violation::ChannelCount`](crate::error::Violation::ChannelCount),
    /// [`Violation::TooFewChannels`](crate::error::Violation::TooFewChannels) or
    /// [`Violation::NoChannels`](crate::error::Violation::NoChannels) if there are fewer channels than expected,
    /// [`Violation::MissingPackets`](crate::error::Violation::MissingPackets) if packets have not arrived, or the error
    /// that stopped the migration.
    pub fn sync(&self) -> Result<()> {
        self.shared.sync()
    }

    /// Main has reached the end of RAM: from now on no page is written.
    ///
    /// # Errors
    /// [`Violation::PagesAfterEnd`](crate::error::Violation::PagesAfterEnd) if a channel is still receiving pages, or the error that stopped the migration.
    pub fn seal(&self) -> Result<()> {
        self.shared.seal()
    }

    /// The blocks and which of their pages have arrived; `None` before [`set_blocks`](Receiver::set_blocks).
    pub fn arrived(&self) -> Option<&Arrived> {
        self.shared.arrived.get()
    }

    /// The number of channels that have connected so far.
    pub fn channels(&self) -> u16 {
        self.shared.lock().roster.connected()
    }

    /// The UUID in the channels' initial packets: nil for a machine without one, `None` before main and a channel have
    /// connected.
    pub fn uuid(&self) -> Option<VmUuid> {
        self.shared.lock().roster.uuid
    }

    /// The stop of the migration.
    pub fn stop(&self) -> &Stop {
        &self.shared.stop
    }

    /// The counters of each channel.
    pub fn stats(&self) -> Vec<ChannelStats> {
        self.shared.stats()
    }

    /// The same counters, for another thread, for example a progress display.
    pub fn counters(&self) -> RecvCounters {
        RecvCounters(self.shared.clone())
    }

    /// Whether a channel has received the head of a packet, and not all of its pages yet.
    pub fn has_open_packet(&self) -> bool {
        // Relaxed: it orders nothing. The caller asks after a time in which nothing has moved.
        self.shared.filling.iter().any(|flag| flag.load(Ordering::Relaxed))
    }

    /// Ends a successful migration, after the source was informed of the success. Waits for `drain_timeout` until the
    /// source has closed its channels, closes the others, and joins all threads.
    ///
    /// # Errors
    /// The error that stopped the migration before.
    pub fn finish(self) -> Result<Vec<ChannelStats>> {
        self.shared.seal()?;
        self.shared.drain_channels();
        self.shared.stop.finish();
        self.shared.join();
        self.shared.stop.check()?;
        Ok(self.shared.stats())
    }

    /// Fails the migration because the source has closed main. This waits until the source has closed its channels as well,
    /// for `limit` at most: channels that are reset before the source closes them can hang a QEMU. Returns the error to
    /// report: `error`, unless the migration had failed or was cancelled before.
    pub fn fail_with_source(&self, error: Error, limit: Duration) -> Error {
        self.shared.stop.expect(error.clone());
        // Channels that wait at a sync point are read to their end.
        self.shared.lock().life.source_closed = true;
        self.shared.changed.notify_all();
        drop(self.shared.wait_ended(limit));
        self.shared.stop.fail(error)
    }

    /// Joins all threads, and cancels the migration if it has not ended. A second call does nothing.
    pub fn clean_up(&mut self) {
        self.shared.stop.cancel();
        self.shared.join();
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.clean_up();
    }
}

/// Reads the counters of a [`Receiver`] from any thread.
#[derive(Clone)]
pub struct RecvCounters(Arc<Shared>);

impl std::fmt::Debug for RecvCounters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("RecvCounters").field(&self.stats()).finish()
    }
}

impl RecvCounters {
    /// The counters of each channel.
    pub fn stats(&self) -> Vec<ChannelStats> {
        self.0.stats()
    }

    /// How often the pages on the channels began again: the number of passes after the first one, as the channels show them.
    /// Passes of very few pages may be missed.
    pub fn restarts(&self) -> u64 {
        self.0.restarts.load(Ordering::Relaxed)
    }

    /// Whether the source's main connection has connected.
    pub fn has_main(&self) -> bool {
        self.0.lock().roster.main.is_some()
    }

    /// How many connections were refused before main connected: a TLS handshake that failed, a connection that is neither
    /// main nor a channel, or one that did not identify itself.
    pub fn refused(&self) -> u64 {
        self.0.lock().roster.refused
    }
}

const _: () = assert!(limits::CHANNELS == u8::MAX);
