//! Throughput against channels, one line per peer.

use plotters::prelude::*;

use crate::{Result, cases::Who, measure::Measured};

/// The picture as SVG; `None` if fewer than two numbers of channels were measured.
pub(super) fn draw(all: &[Measured]) -> Result<Option<String>> {
    let cases: Vec<&Measured> =
        all.iter().filter(|measured| measured.case.name.starts_with("none-")).collect();
    let Some(first) = cases.first().filter(|_| cases.len() >= 2) else { return Ok(None) };
    let lines: Vec<(Who, Vec<Point>)> = first
        .case
        .peers
        .iter()
        .map(|who| (*who, cases.iter().filter_map(|case| point(case, *who)).collect()))
        .collect();
    // Shifted a little from each other, so that no line hides another's rounds.
    let lines = lines.into_iter().filter(|(_, points)| !points.is_empty()).enumerate();
    let lines: Vec<(Who, Vec<Point>)> = lines.map(|(at, (who, points))| (who, beside(points, at))).collect();
    let top = lines.iter().flat_map(|(_, points)| points).map(|point| point.most).fold(0.0, f64::max) * ROOM;

    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, (860, 520)).into_drawing_area();
        root.fill(&WHITE)?;
        let ticks: Vec<f64> = cases.iter().map(|case| f64::from(case.case.setting.channels).log2()).collect();
        let (left, right) = (ticks[0] - 0.15, ticks[ticks.len() - 1] + 0.15);
        let mut chart = ChartBuilder::on(&root)
            .caption("RAM moved a second over loopback: medians, and all rounds", ("sans-serif", 20))
            .margin(16)
            .x_label_area_size(44)
            .y_label_area_size(56)
            .build_cartesian_2d(left..right, 0.0..top)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(ticks.len())
            .x_desc("channels")
            .y_desc("GB/s")
            .x_label_formatter(&|power| format!("{:.0}", power.exp2()))
            .y_label_formatter(&|rate| format!("{rate:.1}"))
            .label_style(("sans-serif", 15))
            .axis_desc_style(("sans-serif", 16))
            .light_line_style(WHITE)
            .draw()?;
        for ((who, points), colour) in lines.iter().zip(COLOURS) {
            let style = colour.stroke_width(if *who == Who::Engine { 4 } else { 2 });
            chart
                .draw_series(LineSeries::new(points.iter().map(|point| (point.power, point.median)), style))?
                .label(who.label())
                .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 24, y)], style));
            chart.draw_series(
                points.iter().map(|point| Circle::new((point.power, point.median), 4, colour.filled())),
            )?;
            chart.draw_series(points.iter().map(|point| {
                PathElement::new(
                    vec![(point.power, point.least), (point.power, point.most)],
                    colour.stroke_width(1),
                )
            }))?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .legend_area_size(34)
            .margin(10)
            .label_font(("sans-serif", 16))
            .background_style(WHITE.mix(0.85))
            .border_style(RGBColor(200, 200, 200))
            .draw()?;
        root.present()?;
    }
    Ok(Some(text))
}

/// Space above the highest round, for the legend.
const ROOM: f64 = 1.5;

#[expect(clippy::cast_precision_loss, reason = "there are few peers")]
fn beside(points: Vec<Point>, at: usize) -> Vec<Point> {
    points
        .into_iter()
        .map(|point| Point { power: point.power + 0.025 * (at as f64 - 2.0), ..point })
        .collect()
}

struct Point {
    /// The binary logarithm of the number of channels.
    power: f64,
    median: f64,
    least: f64,
    most: f64,
}

fn point(measured: &Measured, who: Who) -> Option<Point> {
    let (_, samples) = measured.peers.iter().find(|(peer, _)| *peer == who)?;
    let speed = samples.as_ref().ok()?.speed()?;
    let power = f64::from(measured.case.setting.channels).log2();
    Some(Point { power, median: speed.median / 1e9, least: speed.least / 1e9, most: speed.most / 1e9 })
}

/// Distinguishable for colour-blind readers, too.
const COLOURS: [RGBColor; 6] = [
    RGBColor(213, 94, 0),
    RGBColor(0, 114, 178),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(130, 130, 130),
    RGBColor(0, 0, 0),
];
