//! What the jobs do at present: for the signals, which end them, and for the service manager.

use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use multifd::channel::Stop;

use crate::service;

/// The state of all jobs, which they share.
pub(super) struct Crew {
    state: Mutex<State>,
    /// The end has begun.
    closes: Condvar,
}

struct State {
    /// The stop of the machine that each job waits for or receives.
    jobs: Vec<Doing>,
    closing: bool,
    cancelled: bool,
    /// The number of machines that have begun to arrive.
    machines: u64,
    received: u64,
    failed: u64,
}

#[derive(Clone)]
enum Doing {
    Nothing,
    /// No source is here.
    Waits(Stop),
    Receives(Stop),
}

impl Crew {
    /// This many jobs, which do nothing yet.
    pub(super) fn new(jobs: usize) -> Self {
        let state = State {
            jobs: vec![Doing::Nothing; jobs],
            closing: false,
            cancelled: false,
            machines: 0,
            received: 0,
            failed: 0,
        };
        Self { state: Mutex::new(state), closes: Condvar::new() }
    }

    /// Job `job` begins to wait for a source; `false` if it must end instead.
    pub(super) fn waits(&self, job: u64, stop: &Stop) -> bool {
        let mut state = self.lock();
        if !state.closing {
            state.set(job, Doing::Waits(stop.clone()));
        }
        !state.closing
    }

    /// The source of job `job` is here. Returns the number of the machine, from 1.
    pub(super) fn receives(&self, job: u64, stop: &Stop) -> u64 {
        let mut state = self.lock();
        state.set(job, Doing::Receives(stop.clone()));
        state.machines += 1;
        let number = state.machines;
        drop(state);
        self.report();
        number
    }

    /// The machine of job `job` was received, or has failed.
    pub(super) fn ended(&self, job: u64, received: bool) {
        let mut state = self.lock();
        state.set(job, Doing::Nothing);
        if received {
            state.received += 1;
        } else {
            state.failed += 1;
        }
        drop(state);
        self.report();
    }

    /// Ends the jobs that wait for a source. The others receive their machine and end then.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closing = true;
        let waiting: Vec<Stop> = state.jobs.iter().filter_map(Doing::waiting).cloned().collect();
        drop(state);
        self.closes.notify_all();
        waiting.iter().for_each(Stop::cancel);
    }

    /// Ends all jobs, and cancels what they receive.
    pub(super) fn cancel(&self) {
        self.close();
        let mut state = self.lock();
        let running: Vec<Stop> = state.jobs.iter().filter_map(Doing::running).cloned().collect();
        state.cancelled = !running.is_empty();
        drop(state);
        running.iter().for_each(Stop::cancel);
    }

    pub(super) fn is_closing(&self) -> bool {
        self.lock().closing
    }

    /// Whether a machine that was arriving was cancelled.
    pub(super) fn is_cancelled(&self) -> bool {
        self.lock().cancelled
    }

    /// Waits for this time, or until the end begins.
    pub(super) fn pause(&self, time: Duration) {
        let state = self.lock();
        let waited = self.closes.wait_timeout_while(state, time, |state| !state.closing);
        drop(waited);
    }

    /// Informs the service manager.
    pub(super) fn report(&self) {
        let state = self.lock();
        let running = state.jobs.iter().filter_map(Doing::running).count();
        let line = format!(
            "{running} of {} jobs receive a machine; {} received, {} failed",
            state.jobs.len(),
            state.received,
            state.failed
        );
        drop(state);
        service::status(&line);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn set(&mut self, job: u64, doing: Doing) {
        let place = usize::try_from(job).ok().and_then(|job| self.jobs.get_mut(job.checked_sub(1)?));
        if let Some(place) = place {
            *place = doing;
        }
    }
}

impl Doing {
    fn waiting(&self) -> Option<&Stop> {
        if let Self::Waits(stop) = self { Some(stop) } else { None }
    }

    fn running(&self) -> Option<&Stop> {
        if let Self::Receives(stop) = self { Some(stop) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_signal_ends_the_jobs_that_wait_and_the_second_one_all() {
        let crew = Crew::new(2);
        let (waiting, running) = (Stop::new(), Stop::new());
        assert!(crew.waits(1, &waiting) && crew.waits(2, &running));
        assert_eq!(crew.receives(2, &running), 1);
        crew.close();
        assert!(waiting.is_stopped() && !running.is_stopped() && crew.is_closing());
        assert!(!crew.waits(1, &Stop::new()), "no job begins again");
        assert!(!crew.is_cancelled());
        crew.cancel();
        assert!(running.is_stopped() && crew.is_cancelled());
    }

    #[test]
    fn second_signal_that_finds_nothing_running_cancels_nothing() {
        let crew = Crew::new(1);
        let stop = Stop::new();
        assert!(crew.waits(1, &stop));
        crew.receives(1, &stop);
        crew.close();
        crew.ended(1, true);
        crew.cancel();
        assert!(!crew.is_cancelled() && !stop.is_stopped());
    }

    #[test]
    fn pause_ends_when_the_end_begins() {
        let crew = Crew::new(1);
        crew.close();
        let start = std::time::Instant::now();
        crew.pause(Duration::from_secs(60));
        assert!(start.elapsed() < Duration::from_secs(30));
    }
}
