//! The outlet: all text that the program prints passes through here, and nothing else writes to standard output and error.
//!
//! ```text
//! reports, errors, progress, results ─ lines ─▶ outlet ─ escaped ─▶ standard output, standard error
//! log ─ escaped by the outlet's rules, with colours of its own ────▶ standard error
//! ```
//!
//! Texts contain what others chose: a peer, a file, the file system, the environment, a certificate. A terminal would execute
//! control characters in them. So a text is printed line by line, and each line is escaped as a whole: a line break inside
//! a file name is escaped as well, and cannot imitate a line of this program. `clippy.toml` forbids every other way out.
#![expect(clippy::disallowed_methods, reason = "the one place that prints")]

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    env,
    error::Error,
    ffi::OsStr,
    fmt::Write as _,
    io::{self, IsTerminal, Write},
    panic,
    process::ExitCode,
};

use clap::error::{ContextValue, ErrorKind};
use multifd::error::{Printable, is_executed};
use serde::Serialize;

use super::failure::While;

/// Prints a line for people. If standard error is closed, nobody wants it.
pub(crate) fn say(line: &str) {
    say_lines(&[line]);
}

/// Prints lines for people, in one piece.
pub(crate) fn say_lines<T: AsRef<str>>(lines: &[T]) {
    let _ = io::stderr().write_all(escaped(lines).as_bytes());
}

/// Prints lines of a result. If the reader of standard output has closed it (`| head`), nobody wants them.
///
/// # Errors
/// If standard output is full.
pub(crate) fn print_lines<T: AsRef<str>>(lines: &[T]) -> Result<(), While> {
    match write_out(&escaped(lines)) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        printed => printed.map_err(unwritten),
    }
}

/// Prints a result as JSON, on one line. If the reader of standard output has closed it, nobody wants it.
///
/// # Errors
/// If standard output is full.
pub(crate) fn print_json(result: &impl Serialize) -> Result<(), While> {
    match write_out(&json(result)?) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        printed => printed.map_err(unwritten),
    }
}

/// Prints a line that another process waits for.
///
/// # Errors
/// If standard output is closed or full.
pub(crate) fn reply(line: &str) -> Result<(), While> {
    write_out(&escaped(&[line])).map_err(unwritten)
}

/// The same, as JSON.
///
/// # Errors
/// If standard output is closed or full.
pub(crate) fn reply_json(result: &impl Serialize) -> Result<(), While> {
    write_out(&json(result)?).map_err(unwritten)
}

/// Standard output for bytes that are no text: the RAM of a guest, as it is.
///
/// # Errors
/// If standard output is a terminal, which would execute the bytes.
pub(crate) fn bytes() -> io::Result<impl Write> {
    let out = io::stdout().lock();
    if out.is_terminal() {
        let why =
            "standard output is a terminal; redirect it to a file or a program, or give the name of a file";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    Ok(out)
}

/// Whether standard error is a terminal.
pub(crate) fn is_terminal() -> bool {
    io::stderr().is_terminal()
}

/// Whether standard error gets colours: on a terminal, unless `NO_COLOR` is set.
pub(super) fn has_colours() -> bool {
    is_terminal() && !no_color(env::var_os("NO_COLOR").as_deref())
}

/// Standard error, for the log: its lines are escaped when they are formatted.
pub(super) fn log() -> io::Stderr {
    io::stderr()
}

/// Prints why a command line was refused, or the help that it asks for. Returns the exit code.
pub(crate) fn refused(mut refused: clap::Error) -> ExitCode {
    let code = ExitCode::from(u8::try_from(refused.exit_code()).unwrap_or(2));
    if matches!(
        refused.kind(),
        ErrorKind::DisplayHelp
            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
            | ErrorKind::DisplayVersion
    ) {
        // These are texts of this program alone.
        let _ = refused.print();
        return code;
    }
    let text = refusal(&mut refused);
    match text.strip_prefix(ERROR).filter(|_| has_colours()) {
        Some(rest) => {
            let _ = io::stderr().write_all(format!("\x1b[1;31m{ERROR}\x1b[0m{rest}").as_bytes());
        }
        None => {
            let _ = io::stderr().write_all(text.as_bytes());
        }
    }
    code
}

/// The escaped text of a refusal. The parser puts parts of the command line into its own text, which has several lines: so
/// they are escaped before.
fn refusal(refused: &mut clap::Error) -> String {
    let shown = |text: &String| Printable(text).to_string();
    let parts: Vec<_> = refused.context().map(|(kind, value)| (kind, value.clone())).collect();
    for (kind, part) in parts {
        let part = match part {
            ContextValue::String(text) => ContextValue::String(shown(&text)),
            ContextValue::Strings(texts) => ContextValue::Strings(texts.iter().map(shown).collect()),
            ContextValue::StyledStrs(texts) => {
                let plain = texts.iter().map(|text| shown(&text.to_string()).into());
                ContextValue::StyledStrs(plain.collect())
            }
            // Numbers, and the usage, which is the program's own.
            _ => continue,
        };
        refused.insert(kind, part);
    }
    let mut text = refused.render().to_string();
    if let Some(reason) =
        refused.source().map(ToString::to_string).filter(|reason| reason.contains(is_executed))
    {
        text = text.replace(&reason, &Printable(&reason).to_string());
    }
    escaped(&text.lines().collect::<Vec<_>>())
}

/// Makes the text of a panic pass through here as well, for the whole process.
pub(crate) fn report_panics() {
    panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let text = panic.payload_as_str().unwrap_or("no text");
        let mut lines = vec![format!(
            "multifd: a bug: thread '{}' panicked at {place}: {text}",
            thread.name().unwrap_or("without a name")
        )];
        let backtrace = Backtrace::capture();
        if backtrace.status() == BacktraceStatus::Captured {
            lines.extend(backtrace.to_string().lines().map(str::to_owned));
        }
        say_lines(&lines);
    }));
}

