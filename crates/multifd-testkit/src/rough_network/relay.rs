//! The wire: moves packets from one device to the other, with one thread for each direction.
//!
//! When a packet arrives, a random number decides its fate. It gets the time at which it is to be delivered, and waits
//! until then with the others. A wait ends with the next packet, with the time of the next delivery, or with the drop.

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
    /// The share of packets that are lost, 0 to 1.
    pub loss: f64,
    /// The delay of every packet.
    pub delay: Duration,
    /// The share of packets, 0 to 1, that are not delayed and so overtake others.
    pub reordered: f64,
    /// Bits per second; `None` is no limit.
    pub rate: Option<u64>,
    /// The seed of all random decisions.
    pub seed: u64,
}

impl Default for Line {
    /// A line that delivers all packets at once.
    fn default() -> Self {
        Self { loss: 0.0, delay: Duration::ZERO, reordered: 0.0, rate: None, seed: 1 }
    }
}

/// What happened to packets in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// Packets that arrived.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Packets that were lost by chance.
    pub lost: u64,
    /// Packets that were lost because the line was disconnected.
    pub cut: u64,
    /// Packets that arrived while too many waited for a slow line.
    pub crowded: u64,
    /// Packets that overtook others.
    pub reordered: u64,
}

/// The threads. The drop ends them.
#[derive(Debug)]
pub(super) struct Relay {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// Orders nothing: one packet more or less makes no difference.
    plugged: AtomicBool,
    carried: Mutex<[Carried; 2]>,
    changed: Condvar,
    /// Readable at the end.
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
            // A thread that panicked has reported it.
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
    /// Ordered by time of delivery, then by number.
    under_way: BinaryHeap<Reverse<(Instant, u64, Vec<u8>)>>,
    count: u64,
    /// The time at which the last packet has gone into a slow line.
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
                // There is no packet, or the device is down.
                let Ok(length) = from.read(&mut packet) else { break };
                self.take(&packet[..length], &mut now);
            }
            while let Some(due) = self.under_way.peek() {
                if due.0.0 > Instant::now() {
                    break;
                }
                let Some(Reverse((_, _, packet))) = self.under_way.pop() else { break };
                // A device that is down or full accepts nothing.
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

    /// Decides what happens to a packet.
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

/// The greatest size of a packet.
const LONGEST: usize = 64 << 10;
/// The number of packets read before waiting packets are checked again.
const AT_ONCE: usize = 64;
/// The greatest delay in the queue of a slow line. More packets are lost: this is how a network signals congestion.
const QUEUE: Duration = Duration::from_millis(50);
