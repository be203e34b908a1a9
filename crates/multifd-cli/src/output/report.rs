//! The final report, as JSON with the names of QEMU's `query-migrate`, or as a few lines for people.

use std::time::Duration;

use indicatif::{BinaryBytes, HumanCount, HumanDuration};
use multifd::{
    ChannelStats,
    error::chain,
    live::{MigrationInfo, Status},
};
use qemu_stream::outgoing::postcopy::PostcopyInfo;
use serde::Serialize;

/// The end of a migration.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Report {
    /// The job of `receive --dir` that has received it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) job: Option<u64>,
    /// The file, if the command line does not name it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) file: Option<String>,
    pub(crate) status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error_desc: Option<String>,
    pub(crate) total_time: u64,
    /// Whether the source, which waits for the confirmation, has got it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) source_told: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) downtime: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) setup_time: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cpu_throttle_percentage: Option<u8>,
    /// Connections that were refused before the source connected; at a destination.
    #[serde(rename = "refused-connections", skip_serializing_if = "Option::is_none")]
    pub(crate) refused: Option<u64>,
    pub(crate) ram: Ram,
    pub(crate) channels: Vec<Channel>,
    /// Channels whose connections broke, without which the migration continued; at a source.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) lost_channels: Vec<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) postcopy: Option<Postcopy>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ram_equal: Option<bool>,
    /// Peak resident memory beyond the guest's RAM, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) memory_beyond_ram: Option<BeyondRam>,
}

/// A guest that runs before its RAM is there. Times of requests are in microseconds.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Postcopy {
    /// Milliseconds from the beginning until the guest ran at the destination.
    #[serde(skip_serializing_if = "Option::is_none")]
    guest_running_after: Option<u64>,
    /// Requests for pages that had been sent already.
    late_requests: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    request_p50: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    request_p99: Option<u64>,
    unreadable_pages: u64,
    recoveries: u64,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct BeyondRam {
    pub(crate) source: u64,
    pub(crate) destination: u64,
}

#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Ram {
    pub(crate) total: u64,
    /// `None` at a destination that does not have all of RAM: only the source knows which pages it will send again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) remaining: Option<u64>,
    pub(crate) transferred: u64,
    pub(crate) duplicate: u64,
    pub(crate) normal: u64,
    pub(crate) normal_bytes: u64,
    pub(crate) page_size: u64,
    pub(crate) mbps: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) dirty_sync_count: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) dirty_sync_missed_zero_copy: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) dirty_pages_rate: Option<u64>,
    pub(crate) pages_per_second: u64,
    pub(crate) multifd_bytes: u64,
    pub(crate) precopy_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) downtime_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) postcopy_requests: Option<u64>,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Channel {
    pub(crate) id: u8,
    pub(crate) packets: u64,
    pub(crate) pages: u64,
    pub(crate) bytes: u64,
}

impl From<&ChannelStats> for Channel {
    fn from(stats: &ChannelStats) -> Self {
        let ChannelStats { id, packets, normal, zero, bytes, .. } = *stats;
        Self { id: id.0, packets, pages: normal + zero, bytes }
    }
}

