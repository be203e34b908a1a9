//! The main connection, as the two drivers need it.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpStream},
    os::unix::net::UnixStream,
    sync::Arc,
    time::Duration,
};

use multifd::channel::{CloseWatch, Stop, Wake};

/// A main connection: bytes both ways, and a way out of a wait.
///
/// A read that another thread ends by shutting the connection down gives 0 bytes or an error; both
/// end the migration.
pub trait Connection: Read + Write {
    /// How long a read waits before it fails with [`io::ErrorKind::WouldBlock`] or
    /// [`io::ErrorKind::TimedOut`]; `None` is for ever.
    ///
    /// # Errors
    /// If the system refuses it.
    fn set_read_timeout(&mut self, limit: Option<Duration>) -> io::Result<()>;

    /// What ends all reads and writes, from any thread; `None` if none of them waits for a peer.
    fn waker(&self) -> Option<Arc<dyn Wake>>;

    /// What ends writes alone, from any thread, and tells the peer so; what it says can still be read. `None` if no write waits
    /// for a peer.
    fn write_waker(&self) -> Option<Arc<dyn Wake>>;

    /// Has `stop` fail with what `judge` makes of the peer, whatever this end waits for, until the guard is dropped: see
    /// [`CloseWatch::start`]. A connection that cannot tell gives `None`; the peer's end is then found out by the next read
    /// or write.
    fn watch_peer(&self, stop: &Stop, grace: Duration, judge: Judge) -> Option<CloseWatch> {
        drop((stop, grace, judge));
        None
    }

    /// Whether something has come, or the end, that was not read yet. A connection that cannot tell says no.
    ///
    /// # Errors
    /// If the system refuses to tell.
    fn is_readable(&mut self) -> io::Result<bool> {
        Ok(false)
    }

    /// Takes leave of a destination that has no return path to tell how it went, and waits for what can be known of it.
    ///
    /// # Errors
    /// If it is known to have failed.
    fn finish(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a peer that has said something, or has closed, means: see [`CloseWatch::start`].
pub type Judge = Box<dyn Fn(&[u8], bool) -> Option<multifd::Error> + Send>;

/// Whether a read has ended because its time was over. The system's own timeout is of a host that has gone.
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
