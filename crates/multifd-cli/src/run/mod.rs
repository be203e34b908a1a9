//! One run of a verb that migrates a guest: what ends it early, and what shows it to other programs.
//!
//! ```text
//! verb ─ its numbers ─▶ Observed ─▶ metrics      --metrics: a file for a collector, written every few seconds
//! Stop ◀─ time_limit    --timeout
//! ```
//!
//! A run exists before the migration and after it, so a failure at the first step is in the metrics as well.

mod metrics;
mod observed;
mod page;
mod time_limit;

use std::sync::{Arc, Mutex, PoisonError};

use multifd::channel::Stop;

use self::{metrics::Metrics, observed::Observed, time_limit::TimeLimit};
use crate::{
    args::RunArgs,
    output::{
        display::Shown,
        outcome::{Failure, While},
        report::Report,
    },
};

/// A run, until its end.
pub(crate) struct Run {
    /// Only taken out and dropped.
    limit: Mutex<Option<TimeLimit>>,
    observed: Arc<Observed>,
    metrics: Option<Metrics>,
}

impl Run {
    /// Begins a run of `verb` from `file` or into it; `address` is the other side. `stop` ends it.
    ///
    /// # Errors
    /// If the metrics cannot be written, or the system cannot start a thread.
    pub(crate) fn start(
        verb: &'static str,
        file: String,
        address: String,
        args: &RunArgs,
        stop: &Stop,
    ) -> Result<Self, While> {
        let observed = Arc::new(Observed::new(verb, file, address));
        let metrics = args.metrics.as_ref().map(|path| Metrics::start(path, &observed)).transpose()?;
        let limit = TimeLimit::start(args.timeout(), stop)?;
        Ok(Self { limit: Mutex::new(Some(limit)), observed, metrics })
    }

    /// From now on the run has the numbers of `shown`.
    pub(crate) fn show(&self, shown: Arc<dyn Shown>) {
        self.observed.show(shown);
    }

    /// The run has this report, which is its last one.
    pub(crate) fn reported(&self, report: &Report) {
        self.observed.reported(report);
    }

    /// The guest is handed over: from now on nothing ends the run early.
    pub(crate) fn handed_over(&self) {
        let limit = self.limit.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(limit);
    }

    /// Ends the run, and returns how it ended.
    pub(crate) fn end(mut self, ended: Result<(), Failure>) -> Result<(), Failure> {
        self.handed_over();
        self.observed.ended(&ended);
        if let Some(metrics) = self.metrics.take() {
            metrics.end();
        }
        ended
    }
}
