//! A callback of the embedder that does not return is named, and the migration ends when it returns.

use std::{
    io,
    sync::{Arc, Mutex, mpsc},
    time::{Duration, Instant},
};

use multifd::{
    Callback, Error, SendOptions, Sender,
    channel::{Stop, memory},
    live::{DeviceInfo, DeviceSection, Guest, MigrateOptions, Migration, Percent, Progress, RunState},
    ram::{BlockIndex, DirtyLog, DirtyPages, PageBitmap, PageSize, RamBlocks},
};

use crate::kit::{TestMain, fresh, receive, spawn};

const LIMIT: Duration = Duration::from_millis(400);
const SOON: Duration = Duration::from_secs(60);

/// A guest and its log, one callback of which waits until it is released.
struct Hangs {
    at: Callback,
    /// Fails to save, so that the callbacks after a failure are called.
    fails: bool,
    /// Panics instead of waiting.
    panics: bool,
    release: Mutex<mpsc::Receiver<()>>,
}

impl Hangs {
    fn called(&self, callback: Callback) {
        if self.at == callback && self.panics {
            // Without the message of the panic in the output of the test.
            std::panic::resume_unwind(Box::new("as told"));
        }
        if self.at == callback {
            // Only the first call waits: the sender is gone after it.
            let _ = self.release.lock().expect("whole").recv_timeout(SOON);
        }
    }
}

/// The guest's side of it, and the log's.
struct Side(Arc<Hangs>);

impl Guest for Side {
    fn devices(&self) -> Vec<DeviceInfo> {
        self.0.called(Callback::GuestDevices);
        Vec::new()
    }
    fn run_state(&mut self) -> RunState {
        self.0.called(Callback::GuestRunState);
        RunState::Running
    }
    fn stop(&mut self) -> io::Result<()> {
        self.0.called(Callback::GuestStop);
        Ok(())
    }
    fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
        self.0.called(Callback::GuestSave);
        if self.0.fails { Err(io::Error::other("as told")) } else { Ok(Vec::new()) }
    }
    fn resume(&mut self) {
        self.0.called(Callback::GuestResume);
    }
    fn can_throttle(&self) -> bool {
        self.0.called(Callback::GuestCanThrottle);
        true
    }
    fn throttle(&mut self, _: Percent) -> io::Result<()> {
        self.0.called(Callback::GuestThrottle);
        Ok(())
    }
}

impl DirtyLog for Side {
    fn begin(&mut self, _: &RamBlocks) -> io::Result<()> {
        self.0.called(Callback::DirtyLogBegin);
        Ok(())
    }
    fn take(&mut self, _: BlockIndex, _: &mut DirtyPages<'_>) -> io::Result<()> {
        self.0.called(Callback::DirtyLogTake);
        Ok(())
    }
    fn put_back(&mut self, _: BlockIndex, _: &PageBitmap) {
        self.0.called(Callback::DirtyLogPutBack);
    }
}

/// Migrates with a callback that hangs until `released` returns. Returns the source's error, and what was released.
fn hang<T: Send + 'static>(
    at: Callback,
    panics: bool,
    limit: Option<Duration>,
    options: MigrateOptions,
    released: impl FnOnce(Progress, Stop) -> T + Send + 'static,
) -> (Error, T) {
    let (connector, listener) = memory::network(1 << 18);
    let destination = spawn("destination", move || {
        let receiver = multifd::Receiver::new(multifd::ReceiveOptions::new(), Stop::new());
        receive(receiver, Box::new(listener), fresh(PageSize::KIB_4, &[("ram", 1 << 16)]))
    });
    let stop = Stop::new();
    let mut main = TestMain::connect(&connector, &stop);
    let source = fresh(PageSize::KIB_4, &[("ram", 1 << 16)]);
    let mut sender = Sender::new(SendOptions::new(), source, stop.clone()).expect("made");
    sender.set_up(Arc::new(connector)).expect("set up");
    let migration = Migration::new(options.auto_converge(true), sender).expect("options");
    let migration = migration.callback_timeout(limit);
    let progress = migration.progress();
    let (release, waits) = mpsc::channel();
    let beside = spawn("beside", move || {
        let released = released(progress, stop);
        drop(release);
        released
    });
    let fails = matches!(at, Callback::GuestResume | Callback::DirtyLogPutBack);
    let hangs = Arc::new(Hangs { at, fails, panics, release: Mutex::new(waits) });
    let error = migration.run(&mut main, &mut Side(hangs.clone()), &mut Side(hangs)).expect_err("it hangs");
    drop(main);
    destination.join().expect("no panic").expect_err("the source has gone");
    (error, beside.join().expect("no panic"))
}

