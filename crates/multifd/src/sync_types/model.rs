//! The model checker's side of [`sync_types`](super): its primitives, with a clock that the checker moves.
//!
//! The checker runs the threads of a model one at a time. At every lock, wait, notification and atomic it chooses the
//! next thread. By default no time passes, so a wait with a limit never ends by the limit. A lost notification is then
//! found as a deadlock and not hidden by the limit. After a model has called [`let_time_run`], each such wait has a
//! separate thread for its limit: when the checker chooses this thread, the limit has passed. The clock is then set to
//! the end of the limit, and all threads that wait on that condition are woken.

use std::{
    cell::Cell,
    io,
    ops::{Add, Deref, DerefMut},
    sync::{
        Arc, LockResult, PoisonError,
        atomic::{AtomicBool as Flag, Ordering},
    },
    time::Duration,
};

use shuttle::{
    Config, Runner,
    scheduler::{DfsScheduler, PctScheduler, RandomScheduler, Scheduler},
    sync as checked,
};

pub(crate) use shuttle::{
    sync::atomic::{AtomicBool, AtomicU64},
    thread::{self, JoinHandle as Thread, panicking},
};

thread_local! {
    // All threads of a model are the same thread for the system; only the checker distinguishes them.
    static NOW: Cell<Duration> = const { Cell::new(START) };
    static TIME_RUNS: Cell<bool> = const { Cell::new(false) };
}

/// Runs `model` `times` times under schedules drawn from a fixed seed: half of them random, half with a few badly
/// chosen interruptions.
///
/// # Panics
/// With the first schedule under which `model` panics or its threads wait for each other.
pub fn explore(times: usize, model: fn()) {
    check(RandomScheduler::new_from_seed(SEED, times / 2), model);
    check(PctScheduler::new_from_seed(SEED, INTERRUPTIONS, times - times / 2), model);
}

/// Runs `model` under every possible schedule. Returns their number.
///
/// # Panics
/// As [`explore`].
pub fn exhaust(model: fn()) -> usize {
    check(DfsScheduler::new(None, false), model)
}

fn check(scheduler: impl Scheduler + 'static, model: fn()) -> usize {
    let mut config = Config::new();
    // A channel's thread has a packet's vectors on its stack.
    config.stack_size = 256 << 10;
    // The warning is about atomics that are not sequentially consistent; docs/develop/concurrency.md explains them.
    config.silence_warnings = true;
    Runner::new(scheduler, config).run(move || {
        NOW.set(START);
        TIME_RUNS.set(false);
        model();
    })
}

/// From now on a wait with a limit may end by its limit.
pub(crate) fn let_time_run() {
    TIME_RUNS.set(true);
}

/// Like the standard library's, with the time of the model's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instant(Duration);

impl Instant {
    pub(crate) fn now() -> Self {
        Self(NOW.get())
    }

    pub(crate) fn elapsed(&self) -> Duration {
        Self::now().saturating_duration_since(*self)
    }

    pub(crate) fn checked_add(&self, time: Duration) -> Option<Self> {
        self.0.checked_add(time).map(Self)
    }

    pub(crate) fn checked_sub(&self, time: Duration) -> Option<Self> {
        self.0.checked_sub(time).map(Self)
    }

    pub(crate) fn saturating_duration_since(&self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for Instant {
    type Output = Self;

    fn add(self, time: Duration) -> Self {
        Self(self.0 + time)
    }
}

/// A lock of the checker. The clock of a condition can take it, too.
#[derive(Debug, Default)]
pub(crate) struct Mutex<T>(Arc<checked::Mutex<T>>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Arc::new(checked::Mutex::new(value)))
    }

    pub(crate) fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
        lock(&self.0)
    }
}

fn lock<T>(mutex: &Arc<checked::Mutex<T>>) -> LockResult<MutexGuard<'_, T>> {
    match mutex.lock() {
        Ok(guard) => Ok(MutexGuard { guard, mutex }),
        Err(poisoned) => Err(PoisonError::new(MutexGuard { guard: poisoned.into_inner(), mutex })),
    }
}

#[derive(Debug)]
pub(crate) struct MutexGuard<'a, T> {
    guard: checked::MutexGuard<'a, T>,
    mutex: &'a Arc<checked::Mutex<T>>,
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

