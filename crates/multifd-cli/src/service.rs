//! What a service manager passes to the program, and what is reported to it: systemd's protocols, in environment variables.
//!
//! ```text
//! LISTEN_PID, LISTEN_FDS ─▶ sockets    listening sockets that were opened before this process (socket activation)
//! NOTIFY_SOCKET ◀─ ready, status, stopping    datagrams, for a unit of Type=notify
//! ```
//!
//! Without these variables nothing happens. A service manager that cannot be informed is a warning, because the migration does not
//! depend on it.

use std::{io, os::fd::RawFd};

use sd_notify::NotifyState;

/// The listening sockets that were passed to this process, in the order of the unit.
///
/// # Errors
/// If there is none, with the reason.
pub(crate) fn sockets() -> io::Result<Vec<RawFd>> {
    let sockets: Vec<RawFd> = sd_notify::listen_fds()?.collect();
    if sockets.is_empty() {
        let why = "no sockets were passed: the address systemd is for a service that a socket unit starts (LISTEN_PID, \
                   LISTEN_FDS)";
        return Err(io::Error::new(io::ErrorKind::NotFound, why));
    }
    Ok(sockets)
}

/// The program listens.
pub(crate) fn ready() {
    notify(&[NotifyState::Ready]);
}

/// The program ends in order.
pub(crate) fn stopping() {
    notify(&[NotifyState::Stopping]);
}

/// What the program does at present, in one line.
pub(crate) fn status(line: &str) {
    notify(&[NotifyState::Status(line)]);
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "the service manager cannot be informed (NOTIFY_SOCKET)");
    }
}
