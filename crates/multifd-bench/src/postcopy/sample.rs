//! What is measured of one migration.

use std::time::Duration;

/// One migration.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sample {
    /// Faults that were waited for, or requests.
    pub(super) faults: u64,
    pub(super) p50: Duration,
    pub(super) p99: Duration,
    /// The time that the guest has waited, together.
    pub(super) blocked: Duration,
    pub(super) downtime: Duration,
    pub(super) total: Duration,
    pub(super) bytes: u64,
}
