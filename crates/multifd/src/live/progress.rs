//! The progress of a migration: numbers that any thread may read while it runs, with the names of QEMU's
//! `query-migrate`.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::{RunState, converge::Judgement, status::StatusCell};
use crate::{
    channel::Callbacks,
    error::Result,
    outcome::{Bound, Callback, NotConverged, Percent, Stall, Status},
    ram::PageSize,
    send::{SendCounters, Sender},
    stats::ChannelStats,
    wire::ChannelId,
};

/// A snapshot of a migration: what `query-migrate` shows at the source.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct MigrationInfo {
    /// `status`.
    pub status: Status,
    /// `total-time`: from the first connection until now, or until the end.
    pub total_time: Duration,
    /// `setup-time`: until the blocks were announced.
    pub setup_time: Duration,
    /// `downtime`: from stopping the guest to the destination's confirmation that it has everything.
    pub downtime: Option<Duration>,
    /// `expected-downtime`: the time that the remaining pages would take, while the guest runs.
    pub expected_downtime: Option<Duration>,
    /// The expected time until the migration is complete, downtime included, while the guest runs. In the first pass it
    /// is the rest of that pass. Later it includes what the guest dirties and the effect of `auto-converge`. `None` if
    /// the migration does not converge.
    pub expected_remaining_time: Option<Duration>,
    /// `cpu-throttle-percentage`: percentage of time for which the guest's processors paused last; `None` if
    /// `auto-converge` has not throttled it.
    pub cpu_throttle_percentage: Option<u8>,
    /// Why the migration does not converge at present, and what would help.
    pub stall: Option<Stall>,
    /// `ram`.
    pub ram: RamInfo,
    /// Whether the guest ran before it was stopped; `None` before it is stopped.
    pub guest_was: Option<RunState>,
    /// The counters of each channel.
    pub channels: Vec<ChannelStats>,
    /// The channels whose connection is broken, and without which the migration continues: see [`Round`](super::Round).
    pub lost_channels: Vec<ChannelId>,
}

/// The `ram` part of [`MigrationInfo`]. Lengths are in bytes.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct RamInfo {
    /// `total`: the used lengths of all blocks.
    pub total: u64,
    /// `remaining`: dirty pages not sent yet. Before the first pass: all pages that it will send.
    pub remaining: u64,
    /// `transferred`: all bytes on all connections.
    pub transferred: u64,
    /// `duplicate`: zero pages that were sent.
    pub duplicate: u64,
    /// `normal`: pages whose bytes were sent.
    pub normal: u64,
    /// `normal-bytes`.
    pub normal_bytes: u64,
    /// `page-size`.
    pub page_size: u64,
    /// `mbps`: megabits per second in the last pass.
    pub mbps: f64,
    /// `dirty-sync-count`: how many times the dirty bits were taken.
    pub dirty_sync_count: u64,
    /// `dirty-sync-missed-zero-copy`: channel syncs, counted for each channel, up to which pages were copied although
    /// `zero-copy-send` was requested.
    pub dirty_sync_missed_zero_copy: u64,
    /// `dirty-pages-rate`: pages that the guest dirtied per second in the last pass.
    pub dirty_pages_rate: u64,
    /// `pages-per-second`: pages sent per second in the last pass.
    pub pages_per_second: u64,
    /// `multifd-bytes`: bytes on the channels.
    pub multifd_bytes: u64,
    /// `precopy-bytes`: bytes on main while the guest ran.
    pub precopy_bytes: u64,
    /// `downtime-bytes`: bytes on main after the guest had stopped.
    pub downtime_bytes: u64,
}

/// The live numbers of one migration. Clones show the same numbers.
#[derive(Clone)]
pub struct Progress(Arc<Inner>);

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Progress").field("status", &self.0.status.load()).finish_non_exhaustive()
    }
}

struct Inner {
    status: StatusCell,
    page_size: PageSize,
    total: u64,
    start: Instant,
    // Relaxed: only the migration's thread writes them, and they order nothing.
    remaining_pages: AtomicU64,
    /// Zero pages over main. The channels' counters have the pages over channels.
    main_duplicate: AtomicU64,
    main_normal: AtomicU64,
    /// Bytes on main so far.
    main_bytes: AtomicU64,
    /// What changes once a pass.
    passes: Mutex<Passes>,
    calls: Callbacks,
}

