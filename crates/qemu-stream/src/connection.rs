//! The main connection, as the two drivers need it.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    os::unix::net::UnixStream,
    time::Duration,
};

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

impl Connection for TcpStream {
    fn set_read_timeout(&mut self, limit: Option<Duration>) -> io::Result<()> {
        Self::set_read_timeout(self, limit)
    }
}

impl Connection for UnixStream {
    fn set_read_timeout(&mut self, limit: Option<Duration>) -> io::Result<()> {
        Self::set_read_timeout(self, limit)
    }
}

impl Connection for multifd::channel::Stream {
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
