//! A source that returns: over a new main connection, after it has switched to post-copy and its connection has broken.
//!
//! ```text
//! main: … ─ switch (expect_resumed) ─ breaks ─▶ wait_resumed ◀─ identify: a main connection without header
//! ```
//!
//! If a channel breaks after the switch, all other connections are shut down as well, so that both sides find the same. The channels
//! that the source opens when it returns are new ones: everything about the earlier ones is forgotten then.
//!
//! The source may return before this side has read its switch, which is in a buffer: the new connection waits until then. And it may
//! have noticed a broken network which this side has not. So when it returns, its earlier connections are shut down.

use std::{
    io, mem,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use super::{
    entry::Origin,
    shared::{Gate, Resumed, Shared, State},
};
use crate::{
    channel::{Stream, Wake, deadline},
    error::{Error, Result, Usage, Violation},
    outcome::Fault,
    sync_types::Instant,
    wire::ChannelId,
};

impl Shared {
    /// Whether a connection may be the one with which the source returns.
    pub(super) fn may_resume(&self, origin: &Origin) -> bool {
        let state = self.lock();
        // A source that may switch says so before.
        (state.source.may_resume || state.source.preempt.may_come) && self.may_be_missed(&state, origin)
    }

    /// The source has switched to post-copy.
    pub(super) fn expect_resumed(&self) {
        let mut state = self.lock();
        state.source.may_resume = true;
        let given_up = state.give_up_earlier();
        // The source does not know of it, and sends pages over it.
        let is_broken = state.unreported().is_some() && !state.source.is_broken && !state.life.sealed;
        drop(state);
        given_up.iter().for_each(|waker| waker.wake());
        if is_broken {
            self.break_off();
        }
    }

    /// The source has returned. The newest connection counts: it has given the others up.
    pub(super) fn has_resumed(&self, resumed: Resumed) {
        tracing::debug!(peer = resumed.origin.peer, "the source has returned");
        let mut state = self.lock();
        let older = state.main.resumed.replace(resumed);
        let given_up = state.give_up_earlier();
        drop(state);
        drop(older);
        given_up.iter().for_each(|waker| waker.wake());
        self.changed.notify_all();
    }

    /// Whether a channel whose thread ends, with this error or without one, is only broken: the source may return. All connections
    /// are shut down then.
    pub(super) fn breaks_off(&self, id: ChannelId, number: u64, error: Option<&Error>) -> bool {
        let mut state = self.lock();
        if !state.source.may_resume || state.life.sealed || state.life.stopped {
            return false;
        }
        let given_up = state.source.is_broken || state.roster.place(id, number).is_none();
        let is_broken = match error {
            // Channels that are not used any more may be closed.
            None => self.arrived.get().is_some_and(|arrived| arrived.late().is_some()),
            Some(error) => is_broken(error),
        };
        if !given_up && !is_broken {
            return false;
        }
        drop(state);
        if !given_up {
            self.break_off();
        }
        true
    }

    /// Shuts all connections of the source down, but not those with which it has returned.
    pub(super) fn break_off(&self) {
        let mut state = self.lock();
        let mut wakes = state.broken_channels();
        if state.main.resumed.is_none() {
            wakes.extend(state.main.wake.clone());
            wakes.append(&mut state.source.preempt.wakes);
        }
        drop(state);
        self.changed.notify_all();
        wakes.iter().for_each(|waker| waker.wake());
    }

    /// See [`Receiver::wait_resumed`](super::Receiver::wait_resumed).
    pub(super) fn wait_resumed(&self, limit: Option<Duration>) -> Result<Stream> {
        let end = limit.map(|limit| (limit, deadline(limit)));
        if !self.lock().source.may_resume {
            return Err(Usage::TooEarly("the switch to post-copy").into());
        }
        // Main is broken, or is read no longer. After a stop it stays open, because the source is still informed over it.
        if !self.stop.is_stopped() {
            self.break_off();
        }
        let mut state = self.lock();
        loop {
            if state.life.stopped {
                drop(state);
                self.stop.check()?;
                return Err(Error::Cancelled);
            }
            // Its pages are those of the earlier connections.
            let ended = state.roster.channels.iter().flatten().all(|place| place.ended);
            if !state.source.preempt.is_read
                && ended
                && let Some(Resumed { stream, watch, .. }) = state.main.resumed.take()
            {
                let earlier = state.main.watch.replace(watch);
                state.source.is_broken = false;
                state.source.tolerant = false;
                // It may return when all of RAM is here. A page that comes again is placed beside what is there.
                state.life.sealed = false;
                self.sealed.store(false, Ordering::SeqCst);
                state.roster.channels.clear();
                state.roster.lost.clear();
                state.gate = Gate::default();
                drop(state);
                drop(earlier);
                return Ok(stream);
            }
            state = match end {
                None => self.wait(state),
                Some((limit, end)) => match end.saturating_duration_since(Instant::now()) {
                    left if left.is_zero() => {
                        return Err(Error::TimedOut { what: "the source did not resume".into(), limit });
                    }
                    left => self.wait_timeout(state, left),
                },
            };
        }
    }
}

/// The error of a connection that has broken.
pub(super) fn broken() -> Error {
    Error::io("wait for the channels", io::ErrorKind::ConnectionReset.into())
}

/// Whether this is an error of a connection, and not of what came over it.
pub(super) fn is_broken(error: &Error) -> bool {
    matches!(error.fault(), Fault::Connection | Fault::Stalled)
        || matches!(error.kind(), Error::Violation(Violation::Cut { .. }))
}

impl State {
    /// If the source has switched and returned, its earlier connections do not belong to it any more. The result shuts them down.
    #[must_use]
    fn give_up_earlier(&mut self) -> Vec<Arc<dyn Wake>> {
        let Some(resumed) = self.main.resumed.as_ref().filter(|_| self.source.may_resume) else {
            return Vec::new();
        };
        // From now on no earlier connection is the one of postcopy-preempt.
        self.roster.main = Some(resumed.origin.clone());
        let preempt = &mut self.source.preempt;
        preempt.reader = None;
        preempt.has_silent = false;
        let mut given_up = mem::take(&mut preempt.wakes);
        given_up.extend(self.main.wake.replace(resumed.wake.clone()));
        given_up.extend(self.broken_channels());
        given_up
    }

    /// The connections are broken: what shuts down the channels, but not those of a source that has returned.
    #[must_use]
    fn broken_channels(&mut self) -> Vec<Arc<dyn Wake>> {
        self.source.is_broken = true;
        let end = self.main.resumed.as_ref().map_or(u64::MAX, |resumed| resumed.origin.number);
        let earlier = self.roster.channels.iter().flatten().filter(|place| place.origin.number < end);
        earlier.filter_map(|place| place.wake.clone()).collect()
    }
}