/// A name of the file system or the command line, in one line of text that shows every byte of it: invalid UTF-8 as `\xff`,
/// control characters as `\u{1b}`.
pub(crate) fn shown(name: impl AsRef<OsStr>) -> String {
    let mut text = String::new();
    for chunk in name.as_ref().as_encoded_bytes().utf8_chunks() {
        let _ = write!(text, "{}", Printable(chunk.valid()));
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

fn escaped<T: AsRef<str>>(lines: &[T]) -> String {
    lines.iter().fold(String::new(), |mut text, line| {
        let _ = writeln!(text, "{}", Printable(line.as_ref()));
        text
    })
}

/// One line of JSON. What a terminal would execute is written in JSON's own form, `\u001b`.
fn json(result: &impl Serialize) -> Result<String, While> {
    let plain = serde_json::to_string(result)
        .map_err(|error| While::new("cannot write the result as JSON", error))?;
    let mut text = String::with_capacity(plain.len() + 1);
    for character in plain.chars() {
        // Only strings contain such characters.
        if is_executed(character) {
            for unit in character.encode_utf16(&mut [0; 2]) {
                let _ = write!(text, "\\u{unit:04x}");
            }
        } else {
            text.push(character);
        }
    }
    text.push('\n');
    Ok(text)
}

fn write_out(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush())
}

fn unwritten(error: io::Error) -> While {
    While::new("cannot write to standard output", error)
}

/// Whether the environment variable `NO_COLOR` asks for output without colours: if it is set to any text.
fn no_color(variable: Option<&OsStr>) -> bool {
    variable.is_some_and(|text| !text.is_empty())
}

const ERROR: &str = "error:";

#[cfg(test)]
mod tests {
    use std::{ffi::OsString, os::unix::ffi::OsStringExt};

    use clap::Parser;

    use super::*;
    use crate::args::Args;

    const HOSTILE: &str = "a\u{1b}]0;owned\u{7}\u{9b}2J\u{202e}\u{200b}\u{7f}\r\nmultifd: received ok";

    fn is_clean(text: &str) -> bool {
        text.lines().all(|line| !line.contains(is_executed))
    }

    #[test]
    fn a_line_break_inside_a_line_makes_no_line() {
        let text = escaped(&[format!("multifd: cannot read {HOSTILE}"), "  because: b".into()]);
        assert_eq!(text.lines().count(), 2, "{text:?}");
        assert!(is_clean(&text) && text.contains(r"\u{a}multifd: received ok"), "{text:?}");
    }

    #[test]
    fn a_name_shows_each_of_its_bytes() {
        let name = OsString::from_vec(b"a\xff\x1b[2J\n\xc3(\xe2\x80\xae".to_vec());
        assert_eq!(shown(name), r"a\xff\u{1b}[2J\u{a}\xc3(\u{202e}");
        assert_eq!(shown("größe メモリ"), "größe メモリ");
    }

    #[test]
    fn json_has_no_character_that_a_terminal_executes_and_means_the_same() {
        let hostile = format!("{HOSTILE}\u{e0041}");
        let text = json(&serde_json::json!({ "name": hostile })).expect("text");
        assert!(is_clean(&text) && text.lines().count() == 1, "{text:?}");
        assert!(text.contains(r"\u009b2J\u202e\u200b\u007f") && text.contains(r"\udb40\udc41"), "{text}");
        let read: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(read["name"], hostile.as_str());
    }

    #[test]
    fn a_refusal_shows_the_command_line_escaped_and_has_no_line_of_it() {
        let lines: [&[&str]; 6] = [
            &["inspect", "--\u{1b}[2J\nerror: fake"],
            &["inspect", "file:a,offset=\u{1b}[2J\nerror: fake"],
            &["receive", "tcp:\u{1b}[2J\nerror: fake", "f"],
            &["receive", "--stall-timeout", "\u{1b}[2J\nerror: fake", "tcp:h:1", "f"],
            &["\u{1b}[2J\nerror: fake"],
            &["send", "f", "\u{1b}[2J\nerror: fake"],
        ];
        for words in lines {
            let all = ["\u{1b}]0;multifd\n"].iter().chain(words);
            let mut error = Args::try_parse_from(all.copied()).expect_err("refused");
            let text = refusal(&mut error);
            assert!(is_clean(&text), "{text:?}");
            assert!(text.starts_with(ERROR), "{text:?}");
            assert!(!text.lines().any(|line| line.trim_start().starts_with("error: fake")), "{text:?}");
        }
    }

    #[test]
    fn help_contains_no_word_of_the_command_line() {
        for words in [&["\u{1b}[2J"][..], &["\u{1b}[2J", "--help"], &["\u{1b}[2J", "send", "--help"]] {
            let help = Args::try_parse_from(words.iter().copied()).expect_err("help");
            assert!(is_clean(&help.render().to_string()), "{words:?}");
        }
    }

    #[test]
    fn no_color_asks_for_no_colours_if_it_has_any_text() {
        assert!(no_color(Some(OsStr::new("1"))) && no_color(Some(OsStr::new("0"))));
        assert!(!no_color(Some(OsStr::new(""))) && !no_color(None));
    }
}
