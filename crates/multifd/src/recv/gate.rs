//! The channel sync on the destination's side: main and the channels wait for each other.
//!
//! A channel that has received its k-th SYNC waits here until main has reached sync point k; main waits until every channel
//! has received its k-th SYNC. So pages sent after a sync point are never written before pages sent ahead of it, on any
//! channel. A channel that has ended fails main's wait at once, because its SYNC can no longer arrive.

use std::time::Duration;

use super::{
    resumed::broken,
    shared::{Guard, Shared, State},
};
use crate::{
    channel::deadline,
    error::{Error, Result, Usage, Violation},
    options::ChannelCount,
    sync_types::Instant,
    wire::ChannelId,
};

impl Shared {
    /// A channel has received a SYNC: it waits until main has reached the same sync point. Additional SYNCs at the end of a
    /// migration do not wait.
    ///
    /// `packets` is the number of packets up to this SYNC, and `greatest` their greatest packet number.
    pub(super) fn reach(&self, id: ChannelId, number: u64, packets: u64, greatest: u64) -> Result<()> {
        let mut state = self.lock();
        let Some(place) = state.roster.place(id, number) else { return Ok(()) };
        place.reached += 1;
        (place.packets, place.greatest) = (packets, Some(greatest));
        let reached = place.reached;
        self.changed.notify_all();
        tracing::trace!(channel = id.0, point = reached, "multifd_recv_sync");
        let begun = Instant::now();
        while state.gate.released < reached
            && !state.life.sealed
            && !state.life.source_closed
            && !state.life.stopped
            && !state.source.is_broken
            && !state.roster.is_lost(id)
        {
            state = if state.gate.main_waits {
                // Main has the time limit, because it knows the missing channel.
                self.wait(state)
            } else {
                self.wait_moving(state, begun, |stalled| {
                    stalled.pending(format!("main has not reached sync point {reached}")).on_channel(id)
                })?
            };
        }
        let is_lost = state.roster.is_lost(id);
        drop(state);
        self.stop.check()?;
        // What it has after its SYNC must not be read before main has passed the point.
        if is_lost { Err(broken()) } else { Ok(()) }
    }

    /// Main has reached its next sync point: it waits until every channel has received its SYNC.
    pub(super) fn sync(&self) -> Result<()> {
        // A channel that connects after the second point is refused, so it is not waited for.
        let (may_grow, opened) = {
            let mut state = self.lock();
            state.gate.main_waits = true;
            (state.gate.released < 2, self.open(&mut state))
        };
        self.finish_opening(opened)?;
        if may_grow {
            self.drain_listener()?;
        }
        let mut state = self.lock();
        let point = state.gate.released + 1;
        if may_grow {
            state = self.wait_for_channels(state)?;
        }
        let begun = Instant::now();
        let end = deadline(self.options.channels_timeout);
        loop {
            if state.life.stopped {
                drop(state);
                return self.stop.check();
            }
            if state.source.is_broken {
                return Err(broken());
            }
            // A channel may have been left over from an earlier source, and have ended.
            if may_grow && self.missing(&state).is_some() {
                state = self.wait_for_channels(state)?;
                continue;
            }
            let mut missing = None;
            for (id, place) in (0..=u8::MAX).map(ChannelId).zip(&state.roster.channels) {
                let Some(place) = place else { continue };
                if place.lost.is_some() {
                    // Its thread may still write what it has received.
                    missing = missing.or(Some(id).filter(|_| !place.ended));
                    continue;
                }
                if place.reached >= point {
                    continue;
                }
                if place.ended {
                    let found = place.reached;
                    drop(state);
                    let early = Error::from(Violation::EndedEarly { expected: point, found });
                    return Err(self.stop.fail(early.on_channel(id)));
                }
                missing = missing.or(Some(id));
            }
            let Some(missing) = missing else {
                let exact = state.source.numbers_are_exact;
                let Some(error) = state.roster.missing_packets(point).filter(|_| exact) else { break };
                let left = end.saturating_duration_since(Instant::now());
                if may_grow && !left.is_zero() {
                    // They were sent on a channel that has not connected yet.
                    state = self.wait_timeout(state, left);
                    continue;
                }
                drop(state);
                return Err(self.stop.fail(error));
            };
            if state.may_lose_silent(point) {
                state = self.wait_or_lose(state, point, begun);
                continue;
            }
            state = self.wait_moving(state, begun, |stalled| {
                let what = format!("no SYNC packet has arrived for sync point {point}");
                stalled.pending(what).on_channel(missing)
            })?;
        }
        state.gate.released = point;
        state.gate.main_waits = false;
        self.changed.notify_all();
        tracing::debug!(point, "multifd_recv_sync_main");
        Ok(())
    }

    /// The source has announced its number of channels.
    pub(super) fn expect_channels(&self, announced: u8) -> Result<()> {
        let mut state = self.lock();
        if state.source.announced.is_some_and(|before| before != announced) || state.gate.released > 0 {
            return Err(Usage::UsedTwice.into());
        }
        if let ChannelCount::Exact(expected) = self.options.channels
            && expected != announced
        {
            drop(state);
            return Err(self.stop.fail(Violation::AnnouncedChannels { expected, announced }.into()));
        }
        state.source.announced = Some(announced);
        let beyond = (0..=u8::MAX)
            .zip(&state.roster.channels)
            .skip(announced.into())
            .find(|(_, place)| place.is_some());
        let error =
            beyond.map(|(id, _)| Violation::ChannelId { id: ChannelId(id), channels: announced.into() });
        let opened = self.open(&mut state);
        drop(state);
        match error {
            Some(error) => Err(self.stop.fail(error.into())),
            None => self.finish_opening(opened),
        }
    }