#[derive(Clone, Default)]
struct Passes {
    channels: Option<SendCounters>,
    setup_time: Option<Duration>,
    total_time: Option<Duration>,
    downtime: Option<Duration>,
    guest_was: Option<RunState>,
    expected_downtime: Option<Duration>,
    /// When the first pass began, and its number of pages.
    first_pass: Option<(Instant, u64)>,
    /// When the remaining time was estimated, and the estimate.
    remaining_time: Option<(Instant, Duration)>,
    throttled: Option<Percent>,
    stall: Option<Stall>,
    /// Like `stall`, while it is not certain yet.
    doubt: Option<Stall>,
    dirty_sync_count: u64,
    dirty_pages_rate: u64,
    pages_per_second: u64,
    mbps: f64,
    /// Bytes on main when the guest was stopped.
    precopy_bytes: Option<u64>,
    lost_channels: Vec<ChannelId>,
}

/// Pages and bytes on all connections.
#[derive(Clone, Copy)]
pub(super) struct Sent {
    pub(super) normal: u64,
    pub(super) zero: u64,
    pub(super) bytes: u64,
}

/// What a pass has sent, and its duration.
pub(super) struct PassRate {
    pub(super) bytes: u64,
    pub(super) pages: u64,
    pub(super) time: Duration,
}

impl PassRate {
    /// Bytes per second.
    pub(super) fn bandwidth(&self) -> f64 {
        self.bytes as f64 / self.time.as_secs_f64().max(1e-9)
    }
}

impl Progress {
    /// A migration of `total` bytes of RAM, of which the first pass sends `pages` pages.
    pub(super) fn new(total: u64, page_size: PageSize, pages: u64, calls: Callbacks) -> Self {
        Self(Arc::new(Inner {
            status: StatusCell::default(),
            page_size,
            total,
            start: Instant::now(),
            remaining_pages: AtomicU64::new(pages),
            main_duplicate: AtomicU64::new(0),
            main_normal: AtomicU64::new(0),
            main_bytes: AtomicU64::new(0),
            passes: Mutex::default(),
            calls,
        }))
    }

    pub(super) fn callbacks(&self) -> &Callbacks {
        &self.0.calls
    }

    /// The callback of the guest or of the dirty log that the migration waits for at present, and since when; `None` while it
    /// waits for none.
    pub fn callback(&self) -> Option<(Callback, Duration)> {
        self.0.calls.running()
    }

    /// The current state.
    pub fn info(&self) -> MigrationInfo {
        let inner = &*self.0;
        let passes = self.passes(|passes| passes.clone());
        let expected_remaining_time = self.remaining_time(&passes);
        let channels = passes.channels.map_or_else(Vec::new, |counters| counters.stats());
        let page_size = inner.page_size.bytes() as u64;
        let on_channels = |count: fn(&ChannelStats) -> u64| channels.iter().map(count).sum::<u64>();
        let normal = inner.main_normal.load(Ordering::Relaxed) + on_channels(|channel| channel.normal);
        let duplicate = inner.main_duplicate.load(Ordering::Relaxed) + on_channels(|channel| channel.zero);
        let multifd_bytes = on_channels(|channel| channel.bytes);
        let main_bytes = inner.main_bytes.load(Ordering::Relaxed);
        let precopy_bytes = passes.precopy_bytes.unwrap_or(main_bytes);
        MigrationInfo {
            status: inner.status.load(),
            total_time: passes.total_time.unwrap_or_else(|| inner.start.elapsed()),
            setup_time: passes.setup_time.unwrap_or_else(|| inner.start.elapsed()),
            downtime: passes.downtime,
            expected_downtime: passes.expected_downtime,
            expected_remaining_time,
            cpu_throttle_percentage: passes.throttled.map(Percent::get),
            stall: passes.stall,
            ram: RamInfo {
                total: inner.total,
                remaining: inner.remaining_pages.load(Ordering::Relaxed) * page_size,
                transferred: multifd_bytes + main_bytes,
                duplicate,
                normal,
                normal_bytes: normal * page_size,
                page_size,
                mbps: passes.mbps,
                dirty_sync_count: passes.dirty_sync_count,
                dirty_sync_missed_zero_copy: on_channels(|channel| channel.missed_zero_copy),
                dirty_pages_rate: passes.dirty_pages_rate,
                pages_per_second: passes.pages_per_second,
                multifd_bytes,
                precopy_bytes,
                downtime_bytes: main_bytes.saturating_sub(precopy_bytes),
            },
            guest_was: passes.guest_was,
            channels,
            lost_channels: passes.lost_channels,
        }
    }

