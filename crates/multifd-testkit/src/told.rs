//! An error as a person is told of it.

use std::{error::Error, fmt::Write};

/// The text of an error and of its causes, in a line.
pub fn told(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}
