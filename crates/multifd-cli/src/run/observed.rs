//! What is known about a run, for other threads: its numbers while it runs, and its end.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use multifd::live::Status;

use crate::output::{
    display::{Shown, WAITS},
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

#[derive(Default)]
struct State {
    /// The migration, when there is one.
    shown: Option<Arc<dyn Shown>>,
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
            Err(_) if report.status != Status::Completed.as_str() => Status::Failed.as_str(),
            _ => report.status,
        };
        let mut state = self.lock();
        state.last = Some(report);
        state.end = Some(End { time: SystemTime::now(), exit_code });
        // The migration is over, and its memory is not needed any more.
        state.shown = None;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
