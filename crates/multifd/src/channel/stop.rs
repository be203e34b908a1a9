//! The stop of one side of a migration.
//!
//! The input is the first error, a cancel, or the normal end. The output is a wake-up of all threads that wait. A
//! component that can wait registers a [`Wake`]: a socket that shuts down, a condition that is notified. The first
//! cause wins and is reported; errors that follow from it go to the log. A second stop does nothing.

use std::{
    fmt,
    sync::{Arc, PoisonError, atomic::Ordering},
    time::Duration,
};

use super::{
    callbacks::Callbacks,
    clock::deadline,
    stall_timer::{Activity, StallTimer},
};
use crate::{
    error::{Error, Result, Usage},
    sync_types::{AtomicBool, Condvar, Instant, Mutex, MutexGuard, panicking},
};

/// Something with waits that can be ended.
pub trait Wake: Send + Sync {
    /// Ends all present and future waits. Called at most a few times, from any thread.
    ///
    /// **Warning:** an implementation that blocks delays the thread that ends the migration, and all wakers after it.
    /// An implementation that does not end future waits leaves a thread behind; the drop of its `Sender` or `Receiver`
    /// waits for that thread without limit.
    fn wake(&self);
}

/// Stops one side of one migration, exactly once. Clones are the same stop. A second migration needs a stop of its own and
/// is refused with this one ([`Usage::StopTaken`]): a shared stop would cancel both, and after the first migration has
/// ended it has no effect.
#[derive(Clone, Default)]
pub struct Stop(Arc<Inner>);

#[derive(Default)]
struct Inner {
    /// A migration has this stop; only whether it was set before matters.
    taken: AtomicBool,
    /// Set after the cause; pairs with the acquire in `is_stopped`, which avoids the lock on hot paths.
    stopped: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    /// Locks nothing; see `stall_timer.rs`.
    activity: Arc<Activity>,
    /// Has a lock of its own, which is held with no other.
    calls: Callbacks,
}

#[derive(Default)]
struct State {
    cause: Option<Cause>,
    /// An error that is known to be the cause of the next failure; it is reported instead of that failure.
    expected: Option<Error>,
    /// How many can still learn from the peer why it fails.
    informed: usize,
    watchers: Vec<(u64, Arc<dyn Wake>)>,
    next: u64,
}

#[derive(Clone)]
enum Cause {
    Failed(Error),
    Finished,
}

impl Stop {
    /// Creates a stop that has not happened.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the stop for a migration. A stop that was cancelled before can be taken: it ends that migration.
    ///
    /// # Errors
    /// [`Usage::StopTaken`] the second time.
    pub(crate) fn take(&self) -> Result<()> {
        if self.0.taken.swap(true, Ordering::Relaxed) { Err(Usage::StopTaken.into()) } else { Ok(()) }
    }

    /// The callback of the embedder that this side is running.
    pub fn callbacks(&self) -> &Callbacks {
        &self.0.calls
    }

    /// Stops with an error, unless the migration was stopped before. Returns the error to report: the first one. If a
    /// callback has used up the time limit of `error`, that callback is reported.
    pub fn fail(&self, error: Error) -> Error {
        let error = self.0.calls.explain(error);
        let (cause, stops) = self.stop(Cause::Failed(error.clone()));
        tracing::debug!(%error, "{}", if stops { "the migration stops" } else { "an error after the stop" });
        match cause {
            Cause::Failed(first) => first,
            Cause::Finished => error,
        }
    }

    /// Reports any later failure, except a cancel, as `error`, which is known to be its cause. This call stops nothing.
    pub(crate) fn expect(&self, error: Error) {
        let mut state = self.lock();
        state.expected.get_or_insert(error);
        self.0.changed.notify_all();
    }

    /// Until the returned guard is dropped, somebody can still learn from the peer why it fails, and then reports it with
    /// [`expect`](Self::expect) or [`fail`](Self::fail).
    pub(super) fn inform(&self) -> Informed {
        self.lock().informed += 1;
        Informed(self.clone())
    }

    /// Stops with an error that often has a cause which the peer reports elsewhere, such as a closed channel. Waits up to
    /// `limit` for that report, as long as there is somebody who can receive it. Returns the error to report.
    pub(crate) fn fail_as_consequence(&self, error: Error, limit: Duration) -> Error {
        let end = deadline(limit);
        let mut state = self.lock();
        while state.informed > 0 && state.cause.is_none() && state.expected.is_none() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        self.fail(error)
    }

    #[cfg(test)]
    pub(super) fn expected(&self) -> Option<Error> {
        self.lock().expected.clone()
    }

    /// Cancels: stops with [`Error::Cancelled`]. From any thread, at any time; does nothing after a stop.
    ///
    /// **Warning:** do not call it from a signal handler. It takes locks and allocates, so it may wait for the same
    /// thread that was interrupted. Use a thread that waits for the signal.
    pub fn cancel(&self) {
        if self.stop(Cause::Failed(Error::Cancelled)).1 {
            tracing::debug!(error = %Error::Cancelled, "the migration stops");
        }
    }

