//! The name of a file that is being written: only one process of this program writes to it at a time.
//!
//! The reservation is a socket in the abstract namespace, which is no file: the system removes it when the process ends, in
//! any way. Its name is made of the folder and the file's name, so every path to the folder leads to the same one. Processes
//! in another network namespace are not seen; the later of two then fails when it is complete.

use std::{
    error::Error,
    ffi::OsStr,
    fmt,
    fs::Metadata,
    io,
    os::{
        fd::AsFd,
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            fs::MetadataExt,
            net::{SocketAddr, UnixListener, UnixStream},
        },
    },
};

use multifd::ram::Digest;
use rustix::{net::sockopt::socket_peercred, process::geteuid};

/// A name that is kept until this is dropped.
#[derive(Debug)]
pub(super) struct Reservation {
    /// `None`: another user's process has it, which is not trusted to know better, or the system has no such sockets.
    _socket: Option<UnixListener>,
}

impl Reservation {
    /// Reserves `name` in `folder`.
    ///
    /// # Errors
    /// [`Taken`], inside.
    pub(super) fn of(folder: &Metadata, name: &OsStr) -> io::Result<Self> {
        let digest = u128::from_be_bytes(Digest::of(name.as_bytes()).to_bytes());
        let key = format!("multifd-new-file-{:x}-{:x}-{digest:x}", folder.dev(), folder.ino());
        let address = SocketAddr::from_abstract_name(key)?;
        match UnixListener::bind_addr(&address) {
            Ok(socket) => Ok(Self { _socket: Some(socket) }),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => match holder(&address) {
                Some(process) => Err(io::Error::new(io::ErrorKind::ResourceBusy, Taken { process })),
                None => Ok(Self { _socket: None }),
            },
            // It is only a convenience: two that write to one file do each other no harm until the end.
            Err(error) => {
                tracing::debug!(%error, "the name cannot be reserved");
                Ok(Self { _socket: None })
            }
        }
    }
}

/// The process that has the name, if it is one of this user or of root.
fn holder(address: &SocketAddr) -> Option<i32> {
    let holder = socket_peercred(UnixStream::connect_addr(address).ok()?.as_fd()).ok()?;
    (holder.uid == geteuid() || holder.uid.is_root()).then(|| holder.pid.as_raw_pid())
}

/// Another process writes to the file.
#[derive(Debug)]
struct Taken {
    process: i32,
}

impl fmt::Display for Taken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "process {} is writing this file: wait until it has ended, or use another file name",
            self.process
        )
    }
}

impl Error for Taken {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_is_taken_until_the_reservation_is_dropped() {
        let folder = tempfile::tempdir().expect("a folder");
        let metadata = folder.path().metadata().expect("known");
        let first = Reservation::of(&metadata, OsStr::new("a")).expect("free");
        let other = Reservation::of(&metadata, OsStr::new("b")).expect("another name");
        let error = Reservation::of(&metadata, OsStr::new("a")).expect_err("taken");
        assert!(error.to_string().contains(&format!("process {} is writing", std::process::id())), "{error}");
        drop((first, other));
        let again = Reservation::of(&metadata, OsStr::new("a")).expect("free again");
        assert!(again._socket.is_some());
    }
}
