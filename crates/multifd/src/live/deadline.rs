//! A deadline: for stopping the guest (`max-total-time`), or for handing it over once it is stopped.
//!
//! It waits in its own thread, because the migration's thread may be blocked in a channel's queue. It ends the
//! migration through the stop, like any other failure.

use std::{
    thread::{Builder, JoinHandle},
    time::Duration,
};

use crate::{
    channel::Stop,
    error::{Error, Result},
};

/// Until this value is dropped, the migration must finish in time.
pub(super) struct Deadline {
    /// Set to end the deadline's thread. This is not the migration's stop.
    done: Stop,
    thread: Option<JoinHandle<()>>,
}

impl Deadline {
    /// Makes `stop` fail after `left`, with the error that `late` returns at that time.
    ///
    /// # Errors
    /// If the system cannot start the thread.
    pub(super) fn start(
        left: Duration,
        stop: &Stop,
        late: impl FnOnce() -> Error + Send + 'static,
    ) -> Result<Self> {
        let done = Stop::new();
        let thread = Builder::new().name("multifddeadline".into()).spawn({
            let (done, stop) = (done.clone(), stop.clone());
            move || {
                if done.pause(left).is_ok() && !done.is_stopped() {
                    stop.fail(late());
                }
            }
        });
        let thread = thread.map_err(|error| Error::io("start a thread for a time limit", error))?;
        Ok(Self { done, thread: Some(thread) })
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        self.done.finish();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
