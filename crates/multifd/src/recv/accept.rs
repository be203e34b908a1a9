//! The acceptor: it accepts connections until the migration is over. When main asks for it, it first accepts all that are
//! waiting.

use std::sync::Arc;

use super::{identify::identify_in_thread, shared::Shared};
use crate::{
    channel::{Listen, are_none_left, deadline},
    error::{Error, Result},
    sync_types::Instant,
};

/// The limit is not less than a listener's queue, so that many incoming connections do not delay main.
const DRAIN_MOST: usize = 1024;

/// The acceptor's thread: accepts connections until the migration is over.
pub(super) fn run(shared: &Arc<Shared>, mut listener: Box<dyn Listen>) {
    let _alarm = shared.stop.alarm("the acceptor's thread");
    loop {
        // Each connection has its own context. It counts for the stall timer when the connection is identified.
        let context = shared.context.of_stranger();
        match listener.accept(&context) {
            Ok(Some(link)) => identify_in_thread(shared, link, context),
            Ok(None) => {
                // A connection that is waiting now may have been waiting when main asked.
                for _ in 0..DRAIN_MOST {
                    let context = shared.context.of_stranger();
                    let Ok(Some(link)) = listener.accept_waiting(&context) else { break };
                    identify_in_thread(shared, link, context);
                }
                if shared.drained() {
                    break;
                }
            }
            // Connections that say nothing may hold the descriptors that the source needs.
            Err(error) if are_none_left(&error) && shared.close_silent() => {}
            Err(error) => {
                shared.stop.fail(Error::io(format!("accept a connection at {}", listener.address()), error));
                break;
            }
        }
    }
    tracing::debug!("the listener closes");
}

impl Shared {
    /// Makes the acceptor accept every connection that is waiting now, and waits until it has done so.
    ///
    /// # Errors
    /// [`Error::TimedOut`] if the listener does not return: one that loses a wake waits for the next connection. The error
    /// that stopped the migration.
    pub(super) fn drain_listener(&self) -> Result<()> {
        let mut state = self.lock();
        // There is no acceptor, or the stop has ended it. In the latter case channels it did not accept must not count as
        // missing.
        let Some(waker) = state.acceptor.waker.clone() else {
            drop(state);
            return self.stop.check();
        };
        state.acceptor.drains_asked += 1;
        let asked = state.acceptor.drains_asked;
        drop(state);
        waker.wake();
        let limit = self.options.channels_timeout;
        let end = deadline(limit);
        let mut state = self.lock();
        while state.acceptor.drains_done < asked && state.acceptor.waker.is_some() && !state.life.stopped {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(state);
                let what =
                    "the listener did not end its wait for a connection when woken (Listen::waker)".into();
                return Err(self.stop.fail(Error::TimedOut { what, limit }));
            }
            state = self.wait_timeout(state, left);
        }
        drop(state);
        self.stop.check()
    }

    /// Records that the acceptor has accepted what was waiting. Returns whether it has to end.
    fn drained(&self) -> bool {
        let mut state = self.lock();
        state.acceptor.drains_done = state.acceptor.drains_asked;
        self.changed.notify_all();
        // `state.life.stopped` is not enough: a listener that is registered while the stop wakes the others is woken before
        // it is set, and not again.
        self.stop.is_stopped()
    }
}
