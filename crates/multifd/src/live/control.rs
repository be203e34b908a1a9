//! Controls a running migration: continue after the pause before the switchover, change `downtime-limit` and
//! `max-bandwidth`.
//!
//! The migration's thread waits in [`Gate::pause`] until [`Control::proceed`] or the stop. Other threads may wait in
//! [`Control::wait_pre_switchover`] until the migration pauses or is over.

use std::{
    fmt,
    sync::{
        Arc, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{MigrateOptions, Progress};
use crate::{
    channel::{Stop, Wake},
    error::{Result, Usage},
    outcome::Status,
    sync_types::{Condvar, Mutex, MutexGuard},
};

/// Controls a running migration. Clones control the same one.
#[derive(Clone)]
pub struct Control {
    gate: Arc<Inner>,
    progress: Progress,
}

impl Control {
    /// Sets another `downtime-limit`, 0 to 2000 s, from the end of the current pass on. Use it for a migration that
    /// does not converge if a longer downtime is better than starting again.
    ///
    /// # Errors
    /// [`Usage::OutOfRange`] if `limit` is out of range.
    pub fn set_downtime_limit(&self, limit: Duration) -> Result<()> {
        MigrateOptions::new().downtime_limit(limit).check()?;
        *self.gate.downtime_limit.lock().unwrap_or_else(PoisonError::into_inner) = Some(limit);
        Ok(())
    }

    /// Sets another `max-bandwidth` in bytes per second, as [`MigrateOptions::max_bandwidth`]: `None` and 0 are no limit. It
    /// holds from now on, also for a source that waits because of the previous limit, until the guest is stopped. The
    /// pages that remain then are sent without a limit.
    pub fn set_max_bandwidth(&self, bytes: Option<u64>) {
        self.gate.bandwidth.set(bytes);
    }

    /// The `max-bandwidth` that holds at present, in bytes per second; `None` is no limit.
    pub fn max_bandwidth(&self) -> Option<u64> {
        self.gate.bandwidth.get()
    }

    /// Switches to post-copy as soon as the pages that are being sent have left: the guest moves to the destination, and the rest
    /// follows.
    ///
    /// # Errors
    /// [`Usage::NoPostcopy`] if the options [do not allow it](MigrateOptions::postcopy), or the migration is over or has stopped its
    /// guest.
    pub fn start_postcopy(&self) -> Result<()> {
        if !self.gate.postcopy_allowed {
            return Err(
                Usage::NoPostcopy { why: "its options do not allow it (MigrateOptions::postcopy)" }.into()
            );
        }
        if !matches!(self.progress.status(), Status::None | Status::Setup | Status::Active) {
            return Err(Usage::NoPostcopy { why: "its guest is stopped already, or it is over" }.into());
        }
        self.gate.postcopy_requested.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Waits until the migration is in state `pre-switchover` and returns `true`, or until it is over and returns
    /// `false`. For a migration that does not pause, it waits until the migration is over.
    pub fn wait_pre_switchover(&self) -> bool {
        *self.gate.wait_while(At::Before) == At::Paused
    }

    /// Continues a migration in state `pre-switchover`: QEMU's `migrate-continue`.
    ///
    /// # Errors
    /// [`Usage::NotPaused`] in any other state.
    pub fn proceed(&self) -> Result<()> {
        let mut at = self.gate.lock();
        if *at != At::Paused {
            return Err(Usage::NotPaused { found: self.progress.status() }.into());
        }
        *at = At::Over;
        drop(at);
        self.gate.changed.notify_all();
        Ok(())
    }
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").field("at", &*self.gate.lock()).finish_non_exhaustive()
    }
}

/// The migration's side of the control. When it is dropped, nobody waits any longer.
#[derive(Default)]
pub(super) struct Gate(Arc<Inner>);

impl Gate {
    /// Creates the control of a migration with these options.
    pub(super) fn new(options: &MigrateOptions) -> Self {
        let (bandwidth, postcopy_allowed) =
            (Bandwidth::new(options.max_bandwidth), options.postcopy.is_allowed());
        Self(Arc::new(Inner { bandwidth, postcopy_allowed, ..Inner::default() }))
    }

    /// Whether somebody has requested the switch to post-copy.
    pub(super) fn is_postcopy_requested(&self) -> bool {
        self.0.postcopy_requested.load(Ordering::Relaxed)
    }

    /// The `max-bandwidth` that holds at present.
    pub(super) fn bandwidth(&self) -> Bandwidth {
        self.0.bandwidth.clone()
    }

    pub(super) fn control(&self, progress: Progress) -> Control {
        Control { gate: self.0.clone(), progress }
    }

    /// The `downtime-limit` that was set while the migration runs, if any.
    pub(super) fn downtime_limit(&self) -> Option<Duration> {
        *self.0.downtime_limit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for [`Control::proceed`].
    ///
    /// # Errors
    /// The error that stopped the migration in the meantime.
    pub(super) fn pause(&self, progress: &Progress, stop: &Stop) -> Result<()> {
        // Under the lock: a thread that sees the state can continue the migration.
        let mut at = self.0.lock();
        progress.advance(Status::PreSwitchover)?;
        *at = At::Paused;
        drop(at);
        self.0.changed.notify_all();
        // If the stop has already happened, the watch wakes at once, so no stop is missed.
        let _watch = stop.watch(self.0.clone());
        drop(self.0.wait_while(At::Paused));
        stop.check()
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.0.wake();
    }
}

#[derive(Default)]
struct Inner {
    at: Mutex<At>,
    changed: Condvar,
    downtime_limit: Mutex<Option<Duration>>,
    bandwidth: Bandwidth,
    postcopy_allowed: bool,
    /// Orders nothing: the passes look at it from time to time.
    postcopy_requested: AtomicBool,
}

/// A limit in bytes per second that any thread may change. Clones are the same limit. The default is no limit.
#[derive(Clone, Debug, Default)]
pub(super) struct Bandwidth(
    /// 0 is no limit. Orders nothing: the source uses each new value when it reads it.
    Arc<AtomicU64>,
);

impl Bandwidth {
    pub(super) fn new(bytes: Option<u64>) -> Self {
        Self(Arc::new(AtomicU64::new(bytes.unwrap_or(0))))
    }

    pub(super) fn set(&self, bytes: Option<u64>) {
        self.0.store(bytes.unwrap_or(0), Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|bytes| *bytes > 0)
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum At {
    #[default]
    Before,
    Paused,
    /// The pause was ended, or there is no migration to continue.
    Over,
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, At> {
        self.at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_while(&self, place: At) -> MutexGuard<'_, At> {
        let mut at = self.lock();
        while *at == place {
            at = self.changed.wait(at).unwrap_or_else(PoisonError::into_inner);
        }
        at
    }
}

impl Wake for Inner {
    fn wake(&self) {
        *self.lock() = At::Over;
        self.changed.notify_all();
    }
}
