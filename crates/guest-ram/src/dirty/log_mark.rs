//! A moment of a dirty log.

/// A moment of a [`KeptLog`](crate::KeptLog) at which the guest was stopped and no page was dirty. Only this log knows what was
/// written after it. It means nothing to another log or another process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogMark {
    pub(super) log: u64,
    pub(super) at: u64,
}
