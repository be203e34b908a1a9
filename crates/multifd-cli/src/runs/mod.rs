//! One run of a verb that migrates a guest: what ends it early, and what shows it to other programs.
//!
//! ```text
//! verb ─ its numbers ─▶ Observed ─▶ metrics      --metrics: a file for a collector, written every few seconds
//! Stop ◀─ time_limit    --timeout         └─▶ control  --control: a socket for commands
//! ```
//!
//! A run exists before the migration and after it, so a failure at the first step is in the metrics as well.

mod control;
mod metrics;
mod observed;
mod page;
mod time_limit;

use std::sync::{Arc, Mutex, PoisonError};

use multifd::channel::Stop;

pub(crate) use self::observed::{Adjust, Limits};
use self::{control::Control, metrics::Metrics, observed::Observed, time_limit::TimeLimit};
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
    control: Option<Control>,
}

impl Run {
    /// Begins a run of `verb` from `file` or into it; `address` is the other side. `stop` ends it.
    ///
    /// # Errors
    /// If the metrics cannot be written, or the control socket cannot be made, or the system cannot start a thread.
    pub(crate) fn start(
        verb: &'static str,
        file: String,
        address: String,
        args: &RunArgs,
        stop: &Stop,
    ) -> Result<Self, While> {
        let observed = Arc::new(Observed::new(verb, file, address));
        let metrics = args.metrics.as_ref().map(|path| Metrics::start(path, &observed)).transpose()?;
        let control = args.control.as_ref().map(|path| Control::start(path, &observed, stop)).transpose()?;
        let limit = TimeLimit::start(args.timeout(), stop)?;
        Ok(Self { limit: Mutex::new(Some(limit)), observed, metrics, control })
    }

    /// From now on the run has the numbers of `shown`.
    pub(crate) fn show(&self, shown: Arc<dyn Shown>) {
        self.observed.show(shown);
    }

    /// From now on the limits of `adjusts` can be changed; none can, if it is `None`.
    pub(crate) fn adjusts(&self, adjusts: Option<Arc<dyn Adjust>>) {
        self.observed.adjusts(adjusts);
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
        drop(self.control.take());
        self.observed.ended(&ended);
        if let Some(metrics) = self.metrics.take() {
            metrics.end();
        }
        ended
    }
}
