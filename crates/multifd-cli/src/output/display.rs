//! Shows progress while a migration runs: a bar on a terminal, lines with the time elsewhere, or objects for programs.
//!
//! A separate thread reads the counters; the migration does not know it. The thread ends when its handle is dropped.

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread::{Builder, JoinHandle},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use multifd::error::Printable;

use super::{
    log::time_of_day,
    outlet::{is_terminal, print_json, say},
    progress::{Look, Meter, percent},
    report::Report,
};
use crate::args::{PLAIN, ProgressArg};

/// Shows progress until it is dropped.
pub(crate) struct Display {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What the display asks for: a snapshot for people, and one for programs.
pub(crate) trait Shown: Send + Sync + 'static {
    /// For people.
    fn look(&self) -> Look;

    /// For programs.
    fn report(&self) -> Report;
}

impl Display {
    /// Starts to show `shown` in this mode.
    pub(crate) fn start(verb: impl Into<String>, mode: ProgressArg, shown: Arc<dyn Shown>) -> Self {
        let (end, ended) = channel();
        let verb = verb.into();
        let show = move || match mode {
            ProgressArg::Bar => as_bar(&verb, &*shown, &ended),
            ProgressArg::Auto if is_terminal() => as_bar(&verb, &*shown, &ended),
            ProgressArg::Auto => as_lines(&verb, &*shown, PLAIN, &ended),
            ProgressArg::Plain(every) => as_lines(&verb, &*shown, every, &ended),
            ProgressArg::Json => as_objects(&*shown, &ended),
            ProgressArg::None => {}
        };
        if mode == ProgressArg::None {
            return Self { end: None, thread: None };
        }
        // Without a thread no progress is shown, which is not an error.
        let thread = Builder::new().name("display".into()).spawn(show);
        Self { end: Some(end), thread: thread.ok() }
    }
}

/// Waits for this time; `false` at the end. Nothing is ever sent: the wait ends when the other end is dropped.
fn goes_on(ended: &Receiver<()>, time: Duration) -> bool {
    ended.recv_timeout(time) == Err(RecvTimeoutError::Timeout)
}

fn as_bar(verb: &str, shown: &dyn Shown, ended: &Receiver<()>) {
    let bar = ProgressBar::new_spinner();
    bar.set_draw_target(ProgressDrawTarget::stderr_with_hz(20));
    let (mut bounded, mut meter) = (None, Meter::default());
    while goes_on(ended, BAR_EVERY) {
        let look = shown.look();
        let (text, hint) = meter.text(&look);
        if let Some(hint) = hint {
            bar.suspend(|| say(&format!("{verb}: {hint}")));
        }
        if bounded.replace(look.is_bounded()) != Some(look.is_bounded()) {
            bar.set_style(style(look.is_bounded()));
        }
        bar.set_length(look.total);
        bar.set_position(look.done.min(look.total));
        show(&bar, &text);
    }
    bar.finish_and_clear();
}

/// The first line comes soon, the others in every period. A hint does not wait for its line.
fn as_lines(verb: &str, shown: &dyn Shown, every: Duration, ended: &Receiver<()>) {
    let (mut meter, mut next, mut waited) = (Meter::default(), Instant::now(), false);
    // The first rate is that of the first period.
    meter.text(&shown.look());
    while goes_on(ended, LOOK.min(every)) {
        let look = shown.look();
        let (text, hint) = meter.text(&look);
        if let Some(hint) = hint {
            say(&format!("{verb}: {hint}"));
        }
        let now = Instant::now();
        if now >= next && !(look.waits && std::mem::replace(&mut waited, true)) {
            say(&format!("{} {verb}: {}{text}", time_of_day(), percent(&look)));
            next = now + every;
        }
    }
}

/// One object in each second, and one for each new status. A source may be waited for for days, which is one object.
fn as_objects(shown: &dyn Shown, ended: &Receiver<()>) {
    let (mut last, mut next) = (None, Instant::now());
    while goes_on(ended, BAR_EVERY) {
        let report = shown.report();
        let now = Instant::now();
        if last == Some(report.status) && (now < next || report.status == WAITS) {
            continue;
        }
        if print_json(&report).is_err() {
            return;
        }
        (last, next) = (Some(report.status), now + LOOK);
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

/// Shows a text beside the bar.
#[expect(clippy::disallowed_methods, reason = "the text is escaped; the bar draws itself")]
fn show(bar: &ProgressBar, text: &str) {
    bar.set_message(Printable(text).to_string());
}

const BAR_EVERY: Duration = Duration::from_millis(100);
/// The status while nobody has connected.
pub(crate) const WAITS: &str = "none";
/// The status of post-copy that was interrupted.
pub(crate) const PAUSED: &str = "postcopy-paused";
/// How often progress is looked at, and printed as an object.
const LOOK: Duration = Duration::from_secs(1);

/// One line, cut at the width of the terminal: a bar if the end is known (`bounded`).
fn style(bounded: bool) -> ProgressStyle {
    let template = if bounded { "[{bar:10}] {percent:>3}% {wide_msg}" } else { "{spinner} {wide_msg}" };
    let style = ProgressStyle::with_template(template);
    style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ").tick_chars("-\\|/-")
}
