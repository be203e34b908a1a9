//! Limits how long a callback of the embedder may run.
//!
//! The library cannot interrupt a callback. If one does not return, the watch names it in the log and in the error that stops
//! the migration. The stop closes the connections, so the other side does not wait for it.

use std::{
    thread::{Builder, JoinHandle},
    time::Duration,
};

use super::Stop;
use crate::error::{Error, Result};

/// Watches the callbacks of one side of a migration until dropped.
#[must_use = "the watch ends when it is dropped"]
#[derive(Debug)]
pub struct CallbackWatch {
    /// Set to end the thread. This is not the migration's stop.
    done: Stop,
    thread: Option<JoinHandle<()>>,
}

impl CallbackWatch {
    /// Makes `stop` fail with [`Error::CallbackHangs`] when one of [its callbacks](Stop::callbacks) has run for `limit`, until
    /// the watch is dropped. The log has a warning then, also where the stop has happened before. `None` is no limit.
    ///
    /// # Errors
    /// If the system cannot start the thread.
    pub fn start(stop: &Stop, limit: Option<Duration>) -> Result<Self> {
        let done = Stop::new();
        let thread = limit.map(|limit| {
            let (stop, done) = (stop.clone(), done.clone());
            Builder::new().name("multifdcalls".into()).spawn(move || report(&stop, &done, limit))
        });
        let thread =
            thread.transpose().map_err(|error| Error::io("start a thread for a time limit", error))?;
        Ok(Self { done, thread })
    }
}

impl Drop for CallbackWatch {
    fn drop(&mut self) {
        self.done.finish();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has nothing left to report.
            let _ = thread.join();
        }
    }
}

fn report(stop: &Stop, done: &Stop, limit: Duration) {
    let mut reported = None;
    loop {
        let running = stop.callbacks().running();
        if let Some((call, _)) = running.filter(|(_, waited)| *waited >= limit)
            && reported != Some(call)
        {
            reported = Some(call);
            let error = Error::CallbackHangs { call, waited: limit };
            tracing::warn!("{error}");
            stop.fail(error);
        }
        // The limit of a callback that has begun since then ends later.
        let waited = running.map_or(Duration::ZERO, |(_, waited)| waited);
        let left = limit.saturating_sub(waited).max(limit / CHECKS).max(LEAST);
        if done.pause(left).is_err() || done.is_stopped() {
            return;
        }
    }
}

/// How many times a callback is checked within its limit. A callback may exceed the limit by this part of it.
const CHECKS: u32 = 4;
const LEAST: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::Callback;

    #[test]
    fn callback_that_hangs_is_named_and_one_that_returns_in_time_is_not() {
        let stop = Stop::new();
        let calls = stop.callbacks().clone();
        let watch = CallbackWatch::start(&stop, Some(Duration::from_millis(200))).expect("started");
        for _ in 0..30 {
            calls.call(Callback::DirtyLogTake, || std::thread::sleep(Duration::from_millis(10)));
        }
        assert!(!stop.is_stopped(), "no single one hangs");
        let stopped = calls.call(Callback::GuestSave, || {
            let stopped = stop.pause(Duration::from_secs(60));
            assert_eq!(calls.running().expect("this one").0, Callback::GuestSave);
            stopped
        });
        let error = stopped.expect_err("it hangs");
        assert!(matches!(error, Error::CallbackHangs { call: Callback::GuestSave, .. }), "{error:?}");
        assert!(calls.running().is_none());
        drop(watch);
    }

    #[test]
    fn watch_without_a_limit_or_with_a_long_one_ends_at_once() {
        for limit in [None, Some(Duration::MAX)] {
            drop(CallbackWatch::start(&Stop::new(), limit).expect("started"));
        }
    }
}
