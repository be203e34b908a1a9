//! The machine that a delta is compared with while it is written.

use std::{
    ffi::OsString,
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use multifd::{
    Error, Result,
    ram::{Digest, LogMark, RamBlocks, Unwritten},
};

use super::{BaseName, ReadPath, StoredMachine, chain::named};
use crate::error::Usage;

/// A machine that was captured before, and that a delta is compared with.
#[derive(Clone, Debug)]
pub struct Base {
    name: BaseName,
    blocks: Arc<RamBlocks>,
    /// Device and inode of each file.
    files: Arc<[(u64, u64)]>,
    mark: Option<LogMark>,
}

/// What a complete [`Capture`](super::Capture) has captured: the base of the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Captured {
    /// What identifies the file.
    pub root: Digest,
    /// The state of the dirty log that is in the file, if the log is [kept](multifd::ram::KeptLog).
    pub mark: Option<LogMark>,
}

impl Base {
    /// Makes a base of `machine`. `path` is that of its newest file, relative to the folder of the delta; [`relative`](Self::relative)
    /// finds it.
    ///
    /// # Errors
    /// If the machine has no digests, or has the greatest number of files; if its bitmaps cannot be
    /// read.
    pub fn new(machine: &StoredMachine, path: impl Into<PathBuf>) -> Result<Self> {
        let refused = |why: &str| {
            let error = Usage::Value { what: "base", why: why.to_owned() };
            Err(Error::other("use it as a base", error))
        };
        let Some(root) = machine.root().filter(|_| machine.has_digests()) else {
            return refused("it has no digests: add them first");
        };
        if machine.files().len() >= StoredMachine::MOST_FILES {
            return refused(
                "it has the greatest number of files, and a delta would be one more: merge some of them first",
            );
        }
        let name = BaseName { root, path: path.into(), offset: machine.newest().offset() };
        let files =
            machine.files().iter().map(|file| file.file().metadata().map(|found| (found.dev(), found.ino())));
        let files = files.collect::<io::Result<_>>().map_err(|error| Error::io("use it as a base", error))?;
        let blocks = Arc::new(machine.ram_blocks(|_, _| ReadPath::Cached)?);
        Ok(Self { name, blocks, files, mark: None })
    }

    /// Reads only what the dirty log has found since the base was captured. `captured` is what that capture has returned.
    ///
    /// # Errors
    /// If this machine is not what was captured, or the log was not kept.
    pub fn with_log(mut self, captured: &Captured) -> Result<Self> {
        let refused = |why: String| Err(Error::other("use it as a base", Usage::Value { what: "base", why }));
        if captured.root != self.name.root {
            return refused(format!(
                "its root is {}, but that of the capture that the dirty log continues is {}",
                self.name.root, captured.root
            ));
        }
        if captured.mark.is_none() {
            return refused("it was captured without a dirty log that is kept (KeptLog)".into());
        }
        self.mark = captured.mark;
        Ok(self)
    }

    /// The path of the file at `base` from the folder of a file at `delta`, which need not exist.
    ///
    /// # Errors
    /// If one of the folders does not exist.
    pub fn relative(delta: &Path, base: &Path) -> io::Result<PathBuf> {
        let folder_of = |path: &Path| {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            folder.unwrap_or(Path::new(".")).canonicalize()
        };
        let name = base.file_name().map(OsString::from).ok_or(io::ErrorKind::IsADirectory)?;
        let (from, to) = (folder_of(delta)?, folder_of(base)?);
        let common = from.components().zip(to.components()).take_while(|(one, other)| one == other).count();
        let up = from.components().skip(common).map(|_| "..".into());
        let down = to.components().skip(common).map(|part| part.as_os_str().to_owned());
        Ok(up.chain(down).chain([name]).collect())
    }

    /// The name that the delta has for it.
    pub fn name(&self) -> &BaseName {
        &self.name
    }

    /// Whether a file is one of its files, so that writing a delta there would destroy the base.
    ///
    /// # Errors
    /// If the system cannot report this.
    pub fn has(&self, file: &File) -> io::Result<bool> {
        let found = file.metadata()?;
        Ok(self.files.contains(&(found.dev(), found.ino())))
    }

    pub(super) fn check_beside(&self, file: &File) -> Result<(), Usage> {
        match self.has(file) {
            Ok(false) => Ok(()),
            _ => {
                let why = format!("it would overwrite its base {:?}", named(&self.name.path));
                Err(Usage::Value { what: "file", why })
            }
        }
    }

    pub(super) fn blocks(&self) -> &Arc<RamBlocks> {
        &self.blocks
    }

    pub(super) fn mark(&self) -> Option<LogMark> {
        self.mark
    }

    pub(super) fn unwritten(&self) -> Unwritten {
        if self.mark.is_some() { Unwritten::AsBase } else { Unwritten::Zero }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_of_the_base_is_relative_to_the_folder_of_the_delta() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path();
        std::fs::create_dir_all(path.join("a/b")).expect("made");
        std::fs::create_dir_all(path.join("c")).expect("made");
        let relative =
            |delta: &str, base: &str| Base::relative(&path.join(delta), &path.join(base)).expect("folders");
        assert_eq!(relative("night", "base"), Path::new("base"));
        assert_eq!(relative("a/b/night", "c/base"), Path::new("../../c/base"));
        assert_eq!(relative("night", "a/b/base"), Path::new("a/b/base"));
        assert!(Base::relative(&path.join("none/x"), &path.join("base")).is_err());
    }
}
