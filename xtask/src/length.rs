//! Limits the length of files to what a reader can take in: 800 lines with tests, 400 lines of code without them.
//!
//! Blank lines and comments are not code: a file must not get shorter by having fewer comments.

use crate::Failure;
use crate::sources::{self, Source};

/// Checks every source file.
///
/// # Errors
///
/// Names each file that is too long.
pub(crate) fn check() -> Result<(), Failure> {
    let complaints: Vec<String> = sources::all()?.iter().filter_map(complaint).collect();
    if complaints.is_empty() { Ok(()) } else { Err(complaints.join("\n").into()) }
}

fn complaint(source: &Source) -> Option<String> {
    let lines = source.text.lines().count();
    let code = lines_of_code(&source.text);
    let is_test = source.path.contains("/tests/") || source.path.ends_with("/tests.rs");
    if lines > MOST_LINES {
        Some(format!("{}: expected at most {MOST_LINES} lines, found {lines}", source.path))
    } else if code > MOST_CODE && !is_test {
        Some(format!(
            "{}: expected at most {MOST_CODE} lines of code before the tests, found {code}",
            source.path
        ))
    } else {
        None
    }
}

/// Lines before the file's tests that are neither blank nor only a comment.
fn lines_of_code(text: &str) -> usize {
    text.lines()
        .take_while(|line| *line != "#[cfg(test)]")
        .map(str::trim_start)
        .filter(|line| !line.is_empty() && !line.starts_with("//"))
        .count()
}

const MOST_LINES: usize = 800;
const MOST_CODE: usize = 400;

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: String) -> Source {
        Source { path: path.into(), text }
    }

    #[test]
    fn file_at_the_bound_passes_and_one_past_it_is_named() {
        assert_eq!(complaint(&file("a/src/b.rs", "x;\n".repeat(400))), None);
        let found = complaint(&file("a/src/b.rs", "x;\n".repeat(401)));
        assert_eq!(
            found.unwrap(),
            "a/src/b.rs: expected at most 400 lines of code before the tests, found 401"
        );
    }

    #[test]
    fn comments_blanks_and_tests_are_not_code() {
        let text = "/// doc\n\nx;\n".repeat(100) + "#[cfg(test)]\n" + &"t;\n".repeat(399);
        assert_eq!(lines_of_code(&text), 100);
        assert_eq!(complaint(&file("a/src/b.rs", text)), None);
    }

    #[test]
    fn tests_have_a_bound_too() {
        assert_eq!(complaint(&file("a/tests/it/b.rs", "x;\n".repeat(800))), None);
        assert!(complaint(&file("a/tests/it/b.rs", "x;\n".repeat(801))).is_some());
    }
}
