//! `docs/use/parameters.md`, as the tests read it.

use std::{fs, path::Path};

/// A row of the table of supported parameters.
#[derive(Debug)]
pub(crate) struct Parameter {
    pub(crate) name: String,
    pub(crate) since: (u32, u32),
    pub(crate) range: Range,
    /// QEMU's.
    pub(crate) default: String,
    pub(crate) command_line: Vec<Place>,
    pub(crate) library: Vec<Place>,
}

/// A verb or a struct that has a parameter.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) name: String,
    pub(crate) default: String,
    pub(crate) range: Range,
}

/// The values a parameter takes.
#[derive(Clone, Debug)]
pub(crate) enum Range {
    /// Whole numbers, both ends included, and words in addition.
    Numbers(u64, u64, Vec<String>),
    Words(Vec<String>),
    Text,
}

impl Range {
    fn parse(text: &str) -> Self {
        if text == "text" {
            return Self::Text;
        }
        if text == "size" {
            return Self::Numbers(0, u64::MAX, Vec::new());
        }
        let mut words: Vec<String> = text.split(',').map(|word| word.trim().to_owned()).collect();
        match words[0].split_once("..") {
            Some((least, most)) => {
                let bound = |text: &str| text.parse().unwrap_or_else(|_| panic!("a bound, found {text:?}"));
                let (least, most) = (bound(least), bound(most));
                Self::Numbers(least, most, words.split_off(1))
            }
            None => Self::Words(words),
        }
    }

    /// Values that are accepted, and values that are not.
    pub(crate) fn samples(&self) -> (Vec<String>, Vec<String>) {
        match self {
            Self::Numbers(least, most, words) => {
                let taken =
                    [*least, *most].map(|value| value.to_string()).into_iter().chain(words.iter().cloned());
                let beyond = (u128::from(*most) + 1).to_string();
                let below = (i128::from(*least) - 1).to_string();
                (taken.collect(), vec![below, beyond])
            }
            Self::Words(words) => (words.clone(), vec!["no-such-word".to_owned()]),
            Self::Text => (vec!["x".to_owned()], Vec::new()),
        }
    }
}

/// The parameters that apply.
pub(crate) fn parameters() -> Vec<Parameter> {
    let rows = rows("## Parameters that apply");
    assert!(rows.len() > 8, "a table of parameters, found {rows:?}");
    rows.into_iter()
        .map(|row| {
            let [name, since, _unit, range, default, command_line, library, _remarks] =
                row.try_into().expect("8 cells");
            let range = Range::parse(&range);
            let (major, minor) = since.split_once('.').expect("a version");
            Parameter {
                since: (major.parse().expect("a number"), minor.parse().expect("a number")),
                command_line: places(&command_line, &range),
                library: places(&library, &range),
                name: name.trim_matches('`').to_owned(),
                range,
                default,
            }
        })
        .collect()
}

/// The cells of a table's rows, without its head.
pub(crate) fn rows(heading: &str) -> Vec<Vec<String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/use/parameters.md");
    let text = fs::read_to_string(path).expect("docs/use/parameters.md");
    let section = text.lines().skip_while(|line| *line != heading).skip(1);
    let table = section.take_while(|line| !line.starts_with("## ")).filter(|line| line.starts_with('|'));
    let cells = |line: &str| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect();
    table.skip(2).map(cells).collect()
}

/// Places as `VERB DEFAULT (RANGE)`, separated by `;`. A default that is not QEMU's is written in brackets.
fn places(text: &str, range: &Range) -> Vec<Place> {
    let places = text.split(';').map(str::trim).filter(|place| !place.is_empty());
    places
        .map(|place| {
            let (name, rest) = place.split_once(' ').unwrap_or((place, ""));
            let (default, own) = rest.split_once(' ').unwrap_or((rest, ""));
            let own = own.trim_start_matches('(').trim_end_matches(')');
            Place {
                name: name.to_owned(),
                default: default.trim_matches(['(', ')']).to_owned(),
                range: if own.is_empty() { range.clone() } else { Range::parse(own) },
            }
        })
        .collect()
}
