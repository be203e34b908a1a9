//! Records which callback of the embedder is running, and limits how long it may run.
//!
//! The library cannot interrupt a callback. If one does not return, this module names it: to threads that ask, in the log,
//! and in the error that stops the migration. The stop closes the connections, so the other side does not wait for it. A time
//! limit that a callback has used up is not reported as the fault of the other side.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    thread::{Builder, JoinHandle},
    time::{Duration, Instant},
};

use super::Stop;
use crate::{
    error::{Error, Result},
    outcome::Callback,
};

/// The callback that one side of a migration is running. Clones show the same one.
#[derive(Clone, Default)]
pub struct Callbacks(Arc<Mutex<Option<(Callback, Instant)>>>);

impl Callbacks {
    /// Runs this callback. If it panics, it stays recorded.
    pub fn call<T>(&self, callback: Callback, run: impl FnOnce() -> T) -> T {
        self.enter(callback);
        let done = run();
        self.leave();
        done
    }

    /// The callback that is running, and for how long; `None` if none is.
    pub fn running(&self) -> Option<(Callback, Duration)> {
        self.lock().map(|(callback, since)| (callback, since.elapsed()))
    }

    /// Makes `stop` fail with [`Error::CallbackHangs`] when a callback has run for `limit`, until the returned guard is
    /// dropped. The log has a warning then, also where the stop has happened before. `None` is no limit.
    ///
    /// # Errors
    /// If the system cannot start the thread.
    pub fn watch(&self, stop: &Stop, limit: Option<Duration>) -> Result<CallbackWatch> {
        let done = Stop::new();
        let thread = limit.map(|limit| {
            let (calls, stop, done) = (self.clone(), stop.clone(), done.clone());
            Builder::new().name("multifdcalls".into()).spawn(move || calls.report(&stop, &done, limit))
        });
        let thread =
            thread.transpose().map_err(|error| Error::io("start a thread for a time limit", error))?;
        Ok(CallbackWatch { done, thread })
    }

    pub(crate) fn enter(&self, callback: Callback) {
        *self.lock() = Some((callback, Instant::now()));
    }

    pub(crate) fn leave(&self) {
        *self.lock() = None;
    }

    /// The callback that has panicked; the library itself if none was running.
    pub(crate) fn panicked(&self) -> Callback {
        self.lock().take().map_or(Callback::Library, |(callback, _)| callback)
    }

    /// The error of a time limit that has passed while a callback was running, if that took a large part of it.
    pub(crate) fn used_up(&self, limit: Duration) -> Option<Error> {
        let (call, waited) = self.running()?;
        (waited >= limit / 2).then_some(Error::CallbackHangs { call, waited })
    }

    /// The error to report instead of `error`: if its time limit was used up by a callback, the other side is not at fault.
    pub(super) fn explain(&self, error: Error) -> Error {
        match error.kind() {
            Error::Stalled { limit, .. }
            | Error::TimedOut { limit, .. }
            | Error::SwitchoverTimeout { limit } => self.used_up(*limit).unwrap_or(error),
            _ => error,
        }
    }

    fn report(&self, stop: &Stop, done: &Stop, limit: Duration) {
        let mut reported = None;
        loop {
            let running = self.running();
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

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<(Callback, Instant)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Callbacks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Callbacks").field(&self.running()).finish()
    }
}

/// Watches callbacks until dropped: see [`Callbacks::watch`].
#[must_use = "the watch ends when it is dropped"]
#[derive(Debug)]
pub struct CallbackWatch {
    /// Set to end the thread. This is not the migration's stop.
    done: Stop,
    thread: Option<JoinHandle<()>>,
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

/// How many times a callback is checked within its limit. A callback may exceed the limit by this part of it.
const CHECKS: u32 = 4;
const LEAST: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callback_that_hangs_is_named_and_one_that_returns_in_time_is_not() {
        let stop = Stop::new();
        let calls = stop.callbacks().clone();
        let watch = calls.watch(&stop, Some(Duration::from_millis(200))).expect("started");
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
    fn limit_is_used_up_by_a_callback_only_where_it_ran_for_a_large_part_of_it() {
        let calls = Callbacks::default();
        calls.call(Callback::GuestStop, || {
            assert!(calls.used_up(Duration::from_secs(60)).is_none());
            std::thread::sleep(Duration::from_millis(20));
            let hangs = calls.used_up(Duration::from_millis(40));
            assert!(matches!(hangs, Some(Error::CallbackHangs { call: Callback::GuestStop, .. })));
            let late =
                |millis| Error::TimedOut { what: "no SYNC".into(), limit: Duration::from_millis(millis) };
            let explained = calls.explain(late(40).at("channel 3"));
            assert!(matches!(explained, Error::CallbackHangs { .. }), "{explained:?}");
            assert!(matches!(calls.explain(late(60_000)), Error::TimedOut { .. }));
            assert!(calls.explain(Error::Cancelled).is_cancelled());
        });
        assert!(calls.used_up(Duration::ZERO).is_none());
    }

    #[test]
    fn watch_without_a_limit_or_with_a_long_one_ends_at_once() {
        for limit in [None, Some(Duration::MAX)] {
            drop(Callbacks::default().watch(&Stop::new(), limit).expect("started"));
        }
    }
}
