//! A file on its way: it grows under a temporary name in the folder that it is to appear in, and gets its name when it
//! is complete and on the disk. Dropped before that, it is removed.
//!
//! It may keep the head of the file that it replaces: what stands before the offset of a machine in a container.

use std::{
    error::Error,
    ffi::{OsStr, OsString},
    fs::{self, File, Metadata},
    io::{self, Read},
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, StatxAttributes, StatxFlags, fstatvfs, statx},
    io::Errno,
    process::geteuid,
    thread::{CapabilitySet, capabilities},
};
use tempfile::{NamedTempFile, TempPath};

use crate::{file_address::other_kind, identity::Identity, output::outcome::While};

/// A file that holds nothing valid yet.
pub(crate) struct NewFile {
    temporary: NamedTempFile,
    /// Opened first: one that cannot be is not to be found out when everything has come.
    folder: File,
    target: PathBuf,
    replaces: Replaces,
}

/// What may be at the target's place when the file gets its name.
enum Replaces {
    Nothing,
    Anything,
    /// The file whose head was copied, as it was.
    This(Identity),
}

impl NewFile {
    /// A temporary file beside `target`, readable by its owner alone. Its first `keep` bytes are those of the file that
    /// is there, or zero. What would be lost is replaced only with `force`.
    ///
    /// Whatever would keep the file from its name is looked for now, and not found out when everything has come.
    pub(crate) fn create(target: &Path, keep: u64, force: bool) -> Result<Self, While> {
        Self::beside(target, keep, force)
            .map_err(|error| While::new(format!("cannot create {}", target.display()), error))
    }

    fn beside(target: &Path, keep: u64, force: bool) -> Result<Self, Cause> {
        // A container is replaced where it lies; otherwise it is the name that is asked for.
        let resolved = if keep > 0 { fs::canonicalize(target).ok() } else { None };
        let target = resolved.as_deref().unwrap_or(target);
        let found = match target.symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            found => Some(found?),
        };
        let path = target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let unusable = |error| While::new(format!("cannot open folder {}", path.display()), error);
        let folder = File::open(path).map_err(unusable)?;
        if let Some(found) = &found {
            check(found, keep, force)?;
            replaceable(target, found, &folder.metadata()?)?;
        }
        let name = target.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::IsADirectory))?;
        let mut temporary = named_beside(path, name, &folder)?;
        let replaces = match found {
            Some(_) if keep > 0 => {
                let container = File::open(target)?;
                let identity = Identity::of(&container.metadata()?);
                io::copy(&mut container.take(keep), temporary.as_file_mut())?;
                Replaces::This(identity)
            }
            _ if force => Replaces::Anything,
            _ => Replaces::Nothing,
        };
        if keep > 0 {
            // A position that this file system or the limit of this process does not reach.
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

    /// Gives it its name, and makes that durable. What is in it must be on the disk before.
    pub(crate) fn name(self) -> Result<(), While> {
        let Self { temporary, folder, target, replaces } = self;
        let unnamed = |error: io::Error| {
            While::new(format!("cannot rename the temporary file to {}", target.display()), error)
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
        // What failed leaves no file under the name, unless that would leave neither the old one nor the new.
        let left = match replaces {
            Replaces::Nothing if fs::remove_file(&target).is_ok() => "the file was removed again",
            _ => "the file exists, but may be lost in a power failure",
        };
        Err(While::new(format!("cannot sync the folder of {}; {left}", target.display()), error))
    }
}

/// A new file in `path`, which is `folder`: `.NAME.` and something random.
fn named_beside(path: &Path, name: &OsStr, folder: &File) -> Result<NamedTempFile, Cause> {
    let unusable = |error| While::new(format!("cannot create a file in folder {}", path.display()), error);
    let plain = tempfile::Builder::new().prefix(".").tempfile_in(path).map_err(unusable)?;
    let random = plain.path().file_name().unwrap_or_default().to_owned();
    let longest = fstatvfs(folder).map_or(0, |found| found.f_namemax);
    let longest = usize::try_from(longest).ok().filter(|most| *most > 0).unwrap_or(NAME_MAX).min(NAME_MAX);
    let mut hidden = OsString::from(".");
    hidden.push(beginning(name, longest.saturating_sub(random.len() + 1)));
    hidden.push(random);
    // Here a folder shows that takes files and does not let them be renamed.
    let to = path.join(hidden);
    let renamed = plain.persist_noclobber(&to);
    let file = renamed.map_err(|error| {
        While::new(format!("cannot rename a file in folder {}", path.display()), error.error)
    })?;
    Ok(NamedTempFile::from_parts(file, TempPath::try_from_path(to)?))
}

/// As much of a name as has room in `most` bytes, cut between two letters.
fn beginning(name: &OsStr, most: usize) -> &OsStr {
    let bytes = name.as_bytes();
    if bytes.len() <= most {
        return name;
    }
    let is_inner = |at: usize| name.to_str().is_some_and(|text| !text.is_char_boundary(at));
    let end = (0..=most).rev().find(|at| !is_inner(*at)).unwrap_or_default();
    OsStr::from_bytes(&bytes[..end])
}

/// Refuses to lose what is in the target's place.
fn check(found: &Metadata, keep: u64, force: bool) -> io::Result<()> {
    let refused = |why: String| Err(io::Error::new(io::ErrorKind::AlreadyExists, why));
    if let Some(kind) = other_kind(found) {
        return refused(format!("it exists and is not a regular file: it is {kind}"));
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

/// Refuses a file that no other can take the place of: one that is marked so, one that a file system is mounted on (a single
/// file that a container was given), and, in a folder like /tmp, another user's.
fn replaceable(target: &Path, found: &Metadata, folder: &Metadata) -> io::Result<()> {
    let refused = |why: &str| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    // A system that does not tell these attributes finds them out at the end.
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
/// Bytes of a name, at most.
const NAME_MAX: usize = 255;
/// Less than any machine takes: its RAM begins on a border of this size.
const LEAST: u64 = 1 << 20;

/// Whether a folder is as durable as its file system makes it: one that knows no sync of folders says so.
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
