//! Points in time that a limit makes.

use std::time::Duration;

use crate::sync_types::Instant;

/// When `limit` from now on is over; a limit beyond the clock's range is as good as a century.
pub(crate) fn deadline(limit: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(limit).unwrap_or_else(|| now + CENTURY)
}

const CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
