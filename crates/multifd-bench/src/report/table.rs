//! The table, and the targets below it.

use crate::{
    cases::{Quantity, TARGETS, Target, Who},
    measure::{Measured, Samples},
};

const GB: f64 = 1e9;
const MIB: f64 = (1 << 20) as f64;

pub(crate) fn markdown(all: &[Measured], rounds: usize) -> String {
    let mut text =
        format!("Medians of {rounds} rounds in turns; in brackets the slowest and the fastest round.\n\n");
    text += "| case | channels | peer | RAM GB/s | to the first peer | CPU s/GiB: source + destination | wire/RAM | beyond RAM, MiB | downtime, ms |\n";
    text += "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n";
    for measured in all {
        let first = measured.peers.first().and_then(|(_, samples)| speed(samples.as_ref().ok()?));
        for (who, samples) in &measured.peers {
            text += &row(measured, *who, samples, first);
        }
    }
    let reached: Vec<String> = TARGETS.iter().filter_map(|target| verdict(all, target)).collect();
    let growth = growth(all);
    let memory = memory(all);
    if !reached.is_empty() || growth.is_some() || !memory.is_empty() {
        text += "\n| target | expected | found | |\n| --- | --- | --- | --- |\n";
        text.extend(reached.into_iter().chain(growth).chain(memory));
    }
    text
}

fn row(measured: &Measured, who: Who, samples: &Result<Samples, String>, first: Option<f64>) -> String {
    let case = &measured.case;
    let head = format!("| {} | {} | {} |", case.name, case.setting.channels, who.label());
    let samples = match samples {
        Ok(samples) => samples,
        Err(reason) => {
            return format!("{head} not measured: {} | | | | | |\n", reason.replace(['\n', '|'], " "));
        }
    };
    let rate = samples.speed().map_or_else(String::new, |speed| {
        format!("{:.2} ({:.2}–{:.2})", speed.median / GB, speed.least / GB, speed.most / GB)
    });
    let ratio =
        speed(samples).zip(first).map_or_else(String::new, |(ours, first)| format!("{:.2}×", ours / first));
    let cpu = samples.cpu().map_or_else(String::new, |[source, destination, both]| {
        format!("{:.2} + {:.2} = {:.2}", source.median, destination.median, both.median)
    });
    let wire = samples.wire().map_or_else(String::new, |wire| format!("{wire:.4}"));
    let beyond = samples.beyond().map_or_else(String::new, |[source, destination]| {
        format!("{:.1}, {:.1}", source as f64 / MIB, destination as f64 / MIB)
    });
    let downtime = samples.downtime().map_or_else(String::new, |spread| {
        format!("{:.0} ({:.0}–{:.0})", spread.median, spread.least, spread.most)
    });
    format!("{head} {rate} | {ratio} | {cpu} | {wire} | {beyond} | {downtime} |\n")
}

fn speed(samples: &Samples) -> Option<f64> {
    samples.speed().map(|speed| speed.median)
}

fn find<'a>(all: &'a [Measured], case: &str, who: Who) -> Option<&'a Samples> {
    let measured = all.iter().find(|measured| measured.case.name == case)?;
    measured.peers.iter().find(|(peer, _)| *peer == who)?.1.as_ref().ok()
}

fn verdict(all: &[Measured], target: &Target) -> Option<String> {
    let (ours, against) = (find(all, target.case, target.ours)?, find(all, target.case, target.against)?);
    let (ours_label, against_label) = (target.ours.label(), target.against.label());
    let (what, ratio, reached, sign) = match target.quantity {
        Quantity::Speed => {
            let ratio = speed(ours)? / speed(against)?;
            ("speed", ratio, ratio >= target.bound, "≥")
        }
        Quantity::Cpu => {
            let ratio = ours.cpu()?[2].median / against.cpu()?[2].median;
            ("CPU time", ratio, ratio <= target.bound, "≤")
        }
    };
    // Compressed: a peer may be faster because it compresses less.
    let same = ours.wire().zip(against.wire()).filter(|_| matches!(target.case, "zlib" | "zstd"));
    let wire = same.map_or_else(String::new, |(ours, against)| {
        format!(", with {:+.1} % of the bytes on the wire", (ours / against - 1.0) * 100.0)
    });
    let alike = same.is_none_or(|(ours, against)| (ours / against - 1.0).abs() <= 0.05);
    Some(format!(
        "| {}: {what}, {ours_label} to {against_label} | {sign} {} | {ratio:.2}{wire} | {} |\n",
        target.case,
        target.bound,
        if reached && alike { "reached" } else { "missed" }
    ))
}

/// From 1 to 8 channels, relative to the best number of channels.
fn growth(all: &[Measured]) -> Option<String> {
    let speeds: Option<Vec<f64>> = ["none-1", "none-2", "none-4", "none-8"]
        .iter()
        .map(|case| find(all, case, Who::Engine).and_then(speed))
        .collect();
    let speeds = speeds?;
    let best = speeds.iter().copied().fold(0.0, f64::max);
    let least = speeds.iter().copied().fold(f64::INFINITY, f64::min) / best;
    let verdict = if least >= 0.9 { "reached" } else { "missed" };
    Some(format!("| none-1 to none-8: speed, the worst to the best | ≥ 0.9 | {least:.2} | {verdict} |\n"))
}

fn memory(all: &[Measured]) -> Vec<String> {
    let rows =
        all.iter().filter(|measured| measured.case.name.starts_with("memory-")).filter_map(|measured| {
            let case = &measured.case;
            let most = find(all, case.name, Who::Engine)?.beyond()?.into_iter().max()? as f64 / MIB;
            let bound = 16.0 + 2.0 * f64::from(case.setting.channels);
            let verdict = if most <= bound { "reached" } else { "missed" };
            Some(format!(
                "| {}: MiB beyond RAM, the greater side | ≤ {bound} | {most:.1} | {verdict} |\n",
                case.name
            ))
        });
    rows.collect()
}
