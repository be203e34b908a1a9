//! Connections inside one process: two bounded pipes, with a connector and a listener.
//!
//! They behave like sockets, including back-pressure, shutdown and half-close, and need no network. They are for tests,
//! for fuzzing, and for a VMM with both ends in one process.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, PoisonError},
    time::Duration,
};

use super::{Connect, Context, Host, Link, Listen, PeerSignal, StallTimer, Wake, deadline};
use crate::{
    ram::{Part, PartMut},
    sync_types::{Condvar, Instant, Mutex, MutexGuard},
};

/// Creates the two ends of a connection that buffers up to `capacity` bytes in each direction, each with its side's
/// context.
pub fn pair(capacity: usize, near: &Context, far: &Context) -> (MemoryLink, MemoryLink) {
    let (one, other) = ends(capacity);
    (MemoryLink::new(one, near), MemoryLink::new(other, far))
}

fn ends(capacity: usize) -> (End, End) {
    let (there, back) = (Arc::new(Pipe::new(capacity)), Arc::new(Pipe::new(capacity)));
    let near = Ends { incoming: back.clone(), outgoing: there.clone() };
    let far = Ends { incoming: there, outgoing: back };
    (End(Arc::new(near)), End(Arc::new(far)))
}

/// Creates a network: the listener accepts what the connector opens.
pub fn network(capacity: usize) -> (MemoryConnector, MemoryListener) {
    let meeting = Arc::new(Meeting::default());
    (MemoryConnector { meeting: meeting.clone(), capacity }, MemoryListener { meeting })
}

/// One end of a connection in memory.
pub struct MemoryLink {
    end: End,
    timeout: Option<Duration>,
    stall_timer: StallTimer,
}

impl MemoryLink {
    fn new(end: End, context: &Context) -> Self {
        Self { end, timeout: None, stall_timer: context.stall_timer.clone() }
    }
}

impl std::fmt::Debug for MemoryLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryLink").field("timeout", &self.timeout).finish_non_exhaustive()
    }
}

/// One end, closed when it is dropped.
struct End(Arc<Ends>);

struct Ends {
    incoming: Arc<Pipe>,
    outgoing: Arc<Pipe>,
}

impl Wake for Ends {
    fn wake(&self) {
        self.incoming.close();
        self.outgoing.close();
    }
}

impl Wake for Pipe {
    fn wake(&self) {
        self.close();
    }
}

impl Link for MemoryLink {
    fn send(&mut self, parts: &[Part<'_>]) -> io::Result<usize> {
        let sent = self.end.0.outgoing.write(parts, &self.stall_timer);
        self.moved(sent)
    }

    fn recv(&mut self, parts: &mut [PartMut<'_>]) -> io::Result<usize> {
        let received = self.end.0.incoming.read(parts, self.timeout);
        self.moved(received)
    }

    fn is_readable(&mut self) -> io::Result<bool> {
        Ok(self.end.0.incoming.is_readable())
    }

    fn set_recv_timeout(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.timeout = limit;
        Ok(())
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.end.0.clone()
    }

    fn send_waker(&self) -> Arc<dyn Wake> {
        self.end.0.outgoing.clone()
    }

    fn recv_waker(&self) -> Arc<dyn Wake> {
        self.end.0.incoming.clone()
    }

    fn peer_signal(&self) -> io::Result<Option<PeerSignal>> {
        Ok(None)
    }

    fn peer(&self) -> String {
        "memory".into()
    }

    fn host(&self) -> Option<Host> {
        None
    }

    fn finish(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn close_send(&mut self) -> io::Result<()> {
        self.end.0.outgoing.close();
        Ok(())
    }
}

impl MemoryLink {
    fn moved(&self, bytes: io::Result<usize>) -> io::Result<usize> {
        if let Ok(1..) = &bytes {
            self.stall_timer.moved();
        }
        bytes
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.0.wake();
    }
}

/// Bytes in transit. After it is closed, it returns what it contains and then ends; writing to it fails.
struct Pipe {
    state: Mutex<Bytes>,
    changed: Condvar,
    capacity: usize,
}

#[derive(Default)]
struct Bytes {
    buffer: Vec<u8>,
    read: usize,
    closed: bool,
}

impl Pipe {
    fn new(capacity: usize) -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), capacity: capacity.max(1) }
    }

