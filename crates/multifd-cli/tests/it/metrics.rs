//! A strict reader of the text format of OpenMetrics, as far as gauges go.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

type Labels = BTreeMap<String, String>;

/// The samples of a page.
#[derive(Debug, Default)]
pub(crate) struct Page {
    samples: Vec<(String, Labels, f64)>,
}

impl Page {
    /// The value of the only sample of this metric with these labels; `None` if there is none.
    pub(crate) fn one(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let found = self.all(name, labels);
        assert!(found.len() <= 1, "{name} {labels:?}: {found:?}");
        found.first().copied()
    }

    /// The values of this metric with these labels.
    pub(crate) fn all(&self, name: &str, labels: &[(&str, &str)]) -> Vec<f64> {
        let has = |found: &Labels| {
            labels.iter().all(|(name, value)| found.get(*name).is_some_and(|found| found == value))
        };
        let samples = self.samples.iter().filter(|(found, with, _)| {
            found.strip_prefix("multifd_").is_some_and(|found| found == name) && has(with)
        });
        samples.map(|(.., value)| *value).collect()
    }
}

/// Reads a page, and fails at everything that is not allowed in it.
pub(crate) fn read_metrics(path: &Path) -> Page {
    parse(&fs::read_to_string(path).expect("the page"))
}

fn parse(text: &str) -> Page {
    let body = text.strip_suffix("# EOF\n").expect("an end");
    assert!(body.is_empty() || body.ends_with('\n'), "the end is a line");
    let (mut page, mut family, mut families) = (Page::default(), None::<String>, BTreeSet::new());
    // What the present family has: type, unit, help, a sample.
    let mut has = BTreeSet::new();
    let mut seen = BTreeSet::new();
    for line in body.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.splitn(3, ' ');
            let (kind, name, rest) =
                (words.next().unwrap(), words.next().expect(line), words.next().expect(line));
            assert!(is_name(name), "{line}");
            if family.as_deref() != Some(name) {
                assert!(families.insert(name.to_owned()), "a family in two pieces: {line}");
                family = Some(name.to_owned());
                has.clear();
            }
            assert!(!has.contains("sample") && has.insert(kind.to_owned()), "{line}");
            match kind {
                "TYPE" => assert_eq!(rest, "gauge", "{line}"),
                "UNIT" => assert!(name.ends_with(&format!("_{rest}")), "{line}"),
                "HELP" => assert!(!rest.is_empty() && !rest.contains('\\'), "{line}"),
                _ => panic!("{line}"),
            }
            continue;
        }
        let (name, rest) = line.split_once('{').expect(line);
        assert_eq!(family.as_deref(), Some(name), "a sample of its family: {line}");
        assert!(has.contains("TYPE") && has.contains("HELP"), "{line}");
        has.insert("sample".to_owned());
        let (labels, value) = labels(rest);
        let value = value.strip_prefix(' ').expect(line);
        assert!(value.chars().all(|letter| letter.is_ascii_digit() || letter == '.'), "{line}");
        assert!(seen.insert((name.to_owned(), labels.clone())), "a sample twice: {line}");
        page.samples.push((name.to_owned(), labels, value.parse().expect(line)));
    }
    page
}

/// The labels, and what follows their end.
fn labels(mut text: &str) -> (Labels, &str) {
    let mut labels = Labels::new();
    loop {
        let (name, rest) = text.split_once("=\"").expect(text);
        assert!(is_name(name) && !name.contains(':'), "{text}");
        let (mut value, mut letters) = (String::new(), rest.char_indices());
        let end = loop {
            match letters.next().expect(text) {
                (end, '"') => break end,
                (_, '\\') => value.push(match letters.next().expect(text).1 {
                    'n' => '\n',
                    escaped @ ('\\' | '"') => escaped,
                    other => panic!("\\{other} in {text}"),
                }),
                (_, letter) => value.push(letter),
            }
        };
        assert!(labels.insert(name.to_owned(), value).is_none(), "a label twice: {text}");
        let rest = &rest[end + 1..];
        match rest.split_at(1) {
            (",", more) => text = more,
            ("}", after) => return (labels, after),
            _ => panic!("{rest}"),
        }
    }
}

fn is_name(name: &str) -> bool {
    let first = name.chars().next();
    first.is_some_and(|letter| letter.is_ascii_alphabetic() || letter == '_')
        && name.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_')
}

#[test]
fn page_that_is_not_allowed_is_refused() {
    let whole = "# TYPE a_seconds gauge\n# UNIT a_seconds seconds\n# HELP a_seconds Text.\na_seconds{b=\"c\\\"\\\\\\n\"} 1.5\n# EOF\n";
    assert_eq!(parse(whole).samples.len(), 1);
    for (from, to) in [
        ("# EOF\n", ""),
        ("1.5\n", "1.5\n\n"),
        ("gauge", "counter"),
        ("# UNIT a_seconds seconds", "# UNIT a_seconds bytes"),
        ("\na_seconds{", "\nb_seconds{"),
        ("\\n\"", "\\t\""),
        ("1.5", "one"),
        ("1.5\n", "1.5 17\n"),
        ("1.5\n", "1.5\na_seconds{b=\"c\\\"\\\\\\n\"} 2\n"),
        ("# HELP a_seconds Text.\n", ""),
        ("# EOF", "# HELP a_seconds Text.\n# EOF"),
    ] {
        let broken = whole.replacen(from, to, 1);
        assert_ne!(broken, whole);
        assert!(std::panic::catch_unwind(|| parse(&broken)).is_err(), "{broken}");
    }
}
