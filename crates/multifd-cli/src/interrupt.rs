//! Signals. The first interrupt cancels the migration in order, the second one ends the process; `receive --dir` counts them
//! for itself. A file that reaches
//! the limit of its size causes an error of the write and does not end the process. Exit statuses of children are kept.
//!
//! UNSAFETY: signals are set to be ignored, or to their default, which runs no code of ours.
#![expect(unsafe_code, reason = "sets what is done with two signals")]

use std::{
    process,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use multifd::channel::Stop;

use crate::output::outcome::Failure;

/// Makes an interrupt or a termination signal cancel the migration.
pub(crate) fn cancels(stop: &Stop) -> Result<(), Failure> {
    let stop = stop.clone();
    counts(move |count| {
        if count > 1 {
            process::exit(130);
        }
        stop.cancel();
    })
}

/// Calls `act` for each interrupt or termination signal, with the number of signals so far.
pub(crate) fn counts(act: impl Fn(u32) + Send + Sync + 'static) -> Result<(), Failure> {
    let (act, count) = (Arc::new(act), AtomicU32::new(0));
    Ok(ctrlc::set_handler(move || {
        let count = count.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        // In another thread, so that a second signal is handled while what the first one wakes is slow.
        let acts = act.clone();
        let thread = thread::Builder::new().name("interrupt".into()).spawn(move || acts(count));
        if thread.is_err() {
            act(count);
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
