//! Connections with faults.
//!
//! The faults use the means of the real connection below, so that the engine gets the real errors of the system. Only
//! [`Mishap::Swallow`] and [`Mishap::Hold`] simulate a network or a program.

use std::{
    io,
    sync::{
        Arc, Condvar, Mutex, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use multifd::{
    channel::{Connect, Context, Host, Link, Listen, PeerSignal, Wake},
    ram::{Part, PartMut},
};

use crate::plan::{Direction, Fault, Mishap, Side};

/// The fault of the connections of one side, and when it happened.
#[derive(Debug)]
pub(crate) struct Misfortune {
    fault: Fault,
    side: Side,
    opened: AtomicUsize,
    pub(crate) struck: OnceLock<Instant>,
}

impl Misfortune {
    pub(crate) fn new(fault: Fault, side: Side) -> Arc<Self> {
        Arc::new(Self { fault, side, opened: AtomicUsize::new(0), struck: OnceLock::new() })
    }

    /// Notes that it happens now.
    pub(crate) fn strike(&self) {
        let _ = self.struck.set(Instant::now());
    }

    fn befall(self: &Arc<Self>, link: Box<dyn Link>) -> Box<dyn Link> {
        let number = self.opened.fetch_add(1, Ordering::SeqCst);
        match self.fault {
            Fault::Link { side, connection, direction, after, what }
                if side == self.side && connection == number =>
            {
                let hold = Arc::new(Hold::default());
                let fortune = self.clone();
                let (moved, slow, timeout) = (0, 0, None);
                Box::new(Unlucky { link, fortune, direction, after, what, moved, slow, hold, timeout })
            }
            _ => link,
        }
    }
}

/// The source's side.
pub(crate) struct UnluckyConnector {
    pub(crate) inner: Arc<dyn Connect>,
    pub(crate) fortune: Arc<Misfortune>,
    /// Foreign connections stay open until the migration is over.
    pub(crate) strangers: Mutex<Vec<Box<dyn Link>>>,
}

impl Connect for UnluckyConnector {
    fn connect(&self, context: &Context) -> io::Result<Box<dyn Link>> {
        let number = self.fortune.opened.load(Ordering::SeqCst);
        match self.fortune.fault {
            Fault::Refused(connection) if connection == number => {
                self.fortune.strike();
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            Fault::Stranger(connection, says)
                if connection == number && self.fortune.struck.get().is_none() =>
            {
                self.fortune.strike();
                let mut stranger = self.inner.connect(context)?;
                if !says.is_empty() {
                    stranger.send(&[Part::from(says)])?;
                }
                self.strangers.lock().unwrap_or_else(PoisonError::into_inner).push(stranger);
            }
            _ => {}
        }
        Ok(self.fortune.befall(self.inner.connect(context)?))
    }

    fn target(&self) -> String {
        self.inner.target()
    }
}

/// The destination's side.
pub(crate) struct UnluckyListener {
    pub(crate) inner: Box<dyn Listen>,
    pub(crate) fortune: Arc<Misfortune>,
}

impl Listen for UnluckyListener {
    fn accept(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>> {
        Ok(self.inner.accept(context)?.map(|link| self.fortune.befall(link)))
    }

    fn accept_waiting(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>> {
        Ok(self.inner.accept_waiting(context)?.map(|link| self.fortune.befall(link)))
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.inner.waker()
    }

    fn address(&self) -> String {
        self.inner.address()
    }
}

/// One connection, from one side.
struct Unlucky {
    link: Box<dyn Link>,
    fortune: Arc<Misfortune>,
    direction: Direction,
    after: u64,
    what: Mishap,
    /// Bytes that have moved in that direction.
    moved: u64,
    /// Of them, slowly.
    slow: u64,
    hold: Arc<Hold>,
    timeout: Option<Duration>,
}

/// Wakes a reader that is held.
#[derive(Default)]
struct Hold {
    woken: Mutex<bool>,
    changed: Condvar,
}

impl Wake for Hold {
    fn wake(&self) {
        *self.woken.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }
}

impl Hold {
    /// Waits; returns whether it was woken in time.
    fn wait(&self, limit: Option<Duration>) -> bool {
        let woken = self.woken.lock().unwrap_or_else(PoisonError::into_inner);
        let limit = limit.unwrap_or(Duration::MAX);
        let waited = self.changed.wait_timeout_while(woken, limit, |woken| !*woken);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Unlucky {
    /// The number of bytes that may still pass before the fault.
    fn before(&self) -> usize {
        usize::try_from(self.after.saturating_sub(self.moved)).unwrap_or(usize::MAX)
    }

    fn send_with(&mut self, parts: &[Part<'_>], more: bool) -> io::Result<usize> {
        let before = self.before();
        let mut send =
            |parts: &[Part<'_>]| if more { self.link.send_more(parts) } else { self.link.send(parts) };
        let total: usize = parts.iter().map(Part::len).sum();
        if self.direction == Direction::Received || total == 0 {
            return send(parts);
        }
        if before >= total {
            let sent = send(parts)?;
            self.moved += sent as u64;
            return Ok(sent);
        }
        if before > 0 {
            let sent = send(&[Part::from(&first(parts, before)[..])])?;
            self.moved += sent as u64;
            return Ok(sent);
        }
        self.fortune.strike();
        match self.what {
            Mishap::Cut => {
                self.link.waker().wake();
                self.link.send(parts)
            }
            Mishap::HalfClose => {
                self.link.close_send()?;
                self.link.send(parts)
            }
            Mishap::Swallow => Ok(total),
            Mishap::Flip(bit) => {
                let mut bytes = first(parts, 1);
                bytes[0] ^= 1 << bit;
                let sent = self.link.send(&[Part::from(&bytes[..])])?;
                // One is enough.
                self.after = u64::MAX;
                Ok(sent)
            }
            Mishap::Slow | Mishap::Hold => {
                thread::sleep(STEP);
                let sent = self.link.send(&[Part::from(&first(parts, PIECE)[..])])?;
                self.moved += sent as u64;
                self.slowed(sent);
                Ok(sent)
            }
        }
    }

    /// Counts bytes that were slowed down; after some the connection is normal again.
    fn slowed(&mut self, bytes: usize) {
        self.slow += bytes as u64;
        self.after = if self.slow > MOST_SLOWLY { u64::MAX } else { self.moved };
    }

    /// Receives up to `len` bytes through a buffer.
    fn recv_piece(&mut self, parts: &mut [PartMut<'_>], len: usize, change: u8) -> io::Result<usize> {
        let mut buffer = vec![0; len];
        let received = self.link.recv(&mut [PartMut::from(&mut buffer[..])])?;
        if received > 0 {
            buffer[0] ^= change;
        }
        let mut rest = &buffer[..received];
        for part in parts {
            rest = &rest[part.copy_from(rest)..];
        }
        self.moved += received as u64;
        Ok(received)
    }
}

impl Link for Unlucky {
    fn send(&mut self, parts: &[Part<'_>]) -> io::Result<usize> {
        self.send_with(parts, false)
    }

    fn send_more(&mut self, parts: &[Part<'_>]) -> io::Result<usize> {
        self.send_with(parts, true)
    }

    fn recv(&mut self, parts: &mut [PartMut<'_>]) -> io::Result<usize> {
        let total: usize = parts.iter().map(PartMut::len).sum();
        if self.direction == Direction::Sent || total == 0 {
            return self.link.recv(parts);
        }
        let before = self.before();
        if before >= total {
            let received = self.link.recv(parts)?;
            self.moved += received as u64;
            return Ok(received);
        }
        if before > 0 {
            return self.recv_piece(parts, before, 0);
        }
        self.fortune.strike();
        match self.what {
            Mishap::Cut | Mishap::HalfClose | Mishap::Swallow => {
                self.link.waker().wake();
                self.link.recv(parts)
            }
            Mishap::Hold => {
                // A pipe in memory reports a closed end only to its reader.
                let alone = self.link.peer_signal()?.is_none().then_some(UNREPORTED);
                let limit = self.timeout.into_iter().chain(alone).min();
                if self.hold.wait(limit) || (limit == alone && limit.is_some()) {
                    self.link.recv(parts)
                } else {
                    Err(io::ErrorKind::TimedOut.into())
                }
            }
            Mishap::Flip(bit) => {
                let received = self.recv_piece(parts, 1, 1 << bit)?;
                self.after = u64::MAX;
                Ok(received)
            }
            Mishap::Slow => {
                thread::sleep(STEP);
                let received = self.recv_piece(parts, PIECE.min(total), 0)?;
                self.slowed(received);
                Ok(received)
            }
        }
    }

    fn set_recv_timeout(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.timeout = limit;
        self.link.set_recv_timeout(limit)
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::new(Both(self.hold.clone(), self.link.waker()))
    }

    fn send_waker(&self) -> Arc<dyn Wake> {
        self.link.send_waker()
    }

    fn recv_waker(&self) -> Arc<dyn Wake> {
        Arc::new(Both(self.hold.clone(), self.link.recv_waker()))
    }

    fn peer_signal(&self) -> io::Result<Option<PeerSignal>> {
        self.link.peer_signal()
    }

    fn is_readable(&mut self) -> io::Result<bool> {
        self.link.is_readable()
    }

    fn host(&self) -> Option<Host> {
        self.link.host()
    }

    fn peer(&self) -> String {
        self.link.peer()
    }

    fn close_send(&mut self) -> io::Result<()> {
        self.link.close_send()
    }

    fn finish(&mut self) -> io::Result<()> {
        self.link.finish()
    }
}

/// Wakes both.
struct Both(Arc<dyn Wake>, Arc<dyn Wake>);

impl Wake for Both {
    fn wake(&self) {
        self.0.wake();
        self.1.wake();
    }
}

/// The first bytes of `parts`.
fn first(parts: &[Part<'_>], len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    for part in parts {
        let mut piece = vec![0; part.len().min(len - bytes.len())];
        part.copy_to(&mut piece);
        bytes.extend(piece);
    }
    bytes
}

const STEP: Duration = Duration::from_micros(200);
const PIECE: usize = 1 << 10;
const UNREPORTED: Duration = Duration::from_secs(4);
const MOST_SLOWLY: u64 = 1 << 18;
