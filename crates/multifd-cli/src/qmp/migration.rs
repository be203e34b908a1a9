//! The states of a migration and of the guest, as QMP reports them, and the wait for them.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use multifd::error::UntrustedText;
use serde_json::{Map, Value, json};

use super::connection::{Qmp, QmpError};

/// What `query-migrate` says.
#[derive(Debug)]
pub(crate) struct Migration {
    pub(crate) status: MigrationStatus,
    fields: Map<String, Value>,
}

/// The status of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MigrationStatus {
    /// There was none.
    None,
    /// It runs, in any of its phases.
    Active,
    Completed,
    Failed,
    Cancelled,
}

impl MigrationStatus {
    fn of(text: Option<&str>) -> Self {
        match text {
            None | Some("none") => Self::None,
            Some("completed") => Self::Completed,
            Some("failed") => Self::Failed,
            Some("cancelled") => Self::Cancelled,
            // Later versions may have more phases.
            Some(_) => Self::Active,
        }
    }
}

impl Migration {
    /// Asks for the present state.
    pub(crate) fn query(qmp: &mut Qmp) -> Result<Self, QmpError> {
        let fields = qmp.query_all("query-migrate")?;
        Ok(Self { status: MigrationStatus::of(fields.get("status").and_then(Value::as_str)), fields })
    }

    /// Waits for the end of a migration, for at most `limit`. Returns the last state, which is
    /// [`Active`](MigrationStatus::Active) if it has not ended.
    pub(crate) fn wait(qmp: &mut Qmp, limit: Duration) -> Result<Self, QmpError> {
        let end = Instant::now() + limit;
        loop {
            let now = Self::query(qmp)?;
            if now.status != MigrationStatus::Active || Instant::now() >= end {
                return Ok(now);
            }
            sleep(EVERY);
        }
    }

    /// Cancels a migration that has not ended, while its connections are still open, and gives QEMU a moment to end it. Returns the
    /// state after that.
    ///
    /// If the connections are closed instead, the migration fails, and the next one can end QEMU with its guest (QEMU 10.0: 13
    /// of 90 attempts, up to 1 s after the failure) or is refused, as is every later one (QEMU 7.2). But they must be closed
    /// soon after: QEMU 7.2 waits without end for a channel that nobody reads.
    ///
    /// # Errors
    /// If the connection ended.
    pub(crate) fn cancel(qmp: &mut Qmp) -> Result<Self, QmpError> {
        let now = Self::query(qmp)?;
        if now.status != MigrationStatus::Active {
            return Ok(now);
        }
        // It may have ended just now; then there is nothing to cancel.
        match qmp.execute("migrate_cancel", json!({})) {
            Ok(_) | Err(QmpError::Refused { .. }) => Self::wait(qmp, CANCELS),
            Err(error) => Err(error),
        }
    }

    /// Lets a migration switch to post-copy, which `postcopy-ram` must allow. If it has ended in the meantime, nothing is done.
    ///
    /// # Errors
    /// If the connection ended, or QEMU refuses.
    pub(crate) fn start_postcopy(qmp: &mut Qmp) -> Result<(), QmpError> {
        match qmp.execute("migrate-start-postcopy", json!({})) {
            Ok(_) => Ok(()),
            Err(error @ QmpError::Refused { .. }) => match Self::query(qmp)?.status {
                MigrationStatus::Active => Err(error),
                _ => Ok(()),
            },
            Err(error) => Err(error),
        }
    }

    /// Lets a migration that [was interrupted](Self::is_paused) continue over new connections to `uri`.
    ///
    /// # Errors
    /// If the connection ended, or QEMU refuses.
    pub(crate) fn resume(qmp: &mut Qmp, uri: &str) -> Result<(), QmpError> {
        qmp.execute("migrate", json!({ "uri": uri, "resume": true })).map(drop)
    }

