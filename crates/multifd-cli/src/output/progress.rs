//! The progress of a migration, in numbers and as one line of text.

use std::time::{Duration, Instant};

use indicatif::{BinaryBytes, HumanDuration};
use multifd::live::{Progress, Status};

use super::report::rate;

/// A snapshot of a migration.
#[derive(Clone, Debug, Default)]
pub(crate) struct Look {
    /// What happens at present, if it is not a pass over RAM: `connecting`. Then nothing else is shown.
    pub(crate) stage: Option<&'static str>,
    /// The stage may last for days, so it is printed as a line only once.
    pub(crate) waits: bool,
    /// The number of bytes of the present pass, or of all RAM, that are done.
    pub(crate) done: u64,
    /// The total number of bytes to do; 0 if it is not known yet.
    pub(crate) total: u64,
    /// The number of bytes on all connections so far.
    pub(crate) transferred: u64,
    /// The pass, from 1; 0 before the first, and if it is unknown.
    pub(crate) pass: u64,
    /// The expected remaining time.
    pub(crate) to_go: Option<Duration>,
    /// Other information: `dirty 200 MiB/s`.
    pub(crate) note: String,
    /// What to check if no data moves: short, to be shown beside a bar.
    pub(crate) check: &'static str,
    /// The same in a sentence, shown once.
    pub(crate) hint: Option<String>,
}

impl Look {
    /// The progress of a source in its present pass.
    pub(crate) fn of(progress: &Progress) -> Self {
        let info = progress.info();
        let ram = &info.ram;
        let stage = match info.status {
            Status::None | Status::Setup => Some("connecting"),
            Status::PreSwitchover => Some("the guest is stopped and waits for the switchover"),
            Status::Device if ram.remaining == 0 => Some("all is sent; the destination loads the guest"),
            _ => None,
        };
        Self {
            stage,
            waits: false,
            done: ram.total.saturating_sub(ram.remaining),
            total: ram.total,
            transferred: ram.transferred,
            pass: ram.dirty_sync_count,
            to_go: info.expected_remaining_time,
            note: String::new(),
            check: "compare channels, compression, TLS",
            hint: None,
        }
    }

    /// Whether the end is known, so that a share of it can be shown.
    pub(super) fn is_bounded(&self) -> bool {
        self.stage.is_none() && self.total > 0
    }
}

pub(super) fn percent(look: &Look) -> String {
    if !look.is_bounded() {
        return String::new();
    }
    match (look.done.min(look.total) * 100).checked_div(look.total) {
        Some(percent) => format!("{percent} %, "),
        None => String::new(),
    }
}

/// The rate in bytes per second since the last snapshot, and the time since the last byte.
pub(super) struct Meter {
    /// When it was last read, and the bytes at that time.
    last: (Instant, u64),
    /// The stage that is shown, and since when.
    stage: Option<(&'static str, Instant)>,
    still_since: Option<Instant>,
    /// The time in which bytes moved.
    moving: Duration,
    hinted: bool,
}

impl Default for Meter {
    /// The meter of something that begins now.
    fn default() -> Self {
        let last = (Instant::now(), 0);
        Self { last, stage: None, still_since: None, moving: Duration::ZERO, hinted: false }
    }
}

impl Meter {
    /// The line to show, and the hint if it is to be shown now.
    pub(super) fn text<'a>(&mut self, look: &'a Look) -> (String, Option<&'a str>) {
        let now = Instant::now();
        let (then, before) = std::mem::replace(&mut self.last, (now, look.transferred));
        if let Some(stage) = look.stage {
            self.still_since = None;
            return (self.stage_text(stage, look), None);
        }
        self.stage = None;
        let speed = rate(look.transferred.saturating_sub(before), now - then);
        if speed > 0 {
            self.still_since = None;
            self.moving += now - then;
        }
        let still = if speed == 0 { now - *self.still_since.get_or_insert(now) } else { Duration::ZERO };
        // A peer that never reads accepts what fits into the buffers of the connections, which takes no time.
        let limit = if self.moving <= BUFFERED { STILL_AT_START } else { STILL };
        if still >= limit {
            let hint = look.hint.as_deref().filter(|_| !std::mem::replace(&mut self.hinted, true));
            return (format!("no data for {} s: {}", still.as_secs(), look.check), hint);
        }
        (Self::moving_text(look, speed), None)
    }

    /// `connecting (3 s)`.
    fn stage_text(&mut self, stage: &'static str, look: &Look) -> String {
        let since = match self.stage {
            Some((shown, since)) if shown == stage => since,
            _ => Instant::now(),
        };
        self.stage = Some((stage, since));
        let mut text = stage.to_owned();
        let seconds = since.elapsed().as_secs();
        if seconds > 0 && !look.waits {
            text += &format!(" ({seconds} s)");
        }
        if look.waits && !look.note.is_empty() {
            text += &format!(", {}", look.note);
        }
        text
    }