    /// A guard that [cancels](Self::cancel) when it is dropped. In an async program it belongs to the future that waits for
    /// the migration: if the future is dropped, the migration is cancelled. Dropping or aborting the handle of a blocking
    /// task does not do that.
    pub fn cancel_on_drop(&self) -> CancelOnDrop {
        CancelOnDrop(Some(self.clone()))
    }

    /// Ends the migration normally: waits end, and connections stay open for their owners to close. Returns `false` if
    /// it was stopped before.
    pub(crate) fn finish(&self) -> bool {
        self.stop(Cause::Finished).1
    }

    /// Whether the stop has happened, for any cause.
    pub fn is_stopped(&self) -> bool {
        self.0.stopped.load(Ordering::Acquire)
    }

    /// The error that stopped the migration; `None` while it runs and after a normal end.
    pub fn error(&self) -> Option<Error> {
        match &self.lock().cause {
            Some(Cause::Failed(error)) => Some(error.clone()),
            _ => None,
        }
    }

    /// Fails if the migration has failed.
    ///
    /// # Errors
    /// The error that stopped it.
    pub fn check(&self) -> Result<()> {
        if self.is_stopped() { self.error().map_or(Ok(()), Err) } else { Ok(()) }
    }

    /// Waits for `time`, or until stopped.
    ///
    /// # Errors
    /// The error that stopped the migration.
    pub fn pause(&self, time: Duration) -> Result<()> {
        let end = deadline(time);
        let mut state = self.lock();
        while state.cause.is_none() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            state = self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        self.check()
    }

    pub(super) fn stall_timer(&self, limit: Option<Duration>) -> StallTimer {
        StallTimer::new(self.0.activity.clone(), limit)
    }

    /// Wakes `watcher` at the stop, until the returned guard is dropped. If the stop has happened, it is woken now.
    pub fn watch(&self, watcher: Arc<dyn Wake>) -> Watch {
        let mut state = self.lock();
        let id = state.next;
        state.next += 1;
        let failed = state.cause.is_some();
        state.watchers.push((id, watcher.clone()));
        drop(state);
        if failed {
            watcher.wake();
        }
        Watch { stop: self.clone(), id }
    }

    /// Like [`watch`](Stop::watch), but only a failure wakes. For wakers that shut a connection down: after a normal
    /// end its owner closes it in order.
    pub fn watch_failure(&self, watcher: Arc<dyn Wake>) -> Watch {
        self.watch(Arc::new(OnFailure { stop: self.clone(), wake: watcher }))
    }

    /// Fails the migration if the thread that holds the returned guard panics. Otherwise other threads would wait for
    /// that thread without limit.
    pub(crate) fn alarm(&self, thread: &'static str) -> Alarm<'_> {
        Alarm { stop: self, thread }
    }

    /// Stops for `cause`. Returns the cause of the stop, and whether it is from this call.
    fn stop(&self, cause: Cause) -> (Cause, bool) {
        let mut state = self.lock();
        if let Some(first) = &state.cause {
            return (first.clone(), false);
        }
        let cause = match (cause, &state.expected) {
            (Cause::Failed(error), Some(expected)) if !error.is_cancelled() => {
                Cause::Failed(expected.clone())
            }
            (cause, _) => cause,
        };
        state.cause = Some(cause.clone());
        self.0.stopped.store(true, Ordering::Release);
        let watchers: Vec<_> = state.watchers.iter().map(|(_, watcher)| watcher.clone()).collect();
        self.0.changed.notify_all();
        drop(state);
        // The lock is free: a watcher may take its own lock, and its owner may be taking ours.
        for watcher in watchers {
            watcher.wake();
        }
        (cause, true)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stop").field("stopped", &self.is_stopped()).finish_non_exhaustive()
    }
}

/// Cancels a migration when it is dropped: see [`Stop::cancel_on_drop`]. After the migration has ended, the drop does
/// nothing.
#[must_use = "when it is dropped, the migration is cancelled"]
#[derive(Debug)]
pub struct CancelOnDrop(Option<Stop>);

impl CancelOnDrop {
    /// Ends the guard without a cancel.
    pub fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if let Some(stop) = self.0.take() {
            stop.cancel();
        }
    }
}

/// Keeps a watcher registered with a [`Stop`] until dropped.
#[must_use = "when it is dropped, the watcher is not woken any more"]
pub struct Watch {
    stop: Stop,
    id: u64,
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut state = self.stop.lock();
        let watcher = state.watchers.iter().position(|(id, _)| *id == self.id);
        let watcher = watcher.map(|at| state.watchers.remove(at));
        // The watcher may own other guards of this stop, whose drop takes the lock.
        drop(state);
        drop(watcher);
    }
}

/// See [`Stop::inform`].
#[derive(Debug)]
pub(super) struct Informed(Stop);

