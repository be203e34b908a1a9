//! Notices at once that the peer has closed a connection, or has sent its last message on it, while the connection's
//! owner waits for something else, such as blocked channels.
//!
//! It watches a descriptor of the connection and reports an error to the [`Stop`]. Its thread waits for events of the
//! system, consumes no bytes, and ends with the watch.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    thread::{Builder, JoinHandle},
    time::Duration,
};

use rustix::{
    buffer::spare_capacity,
    event::{
        Timespec,
        epoll::{self, CreateFlags, EventData, EventFlags},
    },
    io::Errno,
    net::{RecvFlags, recv},
};

use super::{Stop, Wake, clock::deadline, event_fd::EventFd};
use crate::{error::Error, sync_types::Instant};

/// The part of a connection that a [`CloseWatch`] uses.
#[derive(Debug)]
pub struct PeerSignal {
    /// A descriptor for which the system reports events.
    pub descriptor: OwnedFd,
    /// Whether its bytes belong to the connection itself, so that they can be peeked without being consumed. False for
    /// a TLS session.
    pub plain: bool,
}

/// Watches a connection until dropped.
#[must_use = "the watch ends when it is dropped"]
pub struct CloseWatch {
    end: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl CloseWatch {
    /// Starts a watch that fails `stop` with the error that `judge` returns. `judge` is given the bytes that have
    /// arrived and were not read (at most the first 1024, none if the connection is not plain), and whether the peer
    /// has closed. It is called when bytes arrive and when the peer closes. A stop that has happened already stays as
    /// it is. After the verdict the watch waits for `grace` before the stop, while the other connections continue. A
    /// failure in that time is reported as the verdict.
    ///
    /// # Errors
    /// If the system cannot start the thread or create what it waits with.
    pub fn start(
        signal: PeerSignal,
        stop: Stop,
        grace: Duration,
        judge: impl Fn(&[u8], bool) -> Option<Error> + Send + 'static,
    ) -> io::Result<Self> {
        let end = EventFd::new()?;
        let events = epoll::create(CreateFlags::CLOEXEC)?;
        // Edge-triggered: bytes that stay unread are reported once.
        let wanted = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&events, &signal.descriptor, EventData::new_u64(PEER), wanted)?;
        epoll::add(&events, end.fd(), EventData::new_u64(END), EventFlags::IN)?;
        let informed = stop.inform();
        let thread = Builder::new().name("multifdmain".into()).spawn(move || {
            // Ends with the thread, which has reported what it learnt by then.
            let _informed = informed;
            if let Err(error) = run(&events, &signal, &stop, grace, judge) {
                tracing::warn!(%error, "the main connection is no longer watched");
            }
        })?;
        Ok(Self { end, thread: Some(thread) })
    }
}

impl Drop for CloseWatch {
    fn drop(&mut self) {
        self.end.wake();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has nothing left to report.
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for CloseWatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CloseWatch").finish_non_exhaustive()
    }
}

fn run(
    events: &OwnedFd,
    signal: &PeerSignal,
    stop: &Stop,
    grace: Duration,
    judge: impl Fn(&[u8], bool) -> Option<Error>,
) -> io::Result<()> {
    let mut ready = Vec::with_capacity(2);
    loop {
        wait(events, &mut ready, None)?;
        if ready.is_empty() {
            continue;
        }
        let mut closed = false;
        for event in &ready {
            if event.data.u64() == END {
                return Ok(());
            }
            let flags = event.flags;
            closed |= flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
        }
        let mut bytes = [0; PEEKED];
        let peeked = if signal.plain {
            match recv(signal.descriptor.as_fd(), &mut bytes, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
                Ok((peeked, _)) => peeked,
                // Nothing has arrived, or the connection has broken, which its owner notices too.
                Err(_) => 0,
            }
        } else {
            0
        };
        if let Some(error) = judge(&bytes[..peeked.min(PEEKED)], closed) {
            // The peer's last message, such as a TLS alert, is in the session. The owner finds it there, and it is more
            // precise.
            if !signal.plain && is_dropped_within(events, LAST_WORD)? {
                return Ok(());
            }
            stop.expect(error.clone());
            if !is_dropped_within(events, grace)? {
                stop.fail(error);
            }
            return Ok(());
        }
        if closed {
            return Ok(());
        }
    }
}