    /// The expected number of channels, as far as it is known.
    pub(super) fn expected(&self, state: &State) -> ChannelCount {
        match (self.options.channels, state.source.announced) {
            (ChannelCount::Auto, Some(announced)) => ChannelCount::Exact(announced),
            (given, _) => given,
        }
    }

    /// Waits for a change, in a wait that began at `begun`, but no longer than the stall timeout.
    pub(super) fn wait_moving<'a>(
        &'a self,
        state: Guard<'a>,
        begun: Instant,
        stalled: impl FnOnce(Stalled) -> Error,
    ) -> Result<Guard<'a>> {
        let Some(left) = self.context.stall_timer.left(begun) else { return Ok(self.wait(state)) };
        if !left.is_zero() {
            return Ok(self.wait_timeout(state, left));
        }
        drop(state);
        Err(self.stop.fail(stalled(Stalled(self.options.stall_timeout.unwrap_or_default()))))
    }

    /// Waits before the first sync points for the channels that belong to this migration. A source connects all channels
    /// before it sends a sync point, but the network may deliver main's bytes first. An unidentified connection may be one
    /// of these channels. If all expected channels are connected, an unidentified connection from main's host may be an
    /// additional one, which is an error.
    fn wait_for_channels<'a>(&'a self, mut state: Guard<'a>) -> Result<Guard<'a>> {
        let limit = self.options.channels_timeout;
        let end = deadline(limit);
        // A channel says at once what it is. What is silent for longer is the connection of postcopy-preempt, if there may be one:
        // no QEMU that opens it this early has channels as well.
        let may_preempt = state.source.preempt.may_come && !state.source.has_channels;
        let end_of_unidentified = if may_preempt { deadline(SPEAKS_WITHIN.min(limit)) } else { end };
        loop {
            if state.life.stopped {
                drop(state);
                self.stop.check()?;
                return Err(Error::Cancelled);
            }
            if state.source.is_broken {
                return Err(broken());
            }
            if let Some(error) = self.missed(&state) {
                drop(state);
                return Err(self.stop.fail(error));
            }
            let missing = self.missing(&state);
            let end = if missing.is_none() { end_of_unidentified } else { end };
            let left = end.saturating_duration_since(Instant::now());
            if missing.is_none() && (!self.has_unidentified(&state) || left.is_zero()) {
                tracing::debug!(channels = state.roster.count(), "multifd_recv_all_channels");
                return Ok(state);
            }
            if let Some(missing) = missing.filter(|_| left.is_zero()) {
                let error = self.count_error(&state, missing);
                drop(state);
                return Err(self.stop.fail(error));
            }
            state = self.wait_timeout(state, left);
        }
    }

    /// The first channel of this migration that is missing.
    fn missing(&self, state: &State) -> Option<ChannelId> {
        state.roster.missing(self.expected(state), state.source.has_channels)
    }

    /// Whether an unidentified connection may be a channel.
    fn has_unidentified(&self, state: &State) -> bool {
        let mut unidentified = state.roster.unidentified.iter().map(|entry| &entry.origin);
        match self.expected(state) {
            // It may be the connection of postcopy-preempt, which is silent, and no channel is missing.
            ChannelCount::Exact(_) if state.source.preempt.may_come => false,
            ChannelCount::Exact(_) => unidentified.any(|origin| self.may_be_missed(state, origin)),
            ChannelCount::Auto => unidentified.any(|origin| self.may_belong(state, origin)),
        }
    }

    /// The error if not all channels have connected in time.
    fn count_error(&self, state: &State, missing: ChannelId) -> Error {
        let found = state.roster.count();
        let error = Error::from(match (self.options.channels, state.source.announced) {
            (ChannelCount::Exact(expected), _) => {
                Violation::ChannelCount { expected: expected.into(), found }
            }
            (ChannelCount::Auto, Some(announced)) => {
                Violation::TooFewChannels { announced: announced.into(), found }
            }
            (ChannelCount::Auto, None) if found == 0 => Violation::NoChannels,
            (ChannelCount::Auto, None) => Violation::ChannelMissing { missing, channels: found },
        });
        match state.roster.foreign {
            0 => error,
            foreign => error.at(format_args!(
                "{foreign} connections of channels from other hosts than main were dropped (see channels-from)"
            )),
        }
    }
}

/// The time in which a channel says what it is, where nothing else distinguishes it from a silent connection.
const SPEAKS_WITHIN: Duration = Duration::from_secs(1);

/// A source without progress for this time.
pub(super) struct Stalled(Duration);

impl Stalled {
    /// The error; `what` is what was pending.
    pub(super) fn pending(self, what: impl Into<String>) -> Error {
        Error::Stalled { what: what.into(), limit: self.0, hint: NO_PROGRESS }
    }
}

const NO_PROGRESS: &str = "the source or its network is stalled, and the guest is still at the source: check query-migrate and the log there";