impl Report {
    /// The report of a source about its migration. Rates are averages over the whole migration.
    pub(crate) fn of_source(info: &MigrationInfo) -> Self {
        let ram = &info.ram;
        let seconds = info.total_time.as_secs_f64().max(1e-9);
        Self {
            status: info.status.as_str(),
            total_time: millis(info.total_time),
            downtime: info.downtime.map(millis),
            setup_time: Some(millis(info.setup_time)),
            cpu_throttle_percentage: info.cpu_throttle_percentage,
            ram: Ram {
                total: ram.total,
                remaining: Some(ram.remaining),
                transferred: ram.transferred,
                duplicate: ram.duplicate,
                normal: ram.normal,
                normal_bytes: ram.normal_bytes,
                page_size: ram.page_size,
                mbps: ram.transferred as f64 * 8.0 / 1e6 / seconds,
                dirty_sync_count: Some(ram.dirty_sync_count),
                dirty_sync_missed_zero_copy: Some(ram.dirty_sync_missed_zero_copy),
                dirty_pages_rate: Some(ram.dirty_pages_rate),
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "a rate of pages"
                )]
                pages_per_second: ((ram.normal + ram.duplicate) as f64 / seconds) as u64,
                multifd_bytes: ram.multifd_bytes,
                precopy_bytes: ram.precopy_bytes,
                downtime_bytes: Some(ram.downtime_bytes),
                postcopy_requests: None,
            },
            channels: info.channels.iter().map(Channel::from).collect(),
            lost_channels: info.lost_channels.iter().map(|id| id.0).collect(),
            ..Self::default()
        }
    }

    /// The report of a guest that runs before its RAM is there: `total` bytes of RAM in pages of `page_size`.
    pub(crate) fn of_postcopy(info: &PostcopyInfo, status: &'static str, total: u64, page_size: u64) -> Self {
        let seconds = info.total_time.as_secs_f64().max(1e-9);
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        Self {
            status,
            total_time: millis(info.total_time),
            ram: Ram {
                total,
                remaining: info.remaining.map(|pages| pages * page_size),
                transferred: info.transferred,
                duplicate: info.zero,
                normal: info.normal,
                normal_bytes: info.normal * page_size,
                page_size,
                mbps: info.transferred as f64 * 8.0 / 1e6 / seconds,
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "a rate of pages"
                )]
                pages_per_second: ((info.normal + info.zero) as f64 / seconds) as u64,
                postcopy_requests: Some(info.requests),
                ..Ram::default()
            },
            postcopy: Some(Postcopy {
                guest_running_after: info.guest_running_after.map(millis),
                late_requests: info.late_requests,
                request_p50: info.request_p50.map(micros),
                request_p99: info.request_p99.map(micros),
                unreadable_pages: info.unreadable,
                recoveries: info.recoveries,
            }),
            ..Self::default()
        }
    }

    /// The same report, for a migration that failed.
    #[must_use]
    pub(crate) fn failed(self, error: &multifd::Error) -> Self {
        let status = if error.is_cancelled() { Status::Cancelled } else { Status::Failed }.as_str();
        self.ended(status, error)
    }

    /// The same report, with this status and its reason.
    #[must_use]
    pub(crate) fn ended(mut self, status: &'static str, error: &(dyn std::error::Error + 'static)) -> Self {
        self.status = status;
        self.error_desc = Some(chain(error).to_string());
        self
    }

    /// The lines for people.
    pub(crate) fn lines(&self, done: &str) -> Vec<String> {
        let ram = &self.ram;
        let time = Duration::from_millis(self.total_time);
        let mut lines = vec![
            format!("{done}: {} of RAM in {}", BinaryBytes(ram.total), seconds(time)),
            format!(
                "{} transferred ({}/s): {} pages with data, {} zero pages",
                BinaryBytes(ram.transferred),
                BinaryBytes(rate(ram.transferred, time)),
                HumanCount(ram.normal),
                HumanCount(ram.duplicate),
            ),
        ];
        let passes = self.downtime.map(|downtime| {
            // The dirty bits are taken before every pass, and once more to find that one more pass is enough.
            let passes = ram.dirty_sync_count.unwrap_or_default().saturating_sub(1);
            let passes = if passes == 1 { "1 pass".to_owned() } else { format!("{passes} passes") };
            format!("downtime {downtime} ms, {passes}")
        });
        let throttled =
            self.cpu_throttle_percentage.map(|percent| format!("the guest throttled by {percent} %"));
        let live: Vec<String> = passes.into_iter().chain(throttled).collect();
        if !live.is_empty() {
            lines.push(live.join(", "));
        }
        if let Some(missed @ 1..) = ram.dirty_sync_missed_zero_copy {
            lines.push(format!(
                "zero-copy-send: the kernel copied pages anyway, before {missed} channel syncs"
            ));
        }
        lines.extend(self.lost_channels.iter().map(|id| {
            format!(
                "channel {id} was lost, because its connection broke: the others have sent its pages again"
            )
        }));
        let sum: u64 = self.channels.iter().map(|channel| channel.bytes).sum();
        lines.extend(self.channels.iter().map(|channel| {
            let share = channel.bytes as f64 * 100.0 / sum.max(1) as f64;
            format!(
                "channel {:<3} {:>12} {share:5.1} %  {:>8} packets",
                channel.id,
                BinaryBytes(channel.bytes).to_string(),
                HumanCount(channel.packets).to_string(),
            )
        }));
        lines
    }
}

pub(crate) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Bytes per second.
pub(crate) fn rate(bytes: u64, time: Duration) -> u64 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate of bytes")]
    {
        (bytes as f64 / time.as_secs_f64().max(1e-3)) as u64
    }
}

/// A time for people: short ones in milliseconds, so that a rate can be checked.
fn seconds(time: Duration) -> String {
    if time < Duration::from_secs(60) {
        format!("{:.3} s", time.as_secs_f64())
    } else {
        HumanDuration(time).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `256.51 MiB of RAM in 0.06 s (19.74 MiB/s)` was the rate of other bytes than those beside it.
    #[test]
    fn the_rate_is_that_of_the_bytes_beside_it() {
        let ram =
            Ram { total: 256 << 20, transferred: 3 << 20, normal: 700, duplicate: 64_836, ..Ram::default() };
        let report = Report { total_time: 1500, ram, ..Report::default() };
        assert_eq!(
            report.lines("received vm.ram"),
            [
                "received vm.ram: 256.00 MiB of RAM in 1.500 s",
                "3.00 MiB transferred (2.00 MiB/s): 700 pages with data, 64,836 zero pages"
            ]
        );
    }
}
