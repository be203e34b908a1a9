//! A file on its way: it grows under a temporary name in the folder that it is to appear in, and gets its name when it
//! is complete and on the disk. Dropped before that, it is removed.
//!
//! It may keep the head of the file that it replaces: what stands before the offset of a machine in a container.

use std::{
    fs::{self, File, Metadata},
    io::{self, Read},
    path::{Path, PathBuf},
};

use rustix::io::Errno;
use tempfile::NamedTempFile;

use crate::{identity::Identity, outcome::While};

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
    pub(crate) fn create(target: &Path, keep: u64, force: bool) -> Result<Self, While> {
        Self::beside(target, keep, force)
            .map_err(|error| While::new(format!("cannot create {}", target.display()), error))
    }

    fn beside(target: &Path, keep: u64, force: bool) -> io::Result<Self> {
        // A container is replaced where it lies; otherwise it is the name that is asked for.
        let resolved = if keep > 0 { fs::canonicalize(target).ok() } else { None };
        let target = resolved.as_deref().unwrap_or(target);
        let found = target.symlink_metadata().ok();
        if let Some(found) = &found {
            check(found, keep, force)?;
        }
        let name = target.file_name().ok_or(io::ErrorKind::IsADirectory)?;
        let mut prefix = std::ffi::OsString::from(".");
        prefix.push(name);
        prefix.push(".");
        let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        let mut temporary = tempfile::Builder::new().prefix(&prefix).tempfile_in(folder)?;
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
        let (folder, target) = (File::open(folder)?, target.to_owned());
        Ok(Self { temporary, folder, target, replaces })
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
        let unnamed = |error: io::Error| While::new(format!("cannot name it {}", target.display()), error);
        let named = match &replaces {
            Replaces::Nothing => temporary.persist_noclobber(&target),
            Replaces::Anything => temporary.persist(&target),
            Replaces::This(identity) => {
                let found = target.symlink_metadata().map_err(unnamed)?;
                if Identity::of(&found) != *identity {
                    return Err(unnamed(io::Error::other("another has changed it meanwhile")));
                }
                temporary.persist(&target)
            }
        };
        named.map_err(|error| unnamed(error.error))?;
        let Err(error) = durable(folder.sync_all()) else { return Ok(()) };
        // What failed leaves no file under the name, unless that would leave neither the old one nor the new.
        let left = match replaces {
            Replaces::Nothing if fs::remove_file(&target).is_ok() => "it is removed again",
            _ => "it is there, and may be gone after a power cut",
        };
        Err(While::new(format!("cannot sync the folder of {}: {left}", target.display()), error))
    }
}

/// Refuses to lose what is in the target's place.
fn check(found: &Metadata, keep: u64, force: bool) -> io::Result<()> {
    let refused = |why: String| Err(io::Error::new(io::ErrorKind::AlreadyExists, why));
    if found.is_dir() {
        // Not to be found out when the machine has come and cannot have its name.
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if !force && keep == 0 {
        return refused("it exists; give --force to replace it".into());
    }
    if !found.is_file() && !found.is_symlink() {
        return refused("it exists and is no regular file".into());
    }
    let lost = found.len().saturating_sub(keep);
    if !force && keep > 0 && lost > 0 {
        let why = format!("{lost:#x} bytes stand behind offset {keep:#x}; give --force to replace them");
        return refused(why);
    }
    Ok(())
}

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
}