/// Waits until the migration is in a callback for `least`, and returns it.
fn running(progress: &Progress, callback: Callback, least: Duration) -> bool {
    let end = Instant::now() + SOON;
    while Instant::now() < end {
        match progress.callback() {
            Some((found, time)) if found == callback && time >= least => return true,
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    false
}

#[test]
fn a_callback_that_hangs_is_named_to_other_threads_and_in_the_error() {
    for at in [
        Callback::GuestDevices,
        Callback::GuestCanThrottle,
        Callback::GuestThrottle,
        Callback::GuestRunState,
        Callback::GuestStop,
        Callback::GuestSave,
        Callback::DirtyLogBegin,
        Callback::DirtyLogTake,
    ] {
        let (error, stopped) = hang(at, false, Some(LIMIT), MigrateOptions::new(), move |progress, stop| {
            assert!(running(&progress, at, Duration::from_millis(1)), "{at}");
            // The stop fails while the callback still hangs, so the peer is free.
            stop.pause(SOON).expect_err("the limit has passed")
        });
        for error in [error, stopped] {
            assert!(matches!(error, Error::CallbackHangs { call, .. } if call == at), "{at}: {error:?}");
            assert!(error.to_string().starts_with(&format!("{at} has not returned for 400 ms")), "{error}");
        }
    }
}

/// The first error stays the one that is reported.
#[test]
fn a_callback_that_hangs_after_a_failure_is_named_to_other_threads() {
    for at in [Callback::GuestResume, Callback::DirtyLogPutBack] {
        let (error, named) = hang(at, false, Some(LIMIT), MigrateOptions::new(), move |progress, _| {
            running(&progress, at, 2 * LIMIT)
        });
        assert!(named, "{at}");
        assert!(error.to_string().contains("Guest::save"), "{error:?}");
    }
}

/// No panic gets out of `run`.
#[test]
fn a_callback_that_panics_is_named_and_the_first_error_is_reported() {
    for at in [
        Callback::GuestDevices,
        Callback::GuestCanThrottle,
        Callback::GuestThrottle,
        Callback::GuestRunState,
        Callback::GuestStop,
        Callback::GuestSave,
        Callback::GuestResume,
        Callback::DirtyLogBegin,
        Callback::DirtyLogTake,
        Callback::DirtyLogPutBack,
    ] {
        let (error, _) = hang(at, true, Some(LIMIT), MigrateOptions::new(), |_, _| ());
        match at {
            Callback::GuestResume => {
                let Error::NotResumed { error, panicked } = &error else { panic!("{error:?}") };
                assert!(error.to_string().contains("Guest::save"), "{error:?}");
                assert_eq!(panicked.to_string(), "Guest::resume panicked: as told");
            }
            Callback::DirtyLogPutBack => assert!(error.to_string().contains("Guest::save"), "{error:?}"),
            _ => assert_eq!(error.to_string(), format!("{at} panicked: as told")),
        }
    }
}

/// The destination was not at fault: it was not asked yet.
#[test]
fn a_time_limit_that_a_callback_has_used_up_names_the_callback() {
    let limit = Duration::from_millis(300);
    let until_stopped = |_: Progress, stop: Stop| stop.pause(SOON).expect_err("the limit has passed");
    let switchover = MigrateOptions::new().switchover_timeout(Some(limit));
    let total = MigrateOptions::new().max_total_time(Some(limit));
    for (at, options) in [(Callback::GuestSave, switchover), (Callback::DirtyLogTake, total)] {
        let (error, _) = hang(at, false, None, options, until_stopped);
        assert!(matches!(error, Error::CallbackHangs { call, .. } if call == at), "{error:?}");
    }
}
