//! The file while it grows. It has no name if the file system can do that, so that nothing can be left behind.
//!
//! ```text
//! new file      O_TMPFILE ─────────────────────── grows ─▶ linkat ─▶ NAME
//!   (cannot)    .NAME.multifd-xxxxxx, locked ──── grows ─▶ rename ─▶ NAME
//! replaced file .NAME.multifd-xxxxxx, locked ──── grows ─▶ rename over NAME
//! ```
//!
//! A named one whose process was killed stays. The next process that writes to the same NAME removes it: the lock shows that
//! its owner is dead.

use std::{
    error::Error,
    ffi::{OsStr, OsString},
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::{
            ffi::OsStrExt,
            fs::{MetadataExt, OpenOptionsExt},
        },
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, fstatvfs, linkat, openat},
    io::Errno,
    process::geteuid,
};
use tempfile::{NamedTempFile, TempPath};

use crate::{
    leftovers::{self, RANDOM},
    output::{outcome::While, outlet::shown},
};

/// A file without its final name.
pub(super) enum Growing {
    Unnamed(File),
    Named(NamedTempFile),
}

impl Growing {
    /// Creates a file in `path`, which is `folder`, for the name `name`. If it will replace another file, it must have a name.
    pub(super) fn create(path: &Path, name: &OsStr, folder: &File, replaces: bool) -> Result<Self, Cause> {
        let hidden = hidden(name, folder);
        sweep(path, &hidden);
        if !replaces && let Some(file) = unnamed(folder).map_err(|error| cannot_create(path, error))? {
            return Ok(Self::Unnamed(file));
        }
        named(path, &hidden).map(Self::Named)
    }

    pub(super) fn file(&self) -> &File {
        match self {
            Self::Unnamed(file) => file,
            Self::Named(file) => file.as_file(),
        }
    }

    /// Gives the file its name, which no other file has.
    pub(super) fn name(self, target: &Path) -> io::Result<()> {
        match self {
            Self::Unnamed(file) => {
                linkat(CWD, descriptor(&file), CWD, target, AtFlags::SYMLINK_FOLLOW).map_err(io::Error::from)
            }
            Self::Named(file) => drop_file(file.persist_noclobber(target)),
        }
    }

    /// Gives the file its name, and removes the file that has it.
    pub(super) fn replace(self, target: &Path) -> io::Result<()> {
        match self {
            Self::Unnamed(_) => Err(io::Error::other("a file without a name replaces nothing")),
            Self::Named(file) => drop_file(file.persist(target)),
        }
    }
}

fn drop_file(named: Result<File, tempfile::PersistError>) -> io::Result<()> {
    named.map(drop).map_err(|error| error.error)
}

fn cannot_create(path: &Path, error: io::Error) -> While {
    While::new(format!("cannot create a file in folder {}", shown(path)), error)
}

/// A file without a name; `None` if the file system has no such files, or they could not get a name later.
fn unnamed(folder: &File) -> io::Result<Option<File>> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match openat(folder, ".", flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => {
            let file = File::from(file);
            Ok(fs::metadata(descriptor(&file)).is_ok().then_some(file))
        }
        // Of the file system, or of a system that does not know the flag.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn descriptor(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// The beginning of the temporary names for `name`.
fn hidden(name: &OsStr, folder: &File) -> OsString {
    let longest = fstatvfs(folder).map_or(0, |found| found.f_namemax);
    let longest = usize::try_from(longest).ok().filter(|most| *most > 0).unwrap_or(NAME_MAX).min(NAME_MAX);
    let mut hidden = OsString::from(".");
    hidden.push(beginning(name, longest.saturating_sub(1 + MARK.len() + RANDOM)));
    hidden.push(MARK);
    hidden
}

/// Removes files of earlier processes that were killed.
fn sweep(path: &Path, hidden: &OsStr) {
    let is_own = |found: &fs::Metadata| found.is_file() && found.uid() == geteuid().as_raw();
    leftovers::sweep(path, hidden, OFlags::NONBLOCK, is_own, |path| {
        fs::remove_file(path)?;
        tracing::warn!("removed {}, which a killed process has left", shown(path));
        Ok(())
    });
}

/// Creates a new, locked file in `path`. Its name is `hidden` and a random part.
fn named(path: &Path, hidden: &OsStr) -> Result<NamedTempFile, Cause> {
    // Made with our own `open`: the errors of `tempfile_in` contain the temporary name, which a user does not know.
    let create =
        |path: &Path| OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
    let plain = tempfile::Builder::new()
        .prefix(".")
        .rand_bytes(RANDOM)
        .make_in(path, create)
        .map_err(|error| cannot_create(path, error))?;
    // Before it has the name by which it would be swept.
    leftovers::lock(plain.as_file());
    let random = plain.path().file_name().map(|name| name.as_bytes()[1..].to_owned()).unwrap_or_default();
    let mut whole = hidden.to_owned();
    whole.push(OsStr::from_bytes(&random));
    // This detects a folder that accepts files but does not allow renaming them.
    let to = path.join(whole);
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

type Cause = Box<dyn Error + Send + Sync>;

/// What marks a temporary name, before its random part.
const MARK: &str = ".multifd-";
/// The greatest length of a name in bytes.
const NAME_MAX: usize = 255;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_name_is_cut_between_two_letters() {
        assert_eq!(beginning(OsStr::new("machine"), 7), "machine");
        assert_eq!(beginning(OsStr::new("machine"), 4), "mach");
        assert_eq!(beginning(OsStr::new("aéé"), 4), "aé");
        assert_eq!(beginning(OsStr::from_bytes(b"\xff\xff\xff"), 2), OsStr::from_bytes(b"\xff\xff"));
        assert_eq!(beginning(OsStr::new("é"), 1), "");
    }

    #[test]
    fn file_of_a_living_owner_and_files_of_others_are_not_swept() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path();
        let names = || {
            let mut names: Vec<_> =
                fs::read_dir(path).expect("read").map(|entry| entry.expect("read").file_name()).collect();
            names.sort();
            names
        };
        for other in [".vm.multifd-toolong", ".vm.multifd-ab", ".vm2.multifd-abcdef", "vm.multifd-abcdef"] {
            fs::write(path.join(other), "").expect("written");
        }
        let hidden = hidden(OsStr::new("vm"), &File::open(path).expect("opened"));
        let living = named(path, &hidden).expect("created");
        fs::write(path.join(".vm.multifd-abcdef"), "").expect("written");
        sweep(path, &hidden);
        assert_eq!(names().len(), 5, "{:?}", names());
        assert!(living.path().exists());
        drop(living);
        assert_eq!(names().len(), 4);
    }

    #[test]
    fn file_without_a_name_gets_one_that_is_free() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, target) = (folder.path(), folder.path().join("vm"));
        let open = File::open(path).expect("opened");
        let grow = || Growing::create(path, OsStr::new("vm"), &open, false).expect("created");
        let (first, second) = (grow(), grow());
        if let Growing::Unnamed(_) = first {
            assert_eq!(fs::read_dir(path).expect("read").count(), 0);
        }
        fs::write(descriptor(first.file()), "first").expect("written");
        first.name(&target).expect("named");
        let error = second.name(&target).expect_err("the name is taken");
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&target).expect("read"), b"first");
        assert_eq!(fs::read_dir(path).expect("read").count(), 1);
    }
}
