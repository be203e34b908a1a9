//! Checks the licences of all compiled packages: each must offer a licence in [`ALLOWED`].
//!
//! The input is the SPDX expression of each package, from cargo; the old `/` means `OR`. `deny.toml` has the same list
//! for `cargo deny`, which is not installed on every machine. This check always runs.

use cargo_metadata::Metadata;
use spdx::{Expression, Licensee, ParseMode};

use crate::Failure;

/// Licences that are compatible with a project under Apache-2.0 or BSD-3-Clause. None of them puts obligations on
/// programs that link the library.
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
    let allowed = allowed()?;
    let mut complaints = Vec::new();
    for package in &metadata.packages {
        if let Err(why) = satisfied(package.license.as_deref().unwrap_or_default(), &allowed) {
            complaints.push(format!("{} {}: {why}", package.name, package.version));
        }
    }
    eprintln!("   {} packages", metadata.packages.len());
    if complaints.is_empty() { Ok(()) } else { Err(complaints.join("\n").into()) }
}

fn allowed() -> Result<Vec<Licensee>, Failure> {
    ALLOWED.iter().map(|name| Licensee::parse(name).map_err(|error| error.to_string().into())).collect()
}

/// Checks that `expression` is well-formed and satisfied by allowed licences alone; otherwise returns the reason.
fn satisfied(expression: &str, allowed: &[Licensee]) -> Result<(), String> {
    let parsed = Expression::parse_mode(expression, MODE);
    let parsed = parsed.map_err(|error| format!("expected a licence as an SPDX expression: {error}"))?;
    let satisfied = parsed.evaluate(|wanted| allowed.iter().any(|licence| licence.satisfies(wanted)));
    if satisfied { Ok(()) } else { Err(format!("licence not allowed: {expression}")) }
}

/// The expressions that registries accept, except misspelt names.
const MODE: ParseMode = ParseMode { allow_imprecise_license_names: false, ..ParseMode::LAX };

#[cfg(test)]
mod tests {
    use super::*;

    fn satisfiable(expression: &str) -> bool {
        satisfied(expression, &allowed().unwrap()).is_ok()
    }

    #[test]
    fn one_allowed_choice_is_enough() {
        assert!(satisfiable("MIT"));
        assert!(satisfiable("MIT OR GPL-3.0-only"));
        assert!(satisfiable("Unlicense/MIT"));
        assert!(satisfiable("(MIT OR Apache-2.0) AND Unicode-3.0"));
        assert!(satisfiable("Apache-2.0 WITH LLVM-exception OR Apache-2.0 OR MIT"));
        assert!(satisfiable("Apache-2.0 WITH LLVM-exception"));
    }

    #[test]
    fn every_part_of_a_sum_must_be_allowed() {
        assert!(!satisfiable("MIT AND GPL-2.0-or-later"));
        assert!(!satisfiable("GPL-2.0-only"));
        assert!(!satisfiable("GPL-2.0-only WITH Classpath-exception-2.0"));
        assert!(!satisfiable("(MIT OR ISC) AND (GPL-2.0-only OR LGPL-2.1-only)"));
    }

    #[test]
    fn exception_on_another_licence_is_not_allowed_with_it() {
        assert!(!satisfiable("MIT WITH LLVM-exception"));
    }

    #[test]
    fn broken_expressions_and_unknown_names_are_refused() {
        for text in
            ["", "MIT OR", "(MIT", "MIT)", "MIT ISC", "AND", "MIT WITH", "Apache 2.0", "LicenseRef-ours"]
        {
            assert!(!satisfiable(text), "{text}");
        }
    }

    #[test]
    fn cargo_deny_has_the_same_list() {
        let deny = include_str!("../../deny.toml");
        let list = deny.split_once("\nallow = [").unwrap().1.split_once("\n]").unwrap().0;
        let names: Vec<&str> = list.lines().map(|line| line.trim_matches([' ', '"', ','])).collect();
        assert_eq!(names[1..], ALLOWED);
    }
}
