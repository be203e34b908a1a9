//! Notices at once that the peer has closed a channel, while the channel's thread waits for something else.
//!
//! One thread watches the descriptors of all channels of a sender. It consumes no bytes. A QEMU destination whose channel has
//! failed shuts all channels down, reports nothing on main, and continues to wait there: without the watch the source would wait
//! until a time limit expires. A destination also closes its channels after success, just before its SHUT, so the watch ends
//! when all of RAM has been sent.
//!
//! If the migration continues without such a channel, it is shut down instead, so that its thread does not wait to send, and the watch
//! continues.

use std::{
    collections::BTreeMap,
    io,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{Builder, JoinHandle},
    time::Duration,
};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use super::{Wake, close_watch, event_fd::EventFd};
use crate::wire::ChannelId;

/// Watches channels until dropped.
#[must_use = "the watch ends when it is dropped"]
pub(crate) struct ClosedChannels {
    end: Arc<EventFd>,
    watched: WatchedChannels,
    /// Orders nothing: a channel that is closed at the moment when it is set may be reported.
    shuts_down: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for ClosedChannels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClosedChannels").finish_non_exhaustive()
    }
}

/// The channels of a [`ClosedChannels`].
#[derive(Clone)]
pub(crate) struct WatchedChannels {
    events: Arc<OwnedFd>,
    peers: Arc<Mutex<BTreeMap<ChannelId, Peer>>>,
}

/// The other end of a channel, and what shuts the channel down.
type Peer = (String, Arc<dyn Wake>);

impl ClosedChannels {
    /// Starts a watch without channels. It calls `report` with the first channel that its peer closes, and the peer's name,
    /// after `grace`, in which main or the channel's thread can report a more precise reason, and ends.
    ///
    /// # Errors
    /// If the system cannot start the thread or create what it waits with.
    pub(crate) fn start(
        grace: Duration,
        report: impl FnOnce(ChannelId, &str) + Send + 'static,
    ) -> io::Result<Self> {
        let end = EventFd::new()?;
        let events = Arc::new(epoll::create(CreateFlags::CLOEXEC)?);
        epoll::add(&*events, end.fd(), EventData::new_u64(close_watch::END), EventFlags::IN)?;
        let watched = WatchedChannels { events: events.clone(), peers: Arc::default() };
        let shuts_down = Arc::new(AtomicBool::new(false));
        let (peers, shuts) = (watched.peers.clone(), shuts_down.clone());
        let peer = move |id| peers.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned();
        let thread = Builder::new().name("multifdclosed".into()).spawn(move || {
            let shut_down = |id| {
                let shuts = shuts.load(Ordering::Relaxed);
                if let Some((_, waker)) = peer(id).filter(|_| shuts) {
                    waker.wake();
                }
                shuts
            };
            let closed = first_closed(&events, shut_down).and_then(|closed| match closed {
                Some(id) if !close_watch::is_dropped_within(&events, grace)? => Ok(Some(id)),
                _ => Ok(None),
            });
            match closed {
                Ok(Some(id)) => {
                    let peer = peer(id);
                    report(id, peer.as_ref().map_or("its destination", |(name, _)| name));
                }
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "the channels are no longer watched"),
            }
        })?;
        Ok(Self { end, watched, shuts_down, thread: Some(thread) })
    }

    /// From now on, a channel that its peer closes is shut down, and not reported.
    pub(crate) fn shut_down(&self) {
        self.shuts_down.store(true, Ordering::Relaxed);
    }

    /// The channels, to which each channel's thread adds its own.
    pub(crate) fn watched(&self) -> WatchedChannels {
        self.watched.clone()
    }
}

impl Drop for ClosedChannels {
    fn drop(&mut self) {
        self.end.wake();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has nothing left to report.
            let _ = thread.join();
        }
    }
}

impl WatchedChannels {
    /// Watches a channel to `peer` as well, which `waker` shuts down, until the result is dropped: the waker keeps a connection open.
    ///
    /// # Errors
    /// If the system refuses.
    pub(crate) fn add(
        &self,
        id: ChannelId,
        peer: &str,
        waker: Arc<dyn Wake>,
        descriptor: &OwnedFd,
    ) -> io::Result<WatchedChannel> {
        let number = close_watch::END + 1 + u64::from(id.0);
        self.peers.lock().unwrap_or_else(PoisonError::into_inner).insert(id, (peer.to_owned(), waker));
        epoll::add(
            &*self.events,
            descriptor,
            EventData::new_u64(number),
            EventFlags::RDHUP | EventFlags::ET,
        )?;
        Ok(WatchedChannel { id, peers: self.peers.clone() })
    }
}