impl Drop for Informed {
    fn drop(&mut self) {
        self.0.lock().informed -= 1;
        self.0.0.changed.notify_all();
    }
}

/// See [`Stop::alarm`].
pub(crate) struct Alarm<'a> {
    stop: &'a Stop,
    thread: &'static str,
}

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if panicking() {
            self.stop.fail(Error::other(format!("{} panicked", self.thread), PANICKED));
        }
    }
}

/// Why a thread may have panicked.
const PANICKED: &str = "a bug in this library, or in a link of the caller";

struct OnFailure {
    stop: Stop,
    wake: Arc<dyn Wake>,
}

impl Wake for OnFailure {
    fn wake(&self) {
        if self.stop.error().is_some() {
            self.wake.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::AtomicUsize,
        thread::{scope, spawn},
    };

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn failure(text: &str) -> Error {
        Error::other(text, "because")
    }

    #[test]
    fn the_first_error_is_the_one_reported() {
        let stop = Stop::new();
        assert_eq!(stop.fail(failure("first")).to_string(), "first");
        assert_eq!(stop.fail(failure("second")).to_string(), "first");
        stop.cancel();
        assert_eq!(stop.check().expect_err("stopped").to_string(), "first");
    }

    #[test]
    fn of_many_threads_that_stop_exactly_one_wins() {
        let (stop, count) = (Stop::new(), Arc::new(Count::default()));
        let _watch = stop.watch(count.clone());
        let reported: Vec<String> = scope(|threads| {
            let all: Vec<_> = (0..8)
                .map(|n| {
                    threads.spawn({
                        let stop = &stop;
                        move || stop.fail(failure(&n.to_string()))
                    })
                })
                .collect();
            all.into_iter().map(|thread| thread.join().expect("no panic").to_string()).collect()
        });
        assert!(reported.iter().all(|text| *text == reported[0]));
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_watcher_that_comes_late_is_woken_at_once_and_one_that_left_is_not() {
        let (stop, early, late) = (Stop::new(), Arc::new(Count::default()), Arc::new(Count::default()));
        drop(stop.watch(early.clone()));
        stop.cancel();
        let _watch = stop.watch(late.clone());
        assert_eq!((early.0.load(Ordering::Relaxed), late.0.load(Ordering::Relaxed)), (0, 1));
    }

    /// Regression: a watcher owned another guard of its stop; dropping it under the lock was a deadlock.
    #[test]
    fn a_watcher_may_own_another_guard() {
        struct Owns {
            _watch: Watch,
        }
        impl Wake for Owns {
            fn wake(&self) {}
        }
        let stop = Stop::new();
        let inner = stop.watch(Arc::new(Count::default()));
        drop(stop.watch(Arc::new(Owns { _watch: inner })));
        assert!(stop.lock().watchers.is_empty());
    }

    /// A consequence waits for its cause exactly as long as somebody can still report one.
    #[test]
    fn a_consequence_waits_for_the_cause_while_somebody_can_report_it() {
        let long = Duration::from_secs(1000);
        let stop = Stop::new();
        assert_eq!(stop.fail_as_consequence(failure("closed"), long).to_string(), "closed");
        for reported in [true, false] {
            let stop = Stop::new();
            let informed = stop.inform();
            let waiting = spawn({
                let stop = stop.clone();
                move || stop.fail_as_consequence(failure("closed"), long).to_string()
            });
            std::thread::sleep(Duration::from_millis(20));
            assert!(!stop.is_stopped());
            if reported {
                stop.expect(failure("refused"));
            }
            drop(informed);
            let first = waiting.join().expect("no panic");
            assert_eq!(first, if reported { "refused" } else { "closed" });
        }
        let stop = Stop::new();
        let _informed = stop.inform();
        let short = Duration::from_millis(1);
        assert_eq!(stop.fail_as_consequence(failure("closed"), short).to_string(), "closed");
    }

    #[test]
    fn a_pause_ends_with_the_stop() {
        let stop = Stop::new();
        let waiter = spawn({
            let stop = stop.clone();
            move || stop.pause(Duration::from_secs(600))
        });
        stop.cancel();
        assert!(waiter.join().expect("no panic").expect_err("cancelled").is_cancelled());
        assert!(Stop::new().pause(Duration::from_millis(1)).is_ok());
    }

    #[test]
    fn a_guard_cancels_when_it_is_dropped_unless_the_migration_has_ended_or_it_was_disarmed() {
        let stop = Stop::new();
        drop(stop.cancel_on_drop());
        assert!(matches!(stop.error(), Some(Error::Cancelled)));
        let stop = Stop::new();
        stop.cancel_on_drop().disarm();
        assert!(!stop.is_stopped());
        let guard = stop.cancel_on_drop();
        assert!(stop.finish());
        drop(guard);
        assert!(stop.check().is_ok());
    }

    #[test]
    fn a_good_end_is_no_error() {
        let stop = Stop::new();
        assert!(stop.finish());
        assert!(stop.is_stopped() && stop.check().is_ok() && !stop.finish());
    }
}