    fn write(&self, parts: &[Part<'_>], stall_timer: &StallTimer) -> io::Result<usize> {
        if parts.iter().all(|part| part.len() == 0) {
            return Ok(0);
        }
        let mut state = self.lock();
        let begun = Instant::now();
        while !state.closed && state.buffer.len() - state.read >= self.capacity {
            state = match stall_timer.left(begun) {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(left) => {
                    let waited = self.changed.wait_timeout(state, left);
                    stall_timer.check_send(begun)?;
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        if state.closed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let read = std::mem::take(&mut state.read);
        state.buffer.drain(..read);
        let mut written = 0;
        for part in parts {
            let start = state.buffer.len();
            let room = part.len().min(self.capacity - start);
            state.buffer.resize(start + room, 0);
            written += part.copy_to(&mut state.buffer[start..]);
            if room < part.len() {
                break;
            }
        }
        self.changed.notify_all();
        Ok(written)
    }

    fn read(&self, parts: &mut [PartMut<'_>], timeout: Option<Duration>) -> io::Result<usize> {
        let end = timeout.map(deadline);
        let mut state = self.lock();
        while !state.closed && state.buffer.len() == state.read {
            state = match end.map(|end| end.saturating_duration_since(Instant::now())) {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return Err(io::ErrorKind::TimedOut.into()),
                Some(left) => {
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        let mut received = 0;
        for part in parts {
            let bytes = &state.buffer[state.read..];
            let copied = part.copy_from(bytes);
            state.read += copied;
            received += copied;
        }
        self.changed.notify_all();
        Ok(received)
    }

    fn is_readable(&self) -> bool {
        let state = self.lock();
        state.closed || state.buffer.len() > state.read
    }

    fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Bytes> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Default)]
struct Meeting {
    state: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    ends: VecDeque<End>,
    woken: bool,
    closed: bool,
}

impl Meeting {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wake for Meeting {
    fn wake(&self) {
        self.lock().woken = true;
        self.changed.notify_all();
    }
}

/// Opens connections to a [`MemoryListener`].
#[derive(Clone)]
pub struct MemoryConnector {
    meeting: Arc<Meeting>,
    capacity: usize,
}

impl std::fmt::Debug for MemoryConnector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryConnector").field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

impl Connect for MemoryConnector {
    fn connect(&self, context: &Context) -> io::Result<Box<dyn Link>> {
        let (near, far) = ends(self.capacity);
        let mut waiting = self.meeting.lock();
        if waiting.closed {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        waiting.ends.push_back(far);
        self.meeting.changed.notify_all();
        Ok(Box::new(MemoryLink::new(near, context)))
    }

    fn target(&self) -> String {
        "memory".into()
    }
}

/// Accepts connections from a [`MemoryConnector`].
pub struct MemoryListener {
    meeting: Arc<Meeting>,
}

impl std::fmt::Debug for MemoryListener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryListener").finish_non_exhaustive()
    }
}

impl Listen for MemoryListener {
    fn accept(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>> {
        let mut waiting = self.meeting.lock();
        loop {
            if std::mem::take(&mut waiting.woken) {
                return Ok(None);
            }
            if let Some(end) = waiting.ends.pop_front() {
                return Ok(Some(Box::new(MemoryLink::new(end, context))));
            }
            waiting = self.meeting.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn accept_waiting(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>> {
        let end = self.meeting.lock().ends.pop_front();
        Ok(end.map(|end| Box::new(MemoryLink::new(end, context)) as _))
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.meeting.clone()
    }

    fn address(&self) -> String {
        "memory".into()
    }
}

impl Drop for MemoryListener {
    fn drop(&mut self) {
        let mut waiting = self.meeting.lock();
        waiting.closed = true;
        waiting.ends.clear();
    }
}
