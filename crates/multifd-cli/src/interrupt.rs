//! Signals: an interrupt cancels the migration in order, the second one ends the process; a file that has come to
//! the limit of its size is an error of the write that meets it, and does not end the process; the ends of children are
//! kept.
//!
//! UNSAFETY: signals are set to be ignored, or to their default, which runs no code of ours.
#![expect(unsafe_code, reason = "sets what is done with two signals")]

use std::{
    process,
    sync::atomic::{AtomicBool, Ordering},
};

use multifd::channel::Stop;

use crate::output::outcome::Failure;

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

/// Has the end of a child kept until it is asked for, whatever the parent process has made of that: `exec:` and `demo` go by
/// it.
pub(crate) fn keeps_ends_of_children() {
    // SAFETY: the number is a signal's, and its default action installs no handler.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// Has a write beyond the limit of a file's size fail with an error, which tells more than a killed process and
/// leaves nothing behind.
pub(crate) fn spares_large_files() {
    // SAFETY: the number is a signal's, and to ignore it installs no handler.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}