/// A condition of the checker, whose waits may have a limit.
#[derive(Debug, Default)]
pub(crate) struct Condvar(Arc<checked::Condvar>);

impl Condvar {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> LockResult<MutexGuard<'a, T>> {
        let MutexGuard { guard, mutex } = guard;
        match self.0.wait(guard) {
            Ok(guard) => Ok(MutexGuard { guard, mutex }),
            Err(poisoned) => Err(PoisonError::new(MutexGuard { guard: poisoned.into_inner(), mutex })),
        }
    }

    pub(crate) fn wait_timeout<'a, T: Send + 'static>(
        &self,
        guard: MutexGuard<'a, T>,
        limit: Duration,
    ) -> LockResult<(MutexGuard<'a, T>, bool)> {
        let over = Arc::new(Flag::new(false));
        if TIME_RUNS.get() {
            self.end_later(guard.mutex.clone(), over.clone(), limit);
        }
        let outcome = self.wait(guard);
        // Only now: a thread that was notified but does not have the lock yet may find that its limit has passed as
        // well.
        let in_time = !over.swap(true, Ordering::Relaxed);
        match outcome {
            Ok(guard) => Ok((guard, !in_time)),
            Err(poisoned) => Err(PoisonError::new((poisoned.into_inner(), !in_time))),
        }
    }

    /// The lock is taken first: the waiter holds it until it waits.
    fn end_later<T: Send + 'static>(&self, mutex: Arc<checked::Mutex<T>>, over: Arc<Flag>, limit: Duration) {
        let (condition, end) = (self.0.clone(), NOW.get().saturating_add(limit));
        drop(thread::spawn(move || {
            let guard = mutex.lock().unwrap_or_else(PoisonError::into_inner);
            if !over.swap(true, Ordering::Relaxed) {
                NOW.set(NOW.get().max(end));
                condition.notify_all();
            }
            drop(guard);
        }));
    }

    pub(crate) fn notify_one(&self) {
        self.0.notify_one();
    }

    pub(crate) fn notify_all(&self) {
        self.0.notify_all();
    }
}

/// The standard library's, with a point at which the checker may switch threads. Its initialisation is always short.
#[derive(Debug)]
pub(crate) struct OnceLock<T> {
    value: std::sync::OnceLock<T>,
    point: AtomicBool,
}

impl<T> OnceLock<T> {
    pub(crate) fn new() -> Self {
        Self { value: std::sync::OnceLock::new(), point: AtomicBool::new(false) }
    }

    pub(crate) fn get(&self) -> Option<&T> {
        self.point.load(Ordering::SeqCst);
        self.value.get()
    }

    pub(crate) fn set(&self, value: T) -> Result<(), T> {
        self.point.load(Ordering::SeqCst);
        self.value.set(value)
    }

    pub(crate) fn get_or_init(&self, make: impl FnOnce() -> T) -> &T {
        self.point.load(Ordering::SeqCst);
        self.value.get_or_init(make)
    }
}

impl<T> From<T> for OnceLock<T> {
    fn from(value: T) -> Self {
        Self { value: value.into(), point: AtomicBool::new(false) }
    }
}

/// Like the standard library's.
#[derive(Debug, Default)]
pub(crate) struct Builder(thread::Builder);

impl Builder {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn name(self, name: String) -> Self {
        Self(self.0.name(name))
    }

    pub(crate) fn spawn<T: Send + 'static>(
        self,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<JoinHandle<T>> {
        let finished = Arc::new(Flag::new(false));
        let thread = self.0.spawn({
            let finished = finished.clone();
            move || {
                let outcome = body();
                finished.store(true, Ordering::Relaxed);
                outcome
            }
        })?;
        Ok(JoinHandle { thread, finished })
    }
}

#[derive(Debug)]
pub(crate) struct JoinHandle<T> {
    thread: thread::JoinHandle<T>,
    finished: Arc<Flag>,
}

impl<T> JoinHandle<T> {
    pub(crate) fn join(self) -> std::thread::Result<T> {
        self.thread.join()
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.finished.load(Ordering::Relaxed)
    }
}

/// Far from the clock's ends.
const START: Duration = Duration::from_secs(1 << 20);
const SEED: u64 = 0x1122_3344_0001;
/// Most concurrency errors need no more.
const INTERRUPTIONS: usize = 3;
