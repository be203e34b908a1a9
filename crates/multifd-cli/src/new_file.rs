//! A file that is being written: it grows under a temporary name in its future folder, and gets its name when it is
//! complete and on the disk. If it is dropped before that, it is removed.
//!
//! It may keep the head of the file that it replaces: the data before the offset of a machine in a container.

use std::{
    error::Error,
    ffi::{OsStr, OsString},
    fs::{self, File, Metadata, OpenOptions},
    io::{self, Read},
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use multifd::ram::kind_of_file;
use rustix::{
    fs::{AtFlags, CWD, StatxAttributes, StatxFlags, fstatvfs, statx},
    io::Errno,
    process::geteuid,
    thread::{CapabilitySet, capabilities},
};
use tempfile::{NamedTempFile, TempPath};

use crate::{
    file_address::open_regular,
    identity::Identity,
    output::{outcome::While, outlet::shown},
};

/// A file that contains nothing valid yet.
pub(crate) struct NewFile {
    temporary: NamedTempFile,
    /// Opened first: a folder that cannot be opened must be reported before everything has arrived.
    folder: File,
    target: PathBuf,
    replaces: Replaces,
}

/// What may be at the target's path when the file gets its name.
enum Replaces {
    Nothing,
    Anything,
    /// The file whose head was copied, unchanged.
    This(Identity),
}

impl NewFile {
    /// Creates a temporary file next to `target`, readable only by its owner. Its first `keep` bytes are those of the
    /// existing file, or zero. Data that would be lost is replaced only with `force`.
    ///
    /// Everything that would prevent the file from getting its name is checked now, not after everything has arrived.
    pub(crate) fn create(target: &Path, keep: u64, force: bool) -> Result<Self, While> {
        Self::beside(target, keep, force)
            .map_err(|error| While::new(format!("cannot create {}", shown(target)), error))
    }

    fn beside(target: &Path, keep: u64, force: bool) -> Result<Self, Cause> {
        // A container is replaced at its real path; otherwise the given name is used.
        let resolved = if keep > 0 { fs::canonicalize(target).ok() } else { None };
        let target = resolved.as_deref().unwrap_or(target);
        let found = match target.symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            found => Some(found?),
        };
        let path = target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let unusable = |error| While::new(format!("cannot open folder {}", shown(path)), error);
        // A folder and nothing else: to open a FIFO would wait for a writer.
        let folder =
            File::options().read(true).custom_flags(libc::O_DIRECTORY).open(path).map_err(unusable)?;
        if let Some(found) = &found {
            check(found, keep, force)?;
            replaceable(target, found, &folder.metadata()?)?;
        }
        let name = target.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::IsADirectory))?;
        let mut temporary = named_beside(path, name, &folder)?;
        let replaces = match found {
            Some(_) if keep > 0 => {
                let container = open_regular(target)?;
                let identity = Identity::of(&container.metadata()?);
                io::copy(&mut container.take(keep), temporary.as_file_mut())?;
                Replaces::This(identity)
            }
            _ if force => Replaces::Anything,
            _ => Replaces::Nothing,
        };
        if keep > 0 {
            // The position may be beyond the limit of this file system or of this process.
            let file = temporary.as_file();
            file.set_len(keep.saturating_add(LEAST)).and_then(|()| file.set_len(keep)).map_err(|error| {
                While::new(format!("offset {keep:#x} leaves no room for a guest in this file"), error)
            })?;
        }
        Ok(Self { temporary, folder, target: target.to_owned(), replaces })
    }

    pub(crate) fn file(&self) -> &File {
        self.temporary.as_file()
    }

    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// Gives the file its name, and makes the name durable. The contents must be on the disk before.
    pub(crate) fn name(self) -> Result<(), While> {
        let Self { temporary, folder, target, replaces } = self;
        let unnamed = |error: io::Error| {
            While::new(format!("cannot rename the temporary file to {}", shown(&target)), error)
        };
        let named = match &replaces {
            Replaces::Nothing => temporary.persist_noclobber(&target),
            Replaces::Anything => temporary.persist(&target),
            Replaces::This(identity) => {
                let found = target.symlink_metadata().map_err(unnamed)?;
                if Identity::of(&found) != *identity {
                    return Err(unnamed(io::Error::other(
                        "another program changed the file during the migration",
                    )));
                }
                temporary.persist(&target)
            }
        };
        named.map_err(|error| unnamed(error.error))?;
        let Err(error) = durable(folder.sync_all()) else { return Ok(()) };
        // After a failure no file remains under the name, unless that would leave neither the old file nor the new one.
        let left = match replaces {
            Replaces::Nothing if fs::remove_file(&target).is_ok() => "the file was removed again",
            _ => "the file exists, but may be lost in a power failure",
        };
        Err(While::new(format!("cannot sync the folder of {}; {left}", shown(&target)), error))
    }
}

