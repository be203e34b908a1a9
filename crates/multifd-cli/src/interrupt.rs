//! Ctrl-C: the first one cancels the migration in order, the second one ends the process.

use std::{
    process,
    sync::atomic::{AtomicBool, Ordering},
};

use multifd::channel::Stop;

use crate::outcome::Failure;

/// Has an interrupt or a termination signal cancel the migration.
pub(crate) fn cancels(stop: &Stop) -> Result<(), Failure> {
    let (stop, again) = (stop.clone(), AtomicBool::new(false));
    Ok(ctrlc::set_handler(move || {
        if again.swap(true, Ordering::Relaxed) {
            process::exit(130);
        }
        stop.cancel();
    })?)
}
