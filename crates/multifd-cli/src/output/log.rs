//! The log of the libraries and of this program, on standard error.
//!
//! An event is formatted without colours and escaped as a whole: fields have names, addresses and errors that a peer chose. The
//! colours are added afterwards.

use std::fmt;

use multifd::error::Printable;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    EnvFilter,
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::{Format, Full, Writer},
        time::{FormatTime, SystemTime},
    },
    registry::LookupSpan,
};

use super::outlet;

/// Sends the libraries' events to standard error, as requested by `MULTIFD_LOG`: `debug`, `multifd=trace`. The default
/// is warnings, or nothing with `quiet`.
pub(crate) fn trace(quiet: bool) {
    let unasked = || EnvFilter::new(if quiet { "off" } else { "warn" });
    let chosen = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_env("MULTIFD_LOG").unwrap_or_else(|_| unasked()))
        .with_writer(outlet::log)
        .with_ansi(false)
        // A failed write of a line would be reported on standard error, and a panic if that is closed.
        .log_internal_errors(false)
        .event_format(Lines::new(outlet::has_colours()))
        .try_init();
    // Another call in this process has set up logging already.
    drop(chosen);
}

/// An event as one line.
struct Lines {
    rest: Format<Full, ()>,
    colours: bool,
}

impl Lines {
    fn new(colours: bool) -> Self {
        Self { rest: Format::default().with_ansi(false).with_level(false).without_time(), colours }
    }
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let (mut time, mut rest) = (String::new(), String::new());
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        self.rest.format_event(context, Writer::new(&mut rest), event)?;
        let (level, rest) = (event.metadata().level(), Printable(rest.trim_end_matches('\n')));
        if self.colours {
            writeln!(writer, "\x1b[2m{time}\x1b[0m \x1b[{}m{level:>5}\x1b[0m {rest}", colour(*level))
        } else {
            writeln!(writer, "{time} {level:>5} {rest}")
        }
    }
}

/// The time in UTC, to the second: 2026-01-31T23:59:59Z.
pub(crate) fn time_of_day() -> String {
    let mut time = String::new();
    // Writing to a string does not fail.
    let _ = SystemTime.format_time(&mut Writer::new(&mut time));
    match time.split_once('.') {
        Some((seconds, _)) => format!("{seconds}Z"),
        None => time,
    }
}

/// The number of a terminal's colour.
fn colour(level: Level) -> u8 {
    match level {
        Level::ERROR => 31,
        Level::WARN => 33,
        Level::INFO => 32,
        Level::DEBUG => 34,
        Level::TRACE => 35,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{self, Write},
        sync::{Arc, Mutex},
    };

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(colours: bool) -> String {
        let written = Written::default();
        let writer = written.clone();
        let log = tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .with_ansi(false)
            .event_format(Lines::new(colours))
            .finish();
        tracing::subscriber::with_default(log, || {
            let hostile = "a\u{1b}]0;owned\u{7}\u{9b}2J\u{202e}\nmultifd: received ok";
            let _span = tracing::error_span!("span", hostile, shown = %hostile).entered();
            tracing::warn!(hostile, shown = %hostile, debug = ?hostile, "{hostile}");
        });
        let bytes = written.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn fields_messages_and_spans_are_escaped_in_one_line() {
        let text = logged(false);
        assert_eq!(text.lines().count(), 1, "{text:?}");
        assert!(!text.trim_end().contains(multifd::error::is_executed), "{text:?}");
        assert!(text.contains(" WARN ") && text.contains("received ok"), "{text:?}");
    }

    #[test]
    fn colours_are_those_of_the_log_alone() {
        let text = logged(true);
        let own = ["\u{1b}[2m", "\u{1b}[0m", "\u{1b}[33m", "\u{1b}[0m"];
        let mut rest = text.trim_end();
        for code in own {
            rest = rest.split_once(code).expect(code).1;
        }
        assert!(!rest.contains(multifd::error::is_executed), "{text:?}");
    }
}
