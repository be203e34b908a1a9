//! What a connection must do to carry a channel or the main stream.

use std::{io, sync::Arc, time::Duration};

use super::{Context, Host, PeerSignal, Wake};
use crate::ram::{Part, PartMut, advance, advance_mut};

/// A two-way byte stream with one owner: a TCP or unix socket, an in-memory pipe, a TLS session.
///
/// It is made with a [`Context`], whose stall timer it serves. All calls block. Another thread ends them through
/// [`waker`](Link::waker). A link that wraps another one passes every call on, those that have a default as well.
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

    /// Whether something has come, or the end, that [`recv`](Link::recv) has not given yet. A link that cannot know says no.
    ///
    /// # Errors
    /// If the system refuses to tell.
    fn is_readable(&mut self) -> io::Result<bool>;

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
    fn peer_signal(&self) -> io::Result<Option<PeerSignal>>;

    /// The other end, for messages: `127.0.0.1:4711`.
    fn peer(&self) -> String;

    /// Where the other end is; `None` if the link cannot tell. A destination takes channels only from main's host, as far
    /// as [`ChannelsFrom`](crate::ChannelsFrom) says so. An end that cannot be told is taken to be anywhere.
    fn host(&self) -> Option<Host>;

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

    /// How pages are sent from where they are: `zero-copy-send`. `None` if this connection cannot, as only TCP can.
    fn zero_copy(&mut self) -> Option<&mut dyn ZeroCopy> {
        None
    }

    /// Ends the connection to a peer that will not answer: says that nothing more is sent, and waits for what can be known
    /// of the other end. A link that can know nothing has nothing to do.
    ///
    /// # Errors
    /// If it is known that the other end has failed: a command has ended with another exit status than 0.
    fn finish(&mut self) -> io::Result<()>;
}

/// Sends bytes from where they are, without a copy in the kernel.
pub trait ZeroCopy {
    /// Switches it on, once, before the first send.
    ///
    /// # Errors
    /// The system's, if it cannot.
    fn enable(&mut self) -> io::Result<()>;

    /// As [`Link::send`], but the system reads the bytes where they are, now or later: until
    /// [`completed`](ZeroCopy::completed) counts this call, what is written there may travel, too. It keeps the memory
    /// for itself as long as it needs it, even if that is unmapped.
    ///
    /// # Errors
    /// As [`Link::send`]; `ENOBUFS` if no more memory may be locked for this.
    fn send_in_place(&mut self, parts: &[Part<'_>]) -> io::Result<usize>;

    /// Waits until the system is through with the first `calls` calls of [`send_in_place`](ZeroCopy::send_in_place) that
    /// sent something. Says with how many it is through by now, and how many of these it has copied after all.
    ///
    /// # Errors
    /// If the connection is broken or was shut down.
    fn completed(&mut self, calls: u64) -> io::Result<(u64, u64)>;
}

/// Opens connections to one destination.
pub trait Connect: Send + Sync {
    /// Opens a connection for the migration of `context`, whose stop ends the attempt.
    ///
    /// **Warning:** an attempt that respects neither the stop nor the [time limit](Context::connect_timeout) keeps the
    /// migration from ending: the drop of its `Sender` waits for it.
    ///
    /// # Errors
    /// If none comes about within the time limit, or the migration stops.
    fn connect(&self, context: &Context) -> io::Result<Box<dyn Link>>;

    /// The destination, for messages: `tcp:127.0.0.1:4444`.
    fn target(&self) -> String;

    /// Whether it opens one connection and no more, so that there are no channels.
    fn is_single(&self) -> bool {
        false
    }
}

/// Takes connections from sources.
pub trait Listen: Send {
    /// Waits for the next connection, which is for the migration of `context`; `None` if the [waker](Listen::waker) ended
    /// the wait.
    ///
    /// # Errors
    /// If the system refuses: no descriptors are left, say.
    fn accept(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>>;

    /// The next connection that is there already.
    ///
    /// # Errors
    /// As [`accept`](Listen::accept).
    fn accept_waiting(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>>;

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
