//! A source that returns: over a new main connection, after it has switched to post-copy and its connection has broken.
//!
//! ```text
//! main: … ─ switch (expect_resumed) ─ breaks ─▶ wait_resumed ◀─ identify: a main connection without header
//! ```
//!
//! The source may return before this side has read its switch, which is in a buffer: the new connection waits until then. And it may
//! have noticed a broken network which this side has not. So when it returns, its earlier connections are shut down.

use std::{mem, sync::Arc, time::Duration};

use super::{
    entry::Origin,
    shared::{Resumed, Shared, State},
};
use crate::{
    channel::{Stream, Wake, deadline},
    error::{Error, Result, Usage},
    sync_types::Instant,
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
        drop(state);
        given_up.iter().for_each(|waker| waker.wake());
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

    /// See [`Receiver::wait_resumed`](super::Receiver::wait_resumed).
    pub(super) fn wait_resumed(&self, limit: Option<Duration>) -> Result<Stream> {
        let end = limit.map(|limit| (limit, deadline(limit)));
        let mut state = self.lock();
        if !state.source.may_resume {
            return Err(Usage::TooEarly("the switch to post-copy").into());
        }
        loop {
            if state.life.stopped {
                drop(state);
                self.stop.check()?;
                return Err(Error::Cancelled);
            }
            // Its pages are those of the earlier connections.
            if !state.source.preempt.is_read
                && let Some(Resumed { stream, watch, .. }) = state.main.resumed.take()
            {
                let earlier = state.main.watch.replace(watch);
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
        given_up
    }
}