/// A channel that is watched.
#[must_use = "the watch of the channel ends when it is dropped"]
pub(crate) struct WatchedChannel {
    id: ChannelId,
    peers: Arc<Mutex<BTreeMap<ChannelId, Peer>>>,
}

impl Drop for WatchedChannel {
    fn drop(&mut self) {
        let peer = self.peers.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
        drop(peer);
    }
}

/// Waits for the first channel that is closed and that `shut_down` does not accept; `None` at the end of the watch.
fn first_closed(events: &OwnedFd, shut_down: impl Fn(ChannelId) -> bool) -> io::Result<Option<ChannelId>> {
    let mut ready = Vec::with_capacity(8);
    loop {
        close_watch::wait(events, &mut ready, None)?;
        if ready.iter().any(|event| event.data.u64() == close_watch::END) {
            return Ok(None);
        }
        let closed = ready.iter().filter_map(|event| event.data.u64().checked_sub(close_watch::END + 1));
        let mut closed = closed.filter_map(|id| u8::try_from(id).ok()).map(ChannelId);
        if let Some(id) = closed.find(|id| !shut_down(*id)) {
            return Ok(Some(id));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::net::UnixStream, sync::mpsc};

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    #[derive(Default)]
    struct Noted(Option<mpsc::Sender<()>>);

    impl Wake for Noted {
        fn wake(&self) {
            if let Some(noted) = &self.0 {
                let _ = noted.send(());
            }
        }
    }

    #[test]
    fn every_channel_that_is_closed_is_shut_down_if_the_migration_continues_without_it() {
        let (report, reported) = mpsc::channel();
        let watch = ClosedChannels::start(Duration::ZERO, move |id, _| report.send(id).expect("received"));
        let watch = watch.expect("started");
        watch.shut_down();
        let pairs: Vec<_> = (0..3).map(|_| UnixStream::pair().expect("a pair")).collect();
        let woken = (0..).map(ChannelId).zip(&pairs).map(|(id, (here, _))| {
            let (wake, woken) = mpsc::channel();
            let descriptor = here.try_clone().expect("a descriptor").into();
            let guard = watch.watched().add(id, "peer", Arc::new(Noted(Some(wake))), &descriptor);
            (woken, guard.expect("added"))
        });
        let (woken, _guards): (Vec<_>, Vec<_>) = woken.unzip();
        for closed in [2, 0] {
            pairs[closed].1.shutdown(std::net::Shutdown::Both).expect("shut down");
            woken[closed].recv_timeout(SOON).expect("shut down here");
        }
        assert!(woken[1].try_recv().is_err() && reported.try_recv().is_err());
    }

    #[test]
    fn channel_whose_peer_shuts_down_its_sending_side_is_reported_and_one_that_sends_is_not() {
        let (report, reported) = mpsc::channel();
        let watch = ClosedChannels::start(Duration::ZERO, move |id, peer| {
            report.send((id, peer.to_owned())).expect("heard");
        });
        let watch = watch.expect("started");
        let pairs: Vec<_> = (0..2).map(|_| UnixStream::pair().expect("a pair")).collect();
        let mut guards = Vec::new();
        for (id, (here, _)) in (0..).map(ChannelId).zip(&pairs) {
            let descriptor = here.try_clone().expect("a descriptor").into();
            let peer = format!("peer {}", id.0);
            let guard = watch.watched().add(id, &peer, Arc::new(Noted::default()), &descriptor);
            guards.push(guard.expect("added"));
        }
        (&pairs[0].1).write_all(b"key update").expect("written");
        assert!(reported.recv_timeout(Duration::from_millis(100)).is_err(), "bytes are no close");
        pairs[1].1.shutdown(std::net::Shutdown::Write).expect("shut down");
        let first = reported.recv_timeout(SOON).expect("reported");
        assert_eq!(first, (ChannelId(1), "peer 1".to_owned()));
    }

    #[test]
    fn channel_that_closes_after_the_watch_or_in_its_grace_is_not_reported() {
        for grace in [Duration::ZERO, SOON] {
            let (report, reported) = mpsc::channel();
            let watch =
                ClosedChannels::start(grace, move |id, _| report.send(id).expect("heard")).expect("started");
            let (here, there) = UnixStream::pair().expect("a pair");
            let _guard = watch
                .watched()
                .add(
                    ChannelId(0),
                    "peer",
                    Arc::new(Noted::default()),
                    &here.try_clone().expect("a descriptor").into(),
                )
                .expect("added");
            if grace.is_zero() {
                drop(watch);
                drop(there);
            } else {
                drop(there);
                std::thread::sleep(Duration::from_millis(50));
                drop(watch);
            }
            assert!(reported.recv().is_err());
        }
    }
}
