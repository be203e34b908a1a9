//! A file that is being written: it grows in its future folder without a name, or under a temporary one, and gets its name
//! when it is complete and on the disk. If it is dropped before that, it is removed. Its name is reserved meanwhile.
//!
//! It may keep the head of the file that it replaces: the data before the offset of a machine in a container.

mod growing;
mod reservation;

use std::{
    error::Error,
    fs::{self, File, Metadata},
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use growing::Growing;

use multifd::ram::kind_of_file;
use reservation::Reservation;
use rustix::{
    fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx},
    io::Errno,
    process::geteuid,
    thread::{CapabilitySet, capabilities},
};

use crate::{
    file_address::open_regular,
    identity::Identity,
    output::{outcome::While, outlet::shown},
};

/// A file that contains nothing valid yet.
pub(crate) struct NewFile {
    growing: Growing,
    /// Opened first: a folder that cannot be opened must be reported before everything has arrived.
    folder: File,
    target: PathBuf,
    replaces: Replaces,
    /// Kept until the file has its name.
    reservation: Reservation,
}

/// What may be at the target's path when the file gets its name.
enum Replaces {
    Nothing,
    Anything,
    /// The file whose head was copied, unchanged.
    This(Identity),
}

impl NewFile {
    /// Creates a file in the folder of `target`, readable only by its owner, and reserves the name. Its first `keep` bytes are those of the
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
        let name = target.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::IsADirectory))?;
        let reservation = Reservation::of(&folder.metadata()?, name)?;
        if let Some(found) = &found {
            check(found, keep, force)?;
            replaceable(target, found, &folder.metadata()?)?;
        }
        let growing = Growing::create(path, name, &folder, force || found.is_some())?;
        let replaces = match found {
            Some(_) if keep > 0 => {
                let container = open_regular(target)?;
                let identity = Identity::of(&container.metadata()?);
                io::copy(&mut container.take(keep), &mut growing.file())?;
                Replaces::This(identity)
            }
            _ if force => Replaces::Anything,
            _ => Replaces::Nothing,
        };
        if keep > 0 {
            // The position may be beyond the limit of this file system or of this process.
            let file = growing.file();
            file.set_len(keep.saturating_add(LEAST)).and_then(|()| file.set_len(keep)).map_err(|error| {
                While::new(format!("offset {keep:#x} leaves no room for a guest in this file"), error)
            })?;
        }
        Ok(Self { growing, folder, target: target.to_owned(), replaces, reservation })
    }

    pub(crate) fn file(&self) -> &File {
        self.growing.file()
    }

    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// Gives the file its name, and makes the name durable. The contents must be on the disk before.
    pub(crate) fn name(self) -> Result<(), While> {
        let Self { growing, folder, target, replaces, reservation: _kept } = self;
        let unnamed =
            |error: io::Error| While::new(format!("cannot give the file its name {}", shown(&target)), error);
        let named = match &replaces {
            Replaces::Nothing => growing.name(&target),
            Replaces::Anything => growing.replace(&target),
            Replaces::This(identity) => {
                let found = target.symlink_metadata().map_err(unnamed)?;
                if Identity::of(&found) != *identity {
                    return Err(unnamed(io::Error::other(
                        "another program changed the file during the migration",
                    )));
                }
                growing.replace(&target)
            }
        };
        named.map_err(unnamed)?;
        let Err(error) = durable(folder.sync_all()) else { return Ok(()) };
        // After a failure no file remains under the name, unless that would leave neither the old file nor the new one.
        let left = match replaces {
            Replaces::Nothing if fs::remove_file(&target).is_ok() => "the file was removed again",
            _ => "the file exists, but may be lost in a power failure",
        };
        Err(While::new(format!("cannot sync the folder of {}; {left}", shown(&target)), error))
    }
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
}
