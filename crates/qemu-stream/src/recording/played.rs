//! A recording as a listener: the recorded connections, whose bytes are those of the source.
//!
//! ```text
//! Recording ─▶ Played: Listen ─ accept, in the recorded order ─▶ PlayedLink: recv: the recorded bytes; send: thrown away
//! ```
//!
//! A link owns its place in the file and shares nothing with others but the file, so it never waits: its next bytes are there, or it
//! is at its end. The only wait is that of the listener after its last connection; its waker ends it.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use multifd::{
    channel::{Context, Host, Link, Listen, PeerSignal, StallTimer, Wake},
    ram::{Part, PartMut},
};

use super::{Bytes, ConnectionKind, ConnectionNumber, Recording, Side, Timeline, one_way::Cursor};
use crate::error::{Error, Place, StreamKind, Unsupported};

/// A listener that accepts the connections of a recording.
pub struct Played<B> {
    recording: Arc<Recording<B>>,
    left: VecDeque<ConnectionNumber>,
    woken: Arc<Woken>,
    read: Arc<AtomicU64>,
}

impl<B> std::fmt::Debug for Played<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Played").field("left", &self.left).finish_non_exhaustive()
    }
}

impl<B: Bytes + 'static> Played<B> {
    /// The connections of this recording. `read` counts the bytes that are received over all of them.
    ///
    /// # Errors
    /// If the file is malformed, encrypted, has no main connection or several, or cannot be read.
    pub fn new(recording: Arc<Recording<B>>, read: Arc<AtomicU64>) -> Result<Self, Error> {
        let found = Timeline::of(&recording)?;
        let count = |kind| found.connections.iter().filter(|found| found.kind == kind).count();
        let refused = |what| {
            let at = Place { stream: StreamKind::Recording, offset: 0 };
            Err(Unsupported::Recording(what).at(at))
        };
        if count(ConnectionKind::Tls) > 0 {
            return refused("the recording of an encrypted migration (TLS)");
        }
        match count(ConnectionKind::Main) {
            1 => {}
            0 => return refused("a recording without a main connection"),
            _ => return refused("a recording of several migrations, or of one that was resumed,"),
        }
        // What has sent nothing, such as a test of the port, would be refused.
        let connections = found.connections.iter().filter(|found| found.source.bytes > 0);
        let left = connections.map(|found| found.number).collect();
        Ok(Self { recording, left, woken: Arc::default(), read })
    }

    fn next(&mut self, context: &Context) -> Option<Box<dyn Link>> {
        let number = self.left.pop_front()?;
        Some(Box::new(PlayedLink {
            recording: self.recording.clone(),
            cursor: Cursor::new(number, Side::Source),
            number,
            buffer: Vec::new(),
            taken: 0,
            ended: Arc::default(),
            stall_timer: context.stall_timer.clone(),
            read: self.read.clone(),
        }))
    }
}

impl<B: Bytes + 'static> Listen for Played<B> {
    fn accept(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>> {
        if self.woken.take() {
            return Ok(None);
        }
        if let Some(link) = self.next(context) {
            return Ok(Some(link));
        }
        self.woken.wait();
        Ok(None)
    }

    fn accept_waiting(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>> {
        Ok(self.next(context))
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.woken.clone()
    }

    fn address(&self) -> String {
        PEER.to_owned()
    }
}

/// Whether the wait for a connection was ended. Each wake ends one wait.
#[derive(Default)]
struct Woken {
    is: Mutex<bool>,
    changed: Condvar,
}

impl Woken {
    fn take(&self) -> bool {
        std::mem::take(&mut self.is.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn wait(&self) {
        let is = self.is.lock().unwrap_or_else(PoisonError::into_inner);
        // The stop wakes every listener that is registered with it.
        let mut is = self.changed.wait_while(is, |is| !*is).unwrap_or_else(PoisonError::into_inner);
        *is = false;
    }
}

impl Wake for Woken {
    fn wake(&self) {
        *self.is.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }
}

/// One connection.
struct PlayedLink<B> {
    recording: Arc<Recording<B>>,
    cursor: Cursor,
    number: ConnectionNumber,
    /// Bytes that were read from the file, and how many of them were received.
    buffer: Vec<u8>,
    taken: usize,
    ended: Arc<Ended>,
    stall_timer: StallTimer,
    read: Arc<AtomicU64>,
}

/// Whether a link was shut down. Relaxed: nothing else is read because of it.
#[derive(Default)]
struct Ended(AtomicBool);

impl Wake for Ended {
    fn wake(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What ends nothing: replies are thrown away in any case.
struct Nothing;

impl Wake for Nothing {
    fn wake(&self) {}
}

impl<B: Bytes> PlayedLink<B> {
    /// Reads the next bytes; `false` at the end.
    fn fill(&mut self) -> io::Result<bool> {
        if self.ended.0.load(Ordering::Relaxed) {
            return Ok(false);
        }
        self.buffer.resize(BUFFER, 0);
        self.taken = 0;
        let read = self.cursor.read_some(&self.recording, &mut self.buffer);
        self.buffer.truncate(*read.as_ref().unwrap_or(&0));
        let count = read.map_err(io::Error::other)?;
        // Relaxed: it is only displayed.
        self.read.fetch_add(count as u64, Ordering::Relaxed);
        self.stall_timer.moved();
        Ok(count > 0)
    }
}

impl<B: Bytes + 'static> Link for PlayedLink<B> {
    fn send(&mut self, parts: &[Part<'_>]) -> io::Result<usize> {
        Ok(parts.iter().map(Part::len).sum())
    }

    fn recv(&mut self, parts: &mut [PartMut<'_>]) -> io::Result<usize> {
        let mut sum = 0;
        for part in parts {
            let mut done = 0;
            while done < part.len() {
                // Bytes that are here already are received first, so that a read of the file is never for nothing.
                if self.taken == self.buffer.len() && (sum > 0 || !self.fill()?) {
                    return Ok(sum);
                }
                let count = part.copy_from_at(done, self.buffer.get(self.taken..).unwrap_or_default());
                self.taken += count;
                done += count;
                sum += count;
            }
        }
        Ok(sum)
    }

    fn set_recv_timeout(&mut self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }

    fn is_readable(&mut self) -> io::Result<bool> {
        Ok(true)
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.ended.clone()
    }

    fn send_waker(&self) -> Arc<dyn Wake> {
        Arc::new(Nothing)
    }

    fn recv_waker(&self) -> Arc<dyn Wake> {
        self.ended.clone()
    }

    fn peer_signal(&self) -> io::Result<Option<PeerSignal>> {
        Ok(None)
    }

    fn peer(&self) -> String {
        format!("{PEER}, connection {}", self.number.number())
    }

    fn host(&self) -> Option<Host> {
        None
    }

    fn close_send(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const PEER: &str = "the recording";
/// Bytes that are read from the file at once.
const BUFFER: usize = 256 << 10;
