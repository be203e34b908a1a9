//! A descriptor that wakes a thread in a poll.

use std::{io, os::fd::OwnedFd, sync::Arc};

use rustix::event::{EventfdFlags, eventfd};

use super::Wake;

/// A descriptor that becomes readable when woken; it is polled together with a socket.
pub(super) struct EventFd(OwnedFd);

impl EventFd {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    pub(super) fn fd(&self) -> &OwnedFd {
        &self.0
    }

    pub(super) fn drain(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl Wake for EventFd {
    fn wake(&self) {
        // The write can only fail when the counter is full, and then the descriptor is readable.
        let _ = rustix::io::write(&self.0, &1_u64.to_be_bytes());
    }
}
