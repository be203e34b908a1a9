//! The traits that a connection implements to carry a channel or the main stream.

use std::{io, sync::Arc, time::Duration};

use super::{Context, Host, PeerSignal, Wake};
use crate::ram::{Part, PartMut, advance, advance_mut};

/// A two-way byte stream with one owner: a TCP or unix socket, an in-memory pipe, a TLS session.
///
/// It is made with a [`Context`] and updates its stall timer. All calls block. Another thread ends them through
/// [`waker`](Link::waker). A link that wraps another one must forward every call, including those with a default
/// implementation.
pub trait Link: Send {
    /// Sends bytes of `parts`, in order. Returns how many, at least one unless all parts are empty.
    ///
    /// # Errors
    /// If the connection is broken or was shut down.
    fn send(&mut self, parts: &[Part<'_>]) -> io::Result<usize>;

    /// Receives bytes into `parts`, in order, as many as are available. 0 means that the peer has closed.
    ///
    /// # Errors
    /// If the connection is broken or was shut down, or [`io::ErrorKind::TimedOut`] after the time set.
    fn recv(&mut self, parts: &mut [PartMut<'_>]) -> io::Result<usize>;

    /// Sets how long [`recv`](Link::recv) waits for the first byte; `None` is no limit.
    ///
    /// # Errors
    /// If the system refuses it.
    fn set_recv_timeout(&mut self, limit: Option<Duration>) -> io::Result<()>;

    /// Whether [`recv`](Link::recv) has bytes, or the end, to return without a wait. A link that cannot know returns
    /// `false`.
    ///
    /// # Errors
    /// If the system cannot report it.
    fn is_readable(&mut self) -> io::Result<bool>;

    /// The waker that shuts the connection down in both directions, from any thread.
    fn waker(&self) -> Arc<dyn Wake>;

    /// The waker that ends only sending, from any thread. A pending [`send`](Link::send) and all later ones fail. What
    /// was sent arrives, then the other end finds the connection closed. Its reply can still be received.
    fn send_waker(&self) -> Arc<dyn Wake>;

    /// The waker that ends only receiving, from any thread. A pending [`recv`](Link::recv) and all later ones find the
    /// end of the connection. What is sent still arrives.
    fn recv_waker(&self) -> Arc<dyn Wake>;

    /// A signal that reports, without a read, that the other end has closed. `None` if the link cannot provide one: a
    /// close is then noticed at the next use of the connection.
    ///
    /// # Errors
    /// If the system refuses another descriptor.
    fn peer_signal(&self) -> io::Result<Option<PeerSignal>>;

    /// The other end, for messages: `127.0.0.1:4711`.
    fn peer(&self) -> String;

    /// The host of the other end; `None` if the link cannot report it. A destination accepts channels only from main's
    /// host, depending on [`ChannelsFrom`](crate::ChannelsFrom). An end that cannot be reported may be on any host.
    fn host(&self) -> Option<Host>;

    /// Closes the sending direction, after everything sent so far.
    ///
    /// # Errors
    /// If the connection is broken.
    fn close_send(&mut self) -> io::Result<()>;

    /// Like [`send`](Link::send), when more follows at once: for a head, before what it announces.
    ///
    /// # Errors
    /// As [`send`](Link::send).
    fn send_more(&mut self, parts: &[Part<'_>]) -> io::Result<usize> {
        self.send(parts)
    }

    /// Limits how many bytes wait in this connection, sent and not acknowledged by the peer; `None` ends the limit, as does
    /// one above 256 KiB. About as many wait: what a single call has sent is not split. A link that cannot do it ignores it;
    /// TCP does it (Linux 5.14, or with both ends on this machine).
    fn limit_backlog(&mut self, _limit: Option<u64>) {}

    /// The shortest round trip of this connection in the last minutes. `None` if the link does not know it; TCP does.
    fn round_trip(&self) -> Option<Duration> {
        None
    }

    /// The interface for `zero-copy-send`, which sends pages directly from memory. `None` if this connection does not
    /// support it; only TCP does.
    fn zero_copy(&mut self) -> Option<&mut dyn ZeroCopy> {
        None
    }

    /// Ends the connection to a peer that sends no reply: closes the sending direction, and waits for what can be known
    /// of the other end. A link that can know nothing does nothing.
    ///
    /// # Errors
    /// If it is known that the other end has failed: a command has ended with an exit status other than 0.
    fn finish(&mut self) -> io::Result<()>;

    /// Whether [`split`](Link::split) can succeed. A migration that may need it asks before it sends anything.
    fn can_split(&self) -> bool {
        false
    }

    /// Splits the link in two, so that one thread receives from the first while another one sends to the second. The
    /// wakers of both act on the connection. Only sockets and TLS sessions over them can be split.
    ///
    /// # Errors
    /// [`Unsupported`](io::ErrorKind::Unsupported) if the link cannot be split.
    fn split(self: Box<Self>) -> io::Result<(Box<dyn Link>, Box<dyn Link>)> {
        let why = format!("the connection to {} cannot send and receive at the same time", self.peer());
        Err(io::Error::new(io::ErrorKind::Unsupported, why))
    }
}

/// Sends bytes directly from memory, without a copy in the kernel.
pub trait ZeroCopy {
    /// Switches it on. Called once, before the first send.
    ///
    /// # Errors
    /// The system's error, if it cannot.
    fn enable(&mut self) -> io::Result<()>;

    /// Like [`Link::send`], but the system reads the bytes from the memory, now or later. Until
    /// [`completed`](ZeroCopy::completed) counts this call, later writes to the memory may be sent, too. The system
    /// keeps the memory for as long as it needs it, even if it is unmapped.
    ///
    /// # Errors
    /// As [`Link::send`]; `ENOBUFS` if no more memory may be locked for this.
    fn send_in_place(&mut self, parts: &[Part<'_>]) -> io::Result<usize>;

    /// Waits until the system has completed the first `calls` calls of [`send_in_place`](ZeroCopy::send_in_place) that
    /// sent something. Returns how many it has completed by now, and how many of these it has copied after all.
    ///
    /// # Errors
    /// If the connection is broken or was shut down.
    fn completed(&mut self, calls: u64) -> io::Result<(u64, u64)>;
}

/// Opens connections to one destination.
pub trait Connect: Send + Sync {
    /// Opens a connection for the migration of `context`, whose stop ends the attempt.
    ///
    /// **Warning:** an attempt that respects neither the stop nor the [time limit](Context::connect_timeout) prevents
    /// the migration from ending: the drop of its `Sender` waits for it.
    ///
    /// # Errors
    /// If no connection is established within the time limit, or the migration stops.
    fn connect(&self, context: &Context) -> io::Result<Box<dyn Link>>;

    /// The destination, for messages: `tcp:127.0.0.1:4444`.
    fn target(&self) -> String;

    /// Whether it opens only one connection, so that there are no channels.
    fn is_single(&self) -> bool {
        false
    }
}

impl<C: Connect + ?Sized> Connect for Arc<C> {
    fn connect(&self, context: &Context) -> io::Result<Box<dyn Link>> {
        (**self).connect(context)
    }

    fn target(&self) -> String {
        (**self).target()
    }

    fn is_single(&self) -> bool {
        (**self).is_single()
    }
}

/// Accepts connections from sources.
pub trait Listen: Send {
    /// Waits for the next connection, for the migration of `context`; `None` if the [waker](Listen::waker) ended the
    /// wait. A wake takes precedence over connections that are waiting: hosts that connect again and again must not prevent
    /// the end of the wait.
    ///
    /// # Errors
    /// If the system refuses, for example because no descriptors are left.
    fn accept(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>>;

    /// The next connection that has already arrived, without a wait.
    ///
    /// # Errors
    /// As [`accept`](Listen::accept).
    fn accept_waiting(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>>;

    /// The waker that ends a wait in [`accept`](Listen::accept), each time it is called.
    fn waker(&self) -> Arc<dyn Wake>;

    /// Where it listens, for messages.
    fn address(&self) -> String;

    /// Whether it accepts only one connection, so that there are no channels.
    fn is_single(&self) -> bool {
        false
    }
}

impl<L: Listen + ?Sized> Listen for Box<L> {
    fn accept(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>> {
        (**self).accept(context)
    }

    fn accept_waiting(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>> {
        (**self).accept_waiting(context)
    }

    fn waker(&self) -> Arc<dyn Wake> {
        (**self).waker()
    }

    fn address(&self) -> String {
        (**self).address()
    }

    fn is_single(&self) -> bool {
        (**self).is_single()
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

/// Sends all bytes of a part after which more follows.
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

/// Receives into `parts` until at least `least` bytes have arrived. Returns their number, which is less if the peer has
/// closed.
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
