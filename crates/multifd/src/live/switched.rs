//! A migration that has switched to post-copy: its passes are over, and what the destination lacks remains to be sent.

use std::{fmt, sync::Arc, time::Instant};

use super::{Guest, MigrationInfo, Progress, driver::Stopped, plan::Plan};
use crate::{
    channel::Stop,
    error::{Error, Result},
    outcome::Status,
    ram::{DirtyLog, PageBitmap, RamBlocks},
    send::Sender,
};

/// How [`Migration::run_postcopy`](super::Migration::run_postcopy) has ended without an error.
#[derive(Debug)]
#[must_use = "a migration that has switched is not over"]
pub enum Ended {
    /// The destination has the guest, and all of its RAM.
    Completed(Box<MigrationInfo>),
    /// The destination was sent the command to run the guest, and lacks pages.
    Switched(Box<Switched>),
}

/// A migration that has switched to post-copy. The guest is stopped here and must not run, unless [`back`](Self::back) is called
/// because the destination has reported that it does not have it.
pub struct Switched {
    pub(super) plan: Plan,
    pub(super) sender: Option<Sender>,
    pub(super) lacking: Vec<PageBitmap>,
    pub(super) stopped_at: Instant,
    pub(super) stopped: Stopped,
}

impl fmt::Debug for Switched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Switched").field("status", &self.progress().status()).finish_non_exhaustive()
    }
}

impl Switched {
    /// The pages that the destination lacked at the switch, one bitmap for each block.
    pub fn lacking(&self) -> &[PageBitmap] {
        &self.lacking
    }

    /// Takes the channels, all of which have sent their pages and a SYNC; `None` without channels, and the second time.
    pub fn take_sender(&mut self) -> Option<Sender> {
        self.sender.take()
    }

    /// The stop of the migration.
    pub fn stop(&self) -> &Stop {
        &self.plan.stop
    }

    /// The numbers of the migration.
    pub fn progress(&self) -> Progress {
        self.plan.progress.clone()
    }

    /// The blocks of the machine.
    pub fn blocks(&self) -> &Arc<RamBlocks> {
        &self.plan.blocks
    }

    /// To be called when the destination confirms that it runs the guest: the downtime ends then.
    pub fn on_started(&self) -> impl FnOnce() + Send + 'static {
        let (progress, stopped_at) = (self.progress(), self.stopped_at);
        move || progress.downtime(stopped_at.elapsed())
    }

    /// Changes the state to `postcopy-active`, `postcopy-paused` or `postcopy-recover`.
    ///
    /// # Errors
    /// [`Usage::IllegalTransition`](crate::error::Usage::IllegalTransition).
    pub fn becomes(&self, status: Status) -> Result<()> {
        self.plan.progress.advance(status)
    }

    /// The destination has all of RAM.
    ///
    /// # Errors
    /// [`Usage::IllegalTransition`](crate::error::Usage::IllegalTransition).
    pub fn completed(self) -> Result<MigrationInfo> {
        self.plan.progress.advance(Status::Completed)?;
        Ok(self.plan.progress.info())
    }

    /// The destination has reported, with this error, that it does not have the guest: it continues here if it ran. The dirty bits of
    /// all pages are put back. Returns the error to report.
    pub fn back(self, error: Error, log: &mut dyn DirtyLog, guest: &mut dyn Guest) -> Error {
        // The stop may have failed before, because connections broke.
        match self.plan.go_back(error.clone(), self.sender, self.stopped, log, guest) {
            not_resumed @ Error::NotResumed { .. } => not_resumed,
            _ => error,
        }
    }
}
