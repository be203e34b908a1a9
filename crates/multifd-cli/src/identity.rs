//! The identity of a file: checks from its metadata whether it is still the same file.

use std::{fs::Metadata, os::unix::fs::MetadataExt};

/// The metadata that shows whether a file was replaced or written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    device: u64,
    inode: u64,
    length: u64,
    modified: (i64, i64),
    /// The time of the last change of the file or its metadata. A program can set the other time, but not this one.
    changed: (i64, i64),
}

impl Identity {
    pub(crate) fn of(found: &Metadata) -> Self {
        Self {
            device: found.dev(),
            inode: found.ino(),
            length: found.len(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        }
    }
}
