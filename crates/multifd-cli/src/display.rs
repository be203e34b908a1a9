//! Progress while a migration runs: a bar on a terminal, a line now and then elsewhere, nothing when quiet.
//!
//! A thread of its own looks at the counters; the migration knows nothing of it. It ends when its handle is dropped.

use std::{
    io::{self, IsTerminal},
    sync::mpsc::{RecvTimeoutError, Sender, channel},
    thread::{Builder, JoinHandle},
    time::{Duration, Instant},
};

use indicatif::{BinaryBytes, HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::{outcome::say, report::rate};

/// A look at a migration.
#[derive(Clone, Debug, Default)]
pub(crate) struct Look {
    /// Bytes of the present pass, or of all RAM, that are done.
    pub(crate) done: u64,
    /// Bytes that there are to do; 0 if that is not known yet.
    pub(crate) total: u64,
    /// Bytes on all connections so far.
    pub(crate) transferred: u64,
    /// The pass, from 1; 0 before the first.
    pub(crate) pass: u64,
    /// How long it is expected to take.
    pub(crate) to_go: Option<Duration>,
    /// What else is worth a word: `dirty 200 MiB/s`.
    pub(crate) note: String,
}

/// Shows progress until it is dropped.
pub(crate) struct Display {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Display {
    /// Shows what `look` sees, unless it is to be quiet.
    pub(crate) fn start(verb: &'static str, quiet: bool, look: impl Fn() -> Look + Send + 'static) -> Self {
        if quiet {
            return Self { end: None, thread: None };
        }
        let (end, ended) = channel();
        let thread = Builder::new().name("display".into()).spawn(move || {
            let terminal = io::stderr().is_terminal();
            let every = if terminal { BAR_EVERY } else { LINE_EVERY };
            let bar = terminal.then(ProgressBar::new_spinner);
            if let Some(bar) = &bar {
                bar.set_draw_target(ProgressDrawTarget::stderr_with_hz(20));
            }
            let mut bounded = None;
            let mut meter = Meter::default();
            // Nothing is ever sent: the wait ends when the other end is dropped.
            while ended.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                let look = look();
                let text = meter.text(&look);
                match &bar {
                    Some(bar) => {
                        if bounded.replace(look.total > 0) != Some(look.total > 0) {
                            bar.set_style(style(look.total > 0));
                        }
                        bar.set_length(look.total);
                        bar.set_position(look.done.min(look.total));
                        bar.set_message(text);
                    }
                    None => say(&format!("{verb}: {}{text}", percent(&look))),
                }
            }
            if let Some(bar) = bar {
                bar.finish_and_clear();
            }
        });
        // Without a thread there is no progress to see, and that is all.
        Self { end: Some(end), thread: thread.ok() }
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

const BAR_EVERY: Duration = Duration::from_millis(100);
const LINE_EVERY: Duration = Duration::from_secs(1);

/// One line, cut where the terminal ends: a bar, where there is an end to be `bounded` by.
fn style(bounded: bool) -> ProgressStyle {
    let template = if bounded { "[{bar:10}] {percent:>3}% {wide_msg}" } else { "{spinner} {wide_msg}" };
    let style = ProgressStyle::with_template(template);
    style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ").tick_chars("-\\|/-")
}

fn percent(look: &Look) -> String {
    match (look.done.min(look.total) * 100).checked_div(look.total) {
        Some(percent) => format!("{percent} %, "),
        None => String::new(),
    }
}

/// Bytes a second since the last look, and since when there have been none.
#[derive(Default)]
struct Meter {
    last: Option<(Instant, u64)>,
    still_since: Option<Instant>,
}

impl Meter {
    fn text(&mut self, look: &Look) -> String {
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
        // Whole seconds: it is an estimate. The last one is of no use to anybody.
        let to_go = look.to_go.filter(|time| *time > Duration::from_secs(1));
        let to_go =
            to_go.map(|time| format!(", {} to go", HumanDuration(Duration::from_secs(time.as_secs()))));
        if let Some(to_go) = to_go.filter(|to_go| text.len() + to_go.len() <= BESIDE_A_BAR) {
            text += &to_go;
        }
        text
    }
}

/// Columns of the 80 that a terminal has: `[==========] 100% ` takes the others.
const BESIDE_A_BAR: usize = 80 - 18;
/// After so long without a byte it is worth asking why.
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