    /// [Cancels](Self::cancel) a migration that has not ended, and waits until QEMU has cleaned up. Returns the state after that.
    ///
    /// # Errors
    /// If the connection ended, or QEMU has not cleaned up in time.
    pub(crate) fn settle(qmp: &mut Qmp) -> Result<Self, QmpError> {
        let mut now = Self::cancel(qmp)?;
        if now.status == MigrationStatus::Active {
            now = Self::wait(qmp, SETTLES)?;
        }
        let end = Instant::now() + SETTLES;
        while !is_cleaned_up(qmp)? {
            if Instant::now() >= end {
                return Err(QmpError::NotCleanedUp);
            }
            sleep(OFTEN);
        }
        Ok(now)
    }

    /// The state, in QEMU's words.
    pub(crate) fn state(&self) -> UntrustedText {
        self.fields.get("status").and_then(Value::as_str).unwrap_or("none").into()
    }

    /// Whether post-copy was interrupted and can be resumed.
    pub(crate) fn is_paused(&self) -> bool {
        self.fields.get("status").and_then(Value::as_str) == Some("postcopy-paused")
    }

    /// The reason of a failure, or that there is none.
    pub(crate) fn why(&self) -> String {
        self.reason().map_or_else(|| "no reason is known".to_owned(), |why| why.to_string())
    }

    /// The reason of a failure, in QEMU's words.
    pub(crate) fn reason(&self) -> Option<UntrustedText> {
        self.fields.get("error-desc").and_then(Value::as_str).map(UntrustedText::from)
    }

    /// The number of passes over RAM, and one more for the first look at what is dirty.
    pub(crate) fn passes(&self) -> Option<u64> {
        self.fields.get("ram")?.get("dirty-sync-count")?.as_u64()
    }

    /// How long the guest was stopped, in milliseconds.
    pub(crate) fn downtime(&self) -> Option<u64> {
        self.fields.get("downtime").and_then(Value::as_u64)
    }
}

/// Whether nothing of an earlier migration is left: then it cannot be yanked any more.
fn is_cleaned_up(qmp: &mut Qmp) -> Result<bool, QmpError> {
    match qmp.execute("query-yank", json!({})) {
        Ok(instances) => Ok(!instances
            .as_array()
            .into_iter()
            .flatten()
            .any(|instance| instance.get("type").and_then(Value::as_str) == Some("migration"))),
        // Before QEMU 6.0.
        Err(QmpError::Refused { .. }) => {
            sleep(UNSEEN);
            Ok(true)
        }
        Err(error) => Err(error),
    }
}

/// The state of the guest in `query-status`, such as `running`, `paused` or `postmigrate`.
pub(crate) fn run_state(qmp: &mut Qmp) -> Result<String, QmpError> {
    let status = qmp.query("query-status", "status")?;
    status
        .as_str()
        .map(str::to_owned)
        .ok_or(QmpError::Incomplete { command: "query-status", lacks: "status" })
}

/// Lets the guest continue, and waits until it runs.
pub(crate) fn resume(qmp: &mut Qmp) -> Result<(), QmpError> {
    qmp.execute("cont", json!({}))?;
    let end = Instant::now() + RESUMED;
    while run_state(qmp)? != RUNNING {
        if Instant::now() >= end {
            return Err(QmpError::Silent { command: "cont".into(), limit: RESUMED });
        }
        sleep(EVERY);
    }
    Ok(())
}

pub(crate) const RUNNING: &str = "running";
/// How often QEMU is asked.
const EVERY: Duration = Duration::from_millis(100);
const OFTEN: Duration = Duration::from_millis(5);
/// The time in which a migration that was cancelled ends by itself.
const CANCELS: Duration = Duration::from_secs(1);
/// The time limit for the end of a migration that was cancelled.
const SETTLES: Duration = Duration::from_secs(30);
/// The time that a QEMU gets which does not show that it has cleaned up.
const UNSEEN: Duration = Duration::from_millis(500);
/// The time limit for a guest to continue.
const RESUMED: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phase_of_a_later_version_is_active() {
        assert_eq!(MigrationStatus::of(Some("some-new-phase")), MigrationStatus::Active);
        assert_eq!(MigrationStatus::of(None), MigrationStatus::None);
        assert_eq!(MigrationStatus::of(Some("failed")), MigrationStatus::Failed);
    }
}
