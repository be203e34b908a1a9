//! A plain byte stream over a link.

use std::{
    fmt,
    io::{self, Read, Write},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use super::{CloseWatch, Context, Link, StallTimer, Stop, Wake, link::send_all, stall_timer};
use crate::{
    ram::{Part, PartMut},
    sync_types::Instant,
};

/// A plain byte stream over a link. It carries the main stream.
pub struct Stream {
    link: Box<dyn Link>,
    /// Bytes that were received while this connection was identified.
    seen: Vec<u8>,
    stall_timer: StallTimer,
    timeout: Option<Duration>,
    /// What sends in place of `link`, which then only receives.
    writer: Option<SharedWriter>,
}

/// Writes to a stream from several threads: each call's bytes stay together.
#[derive(Clone)]
pub struct SharedWriter(Arc<Mutex<Box<dyn Link>>>);

impl fmt::Debug for SharedWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedWriter")
    }
}

impl SharedWriter {
    /// Writes all of these bytes.
    ///
    /// # Errors
    /// If the connection is broken.
    pub fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        let mut link = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        send_all(&mut **link, &mut [Part::from(bytes)])
    }
}

impl Stream {
    /// Creates a stream over `link`, which was made with the same `context`. A read whose [time
    /// limit](Self::set_read_timeout) has passed continues as long as another connection of the migration moves bytes.
    pub fn new(link: Box<dyn Link>, context: &Context) -> Self {
        Self::resumed(link, context, Vec::new())
    }

    /// Creates a stream over `link`, from which `seen` was received before.
    pub(crate) fn resumed(link: Box<dyn Link>, context: &Context, seen: Vec<u8>) -> Self {
        Self { link, seen, stall_timer: context.stall_timer.clone(), timeout: None, writer: None }
    }

    /// Splits the stream in two, so that one thread reads from the first while another one writes to the second: see
    /// [`Link::split`].
    ///
    /// # Errors
    /// [`Unsupported`](io::ErrorKind::Unsupported) if the connection cannot be split.
    pub fn split(self) -> io::Result<(Self, Self)> {
        let Self { link, seen, stall_timer, timeout, .. } = self;
        let (receives, sends) = link.split()?;
        let stall_timer_of_writer = stall_timer.clone();
        let writer =
            Self { link: sends, seen: Vec::new(), stall_timer: stall_timer_of_writer, timeout, writer: None };
        Ok((Self { link: receives, seen, stall_timer, timeout, writer: None }, writer))
    }

    /// Makes a writer that other threads can use while this stream is read. The stream itself writes through it as well.
    ///
    /// # Errors
    /// [`Unsupported`](io::ErrorKind::Unsupported) if the connection cannot be split.
    pub fn share(self) -> io::Result<(Self, SharedWriter)> {
        let (receives, sends) = self.split()?;
        let writer = SharedWriter(Arc::new(Mutex::new(sends.link)));
        Ok((Self { writer: Some(writer.clone()), ..receives }, writer))
    }

    /// Gives back bytes that were read: the next reads return them first.
    pub fn unread(&mut self, mut bytes: Vec<u8>) {
        bytes.append(&mut self.seen);
        self.seen = bytes;
    }

    /// The other end, for messages.
    pub fn peer(&self) -> String {
        self.link.peer()
    }

    /// The waker that shuts the connection down, from any thread.
    pub fn waker(&self) -> Arc<dyn Wake> {
        self.link.waker()
    }

    /// The waker that ends only writing, from any thread: see [`Link::send_waker`].
    pub fn write_waker(&self) -> Arc<dyn Wake> {
        self.link.send_waker()
    }

    /// Makes `stop` fail with the error that `judge` returns for the other end, even while this end waits, until the
    /// returned guard is dropped: see [`CloseWatch::start`]. `None` if the link does not support it, or the system
    /// refuses.
    pub fn watch_peer(
        &self,
        stop: &Stop,
        grace: Duration,
        judge: impl Fn(&[u8], bool) -> Option<crate::Error> + Send + 'static,
    ) -> Option<CloseWatch> {
        let signal = self.link.peer_signal();
        let watch = signal.and_then(|signal| {
            signal.map(|signal| CloseWatch::start(signal, stop.clone(), grace, judge)).transpose()
        });
        watch.unwrap_or_else(|error| {
            tracing::warn!(peer = self.peer(), %error, "a close by the peer will be noticed late");
            None
        })
    }

    /// Limits how many written bytes wait in the connection: see [`Link::limit_backlog`].
    pub fn limit_backlog(&mut self, limit: Option<u64>) {
        self.link.limit_backlog(limit);
    }

    /// The shortest round trip of the last minutes: see [`Link::round_trip`].
    pub fn round_trip(&self) -> Option<Duration> {
        self.link.round_trip()
    }

    /// Sets how long a read waits for the first byte; `None` is no limit.
    ///
    /// # Errors
    /// If the system refuses it.
    pub fn set_read_timeout(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.timeout = limit;
        self.link.set_recv_timeout(limit.map(stall_timer::interval))
    }

    /// Whether bytes, or the end, have arrived and were not read yet: see [`Link::is_readable`].
    ///
    /// # Errors
    /// If the system cannot report it.
    pub fn is_readable(&mut self) -> io::Result<bool> {
        if self.seen.is_empty() { self.link.is_readable() } else { Ok(true) }
    }

    /// Closes the writing direction.
    ///
    /// # Errors
    /// If the connection is broken.
    pub fn close_write(&mut self) -> io::Result<()> {
        self.link.close_send()
    }

    /// Closes the connection, if there is no return path that ends the migration: see [`Link::finish`].
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
        let Some(limit) = self.timeout else { return self.link.recv(&mut parts) };
        let begun = Instant::now();
        loop {
            match self.link.recv(&mut parts) {
                // Not the system's own timeout: that one means that the host is lost.
                Err(error)
                    if error.kind() == io::ErrorKind::TimedOut
                        && error.get_ref().is_none()
                        && error.raw_os_error().is_none()
                        && !self.stall_timer.left_of(limit, begun).is_zero() => {}
                received => return received,
            }
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match &self.writer {
            Some(writer) => writer.write_all(buffer).map(|()| buffer.len()),
            None => self.link.send(&[Part::from(buffer)]),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
