//! Models of the [`Stop`], and of waits with a time limit.
//!
//! The package `multifd-models` runs each under many schedules; see `docs/develop/concurrency.md`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::{Context, Link, Stop, Wake, memory};
use crate::{
    error::Error,
    ram::{Part, PartMut},
    sync_types::{
        Condvar, Instant, Mutex,
        model::{let_time_run, thread},
    },
};

/// A thread that waits, without limit, to be woken by a stop.
#[derive(Default)]
struct Waiter {
    woken: Mutex<usize>,
    changed: Condvar,
}

impl Wake for Waiter {
    fn wake(&self) {
        *self.woken.lock().expect("whole") += 1;
        self.changed.notify_all();
    }
}

impl Waiter {
    fn wait(&self) {
        let mut woken = self.woken.lock().expect("whole");
        while *woken == 0 {
            woken = self.changed.wait(woken).expect("whole");
        }
    }

    fn times(&self) -> usize {
        *self.woken.lock().expect("whole")
    }
}

fn failure(text: &str) -> Error {
    Error::other(text, "because")
}

/// Two threads fail at once, while a third begins to wait.
pub fn the_first_error_wins_and_a_watcher_is_woken_once_however_late_it_comes() {
    let stop = Stop::new();
    let failing = ["one", "other"].map(|text| {
        let stop = stop.clone();
        thread::spawn(move || stop.fail(failure(text)).to_string())
    });
    let waiter = Arc::new(Waiter::default());
    let watch = stop.watch(waiter.clone());
    waiter.wait();
    let reported = stop.check().expect_err("failed").to_string();
    assert!(failing.map(|thread| thread.join().expect("no panic")).iter().all(|text| *text == reported));
    assert_eq!(waiter.times(), 1);
    drop(watch);
}

/// The flag avoids the lock.
pub fn whoever_sees_the_flag_finds_the_cause() {
    let stop = Stop::new();
    let failing = thread::spawn({
        let stop = stop.clone();
        move || stop.fail(failure("one"))
    });
    if stop.is_stopped() {
        assert!(stop.error().is_some());
    }
    if stop.check().is_ok() {
        // Not yet.
        assert_eq!(failing.join().expect("no panic").to_string(), "one");
    }
    assert!(stop.check().is_err());
}

/// A normal end, an error and a cancel at once.
pub fn of_a_good_end_and_a_cancel_one_wins_and_only_a_failure_shuts_connections_down() {
    let stop = Stop::new();
    let (any, connection) = (Arc::new(Waiter::default()), Arc::new(Waiter::default()));
    let watches = (stop.watch(any.clone()), stop.watch_failure(connection.clone()));
    let cancelling = thread::spawn({
        let stop = stop.clone();
        move || stop.cancel()
    });
    let finished = stop.finish();
    cancelling.join().expect("no panic");
    any.wait();
    assert_eq!(stop.error().is_none(), finished);
    assert_eq!((any.times(), connection.times()), (1, usize::from(!finished)));
    drop(watches);
}

/// No time passes here: only the stop can end the pause.
pub fn a_pause_ends_with_the_stop() {
    let stop = Stop::new();
    let pausing = thread::spawn({
        let stop = stop.clone();
        move || stop.pause(Duration::from_secs(600))
    });
    stop.cancel();
    assert!(pausing.join().expect("no panic").expect_err("cancelled").is_cancelled());
}

/// When time passes, the pause may end before the stop.
pub fn a_pause_ends_by_its_time_or_with_the_stop() {
    let_time_run();
    let stop = Stop::new();
    let pausing = thread::spawn({
        let stop = stop.clone();
        move || stop.pause(Duration::from_secs(600))
    });
    let cancelling = thread::spawn({
        let stop = stop.clone();
        move || stop.cancel()
    });
    if let Err(error) = pausing.join().expect("no panic") {
        assert!(error.is_cancelled());
    }
    cancelling.join().expect("no panic");
    assert!(stop.pause(Duration::from_secs(600)).is_err());
    assert!(Stop::new().pause(Duration::from_secs(600)).is_ok());
}

/// Guards are dropped while their stop wakes the watchers; one watcher owns a guard itself.
pub fn guards_may_go_while_the_stop_wakes() {
    struct Owns {
        woken: Arc<AtomicUsize>,
        _guard: super::Watch,
    }
    impl Wake for Owns {
        fn wake(&self) {
            self.woken.fetch_add(1, Ordering::Relaxed);
        }
    }
    let stop = Stop::new();
    let inner = stop.watch(Arc::new(Waiter::default()));
    let woken = Arc::new(AtomicUsize::new(0));
    // Nothing else owns this watcher: it is dropped with its guard, or after the stop's last use of it.
    let outer = stop.watch(Arc::new(Owns { woken: woken.clone(), _guard: inner }));
    let leaving = thread::spawn(move || drop(outer));
    let failing = thread::spawn({
        let stop = stop.clone();
        move || stop.cancel()
    });
    leaving.join().expect("no panic");
    failing.join().expect("no panic");
    assert!(woken.load(Ordering::Relaxed) <= 1);
    let late = Arc::new(Waiter::default());
    let _watch = stop.watch(late.clone());
    assert_eq!(late.times(), 1);
}

/// One byte fits; the reader is busy elsewhere all the time.
pub fn whoever_waits_for_room_or_for_bytes_is_woken() {
    let context = Context::new(&Stop::new());
    let (mut near, mut far) = memory::pair(1, &context, &context);
    let writing = thread::spawn(move || {
        for byte in 0..3_u8 {
            let sent = near.send(&[Part::from(&[byte][..])]);
            assert_eq!(sent.expect("open"), 1);
        }
    });
    let (mut byte, mut received) = ([0_u8; 1], Vec::new());
    while far.recv(&mut [PartMut::from(&mut byte[..])]).expect("open") == 1 {
        received.push(byte[0]);
    }
    assert_eq!(received, [0, 1, 2]);
    writing.join().expect("no panic");
}

/// One connection is full permanently. On another, bytes may move in between.
pub fn a_wait_for_room_ends_when_nothing_has_moved_for_so_long_and_not_before() {
    const LIMIT: Duration = Duration::from_secs(100);
    let_time_run();
    let stop = Stop::new();
    let context = Context::new(&stop).stall_timeout(Some(LIMIT));
    let (mut near, far) = memory::pair(1, &context, &Context::new(&Stop::new()));
    // A third connection moves now, a second one some time later.
    let moves = [Duration::ZERO, LIMIT / 2].map(|later| {
        let (stop, stall_timer) = (stop.clone(), context.stall_timer.clone());
        thread::spawn(move || {
            stop.pause(later).expect("nobody stops it");
            let noticed = Instant::now();
            stall_timer.moved();
            (noticed, Instant::now())
        })
    });
    near.send(&[Part::from(&[1][..])]).expect("there is room");
    let begun = Instant::now();
    let error = near.send(&[Part::from(&[2][..])]).expect_err("nobody reads");
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
    let ended = Instant::now();
    assert!(ended.saturating_duration_since(begun) >= LIMIT);
    let [_, (noticed, moved)] = moves.map(|thread| thread.join().expect("no panic"));
    // After that move, only the limit of the wait has moved the clock.
    assert!(moved >= ended || ended.saturating_duration_since(noticed) >= LIMIT);
    drop(far);
}