    /// The state of the migration.
    pub fn status(&self) -> Status {
        self.0.status.load()
    }

    /// The time since the migration began.
    pub(super) fn elapsed(&self) -> Duration {
        self.0.start.elapsed()
    }

    pub(super) fn advance(&self, next: Status) -> Result<()> {
        self.0.status.advance(next)?;
        if next.is_final() {
            let total = self.0.start.elapsed();
            self.passes(|passes| passes.total_time = Some(total));
        }
        Ok(())
    }

    pub(super) fn started(&self, sender: Option<&Sender>) {
        self.passes(|passes| passes.channels = sender.map(Sender::counters));
    }

    pub(super) fn set_up(&self) {
        let time = self.0.start.elapsed();
        self.passes(|passes| passes.setup_time = Some(time));
    }

    /// A page went over main.
    pub(super) fn normal(&self) {
        self.0.main_normal.fetch_add(1, Ordering::Relaxed);
    }

    /// Records that a zero page went over main.
    pub(super) fn duplicate(&self) {
        self.0.main_duplicate.fetch_add(1, Ordering::Relaxed);
    }

    /// Records that `pages` fewer dirty pages remain.
    pub(super) fn walked(&self, pages: u64) {
        self.0.remaining_pages.fetch_sub(pages, Ordering::Relaxed);
    }

