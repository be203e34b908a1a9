//! Flags and value parsers that the command lines of several verbs share.

use std::{num::NonZero, str::FromStr, time::Duration};

use clap::{
    Args as ClapArgs, ValueEnum,
    builder::{OsStringValueParser, TypedValueParser},
};
use multifd::{channel::Address, live::ZeroPageDetection, parameters::Parameter};
use parse_size::Config;

use crate::{
    file_address::{FileAddress, kind_of_address},
    qmp::QmpAddress,
};

#[derive(Clone, Copy, Debug, ClapArgs)]
pub(crate) struct OutputArgs {
    /// Print one JSON object at the end, with the fields of QEMU's query-migrate
    #[arg(long)]
    pub(crate) json: bool,
    /// Print errors only; receive also prints its address
    #[arg(long, short)]
    pub(crate) quiet: bool,
    /// Progress: bar; plain: a line with the time every 10 s, or plain=TIME, in seconds or with a unit (500ms, 2m); json: an
    /// object a line on standard output, with the fields of QEMU's query-migrate; none; auto: bar on a terminal, otherwise
    /// plain, with --json none
    #[arg(long, value_name = "MODE", default_value = "auto", value_parser = progress)]
    progress: ProgressArg,
}

impl OutputArgs {
    /// How progress is shown.
    pub(crate) fn progress(&self) -> ProgressArg {
        match self.progress {
            ProgressArg::Auto if self.quiet || self.json => ProgressArg::None,
            chosen => chosen,
        }
    }
}

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProgressArg {
    /// A bar on a terminal, otherwise lines.
    Auto,
    Bar,
    /// A line in each of these periods.
    Plain(Duration),
    Json,
    None,
}

fn progress(text: &str) -> Result<ProgressArg, String> {
    match text {
        "auto" => Ok(ProgressArg::Auto),
        "bar" => Ok(ProgressArg::Bar),
        "plain" => Ok(ProgressArg::Plain(PLAIN)),
        "json" => Ok(ProgressArg::Json),
        "none" => Ok(ProgressArg::None),
        other => match other.strip_prefix("plain=").map(seconds) {
            Some(Ok(every)) if !every.is_zero() => Ok(ProgressArg::Plain(every)),
            _ => Err(format!("expected auto, bar, plain, plain=TIME, json or none, found {other:?}")),
        },
    }
}

/// The period of lines, if none is given.
pub(crate) const PLAIN: Duration = Duration::from_secs(10);

/// `zero-page-detection`, or `auto`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum ZeroPagesArg {
    /// send: chosen by the machine type; demo: multifd
    #[default]
    Auto,
    /// Like other pages
    None,
    /// On the main connection; works with every destination
    Legacy,
    /// In the packets of the channels; needs QEMU 9.0 or later
    Multifd,
}

impl ZeroPagesArg {
    /// The mode; `auto` is returned if the user leaves the choice to the caller.
    pub(crate) fn or(self, auto: ZeroPageDetection) -> ZeroPageDetection {
        match self {
            Self::Auto => auto,
            Self::None => ZeroPageDetection::None,
            Self::Legacy => ZeroPageDetection::Legacy,
            Self::Multifd => ZeroPageDetection::Multifd,
        }
    }
}

/// Parses a text of at most [`MOST_LABEL`] bytes.
pub(super) fn label(text: &str) -> Result<String, String> {
    if text.len() <= MOST_LABEL {
        Ok(text.to_owned())
    } else {
        Err(format!("expected at most {MOST_LABEL} bytes, found {}", text.len()))
    }
}

const MOST_LABEL: usize = 4096;

/// The default of a parameter that is a time, in seconds.
pub(super) fn default_seconds(parameter: Parameter) -> String {
    parameter.default_time().as_secs().to_string()
}

/// The default of a parameter that is at most 255.
pub(super) fn small_default(parameter: Parameter) -> u8 {
    u8::try_from(parameter.default).unwrap_or(u8::MAX)
}

