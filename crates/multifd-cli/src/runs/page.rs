//! The metrics of a run as text, in a form that is both OpenMetrics and the older text format of Prometheus, which
//! node_exporter reads: all metrics are gauges, no sample has a time, and `# EOF` ends the page.
//!
//! The numbers are those of one run and stay in the file after it, so they are gauges and not counters. Written here and not
//! by a library: those for metrics keep registers of live counters, with locks, where one snapshot is a page of text.

use std::{
    fmt::{self, Write},
    time::{SystemTime, UNIX_EPOCH},
};

use super::observed::Observed;
use crate::output::report::{Channel, Report};

/// The page of this moment.
pub(super) fn of(run: &Observed) -> String {
    let (report, end) = run.now();
    let labels = [("verb", run.verb), ("file", &run.file)];
    let mut page = Page { text: String::new(), labels: &labels };
    let start = Some(seconds(run.start));
    page.one("start_time_seconds", "Time at which the run began, since 1970.", start);
    page.one(
        "end_time_seconds",
        "Time at which the run ended, since 1970.",
        end.map(|end| seconds(end.time)),
    );
    page.one("exit_code", "Exit code of the run that has ended; 0 is success.", end.map(|end| end.exit_code));
    let info = [("address", &*run.address), ("version", env!("CARGO_PKG_VERSION"))];
    page.family("run_info", "The run: the address of the other side, and the version of this program.");
    page.sample("run_info", &info, 1);
    page.family("status", "1 for the status of the run, 0 for all others, in the words of query-migrate.");
    for status in STATUSES {
        page.sample("status", &[("status", status)], u8::from(*status == report.status));
    }
    numbers(&mut page, &report);
    page.text + "# EOF\n"
}

fn numbers(page: &mut Page<'_>, report: &Report) {
    let Report { ram, .. } = report;
    let millis = |time: u64| Millis(time);
    page.one("duration_seconds", "Duration of the migration.", Some(millis(report.total_time)));
    page.one("setup_seconds", "Time until the first pass.", report.setup_time.map(millis));
    page.one("downtime_seconds", "Time for which the guest was stopped.", report.downtime.map(millis));
    page.one("ram_bytes", "RAM of the guest.", Some(ram.total).filter(|bytes| *bytes > 0));
    page.one("remaining_bytes", "RAM that is not transferred yet.", ram.remaining);
    page.one("transferred_bytes", "Bytes on the wire, on all connections.", Some(ram.transferred));
    // QEMU's fields are those before the switchover, and after it.
    let main = ram.precopy_bytes + ram.downtime_bytes.unwrap_or(0);
    page.one("main_bytes", "Bytes on the wire, on the main connection.", Some(main));
    page.family("pages", "Pages of RAM on the wire: with data, and zero pages.");
    page.sample("pages", &[("kind", "normal")], ram.normal);
    page.sample("pages", &[("kind", "zero")], ram.duplicate);
    page.one("page_size_bytes", "Size of a page.", Some(ram.page_size).filter(|size| *size > 0));
    page.one("passes", "Passes over RAM that have begun.", ram.dirty_sync_count);
    let throttle = report.cpu_throttle_percentage.map(|percent| f64::from(percent) / 100.0);
    page.one("cpu_throttle_ratio", "Share of time for which the guest's processors are paused.", throttle);
    let confirmed = report.source_told.map(u8::from);
    page.one(
        "confirmed",
        "1 if the source has got the confirmation that it waits for, otherwise 0.",
        confirmed,
    );
    page.one(
        "refused_connections",
        "Connections that were refused before a source connected.",
        report.refused,
    );
    for (name, help, number) in CHANNELS.into_iter().filter(|_| !report.channels.is_empty()) {
        page.family(name, help);
        for channel in &report.channels {
            page.sample(name, &[("channel", &channel.id.to_string())], number(channel));
        }
    }
}

/// The text, and the labels of every sample.
struct Page<'a> {
    text: String,
    labels: &'a [(&'a str, &'a str)],
}

impl Page<'_> {
    /// A metric with one sample, if it is known.
    fn one(&mut self, name: &str, help: &str, value: Option<impl fmt::Display>) {
        if let Some(value) = value {
            self.family(name, help);
            self.sample(name, &[], value);
        }
    }

    /// Begins a metric. Its unit is the end of its name.
    fn family(&mut self, name: &str, help: &str) {
        let name = format!("{PREFIX}{name}");
        // Writing to a string does not fail.
        let _ = writeln!(self.text, "# TYPE {name} gauge");
        if let Some(unit) = UNITS.iter().find(|unit| name.ends_with(&format!("_{unit}"))) {
            let _ = writeln!(self.text, "# UNIT {name} {unit}");
        }
        let _ = writeln!(self.text, "# HELP {name} {help}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl fmt::Display) {
        let all = self.labels.iter().chain(labels);
        let all: Vec<_> = all.map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
        let _ = writeln!(self.text, "{PREFIX}{name}{{{}}} {value}", all.join(","));
    }
}

/// A value of a label. The file and the address may contain any character.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Milliseconds, shown in seconds.
struct Millis(u64);

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:03}", self.0 / 1000, self.0 % 1000)
    }
}

fn seconds(time: SystemTime) -> Millis {
    Millis(time.duration_since(UNIX_EPOCH).map_or(0, crate::output::report::millis))
}

const PREFIX: &str = "multifd_";
const UNITS: &[&str] = &["seconds", "bytes", "ratio"];
const STATUSES: &[&str] = &[
    "none",
    "setup",
    "active",
    "pre-switchover",
    "device",
    "postcopy-active",
    "postcopy-paused",
    "completed",
    "failed",
    "cancelling",
    "cancelled",
];

type OfChannel = fn(&Channel) -> u64;

const CHANNELS: [(&str, &str, OfChannel); 3] = [
    ("channel_bytes", "Bytes on the wire, on one channel.", |channel| channel.bytes),
    ("channel_pages", "Pages of RAM on one channel.", |channel| channel.pages),
    ("channel_packets", "Packets on one channel.", |channel| channel.packets),
];