    /// Records a bitmap sync: `remaining` pages remain, and the guest wrote them in `time`.
    pub(super) fn bitmap_sync(&self, remaining: u64, time: Option<Duration>) {
        self.0.remaining_pages.store(remaining, Ordering::Relaxed);
        self.passes(|passes| {
            passes.dirty_sync_count += 1;
            passes.first_pass.get_or_insert((Instant::now(), remaining));
            if let Some(time) = time {
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "a rate of pages"
                )]
                {
                    passes.dirty_pages_rate = (remaining as f64 / time.as_secs_f64().max(1e-9)) as u64;
                }
            }
        });
    }

    pub(super) fn passed(&self, rate: &PassRate) {
        self.passes(|passes| {
            passes.mbps = rate.bandwidth() * 8.0 / 1e6;
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate of pages")]
            {
                passes.pages_per_second = (rate.pages as f64 / rate.time.as_secs_f64().max(1e-9)) as u64;
            }
        });
    }

    /// Records the judgement after a pass.
    pub(super) fn judged(&self, judgement: &Judgement) {
        let expected = judgement.remaining_time.map(|time| (Instant::now(), time));
        self.passes(|passes| {
            passes.expected_downtime = Some(judgement.expected_downtime);
            passes.remaining_time = expected;
            passes.stall.clone_from(&judgement.stall);
            passes.doubt.clone_from(&judgement.doubt);
        });
    }

    pub(super) fn throttled(&self, percent: Percent) {
        self.passes(|passes| passes.throttled = Some(percent));
    }

    /// The current throttle of the guest, if any.
    pub(super) fn throttle(&self) -> Option<Percent> {
        self.passes(|passes| passes.throttled)
    }

    /// The error when `max-total-time` has passed.
    pub(super) fn not_converged_in(&self, limit: Duration) -> NotConverged {
        let (stall, expected_remaining_time) =
            (self.passes(|passes| passes.doubt.clone()), self.info().expected_remaining_time);
        NotConverged { bound: Bound::Time(limit), stall, expected_remaining_time }
    }

    /// Records the number of bytes on main so far.
    pub(super) fn main_bytes(&self, bytes: u64) {
        self.0.main_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Records that the guest is about to be stopped: later bytes on main belong to the downtime.
    pub(super) fn guest_stops(&self) {
        let bytes = self.0.main_bytes.load(Ordering::Relaxed);
        self.passes(|passes| passes.precopy_bytes = Some(bytes));
    }

    /// All channels that are lost so far.
    pub(super) fn lost(&self, channels: Vec<ChannelId>) {
        self.passes(|passes| passes.lost_channels = channels);
    }

    pub(super) fn guest_was(&self, state: RunState) {
        self.passes(|passes| passes.guest_was = Some(state));
    }

    pub(super) fn downtime(&self, downtime: Duration) {
        self.passes(|passes| {
            (passes.downtime, passes.expected_downtime, passes.remaining_time) = (Some(downtime), None, None);
        });
    }

    /// What has been sent so far.
    pub(super) fn sent(&self) -> Sent {
        let ram = self.info().ram;
        Sent { normal: ram.normal, zero: ram.duplicate, bytes: ram.transferred }
    }

    fn remaining_time(&self, passes: &Passes) -> Option<Duration> {
        if self.0.status.load() != Status::Active {
            return None;
        }
        if passes.dirty_sync_count > 1 {
            return passes.remaining_time.map(|(then, time)| time.saturating_sub(then.elapsed()));
        }
        let (start, pages) = passes.first_pass?;
        let remaining = self.0.remaining_pages.load(Ordering::Relaxed);
        let walked = pages.checked_sub(remaining).filter(|walked| *walked > 0)?;
        Duration::try_from_secs_f64(start.elapsed().as_secs_f64() * remaining as f64 / walked as f64).ok()
    }

    fn passes<T>(&self, look: impl FnOnce(&mut Passes) -> T) -> T {
        look(&mut self.0.passes.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live::converge::Step;

    /// A report of a migration that failed before its first pass said that nothing remained.
    #[test]
    fn all_pages_remain_before_the_first_pass() {
        let progress = Progress::new(100 * 4096, PageSize::KIB_4, 90, Callbacks::default());
        assert_eq!(progress.info().ram.remaining, 90 * 4096);
    }

    #[test]
    fn bytes_on_main_are_counted_while_a_pass_runs_and_split_at_the_stop() {
        let progress = Progress::new(100 * 4096, PageSize::KIB_4, 100, Callbacks::default());
        let counted = || {
            let ram = progress.info().ram;
            (ram.transferred, ram.precopy_bytes, ram.downtime_bytes)
        };
        progress.main_bytes(70);
        assert_eq!(counted(), (70, 70, 0));
        progress.guest_stops();
        progress.main_bytes(100);
        assert_eq!(counted(), (100, 70, 30));
    }

    #[test]
    fn remaining_time_is_that_of_the_first_pass_until_there_is_more_to_go_by() {
        let progress = Progress::new(100 * 4096, PageSize::KIB_4, 100, Callbacks::default());
        let expected = || progress.info().expected_remaining_time;
        for status in [Status::Setup, Status::Active] {
            progress.advance(status).expect("legal");
        }
        progress.bitmap_sync(100, None);
        assert_eq!(expected(), None, "nothing has been sent");
        let begun = Instant::now();
        std::thread::sleep(Duration::from_millis(5));
        progress.walked(20);
        // A fifth is done, so the rest takes four times as long.
        let (expected_now, least) = (expected().expect("known"), Duration::from_millis(20));
        assert!(expected_now >= least && expected_now <= begun.elapsed() * 5, "{expected_now:?}");

        progress.bitmap_sync(50, Some(Duration::from_secs(1)));
        let judgement = Judgement {
            expected_downtime: Duration::from_secs(1),
            remaining_time: Some(Duration::from_secs(600)),
            stall: None,
            doubt: None,
            bandwidth: 1.0,
            step: Step::Pass(None),
        };
        progress.judged(&judgement);
        std::thread::sleep(Duration::from_millis(5));
        let (expected_now, told) = (expected().expect("known"), Duration::from_secs(600));
        assert!(
            expected_now <= told - Duration::from_millis(5),
            "what has passed is taken off: {expected_now:?}"
        );

        progress.judged(&Judgement { remaining_time: None, ..judgement });
        assert_eq!(expected(), None, "no end is in sight");
    }
}
