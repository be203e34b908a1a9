//! The numbers of an arrival: what has arrived so far, for the progress and for reports.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use indicatif::BinaryBytes;
use multifd::ChannelStats;
use qemu_stream::{arrival::ArrivalProgress, incoming::MainPages};

use crate::output::{
    display::{PAUSED, Shown, WAITS},
    progress::Look,
    report::{Channel, Ram, Report, millis, rate},
};

/// How much arrived.
pub(super) struct Numbers {
    /// Bytes of RAM; 0 if the source has not announced them.
    pub(super) total: u64,
    pub(super) page_size: u64,
    pub(super) channels: Vec<ChannelStats>,
    pub(super) main_bytes: u64,
    pub(super) main_pages: MainPages,
    /// Connections that were refused before the source connected.
    refused: u64,
}

impl Numbers {
    /// What has arrived so far.
    pub(super) fn of(progress: &ArrivalProgress) -> Self {
        let (total, page_size) = progress.ram().unwrap_or_default();
        let (channels, main_bytes, main_pages) =
            (progress.channels(), progress.main_bytes(), progress.main_pages());
        let refused = progress.refused();
        Self { total, page_size, channels, main_bytes, main_pages, refused }
    }

    fn on_channels(&self, count: fn(&ChannelStats) -> u64) -> u64 {
        self.channels.iter().map(count).sum()
    }

    fn transferred(&self) -> u64 {
        self.on_channels(|channel| channel.bytes) + self.main_bytes
    }
}

/// What the display shows.
pub(super) struct Receiving {
    pub(super) progress: ArrivalProgress,
    pub(super) completing: Arc<AtomicBool>,
    /// When the source connected.
    pub(super) connected: Arc<OnceLock<Instant>>,
    pub(super) job: Option<u64>,
}

impl Shown for Receiving {
    fn look(&self) -> Look {
        look(&self.progress, &self.completing)
    }

    fn report(&self) -> Report {
        let time = self.connected.get().map(Instant::elapsed).unwrap_or_default();
        let mut report = report(&Numbers::of(&self.progress), time);
        report.status = match self.progress.ram() {
            None if !self.progress.has_source() => WAITS,
            None => "setup",
            Some(_) if self.progress.is_paused() => PAUSED,
            Some(_) if self.completing.load(Ordering::Relaxed) => "device",
            Some(_) => "active",
        };
        report.ram.dirty_sync_count = self.progress.pass();
        report.job = self.job;
        report
    }
}

fn look(progress: &ArrivalProgress, completing: &AtomicBool) -> Look {
    if !progress.has_source() {
        let note = match progress.refused() {
            0 => String::new(),
            1 => "1 connection was refused".into(),
            refused => format!("{refused} connections were refused"),
        };
        return Look { stage: Some("waiting for a source"), note, waits: true, ..Look::default() };
    }
    let transferred = Numbers::of(progress).transferred();
    let mut note = format!("{} received", BinaryBytes(transferred));
    if let Some((total, _)) = progress.ram() {
        note += &format!(", the guest has {}", BinaryBytes(total));
    }
    Look {
        stage: match progress.is_paused() {
            true => Some("interrupted; waiting for the source to resume"),
            false if completing.load(Ordering::Relaxed) => {
                Some("all data was received; the file is being completed")
            }
            false => None,
        },
        transferred,
        pass: progress.pass().unwrap_or(0),
        note,
        check: "check query-migrate at the source",
        ..Look::default()
    }
}

/// What has arrived in `time`, of a migration that has not ended.
pub(super) fn report(numbers: &Numbers, time: Duration) -> Report {
    let Numbers { total, page_size, channels, main_bytes, main_pages, refused } = numbers;
    let normal = numbers.on_channels(|channel| channel.normal) + main_pages.normal;
    let zero = numbers.on_channels(|channel| channel.zero) + main_pages.zero;
    let transferred = numbers.transferred();
    Report {
        total_time: millis(time),
        refused: Some(*refused),
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
