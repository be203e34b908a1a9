//! The limit of the walk, which other threads may change.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use multifd::postcopy::Schedule;

/// Changes a post-copy migration while it runs, from any thread. Clones change the same one.
#[derive(Clone, Debug, Default)]
pub struct PostcopyControl(Arc<Mutex<Walk>>);

#[derive(Debug, Default)]
struct Walk {
    limit: Option<u64>,
    /// The schedule of the present connections.
    schedule: Option<Arc<Schedule>>,
}

impl PostcopyControl {
    pub(super) fn new(limit: Option<u64>) -> Self {
        Self(Arc::new(Mutex::new(Walk { limit, schedule: None })))
    }

    /// Limits pages that nobody requests to this number of bytes in a second from now on, as
    /// [`PostcopyOptions::max_postcopy_bandwidth`](super::PostcopyOptions::max_postcopy_bandwidth) does from the beginning.
    /// `None` and 0 are no limit.
    pub fn set_max_postcopy_bandwidth(&self, bytes: Option<u64>) {
        let mut walk = self.lock();
        walk.limit = bytes;
        walk.apply();
    }

    /// From now on the limit is that of this schedule.
    pub(super) fn serves(&self, schedule: &Arc<Schedule>) {
        let mut walk = self.lock();
        walk.schedule = Some(schedule.clone());
        walk.apply();
    }

    fn lock(&self) -> MutexGuard<'_, Walk> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Walk {
    fn apply(&self) {
        if let Some(schedule) = &self.schedule {
            schedule.limit_walk(self.limit.filter(|bytes| *bytes > 0));
        }
    }
}
