//! Converts time limits to points in time.

use std::time::Duration;

use crate::sync_types::Instant;

/// The time at which `limit` from now has passed. A limit beyond the clock's range becomes a century.
pub(crate) fn deadline(limit: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(limit).unwrap_or_else(|| now + CENTURY)
}

const CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