/// Creates a new file in `path`, which is `folder`. Its name is `.NAME.` and a random part.
fn named_beside(path: &Path, name: &OsStr, folder: &File) -> Result<NamedTempFile, Cause> {
    let unusable = |error| While::new(format!("cannot create a file in folder {}", shown(path)), error);
    // Made with our own `open`: the errors of `tempfile_in` contain the temporary name, which a user does not know.
    let create =
        |path: &Path| OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
    let plain = tempfile::Builder::new().prefix(".").make_in(path, create).map_err(unusable)?;
    let random = plain.path().file_name().unwrap_or_default().to_owned();
    let longest = fstatvfs(folder).map_or(0, |found| found.f_namemax);
    let longest = usize::try_from(longest).ok().filter(|most| *most > 0).unwrap_or(NAME_MAX).min(NAME_MAX);
    let mut hidden = OsString::from(".");
    hidden.push(beginning(name, longest.saturating_sub(random.len() + 1)));
    hidden.push(random);
    // This detects a folder that accepts files but does not allow renaming them.
    let to = path.join(hidden);
    let renamed = plain.persist_noclobber(&to);
    let file = renamed.map_err(|error| {
        While::new(format!("cannot rename a file in folder {}", shown(path)), error.error)
    })?;
    Ok(NamedTempFile::from_parts(file, TempPath::try_from_path(to)?))
}

/// The beginning of a name that fits into `most` bytes, cut between two letters.
fn beginning(name: &OsStr, most: usize) -> &OsStr {
    let bytes = name.as_bytes();
    if bytes.len() <= most {
        return name;
    }
    let is_inner = |at: usize| name.to_str().is_some_and(|text| !text.is_char_boundary(at));
    let end = (0..=most).rev().find(|at| !is_inner(*at)).unwrap_or_default();
    OsStr::from_bytes(&bytes[..end])
}

/// Refuses to lose data at the target's path.
fn check(found: &Metadata, keep: u64, force: bool) -> io::Result<()> {
    let refused = |why: String| Err(io::Error::new(io::ErrorKind::AlreadyExists, why));
    if !found.is_file() {
        let kind = kind_of_file(found);
        return refused(format!(
            "it exists and is not a regular file: it is {kind}; use the path of a new file"
        ));
    }
    if !force && keep == 0 {
        return refused("it exists; use --force to replace it".into());
    }
    let lost = found.len().saturating_sub(keep);
    if !force && keep > 0 && lost > 0 {
        let why = format!("the file has {lost:#x} bytes after offset {keep:#x}; use --force to replace them");
        return refused(why);
    }
    Ok(())
}

/// Refuses a file that cannot be replaced: one with such an attribute, one that is a mount point (a single file that a
/// container was given), and, in a folder like /tmp, another user's.
fn replaceable(target: &Path, found: &Metadata, folder: &Metadata) -> io::Result<()> {
    let refused = |why: &str| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    // On a system that does not report these attributes, the error occurs at the end.
    let attributes = statx(CWD, target, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty())
        .map_or(StatxAttributes::empty(), |found| found.stx_attributes);
    if attributes.contains(StatxAttributes::MOUNT_ROOT) {
        return refused("it is a mount point and cannot be replaced; use another file name");
    }
    if attributes.intersects(StatxAttributes::IMMUTABLE | StatxAttributes::APPEND) {
        return refused("it is immutable or append-only (chattr +i, +a), so it cannot be replaced");
    }
    let mine = |uid| uid == geteuid().as_raw();
    let may_all = || capabilities(None).is_ok_and(|held| held.effective.contains(CapabilitySet::FOWNER));
    if folder.mode() & STICKY != 0 && !mine(found.uid()) && !mine(folder.uid()) && !may_all() {
        return refused(
            "it belongs to another user; the folder has the sticky bit, so only that user can replace it",
        );
    }
    Ok(())
}

type Cause = Box<dyn Error + Send + Sync>;

const STICKY: u32 = 0o1000;
/// The greatest length of a name in bytes.
const NAME_MAX: usize = 255;
/// Less than any machine needs: its RAM begins on a boundary of this size.
const LEAST: u64 = 1 << 20;

/// Checks that a folder was made durable. A file system without sync of folders reports that, and it counts as durable.
fn durable(synced: io::Result<()>) -> io::Result<()> {
    match synced {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_system_without_sync_of_folders_is_no_error() {
        assert!(durable(Err(Errno::INVAL.into())).is_ok());
        assert!(durable(Err(Errno::IO.into())).is_err());
    }

    #[test]
    fn long_name_is_cut_between_two_letters() {
        assert_eq!(beginning(OsStr::new("machine"), 7), "machine");
        assert_eq!(beginning(OsStr::new("machine"), 4), "mach");
        assert_eq!(beginning(OsStr::new("aéé"), 4), "aé");
        assert_eq!(beginning(OsStr::from_bytes(b"\xff\xff\xff"), 2), OsStr::from_bytes(b"\xff\xff"));
        assert_eq!(beginning(OsStr::new("é"), 1), "");
    }
}