    fn moving_text(look: &Look, speed: u64) -> String {
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
        // Whole seconds, because it is an estimate. The last second is not useful, and while nothing moves no time is known.
        let to_go = look.to_go.filter(|time| *time > Duration::from_secs(1) && speed > 0);
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
/// The same if bytes have moved for [`BUFFERED`] at most since the beginning.
const STILL_AT_START: Duration = Duration::from_secs(3);
const BUFFERED: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use multifd::{
        channel::Stop,
        live::{MigrateOptions, Migration},
        ram::{BlockName, Mapping, Memory, PageSize, RamBlock, RamBlocks},
    };

    use super::*;

    fn ago(time: Duration) -> Instant {
        Instant::now().checked_sub(time).expect("the machine runs for longer")
    }

    #[test]
    fn busiest_text_fits_beside_its_bar() {
        let mut meter = Meter { last: (ago(SECOND), 0), ..Meter::default() };
        let look = Look {
            total: 900 << 30,
            transferred: 900 << 20,
            pass: 10,
            note: "dirty 899.99 MiB/s".into(),
            check: Look::of_nothing().check,
            ..Look::default()
        };
        let (text, _) = meter.text(&look);
        assert!(
            text.contains("pass 10, 900.00 GiB left, ") && text.len() <= BESIDE_A_BAR,
            "{text}: {}",
            text.len()
        );
        let still = Instant::now().checked_sub(SECOND * 9999);
        meter = Meter { last: (Instant::now(), look.transferred), still_since: still, ..Meter::default() };
        let (text, _) = meter.text(&look);
        assert!(text.contains("9999 s") && text.len() <= BESIDE_A_BAR, "{text}: {}", text.len());
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn time_to_go_is_shown_where_there_is_room() {
        let text = |look: &Look| Meter { last: (ago(SECOND), 0), ..Meter::default() }.text(look).0;
        let look = Look {
            pass: 1,
            transferred: 900 << 20,
            to_go: Some(Duration::from_millis(12_900)),
            ..Look::default()
        };
        assert!(text(&look).ends_with("MiB/s, 12 seconds to go"), "{}", text(&look));
        let soon = Look { to_go: Some(SECOND), ..look.clone() };
        assert!(text(&soon).ends_with("MiB/s"));
        let still = Look { transferred: 0, ..look.clone() };
        assert_eq!(text(&still), "pass 1, 0 B/s");
        let busy = Look { note: "x".repeat(40), ..look };
        assert!(!text(&busy).contains("to go"));
    }

    /// The system of a destination that never reads accepts what its buffers hold.
    #[test]
    fn a_peer_that_never_accepted_data_is_reported_soon_and_the_hint_is_shown_once() {
        let mut meter = Meter { last: (Instant::now(), 5), ..Meter::default() };
        let look = Look {
            transferred: 5,
            pass: 1,
            check: "compare them",
            hint: Some("compare them all".into()),
            ..Look::default()
        };
        assert_eq!(meter.text(&look), ("pass 1, 0 B/s".into(), None));
        meter.still_since = Some(ago(STILL_AT_START));
        assert_eq!(meter.text(&look), ("no data for 3 s: compare them".into(), Some("compare them all")));
        assert_eq!(meter.text(&look), ("no data for 3 s: compare them".into(), None));
    }

    #[test]
    fn a_peer_that_accepts_nothing_more_is_reported_after_a_while() {
        let mut meter = Meter { last: (Instant::now(), 5), moving: BUFFERED + SECOND, ..Meter::default() };
        let look = Look { transferred: 5, pass: 1, ..Look::default() };
        meter.still_since = Some(ago(STILL_AT_START));
        assert_eq!(meter.text(&look).0, "pass 1, 0 B/s");
        meter.still_since = Some(ago(STILL));
        assert!(meter.text(&look).0.starts_with("no data for 10 s: "));
        meter.last = (ago(SECOND), 0);
        assert!(meter.text(&look).0.starts_with("pass 1, "), "it moves again");
    }

    /// It showed `100 %, 0 B/s`.
    #[test]
    fn a_source_that_has_not_connected_shows_no_share_and_no_rate() {
        let look = Look::of_nothing();
        assert_eq!((percent(&look), Meter::default().text(&look).0), (String::new(), "connecting".into()));
        let mut meter = Meter { stage: Some(("connecting", ago(3 * SECOND))), ..Meter::default() };
        assert_eq!(meter.text(&look).0, "connecting (3 s)");
        let next = Look { stage: Some("next"), ..look.clone() };
        assert_eq!((meter.text(&next).0, meter.text(&look).0), ("next".into(), "connecting".into()));
        let running = Look { stage: None, ..look };
        assert_eq!(percent(&running), "0 %, ");
    }

    impl Look {
        /// A source that has not connected.
        fn of_nothing() -> Self {
            let block = RamBlock::new(
                BlockName::new("ram").expect("a name"),
                1 << 20,
                PageSize::KIB_4,
                Memory::Mapped(Mapping::anonymous(1 << 20).expect("memory")),
            );
            let blocks = Arc::new(RamBlocks::new(vec![block.expect("a block")]).expect("blocks"));
            let migration = Migration::over_main(MigrateOptions::new(), blocks, Stop::new());
            Self::of(&migration.expect("options").progress())
        }
    }
}
