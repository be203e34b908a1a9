//! The time limit of a whole run: a thread fails the stop when the time is over. It ends when its handle is dropped.
//!
//! What cannot be stopped any more is not: a stop that happens after the guest was handed over has no effect.

use std::{
    sync::mpsc::{RecvTimeoutError, Sender, channel},
    thread::{Builder, JoinHandle},
    time::Duration,
};

use multifd::{Error, channel::Stop};

use crate::output::outcome::While;

/// Limits the time until it is dropped.
pub(super) struct TimeLimit {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl TimeLimit {
    /// Fails `stop` after `limit`, if there is one.
    ///
    /// # Errors
    /// If the system cannot start a thread.
    pub(super) fn start(limit: Option<Duration>, stop: &Stop) -> Result<Self, While> {
        let Some(limit) = limit else { return Ok(Self { end: None, thread: None }) };
        let ((end, ended), stop) = (channel::<()>(), stop.clone());
        let wait = move || {
            // Nothing is ever sent: the wait ends when the other end is dropped.
            if ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                stop.fail(over(limit));
            }
        };
        let thread = Builder::new().name("timeout".into()).spawn(wait);
        let thread = thread.map_err(|error| While::new("cannot start a thread for --timeout", error))?;
        Ok(Self { end: Some(end), thread: Some(thread) })
    }
}

impl Drop for TimeLimit {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn over(limit: Duration) -> Error {
    Error::text(format!(
        "the whole run was not complete after {} s, which is its limit (--timeout)",
        limit.as_secs_f64()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_fails_after_the_limit_and_not_after_the_drop() {
        let (stop, spared) = (Stop::new(), Stop::new());
        drop(TimeLimit::start(Some(Duration::from_millis(50)), &spared).unwrap());
        let _limit = TimeLimit::start(Some(Duration::from_millis(50)), &stop).unwrap();
        let error = stop.pause(Duration::from_secs(60)).unwrap_err();
        assert!(error.to_string().contains("after 0.05 s"), "{error}");
        assert!(!spared.is_stopped());
        drop(TimeLimit::start(Some(Duration::MAX), &spared).unwrap());
    }
}
