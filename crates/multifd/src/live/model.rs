//! Models of a migration that waits before its switchover.
//!
//! Each is run under many schedules by the package `multifd-models`; see `docs/concurrency.md`.

use super::{Progress, Status, control::Gate};
use crate::{
    channel::Stop,
    error::{Error, Usage},
    ram::PageSize,
    sync_types::model::thread,
};

fn active() -> Progress {
    let progress = Progress::new(0, PageSize::KIB_4);
    progress.advance(Status::Setup).expect("the first");
    progress.advance(Status::Active).expect("behind set-up");
    progress
}

/// One waits for the pause and lets it go on, one cancels, whenever.
pub fn a_pause_before_the_switchover_ends_when_told_or_with_the_stop() {
    let (stop, progress, gate) = (Stop::new(), active(), Gate::default());
    let control = gate.control(progress.clone());
    let telling =
        thread::spawn(move || if control.wait_pre_switchover() { control.proceed().is_ok() } else { false });
    let cancelling = {
        let stop = stop.clone();
        thread::spawn(move || stop.cancel())
    };
    let paused = gate.pause(&progress, &stop);
    assert!(paused.is_ok() || paused.is_err_and(|error| error.is_cancelled()));
    telling.join().expect("no panic");
    cancelling.join().expect("no panic");
}

/// The migration ends without a pause, while somebody waits for one.
pub fn whoever_waits_for_a_pause_is_told_that_there_is_none() {
    let (progress, gate) = (active(), Gate::default());
    let control = gate.control(progress);
    let waiting = thread::spawn(move || control.wait_pre_switchover());
    drop(gate);
    assert!(!waiting.join().expect("no panic"));
}

/// Nobody cancels: the one that was told to go on goes on.
pub fn a_pause_that_is_told_to_go_on_goes_on() {
    let (stop, progress, gate) = (Stop::new(), active(), Gate::default());
    let control = gate.control(progress.clone());
    let telling = thread::spawn(move || control.wait_pre_switchover() && control.proceed().is_ok());
    gate.pause(&progress, &stop).expect("told to go on");
    assert!(telling.join().expect("no panic"));
}

/// Somebody tells it to go on without having waited: that is taken, or refused for another state than the one that it is for.
pub fn whoever_sees_the_pause_can_end_it() {
    let (stop, progress, gate) = (Stop::new(), active(), Gate::default());
    let control = gate.control(progress.clone());
    let telling = {
        let stop = stop.clone();
        thread::spawn(move || {
            if let Err(refused) = control.proceed() {
                let met = Error::from(Usage::NotPaused { met: Status::Active });
                assert_eq!(refused.to_string(), met.to_string());
                stop.cancel();
            }
        })
    };
    let paused = gate.pause(&progress, &stop);
    assert!(paused.is_ok() || paused.is_err_and(|error| error.is_cancelled()));
    telling.join().expect("no panic");
}
