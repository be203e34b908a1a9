//! The time line as a picture: for each connection, its throughput and the time in which its receiver was waited for.

use std::fmt::Write;

use indicatif::BinaryBytes;
use qemu_stream::recording::{Side, Step, Timeline};

use super::names::{ms, name};

/// Draws it. All numbers are ours, and names of connections have no signs of XML.
pub(super) fn draw(found: &Timeline) -> String {
    let rows = found.connections.len();
    let height = TOP + rows as f64 * ROW + BOTTOM;
    let length = found.length.as_secs_f64().max(1e-3);
    let x = |seconds: f64| LEFT + seconds / length * WIDTH;
    let bar = found.bar.as_secs_f64();
    let bars = || found.connections.iter().flat_map(|connection| &connection.source.bars);
    let most = bars().map(|(bytes, _)| *bytes).max().unwrap_or(0).max(1) as f64;
    let mut out = String::new();
    let mut add = |text: std::fmt::Arguments<'_>| {
        // Into a String.
        let _ = out.write_fmt(text);
    };
    add(format_args!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{:.0}\" height=\"{height:.0}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        LEFT + WIDTH + RIGHT
    ));
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate for people")]
    let top = (most / bar) as u64;
    add(format_args!(
        "<text x=\"{LEFT}\" y=\"18\">bytes from the source: full height = {}/s</text>\n\
         <text x=\"{LEFT}\" y=\"34\" fill=\"#c0392b\">below: time in which the receiver was waited for</text>\n",
        BinaryBytes(top)
    ));
    for (row, connection) in found.connections.iter().enumerate() {
        let base = TOP + row as f64 * ROW + ROW * 0.7;
        add(format_args!(
            "<text x=\"8\" y=\"{base:.1}\">{}</text>\n\
             <line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{base:.1}\" y2=\"{base:.1}\" stroke=\"#bbb\"/>\n",
            name(connection),
            LEFT + WIDTH
        ));
        for (at, (bytes, waited)) in connection.source.bars.iter().enumerate() {
            let from = x(at as f64 * bar);
            let wide = (bar / length * WIDTH).max(0.5);
            let high = *bytes as f64 / most * ROW * 0.6;
            if high > 0.0 {
                add(format_args!(
                    "<rect x=\"{from:.2}\" y=\"{:.2}\" width=\"{wide:.2}\" height=\"{high:.2}\" fill=\"#2980b9\"/>\n",
                    base - high
                ));
            }
            // A wait can be longer than the bar in which it begins.
            let low = (waited.as_secs_f64() / bar).min(1.0) * ROW * 0.22;
            if low > 0.0 {
                add(format_args!(
                    "<rect x=\"{from:.2}\" y=\"{base:.2}\" width=\"{wide:.2}\" height=\"{low:.2}\" fill=\"#c0392b\"/>\n"
                ));
            }
        }
        for at in connection.channel.iter().flat_map(|line| &line.syncs) {
            let at = x(at.as_secs_f64());
            add(format_args!(
                "<line x1=\"{at:.2}\" x2=\"{at:.2}\" y1=\"{:.1}\" y2=\"{base:.1}\" stroke=\"#27ae60\" stroke-width=\"0.8\"/>\n",
                base - ROW * 0.6
            ));
        }
    }
    let bottom = TOP + rows as f64 * ROW;
    for moment in &found.moments {
        let label = match (&moment.step, moment.side) {
            (Step::Pass { last: true }, _) => "last pass",
            (Step::EndOfRam, _) => "end of RAM",
            (Step::Message(text), Side::Destination) if text.starts_with("SHUT") => "SHUT",
            (Step::Command(text), _) if text == "POSTCOPY_RUN" => "post-copy",
            _ => continue,
        };
        let at = x(moment.at.as_secs_f64());
        let line = match label {
            "last pass" | "post-copy" => 14.0,
            "end of RAM" => 28.0,
            _ => 42.0,
        };
        add(format_args!(
            "<line x1=\"{at:.2}\" x2=\"{at:.2}\" y1=\"{TOP}\" y2=\"{:.1}\" stroke=\"#8e44ad\" stroke-dasharray=\"3 2\"/>\n\
             <text x=\"{:.2}\" y=\"{:.1}\" fill=\"#8e44ad\" text-anchor=\"end\">{label}</text>\n",
            bottom + line - 4.0,
            at - 3.0,
            bottom + line
        ));
    }
    for tick in 0..=4 {
        let at = length * f64::from(tick) / 4.0;
        let anchor = if tick == 4 { "end" } else { "start" };
        add(format_args!(
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{:.0} ms</text>\n",
            x(at),
            bottom + 62.0,
            at * 1e3
        ));
    }
    add(format_args!(
        "<text x=\"8\" y=\"{:.1}\">green: SYNC; {:.1} ms in all</text>\n</svg>\n",
        bottom + 82.0,
        ms(found.length)
    ));
    out
}

const LEFT: f64 = 90.0;
const RIGHT: f64 = 20.0;
const WIDTH: f64 = 900.0;
const TOP: f64 = 46.0;
const ROW: f64 = 64.0;
const BOTTOM: f64 = 92.0;
