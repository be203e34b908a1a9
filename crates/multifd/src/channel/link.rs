//! What a connection must do to carry a channel or the main stream.

use std::{
    fmt,
    io::{self, Read, Write},
    sync::Arc,
    time::Duration,
};

use super::{Attention, CloseWatch, Host, PeerSignal, Wake, attention};
use crate::{
    ram::{Part, PartMut, advance, advance_mut},
    sync_types::Instant,
};

/// A two-way byte stream with one owner: a TCP or unix socket, an in-memory pipe, a TLS session.
///
/// All calls block. Another thread ends them through [`waker`](Link::waker).
pub trait Link: Send {
    /// Sends bytes of `parts`, in order; says how many, at least one unless all parts are empty.
    ///
    /// # Errors
    /// If the connection is broken or was shut down.
    fn send(&mut self, parts: &[Part<'_>]) -> io::Result<usize>;

    /// Receives bytes into `parts`, in order, as many as are there; 0 means that the peer has closed.
    ///
    /// # Errors
    /// If the connection is broken or was shut down, or [`io::ErrorKind::TimedOut`] after the time set.
    fn recv(&mut self, parts: &mut [PartMut<'_>]) -> io::Result<usize>;

    /// How long [`recv`](Link::recv) waits for the first byte; `None` is for ever.
    ///
    /// # Errors
    /// If the system refuses it.
    fn set_recv_timeout(&mut self, limit: Option<Duration>) -> io::Result<()>;

    /// Whether something has come, or the end, that [`recv`](Link::recv) has not given yet. A link that cannot tell says no.
    ///
    /// # Errors
    /// If the system refuses to tell.
    fn is_readable(&mut self) -> io::Result<bool> {
        Ok(false)
    }

    /// What shuts the connection down in both directions, from any thread.
    fn waker(&self) -> Arc<dyn Wake>;

    /// What ends sending alone, from any thread: a [`send`](Link::send) under way and all later ones fail, what was sent
    /// arrives, then the other end finds the connection closed, and what it says can still be received.
    fn send_waker(&self) -> Arc<dyn Wake>;

    /// What ends receiving alone, from any thread: a [`recv`](Link::recv) under way and all later ones find the end of the
    /// connection, and what is sent still arrives.
    fn recv_waker(&self) -> Arc<dyn Wake>;

    /// What tells without a read that the other end has closed. A link that cannot tell says `None`: it is then noticed when
    /// the connection is used next.
    ///
    /// # Errors
    /// If the system refuses another descriptor.
    fn peer_signal(&self) -> io::Result<Option<PeerSignal>> {
        Ok(None)
    }

    /// The other end, for messages: `127.0.0.1:4711`.
    fn peer(&self) -> String;

    /// Where the other end is; `None` if the link cannot tell. A destination takes channels only from main's host, as far
    /// as [`ChannelsFrom`](crate::ChannelsFrom) says so. An end that cannot be told is taken to be anywhere.
    fn host(&self) -> Option<Host> {
        None
    }

    /// Says that nothing more is sent, after everything sent so far.
    ///
    /// # Errors
    /// If the connection is broken.
    fn close_send(&mut self) -> io::Result<()>;

    /// As [`send`](Link::send), with more to follow at once: a head, before what it announces.
    ///
    /// # Errors
    /// As [`send`](Link::send).
    fn send_more(&mut self, parts: &[Part<'_>]) -> io::Result<usize> {
        self.send(parts)
    }

    /// Makes [`send_in_place`](Link::send_in_place) possible: `zero-copy-send`.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] if the connection is of another kind than TCP; the system's error if it cannot.
    fn enable_in_place(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// As [`send`](Link::send), but the system reads the bytes where they are, now or later: until
    /// [`completed_in_place`](Link::completed_in_place) tells of this call, what is written there may travel, too. It
    /// keeps the memory for itself as long as it needs it, even if that is unmapped.
    ///
    /// # Errors
    /// As [`send`](Link::send); `ENOBUFS` if no more memory may be locked for this.
    fn send_in_place(&mut self, parts: &[Part<'_>]) -> io::Result<usize> {
        self.send(parts)
    }

    /// Waits until the system is through with the first `calls` calls of [`send_in_place`](Link::send_in_place) that
    /// sent something. Says with how many it is through by now, and how many of these it has copied after all.
    ///
    /// # Errors
    /// If the connection is broken or was shut down.
    fn completed_in_place(&mut self, calls: u64) -> io::Result<(u64, u64)> {
        Ok((calls, calls))
    }

    /// Has the link note in `attention` when bytes move, and has it fail a [`send`](Link::send) with
    /// [`io::ErrorKind::TimedOut`] when the other end has taken nothing for as long as that allows. A link that does
    /// neither waits as long as it takes; what it carries is noted all the same, a packet at a time.
    ///
    /// # Errors
    /// If the system refuses it.
    fn attend(&mut self, attention: Attention) -> io::Result<()> {
        drop(attention);
        Ok(())
    }

    /// Tells the link that it is one of so many channels of one migration, at least 1, before its first packet. A link whose
    /// buffers do not depend on that has nothing to do.
    ///
    /// # Errors
    /// If the system refuses it.
    fn one_of(&mut self, channels: u8) -> io::Result<()> {
        let _ = channels;
        Ok(())
    }

    /// Takes leave of a peer that says nothing more itself: says that nothing more is sent, and waits for what can be
    /// known of the other end.
    ///
    /// # Errors
    /// If it is known that the other end has failed: a command has ended with another exit status than 0.
    fn finish(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Opens connections to one destination.
pub trait Connect: Send + Sync {
    /// Opens a connection. `stop` ends the attempt.
    ///
    /// **Warning:** an attempt that heeds neither `stop` nor `limit` keeps the migration from ending: the drop of its `Sender`
    /// waits for it.
    ///
    /// # Errors
    /// If none comes about before `limit`, or the migration stops.
    fn connect(&self, stop: &super::Stop, limit: Duration) -> io::Result<Box<dyn Link>>;

    /// The destination, for messages: `tcp:127.0.0.1:4444`.
    fn target(&self) -> String;

    /// Whether it opens one connection and no more, so that there are no channels.
    fn is_single(&self) -> bool {
        false
    }
}

/// Takes connections from sources.
pub trait Listen: Send {
    /// Waits for the next connection; `None` if the [waker](Listen::waker) ended the wait.
    ///
    /// # Errors
    /// If the system refuses: no descriptors are left, say.
    fn accept(&mut self) -> io::Result<Option<Box<dyn Link>>>;

    /// The next connection that is there already.
    ///
    /// # Errors
    /// As [`accept`](Listen::accept).
    fn accept_waiting(&mut self) -> io::Result<Option<Box<dyn Link>>>;

    /// What ends a wait in [`accept`](Listen::accept), each time it is called.
    fn waker(&self) -> Arc<dyn Wake>;

    /// Where it listens, for messages.
    fn address(&self) -> String;

    /// Whether it takes one connection and no more, so that there are no channels.
    fn is_single(&self) -> bool {
        false
    }
}

/// Sends all bytes of `parts`.
pub(crate) fn send_all(link: &mut dyn Link, mut parts: &mut [Part<'_>]) -> io::Result<()> {
    while parts.iter().any(|part| part.len() > 0) {
        match link.send(parts) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(sent) => parts = advance(parts, sent),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Sends all bytes of a part that more follows.
pub(crate) fn send_all_more(link: &mut dyn Link, part: Part<'_>) -> io::Result<()> {
    let mut parts = &mut [part][..];
    while parts.iter().any(|part| part.len() > 0) {
        match link.send_more(parts) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(sent) => parts = advance(parts, sent),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Receives into `parts` until at least `least` bytes are there; says how many, fewer if the peer has closed.
pub(crate) fn recv_at_least(
    link: &mut dyn Link,
    mut parts: &mut [PartMut<'_>],
    least: usize,
) -> io::Result<usize> {
    let mut received = 0;
    while received < least {
        match link.recv(parts) {
            Ok(0) => break,
            Ok(some) => {
                received += some;
                parts = advance_mut(parts, some);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(received)
}

/// A link as a plain byte stream: what carries the main stream.
pub struct Stream {
    link: Box<dyn Link>,
    /// Bytes that were received while finding out what this connection is.
    seen: Vec<u8>,
    attention: Option<Attention>,
    timeout: Option<Duration>,
}

impl Stream {
    /// A stream over `link`.
    pub fn new(link: Box<dyn Link>) -> Self {
        Self::resumed(link, Vec::new())
    }

    /// A stream over `link` from which `seen` was received before.
    pub(crate) fn resumed(link: Box<dyn Link>, seen: Vec<u8>) -> Self {
        Self { link, seen, attention: None, timeout: None }
    }

    /// The same stream, whose waits go on as long as another connection of its side moves: a write fails when the other
    /// end has taken nothing for as long as `attention` allows, and the [time of a read](Self::set_read_timeout) begins
    /// anew whenever something moves.
    ///
    /// # Errors
    /// If the system refuses it.
    pub fn attended(mut self, attention: Attention) -> io::Result<Self> {
        self.link.attend(attention.clone())?;
        self.attention = Some(attention);
        Ok(self)
    }

    /// The other end, for messages.
    pub fn peer(&self) -> String {
        self.link.peer()
    }

    /// What shuts the connection down, from any thread.
    pub fn waker(&self) -> Arc<dyn Wake> {
        self.link.waker()
    }

    /// What ends writing alone, from any thread: see [`Link::send_waker`].
    pub fn write_waker(&self) -> Arc<dyn Wake> {
        self.link.send_waker()
    }

    /// Has `stop` fail with what `judge` makes of the other end, whatever this end waits for, until the returned guard is
    /// dropped: see [`CloseWatch::start`]. `None` if the link cannot tell, or the system refuses.
    pub fn watch_peer(
        &self,
        stop: &super::Stop,
        grace: Duration,
        judge: impl Fn(&[u8], bool) -> Option<crate::Error> + Send + 'static,
    ) -> Option<CloseWatch> {
        let signal = self.link.peer_signal();
        let watch = signal.and_then(|signal| {
            signal.map(|signal| CloseWatch::start(signal, stop.clone(), grace, judge)).transpose()
        });
        watch.unwrap_or_else(|error| {
            tracing::warn!(peer = self.peer(), %error, "its closing is noticed late");
            None
        })
    }

    /// How long a read waits for the first byte; `None` is for ever.
    ///
    /// # Errors
    /// If the system refuses it.
    pub fn set_read_timeout(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.timeout = limit;
        let attended = self.attention.is_some();
        self.link.set_recv_timeout(if attended { limit.map(attention::interval) } else { limit })
    }

    /// Whether something has come, or the end, that was not read yet: see [`Link::is_readable`].
    ///
    /// # Errors
    /// If the system refuses to tell.
    pub fn is_readable(&mut self) -> io::Result<bool> {
        if self.seen.is_empty() { self.link.is_readable() } else { Ok(true) }
    }

    /// Says that nothing more is written.
    ///
    /// # Errors
    /// If the connection is broken.
    pub fn close_write(&mut self) -> io::Result<()> {
        self.link.close_send()
    }

    /// Takes leave, where there is no return path that ends the migration: see [`Link::finish`].
    ///
    /// # Errors
    /// If it is known that the other end has failed.
    pub fn finish(&mut self) -> io::Result<()> {
        self.link.finish()
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").field("peer", &self.peer()).finish_non_exhaustive()
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.seen.is_empty() {
            let len = buffer.len().min(self.seen.len());
            buffer[..len].copy_from_slice(&self.seen[..len]);
            self.seen.drain(..len);
            return Ok(len);
        }
        let mut parts = [PartMut::from(buffer)];
        let (Some(attention), Some(limit)) = (&self.attention, self.timeout) else {
            return self.link.recv(&mut parts);
        };
        let begun = Instant::now();
        loop {
            match self.link.recv(&mut parts) {
                // Not the system's own: that one is of a host that has gone.
                Err(error)
                    if error.kind() == io::ErrorKind::TimedOut
                        && error.get_ref().is_none()
                        && error.raw_os_error().is_none()
                        && !attention.left_of(limit, begun).is_zero() => {}
                received => return received,
            }
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.link.send(&[Part::from(buffer)])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
