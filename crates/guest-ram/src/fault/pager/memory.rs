//! The memory that a pager serves: the calls of an armament, and a wait that can be woken.

use std::os::fd::OwnedFd;

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, eventfd, poll},
    io::{Errno, read, write},
};
use zerocopy::IntoBytes;

use crate::{BlockIndex, BlockOffset};

use super::super::{Armed, FaultError, FaultEvent, Placed, Protection};

/// What the threads of a pager do to memory. A model of the threads has memory of its own.
pub(crate) trait Serve: Send + Sync {
    /// Reads one message, if there is one.
    fn read(&self, events: &mut Vec<FaultEvent>) -> Result<(), FaultError>;
    fn copy(&self, block: BlockIndex, offset: BlockOffset, bytes: &[u8]) -> Result<Placed, FaultError>;
    /// Like [`copy`](Self::copy), for private memory. It may move the pages of `bytes` instead, which are zero then.
    fn take(&self, block: BlockIndex, offset: BlockOffset, bytes: &mut [u8]) -> Result<Placed, FaultError> {
        self.copy(block, offset, bytes)
    }
    /// Whether pages are moved.
    fn takes(&self) -> bool {
        false
    }
    fn zero(&self, block: BlockIndex, offset: BlockOffset, len: u64) -> Result<Placed, FaultError>;
    fn poison(&self, block: BlockIndex, offset: BlockOffset, len: u64) -> Result<Placed, FaultError>;
    fn wake(&self, block: BlockIndex, offset: BlockOffset, len: u64) -> Result<(), FaultError>;
    /// Waits for a message, for [`notify`](Self::notify), or for [`stop`](Self::stop).
    fn wait(&self) -> Result<(), FaultError>;
    /// Ends the wait of one thread, or of the next one that begins to wait.
    fn notify(&self);
    /// Ends all waits, and those to come.
    fn stop(&self);
    /// Memory is no longer armed.
    fn disarm(&self);
    /// Memory stays armed for good, because what is missing in it must not read as zero.
    fn stay_armed(&self);
}

/// Memory of a process.
pub(crate) struct ArmedMemory {
    pub(crate) armed: Armed,
    work: OwnedFd,
    stop: OwnedFd,
}

impl ArmedMemory {
    pub(crate) fn new(armed: Armed) -> Result<Self, FaultError> {
        let new = |flags| {
            let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK | flags;
            eventfd(0, flags).map_err(FaultError::system("create an event descriptor"))
        };
        Ok(Self { armed, work: new(EventfdFlags::SEMAPHORE)?, stop: new(EventfdFlags::empty())? })
    }
}

impl Serve for ArmedMemory {
    fn read(&self, events: &mut Vec<FaultEvent>) -> Result<(), FaultError> {
        self.armed.read_some(1, events)
    }

    fn copy(&self, block: BlockIndex, offset: BlockOffset, bytes: &[u8]) -> Result<Placed, FaultError> {
        self.armed.copy(block, offset, bytes, Protection::Writable)
    }

    fn take(&self, block: BlockIndex, offset: BlockOffset, bytes: &mut [u8]) -> Result<Placed, FaultError> {
        match self.armed.take(block, offset, bytes) {
            Some(placed) => Ok(placed),
            None => self.copy(block, offset, bytes),
        }
    }

    fn takes(&self) -> bool {
        self.armed.takes()
    }

    fn zero(&self, block: BlockIndex, offset: BlockOffset, len: u64) -> Result<Placed, FaultError> {
        self.armed.zero(block, offset, len)
    }

    fn poison(&self, block: BlockIndex, offset: BlockOffset, len: u64) -> Result<Placed, FaultError> {
        self.armed.poison(block, offset, len)
    }

    fn wake(&self, block: BlockIndex, offset: BlockOffset, len: u64) -> Result<(), FaultError> {
        self.armed.wake(block, offset, len)
    }

    fn wait(&self) -> Result<(), FaultError> {
        let mut what = [
            PollFd::new(&self.armed, PollFlags::IN),
            PollFd::new(&self.work, PollFlags::IN),
            PollFd::new(&self.stop, PollFlags::IN),
        ];
        match poll(&mut what, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(FaultError::system("wait for page faults")(error)),
        }
        let [events, work, _] = &what;
        // It takes one notification. Another thread may have been faster.
        if work.revents().contains(PollFlags::IN) {
            let _ = read(&self.work, &mut [0_u8; 8]);
        }
        // The last mapping of the process has gone.
        if events.revents().intersects(PollFlags::HUP | PollFlags::NVAL) {
            return Err(FaultError::ProcessEnded);
        }
        Ok(())
    }

    fn notify(&self) {
        // It can only fail when the counter is full, and then the descriptor is readable.
        let _ = write(&self.work, 1_u64.as_bytes());
    }

    fn stop(&self) {
        let _ = write(&self.stop, 1_u64.as_bytes());
    }

    fn disarm(&self) {
        self.armed.disarm();
    }

    fn stay_armed(&self) {
        self.armed.stay_armed();
    }
}
