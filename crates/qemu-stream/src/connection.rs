//! The main connection: the interface that both drivers use.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpStream},
    os::unix::net::UnixStream,
    sync::Arc,
    time::Duration,
};

use multifd::channel::{CloseWatch, Stop, Wake};

/// A main connection: bytes in both directions, and wakers that end a wait.
///
/// A read that another thread ends by shutting the connection down returns 0 bytes or an error; both end the migration.
pub trait Connection: Read + Write {
    /// Sets how long a read waits before it fails with [`io::ErrorKind::WouldBlock`] or [`io::ErrorKind::TimedOut`];
    /// `None` is no limit.
    ///
    /// # Errors
    /// If the system refuses it.
    fn set_read_timeout(&mut self, limit: Option<Duration>) -> io::Result<()>;

    /// The waker that ends all reads and writes, from any thread; `None` if none of them waits for a peer.
    fn waker(&self) -> Option<Arc<dyn Wake>>;

    /// The waker that ends only writes, from any thread, and signals this to the peer; the peer's reply can still be
    /// read. `None` if no write waits for a peer.
    fn write_waker(&self) -> Option<Arc<dyn Wake>>;

    /// Makes `stop` fail with the error that `judge` returns for the peer, even while this end waits, until the guard
    /// is dropped: see [`CloseWatch::start`]. `None` if the connection does not support it; the peer's end is then
    /// noticed by the next read or write.
    fn watch_peer(&self, stop: &Stop, grace: Duration, judge: Judge) -> Option<CloseWatch> {
        drop((stop, grace, judge));
        None
    }

    /// Whether bytes, or the end, have arrived and were not read yet. A connection that cannot know returns `false`.
    ///
    /// # Errors
    /// If the system cannot report it.
    fn is_readable(&mut self) -> io::Result<bool> {
        Ok(false)
    }

    /// Closes the connection to a destination without a return path, and waits for what can be known of its result.
    ///
    /// # Errors
    /// If it is known to have failed.
    fn finish(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Judges a peer that has sent something or has closed: see [`CloseWatch::start`].
pub type Judge = Box<dyn Fn(&[u8], bool) -> Option<multifd::Error> + Send>;

/// Whether a read has ended because its time limit has passed. A timeout of the system itself means that the host is
/// lost.
pub(crate) fn is_late(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock)
        && !(error.kind() == io::ErrorKind::TimedOut && error.raw_os_error().is_some())
}

/// Shuts a socket down.
struct Shut<S>(S, fn(&S));

impl<S: Send + Sync> Wake for Shut<S> {
    fn wake(&self) {
        self.1(&self.0);
    }
}

macro_rules! sockets {
    ($($socket:ty),*) => {$(
        impl Connection for $socket {
            fn waker(&self) -> Option<Arc<dyn Wake>> {
                let shut = |socket: &Self| drop(socket.shutdown(Shutdown::Both));
                self.try_clone().ok().map(|socket| Arc::new(Shut(socket, shut)) as _)
            }

            fn write_waker(&self) -> Option<Arc<dyn Wake>> {
                let shut = |socket: &Self| drop(socket.shutdown(Shutdown::Write));
                self.try_clone().ok().map(|socket| Arc::new(Shut(socket, shut)) as _)
            }

            fn set_read_timeout(&mut self, limit: Option<Duration>) -> io::Result<()> {
                Self::set_read_timeout(self, limit)
            }
        }
    )*};
}

sockets!(TcpStream, UnixStream);

impl Connection for multifd::channel::Stream {
    fn waker(&self) -> Option<Arc<dyn Wake>> {
        Some(Self::waker(self))
    }

    fn write_waker(&self) -> Option<Arc<dyn Wake>> {
        Some(Self::write_waker(self))
    }

    fn watch_peer(&self, stop: &Stop, grace: Duration, judge: Judge) -> Option<CloseWatch> {
        Self::watch_peer(self, stop, grace, judge)
    }

    fn set_read_timeout(&mut self, limit: Option<Duration>) -> io::Result<()> {
        Self::set_read_timeout(self, limit)
    }

    fn is_readable(&mut self) -> io::Result<bool> {
        Self::is_readable(self)
    }

    fn finish(&mut self) -> io::Result<()> {
        Self::finish(self)
    }
}
