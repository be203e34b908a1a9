//! `max-total-time`: ends a migration whose guest still runs when the time is over.
//!
//! A thread of its own waits, for the migration's may stand in a channel's queue that does not move. What ends it is the
//! one stop, as any other failure does.

use std::{
    io,
    thread::{Builder, JoinHandle},
    time::Duration,
};

use super::Progress;
use crate::{channel::Stop, error::Error};

/// Until it is dropped, the migration has to be done in time.
pub(super) struct Deadline {
    /// Set when the thread is to end. It is not the migration's.
    done: Stop,
    thread: Option<JoinHandle<()>>,
}

impl Deadline {
    /// Has `stop` fail after `left`, with what `progress` knows then.
    pub(super) fn start(
        (limit, left): (Duration, Duration),
        stop: &Stop,
        progress: &Progress,
    ) -> io::Result<Self> {
        let done = Stop::new();
        let thread = Builder::new().name("multifddeadline".into()).spawn({
            let (done, stop, progress) = (done.clone(), stop.clone(), progress.clone());
            move || {
                if done.pause(left).is_ok() {
                    stop.fail(Error::NotConverged(Box::new(progress.not_converged_in(limit))));
                }
            }
        })?;
        Ok(Self { done, thread: Some(thread) })
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        self.done.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
