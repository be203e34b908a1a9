//! One style of module files: a module with children is `x/mod.rs`, never `x.rs` beside a folder `x`.
//!
//! All files of a module are then in one folder, and a search for a file's name finds one place.

use std::collections::BTreeSet;

use crate::Failure;
use crate::sources;

/// Checks every source file.
///
/// # Errors
///
/// Names each file that is a module beside the folder of its children.
pub(crate) fn check() -> Result<(), Failure> {
    let paths: Vec<String> = sources::all()?.into_iter().map(|source| source.path).collect();
    let complaints = complaints(&paths);
    if complaints.is_empty() { Ok(()) } else { Err(complaints.join("\n").into()) }
}

fn complaints(paths: &[String]) -> Vec<String> {
    let folders: BTreeSet<&str> = paths.iter().filter_map(|path| Some(path.rsplit_once('/')?.0)).collect();
    let beside = |path: &&String| path.strip_suffix(".rs").is_some_and(|module| folders.contains(module));
    let complaint = |path: &String| format!("{path}: expected {}/mod.rs", path.trim_end_matches(".rs"));
    paths.iter().filter(beside).map(complaint).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaints_of(paths: &[&str]) -> Vec<String> {
        complaints(&paths.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn module_beside_the_folder_of_its_children_is_named() {
        let found = complaints_of(&["a/src/b.rs", "a/src/b/tests.rs", "a/src/lib.rs"]);
        assert_eq!(found, ["a/src/b.rs: expected a/src/b/mod.rs"]);
    }

    #[test]
    fn folder_with_its_own_module_file_passes_and_so_do_like_names() {
        let paths =
            ["a/src/b/mod.rs", "a/src/b/tests.rs", "a/src/bc.rs", "a/src/c/b.rs", "a/tests/it/main.rs"];
        assert_eq!(complaints_of(&paths), [""; 0]);
    }
}
