//! Opens a machine in a file, or in a delta and its bases.
//!
//! ```text
//! delta ── root, path ──▶ found by the caller, or beside the delta ── the same root? ──▶ next base … a whole machine
//! ```
//!
//! Every file but the last is a delta. A file that is named twice, more than [`MOST_FILES`] files, a base with another root,
//! and one with pages of another size are refused, with both names.

use std::{
    fs::{File, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use multifd::{error::UntrustedText, ram::open_regular};

use super::{BaseName, ChainFile, StoredMachine, machine::MOST_FILES};
use crate::error::{BadBase, Error, Place, StreamKind};

/// A file in which a machine begins at `offset`.
#[derive(Debug)]
pub struct FoundFile {
    /// The file, open for reading.
    pub file: File,
    /// Where the machine begins in it, in bytes.
    pub offset: u64,
    /// Its path, for errors; may be empty.
    pub path: PathBuf,
}

impl FoundFile {
    /// Opens a regular file.
    ///
    /// # Errors
    /// The system's, or that it is not a regular file.
    pub fn open(path: &Path, offset: u64) -> io::Result<Self> {
        let file = open_regular(path, |_| "")?;
        Ok(Self { file, offset, path: path.to_owned() })
    }

    /// Opens the base of the delta at `delta`, at its path.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn beside(delta: &Path, base: &BaseName) -> io::Result<Self> {
        let folder = delta.parent().unwrap_or(Path::new(""));
        Self::open(&folder.join(&base.path), base.offset)
    }
}

/// How much of a file is checked when it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Digests {
    /// Everything but the pages is compared with its digest now, and each page when it is read.
    Compare,
    /// Nothing is compared: for a file that is known to be damaged, to save what can be read. Bases must be the right ones.
    Ignore,
}

impl StoredMachine {
    /// Opens the machine at a path: a whole machine, or a delta whose bases are where their deltas name them.
    ///
    /// # Errors
    /// As [`open_with`](Self::open_with); the system's error if it cannot be opened.
    pub fn open(path: &Path, offset: u64) -> Result<Self, Error> {
        let at = Place { stream: StreamKind::File, offset };
        let found = FoundFile::open(path, offset);
        let found = found.map_err(|source| Error::Io { at, doing: "open it", source })?;
        Self::open_with(found, Digests::Compare, |delta, base| FoundFile::beside(delta.path(), base))
    }

    /// Opens the machine in `newest`. If it is a delta, `find` gives its base, and so on up to a whole machine.
    ///
    /// # Errors
    /// If a file is not a mapped-ram file, incomplete, hostile, damaged, or the system cannot read it; [`Error::Base`] if a
    /// base is not what its delta names.
    pub fn open_with(
        newest: FoundFile,
        digests: Digests,
        mut find: impl FnMut(&ChainFile, &BaseName) -> io::Result<FoundFile>,
    ) -> Result<Self, Error> {
        let FoundFile { file, offset, path } = newest;
        let identity = |file: &File| file.metadata().map(|found| Identity::of(&found, 0));
        let mut known = vec![identity(&file).map_err(|source| unread(source, offset))?.at(offset)];
        let mut files = vec![match digests {
            Digests::Compare => ChainFile::read(file, offset, &path)?,
            Digests::Ignore => ChainFile::read_damaged(file, offset, &path)?,
        }];
        while let Some(delta) = files.last()
            && let Some(base) = delta.base()
        {
            let refused =
                |why| Error::Base { of: named(delta.path()), base: named(&base.path), why: Box::new(why) };
            if files.len() == MOST_FILES {
                return Err(refused(BadBase::TooMany(MOST_FILES)));
            }
            let FoundFile { file, offset, path } =
                find(delta, base).map_err(|error| refused(BadBase::Unreadable(error)))?;
            let found = identity(&file).map_err(|source| unread(source, offset))?.at(offset);
            if known.contains(&found) {
                return Err(refused(BadBase::Loop));
            }
            known.push(found);
            let read = match digests {
                Digests::Compare => ChainFile::read(file, offset, &path),
                Digests::Ignore => ChainFile::read_damaged_base(file, offset, &path),
            };
            let read = read.map_err(|error| {
                refused(BadBase::Invalid { fault: error.fault(), source: Box::new(error) })
            })?;
            match read.root() {
                None => return Err(refused(BadBase::NoDigests)),
                Some(found) if found != base.root => {
                    return Err(refused(BadBase::Other { expected: base.root, found }));
                }
                Some(_) => {}
            }
            let (expected, found) = (delta.blocks().page_size(), read.blocks().page_size());
            if expected != found {
                return Err(refused(BadBase::Pages { expected, found }));
            }
            files.push(read);
        }
        Ok(Self::of(files))
    }
}

/// Which file it is, by any path.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    offset: u64,
}

impl Identity {
    fn of(found: &Metadata, offset: u64) -> Self {
        Self { device: found.dev(), inode: found.ino(), offset }
    }

    fn at(self, offset: u64) -> Self {
        Self { offset, ..self }
    }
}

fn unread(source: io::Error, offset: u64) -> Error {
    let at = Place { stream: StreamKind::File, offset };
    Error::Io { at, doing: "find its identity", source }
}

pub(super) fn named(path: &Path) -> UntrustedText {
    UntrustedText::from_bytes(path.as_os_str().as_encoded_bytes())
}
