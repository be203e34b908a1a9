//! The progress of a migration, in numbers and as one line of text.

use std::time::{Duration, Instant};

use indicatif::{BinaryBytes, HumanDuration};
use multifd::live::Progress;

use super::report::rate;

/// A snapshot of a migration.
#[derive(Clone, Debug, Default)]
pub(crate) struct Look {
    /// The number of bytes of the present pass, or of all RAM, that are done.
    pub(crate) done: u64,
    /// The total number of bytes to do; 0 if it is not known yet.
    pub(crate) total: u64,
    /// The number of bytes on all connections so far.
    pub(crate) transferred: u64,
    /// The pass, from 1; 0 before the first.
    pub(crate) pass: u64,
    /// The expected remaining time.
    pub(crate) to_go: Option<Duration>,
    /// Other information: `dirty 200 MiB/s`.
    pub(crate) note: String,
}

impl Look {
    /// The progress of a source in its present pass.
    pub(crate) fn of(progress: &Progress) -> Self {
        let info = progress.info();
        let ram = &info.ram;
        Self {
            done: ram.total.saturating_sub(ram.remaining),
            total: ram.total,
            transferred: ram.transferred,
            pass: ram.dirty_sync_count,
            to_go: info.expected_remaining_time,
            note: String::new(),
        }
    }
}

pub(super) fn percent(look: &Look) -> String {
    match (look.done.min(look.total) * 100).checked_div(look.total) {
        Some(percent) => format!("{percent} %, "),
        None => String::new(),
    }
}

/// The rate in bytes per second since the last snapshot, and the time since the last byte.
#[derive(Default)]
pub(super) struct Meter {
    last: Option<(Instant, u64)>,
    still_since: Option<Instant>,
}

impl Meter {
    pub(super) fn text(&mut self, look: &Look) -> String {
        let now = Instant::now();
        let speed = self
            .last
            .replace((now, look.transferred))
            .map_or(0, |(then, before)| rate(look.transferred.saturating_sub(before), now - then));
        let still = if speed == 0 { now - *self.still_since.get_or_insert(now) } else { Duration::ZERO };
        if speed > 0 {
            self.still_since = None;
        }
        if still >= STILL {
            return format!("no data for {} s: {ASK}", still.as_secs());
        }
        let mut text = String::new();
        if look.pass > 0 {
            text += &format!("pass {}, ", look.pass);
        }
        let remaining = look.total.saturating_sub(look.done);
        if remaining > 0 {
            text += &format!("{} left, ", BinaryBytes(remaining));
        }
        text += &format!("{}/s", BinaryBytes(speed));
        if !look.note.is_empty() {
            text += &format!(", {}", look.note);
        }
        // Whole seconds, because it is an estimate. The last second is not useful.
        let to_go = look.to_go.filter(|time| *time > Duration::from_secs(1));
        let to_go =
            to_go.map(|time| format!(", {} to go", HumanDuration(Duration::from_secs(time.as_secs()))));
        if let Some(to_go) = to_go.filter(|to_go| text.len() + to_go.len() <= BESIDE_A_BAR) {
            text += &to_go;
        }
        text
    }
}

/// Columns of an 80-column terminal; `[==========] 100% ` takes the others.
const BESIDE_A_BAR: usize = 80 - 18;
/// After this time without a byte, the cause should be checked.
const STILL: Duration = Duration::from_secs(10);
const ASK: &str = "check multifd-channels on both sides";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busiest_text_fits_beside_its_bar() {
        let mut meter =
            Meter { last: Instant::now().checked_sub(SECOND).map(|then| (then, 0)), ..Meter::default() };
        let look = Look {
            total: 900 << 30,
            transferred: 900 << 20,
            pass: 10,
            note: "dirty 899.99 MiB/s".into(),
            ..Look::default()
        };
        let text = meter.text(&look);
        assert!(
            text.contains("pass 10, 900.00 GiB left, ") && text.len() <= BESIDE_A_BAR,
            "{text}: {}",
            text.len()
        );
        let still = Instant::now().checked_sub(SECOND * 9999);
        meter = Meter { last: Some((Instant::now(), look.transferred)), still_since: still };
        let text = meter.text(&look);
        assert!(text.contains("9999 s") && text.len() <= BESIDE_A_BAR, "{text}: {}", text.len());
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn time_to_go_is_shown_where_there_is_room() {
        let mut meter = Meter::default();
        let look = Look { pass: 1, to_go: Some(Duration::from_millis(12_900)), ..Look::default() };
        assert_eq!(meter.text(&look), "pass 1, 0 B/s, 12 seconds to go");
        let soon = Look { to_go: Some(SECOND), ..look.clone() };
        assert_eq!(meter.text(&soon), "pass 1, 0 B/s");
        let busy = Look { note: "x".repeat(40), ..look };
        assert!(!meter.text(&busy).contains("to go"));
    }

    #[test]
    fn a_peer_that_accepts_nothing_is_reported_after_a_while() {
        let mut meter = Meter::default();
        let look = Look { transferred: 5, pass: 1, ..Look::default() };
        assert_eq!(meter.text(&look), "pass 1, 0 B/s");
        meter.still_since = Instant::now().checked_sub(STILL);
        assert_eq!(meter.text(&look), "no data for 10 s: check multifd-channels on both sides");
        meter.last = Instant::now().checked_sub(Duration::from_secs(1)).map(|then| (then, 0));
        assert!(meter.text(&look).starts_with("pass 1, "), "it moves again");
    }
}