/// A time limit; 0 is no limit.
pub(super) fn limit(time: Duration) -> Option<Duration> {
    (!time.is_zero()).then_some(time)
}

/// Parses a whole number from `least` to `most`.
pub(super) fn number<T: TryFrom<u64>>(
    least: u64,
    most: u64,
) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync + 'static {
    move |text| {
        let number = text.parse().ok().filter(|number| (least..=most).contains(number));
        number.and_then(|number| T::try_from(number).ok()).ok_or_else(|| match most {
            u64::MAX => format!("expected a whole number from {least} on, found {text:?}"),
            _ => format!("expected a whole number from {least} to {most}, found {text:?}"),
        })
    }
}

/// Parses a number of threads.
pub(super) fn threads(text: &str) -> Result<NonZero<u8>, String> {
    number::<u8>(1, 255)(text).map(|number| NonZero::new(number).unwrap_or(NonZero::<u8>::MIN))
}

/// Parses a time, in seconds if it has no unit.
pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    time(text, "s").ok_or_else(|| format!("expected a time in seconds, or {TIME_UNITS}, found {text:?}"))
}

/// Parses a time within the range of `parameter`, in milliseconds if it has no unit.
pub(super) fn milliseconds(
    parameter: Parameter,
) -> impl Fn(&str) -> Result<Duration, String> + Clone + Send + Sync + 'static {
    move |text| {
        let parsed = time(text, "ms")
            .ok_or_else(|| format!("expected a time in milliseconds, or {TIME_UNITS}, found {text:?}"))?;
        let Parameter { least, most, .. } = parameter;
        if (least.into()..=most.into()).contains(&parsed.as_millis()) {
            Ok(parsed)
        } else {
            Err(format!("expected {least} to {most} milliseconds, found {text:?}"))
        }
    }
}

/// Parses a number with a unit of time, or in `unit` without one.
fn time(text: &str, unit: &str) -> Option<Duration> {
    let end = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(text.len());
    let (number, given) = text.split_at(end);
    let unit = match if given.is_empty() { unit } else { given } {
        "ms" => Duration::from_millis(1),
        "s" => Duration::from_secs(1),
        "m" | "min" => Duration::from_secs(60),
        "h" => Duration::from_secs(3600),
        _ => return None,
    };
    let (whole, fraction) =
        number.split_once('.').map_or((number, None), |(whole, part)| (whole, Some(part)));
    let whole = u32::from_str(whole).ok().and_then(|whole| unit.checked_mul(whole))?;
    let Some(fraction) = fraction else { return Some(whole) };
    // Milliseconds are the least that any limit is kept to.
    if !(1..=3).contains(&fraction.len()) {
        return None;
    }
    let thousandths = u32::from_str(&format!("{fraction:0<3}")).ok()?;
    whole.checked_add(unit.checked_mul(thousandths)? / 1000)
}

/// Parses the address at which `receive` listens.
pub(crate) fn listen_address(text: &str) -> Result<Address, String> {
    address(text, "LISTEN")
}

/// Parses the address of a QMP socket.
pub(super) fn qmp_address(text: &str) -> Result<QmpAddress, String> {
    QmpAddress::parse(text)
}

/// Parses the address of the other side of `send`.
pub(super) fn destination_address(text: &str) -> Result<Address, String> {
    address(text, "ADDRESS")
}

fn address(text: &str, name: &str) -> Result<Address, String> {
    text.parse().map_err(|refused: multifd::error::Usage| {
        let hint = if kind_of_address(text).is_none() && !text.contains(':') {
            format!("; did you swap {name} and FILE?")
        } else {
            String::new()
        };
        format!("{refused}{hint}")
    })
}

/// A path, or QEMU's form of it.
pub(super) fn file_address() -> impl TypedValueParser<Value = FileAddress> {
    OsStringValueParser::new().try_map(FileAddress::parse)
}

/// The same for a file that is written, or has no snapshots.
pub(super) fn plain_file_address() -> impl TypedValueParser<Value = FileAddress> {
    OsStringValueParser::new().try_map(FileAddress::parse_plain)
}

