//! Waits for a source: until its main connection is there, or until a limit ends the wait.
//!
//! A destination may wait for days, so without limits in the options the wait has none. `accept_timeout` limits the time,
//! `max_refused` the number of connections that were refused: a source that is refused by TLS would otherwise be waited for
//! in vain. When main has connected, refused connections do not count any more, because they may belong to others.

use super::shared::Shared;
use crate::{
    channel::{Stream, deadline},
    error::{Error, Result, Usage},
    sync_types::Instant,
};

impl Shared {
    /// See [`Receiver::wait_main`](super::Receiver::wait_main).
    pub(super) fn wait_main(&self) -> Result<Stream> {
        let options = &self.options;
        let accept = options.accept_timeout.map(|limit| (limit, deadline(limit)));
        let mut state = self.lock();
        let mut begun = None;
        loop {
            if let Some(main) = state.main.stream.take() {
                state.main.taken = true;
                return Ok(main);
            }
            if state.main.taken {
                return Err(Usage::UsedTwice.into());
            }
            if state.life.stopped {
                drop(state);
                self.stop.check()?;
                return Err(Error::Cancelled);
            }
            let left = accept.map(|(limit, end)| (limit, end.saturating_duration_since(Instant::now())));
            // Main that is being handed over has connected in time.
            if let (Some((limit, left)), None) = (left, &state.roster.main)
                && left.is_zero()
            {
                let refused = state.roster.refused;
                drop(state);
                return Err(self.stop.fail(Error::NoSource { limit, refused }));
            }
            let left = left.map(|(_, left)| left).filter(|left| !left.is_zero());
            if state.roster.connected() == 0 {
                begun = None;
                state = match left {
                    Some(left) => self.wait_timeout(state, left),
                    None => self.wait(state),
                };
                continue;
            }
            let begun = *begun.get_or_insert_with(Instant::now);
            let limit = options
                .stall_timeout
                .unwrap_or(options.greeting_timeout.saturating_add(options.channels_timeout));
            let stalled = self.context.stall_timer.left_of(limit, begun);
            if stalled.is_zero() {
                let what =
                    format!("{} channels have connected, but no main connection", state.roster.connected());
                drop(state);
                return Err(self.stop.fail(Error::Stalled { what, limit, hint: NO_MAIN }));
            }
            state = self.wait_timeout(state, left.map_or(stalled, |left| left.min(stalled)));
        }
    }

    /// Counts a connection that was refused because of `error`, and ends the wait for a source if there were too many.
    pub(super) fn refused(&self, error: Error) {
        let mut state = self.lock();
        if state.roster.main.is_some() {
            return;
        }
        state.roster.refused += 1;
        let refused = state.roster.refused;
        drop(state);
        if self.options.max_refused.is_some_and(|most| refused >= most) {
            self.stop.fail(Error::TooManyRefused { refused, last: Box::new(error) });
        }
    }
}

const NO_MAIN: &str = "the source may have ended before the migration began, or its main connection goes to another \
                       address; start the source again, and this destination too if it has ended";
