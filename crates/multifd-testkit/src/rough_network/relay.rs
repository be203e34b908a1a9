//! The wire: packets from one device to the other, a thread a direction.
//!
//! A packet is drawn against the line's odds when it comes, gets the time at which it is due, and waits until then with the
//! others. A wait ends with the next packet, with the time of the next that is due, or with the drop.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    fs::File,
    io::{self, Read, Write},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{Builder, JoinHandle},
    time::{Duration, Instant},
};

use fastrand::Rng;
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    fd::OwnedFd,
    io::Errno,
};

/// What a line does to packets, in both directions.
#[derive(Clone, Debug)]
pub struct Line {
    /// The part of all packets that is lost, 0 to 1.
    pub loss: f64,
    /// How long every packet is under way.
    pub delay: Duration,
    /// The part of all packets, 0 to 1, that is under way for no time at all and so overtakes others.
    pub reordered: f64,
    /// Bits a second; `None` for as many as there are.
    pub rate: Option<u64>,
    /// What it does follows from this.
    pub seed: u64,
}

impl Default for Line {
    /// A line that does nothing to packets.
    fn default() -> Self {
        Self { loss: 0.0, delay: Duration::ZERO, reordered: 0.0, rate: None, seed: 1 }
    }
}

/// What became of packets in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// Packets that arrived.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Packets that were lost by chance.
    pub lost: u64,
    /// Packets that were lost because the line was pulled.
    pub cut: u64,
    /// Packets that came while too many waited for a slow line.
    pub crowded: u64,
    /// Packets that overtook others.
    pub reordered: u64,
}

/// The threads, ended in the drop.
#[derive(Debug)]
pub(super) struct Relay {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// Orders nothing: a packet more or less makes no difference.
    plugged: AtomicBool,
    carried: Mutex<[Carried; 2]>,
    changed: Condvar,
    /// Readable when all is over.
    end: OwnedFd,
}

impl Relay {
    pub(super) fn start(line: &Line, near: Arc<File>, far: Arc<File>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            plugged: AtomicBool::new(true),
            carried: Mutex::default(),
            changed: Condvar::new(),
            end: eventfd(0, EventfdFlags::CLOEXEC)?,
        });
        let mut relay = Self { shared, threads: Vec::new() };
        for (way, (from, to)) in [(near.clone(), far.clone()), (far, near)].into_iter().enumerate() {
            let (line, shared) = (line.clone(), relay.shared.clone());
            let random = Rng::with_seed(line.seed.wrapping_add(way as u64));
            let mut wire =
                Wire { way, line, shared, random, under_way: BinaryHeap::new(), count: 0, free: None };
            let thread = Builder::new().name(format!("wire_{way}"));
            relay.threads.push(thread.spawn(move || wire.carry(&from, &to))?);
        }
        Ok(relay)
    }

    pub(super) fn plug(&self, plugged: bool) {
        self.shared.plugged.store(plugged, Ordering::Relaxed);
    }

    pub(super) fn carried(&self) -> [Carried; 2] {
        *self.shared.carried()
    }

    pub(super) fn wait_carried(&self, bytes: u64, patience: Duration) -> bool {
        let missing = |carried: &mut [Carried; 2]| carried[0].bytes < bytes;
        let waited = self.shared.changed.wait_timeout_while(self.shared.carried(), patience, missing);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // A counter that cannot be full.
        let _ = rustix::io::write(&self.shared.end, &1_u64.to_be_bytes());
        for thread in self.threads.drain(..) {
            // One that panicked has told so.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn carried(&self) -> MutexGuard<'_, [Carried; 2]> {
        self.carried.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_plugged(&self) -> bool {
        self.plugged.load(Ordering::Relaxed)
    }
}

/// One direction.
struct Wire {
    way: usize,
    line: Line,
    shared: Arc<Shared>,
    random: Rng,
    /// By the time they are due, then by their number.
    under_way: BinaryHeap<Reverse<(Instant, u64, Vec<u8>)>>,
    count: u64,
    /// When the last packet has gone into a slow line.
    free: Option<Instant>,
}

impl Wire {
    fn carry(&mut self, mut from: &File, mut to: &File) {
        let mut packet = vec![0; LONGEST];
        loop {
            let due = self.under_way.peek().map(|Reverse((due, ..))| *due);
            let left = due.map(|due| due.saturating_duration_since(Instant::now()));
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            let mut fds = [PollFd::new(&self.shared.end, PollFlags::IN), PollFd::new(from, PollFlags::IN)];
            match poll(&mut fds, left.as_ref()) {
                Ok(_) if !fds[0].revents().is_empty() => return,
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => panic!("wait for a packet: {error}"),
            }
            let mut now = Carried::default();
            for _ in 0..AT_ONCE {
                // Nothing is there, or the device is down.
                let Ok(length) = from.read(&mut packet) else { break };
                self.take(&packet[..length], &mut now);
            }
            while let Some(due) = self.under_way.peek() {
                if due.0.0 > Instant::now() {
                    break;
                }
                let Some(Reverse((_, _, packet))) = self.under_way.pop() else { break };
                // A device that is down, or full, takes nothing.
                if !self.shared.is_plugged() || to.write(&packet).is_err() {
                    now.cut += 1;
                    continue;
                }
                now.packets += 1;
                now.bytes += packet.len() as u64;
            }
            self.count(now);
        }
    }

    /// Decides what becomes of a packet.
    fn take(&mut self, packet: &[u8], now: &mut Carried) {
        let (lost, overtakes) = (self.random.f64() < self.line.loss, self.random.f64() < self.line.reordered);
        if !self.shared.is_plugged() {
            now.cut += 1;
            return;
        }
        if lost {
            now.lost += 1;
            return;
        }
        let mut leaves = Instant::now();
        if let Some(rate) = self.line.rate {
            let begins = self.free.map_or(leaves, |free| free.max(leaves));
            if begins > leaves + QUEUE {
                now.crowded += 1;
                return;
            }
            let bits = packet.len() as u64 * 8;
            leaves = begins + Duration::from_nanos(bits * 1_000_000_000 / rate.max(1));
            self.free = Some(leaves);
        }
        let due = if overtakes { leaves } else { leaves + self.line.delay };
        now.reordered += u64::from(overtakes);
        self.under_way.push(Reverse((due, self.count, packet.to_vec())));
        self.count += 1;
    }

    fn count(&self, now: Carried) {
        if now == Carried::default() {
            return;
        }
        let mut carried = self.shared.carried();
        let all = &mut carried[self.way];
        all.packets += now.packets;
        all.bytes += now.bytes;
        all.lost += now.lost;
        all.cut += now.cut;
        all.crowded += now.crowded;
        all.reordered += now.reordered;
        self.shared.changed.notify_all();
    }
}

/// A packet of the longest kind.
const LONGEST: usize = 64 << 10;
/// Packets taken in before those that are due are looked at again.
const AT_ONCE: usize = 64;
/// How much waits at the head of a slow line, as a time. More is lost: that is how a network tells a sender.
const QUEUE: Duration = Duration::from_millis(50);
