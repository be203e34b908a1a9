//! What is known about a run, for other threads: its numbers while it runs, and its end.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use multifd::live::Status;

use crate::output::{
    display::{PAUSED, Shown, WAITS},
    outcome::Failure,
    report::Report,
};

/// A run, as other threads see it.
pub(super) struct Observed {
    pub(super) verb: &'static str,
    pub(super) file: String,
    /// The other side, as the command line names it.
    pub(super) address: String,
    pub(super) start: SystemTime,
    state: Mutex<State>,
}

/// Limits of a migration to be changed while it runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Bytes per second; 0 is no limit.
    pub(crate) max_bandwidth: Option<u64>,
    pub(crate) downtime_limit: Option<Duration>,
    /// Bytes per second; 0 is no limit.
    pub(crate) max_postcopy_bandwidth: Option<u64>,
}

/// A migration whose limits can be changed while it runs.
pub(crate) trait Adjust: Send + Sync {
    /// Changes these limits, which are in their ranges.
    ///
    /// # Errors
    /// Why they cannot be changed.
    fn adjust(&self, limits: &Limits) -> Result<(), String>;
}

#[derive(Default)]
struct State {
    /// The migration, when there is one.
    shown: Option<Arc<dyn Shown>>,
    adjusts: Option<Arc<dyn Adjust>>,
    /// The last report.
    last: Option<Report>,
    end: Option<End>,
}

/// The end of a run.
#[derive(Clone, Copy, Debug)]
pub(super) struct End {
    pub(super) time: SystemTime,
    pub(super) exit_code: u8,
}

impl Observed {
    pub(super) fn new(verb: &'static str, file: String, address: String) -> Self {
        Self { verb, file, address, start: SystemTime::now(), state: Mutex::default() }
    }

    pub(super) fn show(&self, shown: Arc<dyn Shown>) {
        self.lock().shown = Some(shown);
    }

    /// From now on the limits of `adjusts` can be changed; none can, if it is `None`.
    pub(super) fn adjusts(&self, adjusts: Option<Arc<dyn Adjust>>) {
        self.lock().adjusts = adjusts;
    }

    /// Changes limits of the migration.
    ///
    /// # Errors
    /// Why they cannot be changed.
    pub(super) fn adjust(&self, limits: &Limits) -> Result<(), String> {
        let adjusts = self.lock().adjusts.clone();
        match adjusts {
            Some(adjusts) => adjusts.adjust(limits),
            None if self.verb == "receive" => {
                Err("this is the destination, and the limits are those of the source: set them there".into())
            }
            None => Err("there is nothing to adjust: the migration has not begun, or it is over".into()),
        }
    }

    pub(super) fn reported(&self, report: &Report) {
        self.lock().last = Some(report.clone());
    }

    /// The report of this moment, and the end if there was one.
    pub(super) fn now(&self) -> (Report, Option<End>) {
        let state = self.lock();
        let (shown, last, end) = (state.shown.clone(), state.last.clone(), state.end);
        // The counters have locks of their own.
        drop(state);
        let report = last.or_else(|| shown.map(|shown| shown.report()));
        (report.unwrap_or(Report { status: WAITS, ..Report::default() }), end)
    }

    /// Keeps how the run ended. A machine that was stored stays `completed`, also if something after it has failed.
    pub(super) fn ended(&self, ended: &Result<(), Failure>) {
        let (mut report, _) = self.now();
        let exit_code = ended.as_ref().err().map_or(0, Failure::code);
        report.status = match ended {
            Err(Failure::Interrupted) => Status::Cancelled.as_str(),
            // The guest is at the destination, and the migration can be resumed.
            Err(_) if report.status == PAUSED => PAUSED,
            Err(_) if report.status != Status::Completed.as_str() => Status::Failed.as_str(),
            _ => report.status,
        };
        let mut state = self.lock();
        state.last = Some(report);
        state.end = Some(End { time: SystemTime::now(), exit_code });
        // The migration is over, and its memory is not needed any more.
        (state.shown, state.adjusts) = (None, None);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
