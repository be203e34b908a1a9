//! Licences of everything that is compiled in: each must leave a choice that is in [`ALLOWED`].
//!
//! Comes in: the SPDX expression of each package, as cargo knows it. Only `OR`, `AND`, `WITH` and brackets
//! exist; the old `/` reads as `OR`.

use cargo_metadata::Metadata;

use crate::Failure;

/// Licences that fit a project which is itself Apache-2.0 or BSD-3-Clause. None of them asks anything of
/// those who link the library.
const ALLOWED: [&str; 13] = [
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Checks all packages of the lock file.
///
/// # Errors
///
/// Names each package whose licence leaves no allowed choice.
pub(crate) fn check(metadata: &Metadata) -> Result<(), Failure> {
    let mut complaints = Vec::new();
    for package in &metadata.packages {
        match package.license.as_deref() {
            Some(expression) if satisfiable(expression) => {}
            met => {
                complaints
                    .push(format!("{} {}: licence not allowed: {met:?}", package.name, package.version));
            }
        }
    }
    eprintln!("   {} packages", metadata.packages.len());
    if complaints.is_empty() { Ok(()) } else { Err(complaints.join("\n").into()) }
}

/// Whether `expression` is well-formed and can be met with allowed licences alone.
fn satisfiable(expression: &str) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let mut words = spaced.split_ascii_whitespace().peekable();
    let outcome = any(&mut words);
    outcome.unwrap_or(false) && words.next().is_none()
}

type Words<'a> = std::iter::Peekable<std::str::SplitAsciiWhitespace<'a>>;

fn any(words: &mut Words<'_>) -> Option<bool> {
    let mut met = all(words)?;
    while words.next_if_eq(&"OR").is_some() {
        met |= all(words)?;
    }
    Some(met)
}

fn all(words: &mut Words<'_>) -> Option<bool> {
    let mut met = one(words)?;
    while words.next_if_eq(&"AND").is_some() {
        met &= one(words)?;
    }
    Some(met)
}

fn one(words: &mut Words<'_>) -> Option<bool> {
    match words.next()? {
        "(" => {
            let met = any(words)?;
            words.next_if_eq(&")")?;
            Some(met)
        }
        "OR" | "AND" | "WITH" | ")" => None,
        name if words.next_if_eq(&"WITH").is_some() => {
            let whole = format!("{name} WITH {}", words.next()?);
            Some(ALLOWED.contains(&whole.as_str()))
        }
        name => Some(ALLOWED.contains(&name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_allowed_choice_is_enough() {
        assert!(satisfiable("MIT"));
        assert!(satisfiable("MIT OR GPL-3.0-only"));
        assert!(satisfiable("Unlicense/MIT"));
        assert!(satisfiable("(MIT OR Apache-2.0) AND Unicode-3.0"));
        assert!(satisfiable("Apache-2.0 WITH LLVM-exception OR Apache-2.0 OR MIT"));
    }

    #[test]
    fn every_part_of_a_sum_must_be_allowed() {
        assert!(!satisfiable("MIT AND GPL-2.0-or-later"));
        assert!(!satisfiable("GPL-2.0-only"));
        assert!(!satisfiable("GPL-2.0-only WITH Classpath-exception-2.0"));
        assert!(!satisfiable("(MIT OR ISC) AND (GPL-2.0-only OR LGPL-2.1-only)"));
    }

    #[test]
    fn broken_expressions_are_refused() {
        for text in ["", "MIT OR", "(MIT", "MIT)", "MIT ISC", "AND", "MIT WITH"] {
            assert!(!satisfiable(text), "{text}");
        }
    }
}
