//! Files and folders under temporary names: their owner holds a lock, so that what a killed process has left is distinguished from
//! what is in use, and removed.

use std::{
    ffi::OsStr,
    fs::{self, File, Metadata},
    io,
    os::unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    path::Path,
};

use rustix::fs::{FlockOperation, OFlags, flock};

/// The number of random letters at the end of a temporary name.
pub(crate) const RANDOM: usize = 6;

/// Locks something of this process until `file` is closed. A file system without locks keeps what is left.
pub(crate) fn lock(file: &File) {
    let locked = flock(file, FlockOperation::NonBlockingLockExclusive);
    let _ =
        locked.inspect_err(|error| tracing::debug!(%error, "a temporary file or folder cannot be locked"));
}

/// Calls `remove` with each entry of `parent` that a killed process has left: its name is `prefix` and random letters, it can be
/// opened with these flags, `is_ours`, and nobody has locked it. What cannot be removed stays.
pub(crate) fn sweep(
    parent: &Path,
    prefix: &OsStr,
    flags: OFlags,
    is_ours: impl Fn(&Metadata) -> bool,
    remove: impl Fn(&Path) -> io::Result<()>,
) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let (name, path) = (entry.file_name(), entry.path());
        let rest = name.as_bytes().strip_prefix(prefix.as_bytes());
        if rest.is_none_or(|rest| rest.len() != RANDOM) {
            continue;
        }
        let flags = (OFlags::NOFOLLOW | flags).bits().cast_signed();
        let Ok(file) = File::options().read(true).custom_flags(flags).open(&path) else { continue };
        if file.metadata().is_ok_and(|found| is_ours(&found))
            && flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            let removed = remove(&path);
            let _ =
                removed.inspect_err(|error| tracing::debug!(%error, "what a killed process has left stays"));
        }
    }
}
