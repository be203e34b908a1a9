//! Where this program and a QEMU connect to each other: a unix socket in a private folder if both are on one host and may
//! use it, otherwise TCP on the addresses of the QMP connection.

use std::{
    fs::{self, File},
    io,
    net::SocketAddr,
    os::unix::fs::{MetadataExt, chown},
    path::Path,
    time::Duration,
};

use multifd::channel::Address;
use rustix::{fs::OFlags, process::geteuid};
use tempfile::{Builder, TempDir};

use super::{
    address::Host,
    connection::{Qmp, QmpError},
};
use crate::{
    leftovers::{self, RANDOM},
    output::outcome::While,
};

/// An address for one migration. Its folder is removed with it.
#[derive(Debug)]
pub(crate) struct Meeting {
    address: Address,
    folder: Option<PrivateFolder>,
    /// The user that the other process runs as, if it is another one.
    other_user: Option<u32>,
}

/// Which side listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Listens {
    Here,
    Qemu,
}

impl Meeting {
    /// The address at which the QEMU behind `qmp` and this program can meet, or the one that the user has given.
    ///
    /// # Errors
    /// If a folder for the socket cannot be created.
    pub(crate) fn arrange(qmp: &Qmp, listens: Listens, given: Option<&Address>) -> Result<Self, While> {
        let failed = |error: io::Error| While::new("cannot choose an address for the migration", error);
        if let Some(address) = given {
            return Ok(Self { address: address.clone(), folder: None, other_user: None });
        }
        match qmp.host().map_err(failed)? {
            Host::Other { here, there } => {
                let at = if listens == Listens::Here { here } else { there };
                Ok(Self { address: tcp(at), folder: None, other_user: None })
            }
            Host::This { user, folder } => {
                let own = geteuid();
                let same = own.as_raw() == user;
                if !same && !own.is_root() {
                    let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
                    return Ok(Self { address: tcp(loopback), folder: None, other_user: None });
                }
                Self::in_private(&folder, (!same).then_some(user)).map_err(failed)
            }
        }
    }

    /// A socket in a folder that only the other process's user and root can use. The folder of the QMP socket is preferred,
    /// because both processes see it; `/tmp` may be another folder for each.
    fn in_private(beside: &Path, other_user: Option<u32>) -> io::Result<Self> {
        let fits = beside.as_os_str().len() + LONGEST_NAME <= LONGEST_PATH;
        let folder = match fits.then(|| PrivateFolder::in_folder(beside)) {
            Some(Ok(folder)) => folder,
            _ => PrivateFolder::in_folder(&std::env::temp_dir())?,
        };
        if let Some(user) = other_user {
            chown(folder.path.path(), Some(user), None)?;
        }
        let address = Address::Unix(folder.path.path().join(NAME));
        Ok(Self { address, folder: Some(folder), other_user })
    }

    /// The address at which one side listens.
    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    /// Lets the other process connect to the socket that this one has bound.
    ///
    /// # Errors
    /// If the system refuses.
    pub(crate) fn admit(&self) -> io::Result<()> {
        match (&self.address, self.other_user, &self.folder) {
            (Address::Unix(path), Some(user), Some(_)) => chown(path, Some(user), None),
            _ => Ok(()),
        }
    }
}

/// A folder for a socket. It is locked, so that one of a killed process can be distinguished.
#[derive(Debug)]
struct PrivateFolder {
    path: TempDir,
    _lock: File,
}

impl PrivateFolder {
    /// Creates a folder in `parent`, and removes those that killed processes have left there.
    fn in_folder(parent: &Path) -> io::Result<Self> {
        sweep(parent);
        let path = Builder::new().prefix(PREFIX).rand_bytes(RANDOM).tempdir_in(parent)?;
        let lock = File::open(path.path())?;
        leftovers::lock(&lock);
        Ok(Self { path, _lock: lock })
    }
}

/// Removes folders of earlier processes that were killed.
fn sweep(parent: &Path) {
    let own = geteuid();
    let is_own_and_old = |found: &fs::Metadata| {
        // A new one is not locked yet.
        let is_old = found.modified().is_ok_and(|time| time.elapsed().is_ok_and(|age| age >= NEW));
        is_old && (own.is_root() || found.uid() == own.as_raw())
    };
    leftovers::sweep(parent, PREFIX.as_ref(), OFlags::DIRECTORY, is_own_and_old, |path| {
        let _ = fs::remove_file(path.join(NAME));
        fs::remove_dir(path)
    });
}

/// The address at which a QEMU listens, from its `query-migrate`.
///
/// # Errors
/// If the connection ended, or QEMU does not report where it listens.
pub(crate) fn listening_at(qmp: &mut Qmp, asked: &Address) -> Result<Address, QmpError> {
    let Address::Tcp { options, .. } = asked else { return Ok(asked.clone()) };
    let incomplete = || QmpError::Incomplete { command: "query-migrate", lacks: "socket-address" };
    let found = qmp.query("query-migrate", "socket-address")?;
    let first = found.get(0).ok_or_else(incomplete)?;
    let text = |name: &str| first.get(name).and_then(|value| value.as_str()).ok_or_else(incomplete);
    let port = text("port")?.parse().map_err(|_| incomplete())?;
    Ok(Address::Tcp { host: text("host")?.to_owned(), port, options: options.clone() })
}

fn tcp(at: SocketAddr) -> Address {
    Address::Tcp { host: at.ip().to_string(), port: 0, options: Default::default() }
}

const PREFIX: &str = ".multifd-";
const NAME: &str = "migration";
/// Slash, folder with six random characters, slash, name.
const LONGEST_NAME: usize = 1 + PREFIX.len() + RANDOM + 1 + NAME.len();
/// The age below which a folder is left alone.
const NEW: Duration = Duration::from_secs(60);
/// A socket's path has at most 107 bytes.
const LONGEST_PATH: usize = 107;

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixListener, time::SystemTime};

    use super::*;

    #[test]
    fn folder_of_a_killed_process_is_removed_and_others_stay() {
        let parent = tempfile::tempdir().expect("a folder");
        let make = |name: &str, age| {
            let path = parent.path().join(name);
            fs::create_dir(&path).expect("created");
            drop(UnixListener::bind(path.join(NAME)).expect("bound"));
            let folder = File::open(&path).expect("opened");
            folder.set_modified(SystemTime::now() - age).expect("aged");
            (path, folder)
        };
        let (dead, _) = make(".multifd-abcdef", 2 * NEW);
        let (new, _) = make(".multifd-bcdefg", Duration::ZERO);
        let (other, _) = make(".multifd-longer-name", 2 * NEW);
        let (alive, lock) = make(".multifd-cdefgh", 2 * NEW);
        leftovers::lock(&lock);
        let folder = PrivateFolder::in_folder(parent.path()).expect("created");
        assert!(!dead.exists());
        assert!([&new, &other, &alive, folder.path.path()].iter().all(|path| path.exists()));
    }
}
