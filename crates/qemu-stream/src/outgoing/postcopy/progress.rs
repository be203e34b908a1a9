//! The numbers of a post-copy migration, for another thread to read.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use multifd::{SendCounters, postcopy::Latencies};

use super::pages::Written;

/// The counters. They order nothing: each is only a number to show.
#[derive(Debug)]
pub(super) struct Counts {
    begun: Instant,
    started: OnceLock<Duration>,
    requests: AtomicU64,
    late: AtomicU64,
    normal: AtomicU64,
    zero: AtomicU64,
    bytes: AtomicU64,
    unreadable: AtomicU64,
    recoveries: AtomicU64,
    over_channels: AtomicBool,
    /// Pages sent, and those that are to be sent.
    planned: AtomicU64,
    latencies: Latencies,
    /// Called once, when the destination has confirmed that it runs the guest.
    on_start: Mutex<Option<OnStart>>,
    /// The channels, if they send the pages, and what they had sent before.
    channels: Mutex<Option<(SendCounters, Sent)>>,
}

/// What channels have sent.
#[derive(Clone, Copy, Debug, Default)]
struct Sent {
    normal: u64,
    zero: u64,
    bytes: u64,
}

/// What is done when the guest runs.
struct OnStart(Box<dyn FnOnce() + Send>);

impl fmt::Debug for OnStart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnStart")
    }
}

impl Counts {
    pub(super) fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            begun: Instant::now(),
            started: OnceLock::new(),
            requests: zero(),
            late: zero(),
            normal: zero(),
            zero: zero(),
            bytes: zero(),
            unreadable: zero(),
            recoveries: zero(),
            over_channels: AtomicBool::new(false),
            planned: zero(),
            latencies: Latencies::default(),
            on_start: Mutex::default(),
            channels: Mutex::default(),
        }
    }

    pub(super) fn guest_started(&self) {
        self.started.get_or_init(|| self.begun.elapsed());
        let call = lock(&self.on_start).take();
        if let Some(OnStart(call)) = call {
            call();
        }
    }

    /// Calls `call` when the destination has confirmed that it runs the guest.
    pub(super) fn on_start(&self, call: impl FnOnce() + Send + 'static) {
        *lock(&self.on_start) = Some(OnStart(Box::new(call)));
    }

    /// These channels send the pages from now on.
    pub(super) fn follow(&self, channels: SendCounters) {
        let before = Sent::of(&channels);
        *lock(&self.channels) = Some((channels, before));
    }

    /// The channels have sent all that they will.
    pub(super) fn unfollow(&self) {
        let sent = self.by_channels();
        *lock(&self.channels) = None;
        self.wrote(Written { normal: sent.normal, zero: sent.zero, bytes: sent.bytes });
    }

    fn by_channels(&self) -> Sent {
        lock(&self.channels).as_ref().map_or_else(Sent::default, |(channels, before)| {
            let now = Sent::of(channels);
            Sent {
                normal: now.normal - before.normal,
                zero: now.zero - before.zero,
                bytes: now.bytes - before.bytes,
            }
        })
    }

    pub(super) fn requested(&self, claimed: bool) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.late.fetch_add(u64::from(!claimed), Ordering::Relaxed);
    }

    pub(super) fn answered(&self, time: Duration) {
        self.latencies.add(time);
    }

    pub(super) fn wrote(&self, written: Written) {
        self.normal.fetch_add(written.normal, Ordering::Relaxed);
        self.zero.fetch_add(written.zero, Ordering::Relaxed);
        self.other_bytes(written.bytes);
    }

    pub(super) fn other_bytes(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn unreadable(&self, pages: u64) {
        self.unreadable.fetch_add(pages, Ordering::Relaxed);
    }

    pub(super) fn recovers(&self) {
        self.recoveries.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn over_channels(&self, on: bool) {
        self.over_channels.store(on, Ordering::Relaxed);
    }

    /// This number of pages is to be sent after those that were sent already.
    pub(super) fn plan(&self, left: u64) {
        let channels = self.by_channels();
        let sent = self.normal.load(Ordering::Relaxed)
            + self.zero.load(Ordering::Relaxed)
            + channels.normal
            + channels.zero;
        self.planned.store(sent + left, Ordering::Relaxed);
    }
}

/// Reads the numbers of a migration, from any thread.
#[derive(Clone, Debug)]
pub struct PostcopyProgress(pub(super) Arc<Counts>);

/// The numbers of a post-copy migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PostcopyInfo {
    /// How long it has run.
    pub total_time: Duration,
    /// When the destination had loaded the devices, so that the guest ran, from the beginning on. `None` if it has not.
    pub guest_running_after: Option<Duration>,
    /// The number of requests for pages.
    pub requests: u64,
    /// How many of them were for pages that had been sent already.
    pub late_requests: u64,
    /// The time from a request to the end of the write of its pages: half of the requests took at most this long.
    pub request_p50: Option<Duration>,
    /// Ninety-nine of a hundred requests took at most this long.
    pub request_p99: Option<Duration>,
    /// Pages sent with contents.
    pub normal: u64,
    /// Zero pages sent.
    pub zero: u64,
    /// The number of pages that the destination lacks. `None` before the guest is started, and before a resumed destination has
    /// reported it.
    pub remaining: Option<u64>,
    /// Bytes written.
    pub transferred: u64,
    /// Pages that could not be read and were not sent.
    pub unreadable: u64,
    /// How often the migration has continued over new connections.
    pub recoveries: u64,
    /// Whether the pages go over the channels. Otherwise they go over main, as QEMU sends them.
    pub over_channels: bool,
}

impl PostcopyProgress {
    /// The present numbers.
    pub fn info(&self) -> PostcopyInfo {
        let counts = &*self.0;
        let load = |number: &AtomicU64| number.load(Ordering::Relaxed);
        let channels = counts.by_channels();
        let (normal, zero) = (load(&counts.normal) + channels.normal, load(&counts.zero) + channels.zero);
        PostcopyInfo {
            total_time: counts.begun.elapsed(),
            guest_running_after: counts.started.get().copied(),
            requests: load(&counts.requests),
            late_requests: load(&counts.late),
            request_p50: counts.latencies.percentile(500),
            request_p99: counts.latencies.percentile(990),
            normal,
            zero,
            remaining: Some(load(&counts.planned))
                .filter(|planned| *planned > 0)
                .map(|planned| planned.saturating_sub(normal + zero)),
            transferred: load(&counts.bytes) + channels.bytes,
            unreadable: load(&counts.unreadable),
            recoveries: load(&counts.recoveries),
            over_channels: counts.over_channels.load(Ordering::Relaxed),
        }
    }
}

impl Sent {
    fn of(channels: &SendCounters) -> Self {
        channels.stats().iter().fold(Self::default(), |sum, channel| Self {
            normal: sum.normal + channel.normal,
            zero: sum.zero + channel.zero,
            bytes: sum.bytes + channel.bytes,
        })
    }
}

fn lock<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}
