//! Shows progress while a migration runs: a bar on a terminal, otherwise a line from time to time, nothing with
//! `--quiet`.
//!
//! A separate thread reads the counters; the migration does not know it. The thread ends when its handle is dropped.

use std::{
    sync::mpsc::{RecvTimeoutError, Sender, channel},
    thread::{Builder, JoinHandle},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use multifd::error::Printable;

use super::{
    outlet::{is_terminal, say},
    progress::{Look, Meter, percent},
};

/// Shows progress until it is dropped.
pub(crate) struct Display {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Display {
    /// Starts to show the snapshots that `look` returns, unless `quiet`.
    pub(crate) fn start(verb: &'static str, quiet: bool, look: impl Fn() -> Look + Send + 'static) -> Self {
        if quiet {
            return Self { end: None, thread: None };
        }
        let (end, ended) = channel();
        let thread = Builder::new().name("display".into()).spawn(move || {
            let terminal = is_terminal();
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
                let (text, hint) = meter.text(&look);
                if let Some(hint) = hint {
                    let tell = || say(&format!("{verb}: {hint}"));
                    bar.as_ref().map_or_else(tell, |bar| bar.suspend(tell));
                }
                match &bar {
                    Some(bar) => {
                        if bounded.replace(look.is_bounded()) != Some(look.is_bounded()) {
                            bar.set_style(style(look.is_bounded()));
                        }
                        bar.set_length(look.total);
                        bar.set_position(look.done.min(look.total));
                        show(bar, &text);
                    }
                    None => say(&format!("{verb}: {}{text}", percent(&look))),
                }
            }
            if let Some(bar) = bar {
                bar.finish_and_clear();
            }
        });
        // Without a thread no progress is shown, which is not an error.
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

/// Shows a text beside the bar.
#[expect(clippy::disallowed_methods, reason = "the text is escaped; the bar draws itself")]
fn show(bar: &ProgressBar, text: &str) {
    bar.set_message(Printable(text).to_string());
}

const BAR_EVERY: Duration = Duration::from_millis(100);
const LINE_EVERY: Duration = Duration::from_secs(1);

/// One line, cut at the width of the terminal: a bar if the end is known (`bounded`).
fn style(bounded: bool) -> ProgressStyle {
    let template = if bounded { "[{bar:10}] {percent:>3}% {wide_msg}" } else { "{spinner} {wide_msg}" };
    let style = ProgressStyle::with_template(template);
    style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ").tick_chars("-\\|/-")
}
