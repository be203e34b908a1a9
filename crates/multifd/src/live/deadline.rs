//! A time by which something must be over: the guest stopped (`max-total-time`), or handed over once it stands.
//!
//! A thread of its own waits, for the migration's may stand in a channel's queue that does not move. What ends it is the
//! one stop, as any other failure does.

use std::{
    thread::{Builder, JoinHandle},
    time::Duration,
};

use crate::{
    channel::Stop,
    error::{Error, Result},
};

/// Until it is dropped, the migration has to be done in time.
pub(super) struct Deadline {
    /// Set when the thread is to end. It is not the migration's.
    done: Stop,
    thread: Option<JoinHandle<()>>,
}

impl Deadline {
    /// Has `stop` fail after `left`, with what `late` says then.
    ///
    /// # Errors
    /// If the system refuses the thread.
    pub(super) fn start(
        left: Duration,
        stop: &Stop,
        late: impl FnOnce() -> Error + Send + 'static,
    ) -> Result<Self> {
        let done = Stop::new();
        let thread = Builder::new().name("multifddeadline".into()).spawn({
            let (done, stop) = (done.clone(), stop.clone());
            move || {
                if done.pause(left).is_ok() {
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
        self.done.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
