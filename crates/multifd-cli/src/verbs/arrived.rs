//! The numbers of an arrival, while it runs and at its end: for the display, and as a report.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use indicatif::BinaryBytes;
use multifd::ChannelStats;
use qemu_stream::{arrival::ArrivalProgress, incoming::MainPages};

use crate::output::{
    display::Shown,
    progress::Look,
    report::{Channel, Ram, Report, millis, rate},
};

/// What the display shows.
pub(super) struct Receiving {
    pub(super) progress: ArrivalProgress,
    pub(super) completing: Arc<AtomicBool>,
    pub(super) start: Instant,
    pub(super) job: Option<u64>,
}

impl Shown for Receiving {
    fn look(&self) -> Look {
        look(&self.progress, &self.completing)
    }

    fn report(&self) -> Report {
        let mut report = report(&Numbers::of(&self.progress), self.start.elapsed());
        report.status = match self.progress.ram() {
            None => "setup",
            Some(_) if self.completing.load(Ordering::Relaxed) => "device",
            Some(_) => "active",
        };
        report.ram.dirty_sync_count = self.progress.pass();
        report.job = self.job;
        report
    }
}

fn look(progress: &ArrivalProgress, completing: &AtomicBool) -> Look {
    let transferred = Numbers::of(progress).transferred();
    let mut note = format!("{} received", BinaryBytes(transferred));
    if let Some((total, _)) = progress.ram() {
        note += &format!(", the guest has {}", BinaryBytes(total));
    }
    Look {
        stage: completing
            .load(Ordering::Relaxed)
            .then_some("all data was received; the file is being completed"),
        transferred,
        pass: progress.pass().unwrap_or(0),
        note,
        check: "check query-migrate at the source",
        ..Look::default()
    }
}

/// What has arrived in `time`, of a migration that has not ended.
pub(super) fn report(numbers: &Numbers, time: Duration) -> Report {
    let Numbers { total, page_size, channels, main_bytes, main_pages } = numbers;
    let normal = numbers.on_channels(|channel| channel.normal) + main_pages.normal;
    let zero = numbers.on_channels(|channel| channel.zero) + main_pages.zero;
    let transferred = numbers.transferred();
    Report {
        total_time: millis(time),
        ram: Ram {
            total: *total,
            transferred,
            duplicate: zero,
            normal,
            normal_bytes: normal * page_size,
            page_size: *page_size,
            mbps: transferred as f64 * 8.0 / 1e6 / time.as_secs_f64().max(1e-9),
            pages_per_second: rate(normal + zero, time),
            multifd_bytes: numbers.on_channels(|channel| channel.bytes),
            precopy_bytes: *main_bytes,
            ..Ram::default()
        },
        channels: channels.iter().map(Channel::from).collect(),
        ..Report::default()
    }
}

/// How much arrived.
pub(super) struct Numbers {
    /// Bytes of RAM; 0 if the source has not announced them.
    pub(super) total: u64,
    pub(super) page_size: u64,
    pub(super) channels: Vec<ChannelStats>,
    pub(super) main_bytes: u64,
    pub(super) main_pages: MainPages,
}

impl Numbers {
    /// What has arrived so far.
    pub(super) fn of(progress: &ArrivalProgress) -> Self {
        let (total, page_size) = progress.ram().unwrap_or_default();
        let (channels, main_bytes, main_pages) =
            (progress.channels(), progress.main_bytes(), progress.main_pages());
        Self { total, page_size, channels, main_bytes, main_pages }
    }

    fn on_channels(&self, count: fn(&ChannelStats) -> u64) -> u64 {
        self.channels.iter().map(count).sum()
    }

    fn transferred(&self) -> u64 {
        self.on_channels(|channel| channel.bytes) + self.main_bytes
    }
}
