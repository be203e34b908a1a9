//! Records which callback of the embedder is running.
//!
//! It names the callback to threads that ask. A time limit that a callback has used up is not reported as the fault of the
//! other side.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::{error::Error, outcome::Callback};

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

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<(Callback, Instant)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Callbacks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Callbacks").field(&self.running()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
