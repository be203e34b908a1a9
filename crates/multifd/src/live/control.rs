//! What can be told to a migration under way: to go on where it waits before its switchover, another `downtime-limit`.
//!
//! The migration's thread stands in [`Gate::pause`] until [`Control::proceed`] or the stop; others may stand in
//! [`Control::wait_pre_switchover`] until it does, or until it is over.

use std::{
    fmt,
    sync::{Arc, PoisonError},
    time::Duration,
};

use super::{MigrateOptions, Progress};
use crate::{
    channel::{Stop, Wake},
    error::{Result, Usage},
    outcome::Status,
    sync_types::{Condvar, Mutex, MutexGuard},
};

/// Tells a migration under way what to do. Clones tell the same one.
#[derive(Clone)]
pub struct Control {
    gate: Arc<Inner>,
    progress: Progress,
}

impl Control {
    /// Another `downtime-limit`, 0 to 2000 s, from the end of the present pass on: for a migration that does not converge and
    /// whose user would rather have the guest stand for longer than start anew.
    ///
    /// # Errors
    /// [`Usage::OutOfRange`].
    pub fn set_downtime_limit(&self, limit: Duration) -> Result<()> {
        MigrateOptions::new().downtime_limit(limit).check()?;
        *self.gate.downtime_limit.lock().unwrap_or_else(PoisonError::into_inner) = Some(limit);
        Ok(())
    }

    /// Waits until the migration is in state `pre-switchover`, and is told so; or until it is over, and is told that it is
    /// not. One that does not pause is waited for to its end.
    pub fn wait_pre_switchover(&self) -> bool {
        *self.gate.wait_while(At::Before) == At::Paused
    }

    /// Goes on with a migration in state `pre-switchover`: QEMU's `migrate-continue`.
    ///
    /// # Errors
    /// [`Usage::NotPaused`] in any other state.
    pub fn proceed(&self) -> Result<()> {
        let mut at = self.gate.lock();
        if *at != At::Paused {
            return Err(Usage::NotPaused { met: self.progress.status() }.into());
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

/// The migration's end of it. When it is dropped, nobody waits any longer.
#[derive(Default)]
pub(super) struct Gate(Arc<Inner>);

impl Gate {
    pub(super) fn control(&self, progress: Progress) -> Control {
        Control { gate: self.0.clone(), progress }
    }

    /// The `downtime-limit` that has been told, if any.
    pub(super) fn downtime_limit(&self) -> Option<Duration> {
        *self.0.downtime_limit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits to be told to go on.
    ///
    /// # Errors
    /// The error that stopped the migration meanwhile.
    pub(super) fn pause(&self, progress: &Progress, stop: &Stop) -> Result<()> {
        // Under the lock: whoever sees the state can tell it to go on.
        let mut at = self.0.lock();
        progress.advance(Status::PreSwitchover)?;
        *at = At::Paused;
        drop(at);
        self.0.changed.notify_all();
        // A stop that has happened wakes at once, so none is missed.
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
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum At {
    #[default]
    Before,
    Paused,
    /// It has been told to go on, or there is nothing to go on with.
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
