//! A number that the user of a test may set.

use std::env;

/// The number in an environment variable; `None` if it is not set.
///
/// # Panics
/// If it is something else.
pub fn number(variable: &str) -> Option<u64> {
    let text = env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}: expected a number, found {text:?}")))
}
