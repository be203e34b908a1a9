//! The project's own Rust sources, for the checks that read them.

use std::fs;
use std::path::{Path, PathBuf};

use crate::{Failure, workspace_root};

/// A source file.
pub(crate) struct Source {
    /// Its path relative to the workspace root, with `/` between the parts.
    pub(crate) path: String,
    /// Its text.
    pub(crate) text: String,
}

/// All `.rs` files of the packages, sorted by path.
///
/// # Errors
///
/// When a folder or file cannot be read.
pub(crate) fn all() -> Result<Vec<Source>, Failure> {
    let root = workspace_root();
    let mut paths = Vec::new();
    for folder in ["crates", "examples", "xtask", "fuzz"] {
        let folder = root.join(folder);
        if folder.exists() {
            collect(&folder, &mut paths)?;
        }
    }
    paths.sort();
    paths.iter().map(|path| read(&root, path)).collect()
}

fn collect(folder: &Path, into: &mut Vec<PathBuf>) -> Result<(), Failure> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            if entry.file_name() != "target" {
                collect(&path, into)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
    Ok(())
}

fn read(root: &Path, path: &Path) -> Result<Source, Failure> {
    let text = fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    let below = path.strip_prefix(root)?;
    Ok(Source { path: below.to_string_lossy().into_owned(), text })
}
