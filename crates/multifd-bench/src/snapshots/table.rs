//! The table: a row is printed as soon as it is measured.

pub(super) use crate::first_instruction::median;
use std::time::Duration;

pub(super) struct Table {
    missed: usize,
    rows: usize,
}

/// One figure.
pub(super) struct Row {
    what: &'static str,
    setting: String,
    found: String,
    target: String,
    is_met: Option<bool>,
    note: String,
}

impl Row {
    pub(super) fn new(what: &'static str, setting: &str) -> Self {
        let (found, target, note) = (String::new(), String::new(), String::new());
        Self { what, setting: setting.to_owned(), found, target, is_met: None, note }
    }

    /// A time without a target.
    pub(super) fn time(self, found: Duration) -> Self {
        Self { found: time(found), ..self }
    }

    /// A time, and the longest that is wanted.
    pub(super) fn at_most(self, found: Duration, most: Duration) -> Self {
        let (target, is_met) = (format!("≤ {}", time(most)), Some(found <= most));
        Self { found: time(found), target, is_met, ..self }
    }

    /// How many times as long, and the most that is wanted.
    pub(super) fn times(self, found: f64, most: f64) -> Self {
        let (target, is_met) = (format!("≤ {most}×"), Some(found <= most));
        Self { found: format!("{found:.2}×"), target, is_met, ..self }
    }

    /// A share of 1, without a target.
    pub(super) fn share(self, found: f64) -> Self {
        Self { found: format!("{:.1} %", found * 100.0), ..self }
    }

    /// A share of 1, and the most percent that are wanted.
    pub(super) fn percent(self, found: f64, most: f64) -> Self {
        let (target, is_met) = (format!("≤ {most} %"), Some(found * 100.0 <= most));
        Self { target, is_met, ..self.share(found) }
    }

    /// What was not measured.
    pub(super) fn without(self, reason: &str) -> Self {
        Self { found: "not measured".to_owned(), note: reason.to_owned(), ..self }
    }

    pub(super) fn note(self, note: impl Into<String>) -> Self {
        Self { note: note.into(), ..self }
    }
}

impl Table {
    pub(super) fn new() -> Self {
        println!("| What | Setting | Found | Target | Reached | |");
        println!("| --- | --- | ---: | ---: | --- | --- |");
        Self { missed: 0, rows: 0 }
    }

    pub(super) fn add(&mut self, row: Row) {
        let met = row.is_met.map_or("", |is_met| if is_met { "yes" } else { "**no**" });
        println!(
            "| {} | {} | {} | {} | {met} | {} |",
            row.what, row.setting, row.found, row.target, row.note
        );
        self.rows += 1;
        self.missed += usize::from(row.is_met == Some(false));
    }

    pub(super) fn end(self) {
        eprintln!("{} rows; {} targets were missed", self.rows, self.missed);
    }
}

/// A time with three digits.
pub(super) fn time(time: Duration) -> String {
    let micros = time.as_secs_f64() * 1e6;
    match micros {
        ..100.0 => format!("{micros:.1} µs"),
        ..1000.0 => format!("{micros:.0} µs"),
        ..100_000.0 => format!("{:.2} ms", micros / 1e3),
        ..1_000_000.0 => format!("{:.0} ms", micros / 1e3),
        _ => format!("{:.2} s", micros / 1e6),
    }
}

/// The value below which a part of the values is: 0.5 for the median.
pub(super) fn quantile<T: Ord + Copy + Default>(mut values: Vec<T>, part: f64) -> T {
    values.sort_unstable();
    let last = values.len().saturating_sub(1);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
    let index = (last as f64 * part).round() as usize;
    values.get(index).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_whether_its_target_was_met() {
        let at_most = |found, most| {
            Row::new("pause", "idle")
                .at_most(Duration::from_micros(found), Duration::from_micros(most))
                .is_met
        };
        assert_eq!((at_most(3000, 3000), at_most(3001, 3000)), (Some(true), Some(false)));
        assert_eq!(Row::new("fault", "").times(1.31, 1.3).is_met, Some(false));
        assert_eq!(Row::new("delta", "").percent(0.05, 5.0).is_met, Some(true));
        assert_eq!(Row::new("pause", "").without("no memory").is_met, None);
    }

    #[test]
    fn a_quantile_is_one_of_the_values() {
        assert_eq!(quantile((1..=101).rev().collect(), 0.99), 100);
        assert_eq!((median(vec![9, 1, 2]), median::<u8>(Vec::new())), (2, 0));
        assert_eq!(time(Duration::from_micros(1500)), "1.50 ms");
    }
}
