//! Signals. The first interrupt cancels the migration in order, the second one ends the process. A file that reaches
//! the limit of its size causes an error of the write and does not end the process. Exit statuses of children are kept.
//!
//! UNSAFETY: signals are set to be ignored, or to their default, which runs no code of ours.
#![expect(unsafe_code, reason = "sets what is done with two signals")]

use std::{
    process,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use multifd::channel::Stop;

use crate::output::outcome::Failure;

/// Makes an interrupt or a termination signal cancel the migration.
pub(crate) fn cancels(stop: &Stop) -> Result<(), Failure> {
    let (stop, again) = (stop.clone(), AtomicBool::new(false));
    Ok(ctrlc::set_handler(move || {
        if again.swap(true, Ordering::Relaxed) {
            process::exit(130);
        }
        // In another thread, so that a second signal is handled while what the cancel wakes is slow.
        let cancelled = stop.clone();
        let thread = thread::Builder::new().name("interrupt".into()).spawn(move || cancelled.cancel());
        if thread.is_err() {
            stop.cancel();
        }
    })?)
}

/// Makes the system keep the exit status of a child until it is read, regardless of the setting inherited from the
/// parent process: `exec:` and `demo` depend on it.
pub(crate) fn keeps_ends_of_children() {
    // SAFETY: the number is a signal's, and its default action installs no handler.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// Makes a write beyond the limit of a file's size fail with an error. This is more informative than a killed process,
/// and leaves nothing behind.
pub(crate) fn spares_large_files() {
    // SAFETY: the number is a signal's, and to ignore it installs no handler.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}