/// Parses bytes with binary units as in QEMU: 1K is 1024.
pub(super) fn size(text: &str) -> Result<u64, String> {
    bytes(text).ok_or_else(|| format!("expected a size in bytes, or {SIZE_UNITS}, found {text:?}"))
}

/// Parses bytes per second, with the same units.
pub(super) fn rate(text: &str) -> Result<u64, String> {
    bytes(text.strip_suffix("/s").unwrap_or(text))
        .ok_or_else(|| format!("expected a rate in bytes per second, or {SIZE_UNITS}, found {text:?}"))
}

fn bytes(text: &str) -> Option<u64> {
    Config::new().with_binary().parse_size(text).ok()
}

const SIZE_UNITS: &str = "with a unit (4K, 100M, 2G; K = 1024, M = 1024 K), below 16E";
const TIME_UNITS: &str = "with a unit (500ms, 90s, 2m, 1.5h)";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary_and_nonsense_is_refused() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("1G"), Ok(1 << 30));
        assert_eq!(rate("100M"), Ok(100 << 20));
        assert_eq!(rate("100M/s"), Ok(100 << 20));
        for nonsense in ["", "lots", "-1", "99999999E", "16E", "1X", "100M/s"] {
            let refused = size(nonsense).expect_err(nonsense);
            let expected = format!("(4K, 100M, 2G; K = 1024, M = 1024 K), below 16E, found {nonsense:?}");
            assert!(refused.ends_with(&expected), "{refused}");
        }
        assert!(rate("1M/s/s").is_err());
    }

    #[test]
    fn times_have_units_and_nonsense_is_refused_with_them() {
        for (text, expected) in [
            ("0", 0),
            ("90", 90_000),
            ("500ms", 500),
            ("2m", 120_000),
            ("2min", 120_000),
            ("1h", 3_600_000),
            ("1.5s", 1_500),
            ("1.5h", 5_400_000),
            ("1.5", 1_500),
            ("0.25m", 15_000),
            ("4294967295", 4_294_967_295_000),
        ] {
            assert_eq!(seconds(text), Ok(Duration::from_millis(expected)), "{text}");
        }
        for text in
            ["", "s", "-1", "+1", "1 s", "1.s", ".5", "1.2345", "1.2.3", "1d", "2M", "99999999999", "lots"]
        {
            let refused = seconds(text).expect_err(text);
            assert!(refused.ends_with(&format!("(500ms, 90s, 2m, 1.5h), found {text:?}")), "{refused}");
        }
    }

    #[test]
    fn number_is_refused_with_its_range() {
        let parse = number::<u8>(1, 99);
        assert_eq!((parse("1"), parse("99")), (Ok(1), Ok(99)));
        for text in ["0", "100", "-1", "1.5", "x", "", "99999999999999999999"] {
            assert_eq!(parse(text), Err(format!("expected a whole number from 1 to 99, found {text:?}")));
        }
        let refused = number::<u64>(0, u64::MAX)("x").expect_err("refused");
        assert_eq!(refused, "expected a whole number from 0 on, found \"x\"");
    }

    #[test]
    fn time_beyond_the_range_of_its_parameter_is_refused_with_the_range() {
        let limit = milliseconds(multifd::parameters::DOWNTIME_LIMIT);
        assert_eq!(limit("300"), Ok(Duration::from_millis(300)));
        assert_eq!(limit("2s"), Ok(Duration::from_secs(2)));
        for text in ["2000001", "1h"] {
            let refused = limit(text).expect_err(text);
            assert_eq!(refused, format!("expected 0 to 2000000 milliseconds, found {text:?}"));
        }
    }

    #[test]
    fn file_in_place_of_an_address_is_asked_for() {
        let refused = |text| listen_address(text).expect_err(text);
        assert!(refused("vm.ram").ends_with("; did you swap LISTEN and FILE?"));
        assert!(refused("/var/vm").ends_with("; did you swap LISTEN and FILE?"));
        assert!(!refused("tcp:host").contains("swap") && !refused("host:1").contains("swap"));
    }
}