/// Waits until the watch is dropped, for at most `limit`.
pub(super) fn is_dropped_within(events: &OwnedFd, limit: Duration) -> io::Result<bool> {
    let end = deadline(limit);
    let mut ready = Vec::with_capacity(2);
    loop {
        let left = end.saturating_duration_since(Instant::now());
        wait(events, &mut ready, Some(left))?;
        if ready.iter().any(|event| event.data.u64() == END) {
            return Ok(true);
        }
        if left.is_zero() {
            return Ok(false);
        }
    }
}

/// Waits for events, for at most `limit`. A signal also ends the wait, without an event.
pub(super) fn wait(
    events: &OwnedFd,
    ready: &mut Vec<epoll::Event>,
    limit: Option<Duration>,
) -> io::Result<()> {
    let limit = limit.map(Timespec::try_from).transpose().map_err(|_| io::ErrorKind::InvalidInput)?;
    ready.clear();
    match epoll::wait(events, spare_capacity(ready), limit.as_ref()) {
        Err(Errno::INTR) | Ok(_) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The time that the owner of a session has to find out why the peer has closed it.
const LAST_WORD: Duration = Duration::from_millis(300);
const PEER: u64 = 0;
pub(super) const END: u64 = 1;
/// Enough for everything a destination sends before it has everything.
const PEEKED: usize = 1024;

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::net::UnixStream,
        sync::mpsc,
    };

    use super::*;

    type Judged = mpsc::Receiver<(Vec<u8>, bool)>;

    fn watched() -> (UnixStream, UnixStream, Stop, Judged, CloseWatch) {
        watched_with(Duration::ZERO)
    }

    fn watched_with(grace: Duration) -> (UnixStream, UnixStream, Stop, Judged, CloseWatch) {
        let (here, there) = UnixStream::pair().expect("a pair");
        let descriptor = here.try_clone().expect("a descriptor").into();
        let (stop, (judge, judged)) = (Stop::new(), mpsc::channel());
        let watch = CloseWatch::start(
            PeerSignal { descriptor, plain: true },
            stop.clone(),
            grace,
            move |bytes, closed| {
                judge.send((bytes.to_vec(), closed)).expect("heard");
                (closed || bytes.ends_with(b"!")).then(|| Error::other("the peer has spoken", "closed"))
            },
        );
        (here, there, stop, judged, watch.expect("started"))
    }

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn bytes_are_seen_and_left_and_the_last_word_stops() {
        let (mut here, mut there, stop, judged, _watch) = watched();
        there.write_all(b"pong").expect("written");
        assert_eq!(judged.recv_timeout(SOON).expect("judged"), (b"pong".to_vec(), false));
        there.write_all(b"!").expect("written");
        assert_eq!(judged.recv_timeout(SOON).expect("judged"), (b"pong!".to_vec(), false));
        stop.pause(SOON).expect_err("stopped");
        let mut all = [0; 5];
        here.read_exact(&mut all).expect("still there");
        assert_eq!(&all, b"pong!");
    }

    /// A failure in the grace period, such as channels that end, is a consequence; a cancel is not.
    #[test]
    fn failures_in_the_grace_are_reported_as_the_verdict() {
        for cancelled in [false, true] {
            let (_here, there, stop, judged, _watch) = watched_with(SOON);
            drop(there);
            judged.recv_timeout(SOON).expect("judged");
            // The verdict is recorded after the judge returns.
            while stop.expected().is_none() {
                std::thread::yield_now();
            }
            assert!(!stop.is_stopped(), "channels go on");
            let reported = if cancelled {
                stop.fail(Error::Cancelled)
            } else {
                stop.fail(Error::other("a channel ended", "so"))
            };
            assert_eq!(reported.is_cancelled(), cancelled);
            assert_eq!(reported.to_string() == "the peer has spoken", !cancelled);
        }
    }

    #[test]
    fn a_peer_that_closes_stops_the_migration_and_a_dropped_watch_does_not() {
        let (_here, there, stop, _told, _watch) = watched();
        drop(there);
        stop.pause(SOON).expect_err("stopped");
        let (_here, there, stop, judged, watch) = watched();
        drop(watch);
        drop(there);
        assert!(judged.recv().is_err() && !stop.is_stopped());
    }
}
