//! Listening for a source: every connection that is there, and a way to stop waiting for more.

use std::{
    io,
    net::ToSocketAddrs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};
use socket2::{Domain, SockAddr, Socket, Type};

use super::{
    Address, Link, Listen, Wake,
    socket::{EventFd, SocketLink, inherited},
};

/// A listening socket, or the one connection of an inherited descriptor.
pub struct Listener {
    socket: Socket,
    woken: Arc<EventFd>,
    address: Address,
    kind: Kind,
}

enum Kind {
    /// Accepts connections; a unix socket's file is removed in the end.
    Listening { remove: Option<SocketFile> },
    /// The descriptor is a connection, to be taken once.
    Connection { taken: bool },
}

impl Listener {
    /// Listens at `address`. A unix socket left over at the path is replaced, as QEMU does.
    ///
    /// # Errors
    /// If the system refuses the address.
    pub fn bind(address: &Address) -> io::Result<Self> {
        let (socket, kind) = match address {
            Address::Tcp { host, port } => (listen_tcp(host, *port)?, Kind::Listening { remove: None }),
            Address::Unix(path) => {
                let socket = listen_unix(path)?;
                (socket, Kind::Listening { remove: SocketFile::at(path) })
            }
            Address::Fd(fd) => {
                let socket = inherited(*fd)?;
                let listening = rustix::net::sockopt::socket_acceptconn(&socket)?;
                let kind = if listening {
                    Kind::Listening { remove: None }
                } else {
                    Kind::Connection { taken: false }
                };
                (socket, kind)
            }
        };
        let address = match (address, socket.local_addr()?.as_socket()) {
            (Address::Tcp { .. }, Some(bound)) => {
                Address::Tcp { host: bound.ip().to_string(), port: bound.port() }
            }
            _ => address.clone(),
        };
        socket.set_nonblocking(true)?;
        Ok(Self { socket, woken: EventFd::new()?, address, kind })
    }

    /// Where it listens, with the port that the system chose.
    pub fn local_address(&self) -> &Address {
        &self.address
    }
}

impl Listen for Listener {
    fn accept(&mut self) -> io::Result<Option<Box<dyn Link>>> {
        loop {
            if let Some(link) = self.accept_waiting()? {
                return Ok(Some(link));
            }
            // Once its one connection is taken, an inherited descriptor is the link's: nothing to wait for.
            let wanted = match self.kind {
                Kind::Connection { taken: true } => PollFlags::empty(),
                _ => PollFlags::IN,
            };
            let mut fds = [PollFd::new(self.woken.fd(), PollFlags::IN), PollFd::new(&self.socket, wanted)];
            let count = if wanted.is_empty() { 1 } else { 2 };
            match poll(&mut fds[..count], None) {
                Ok(_) if !fds[0].revents().is_empty() => {
                    self.woken.drain();
                    return Ok(None);
                }
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn accept_waiting(&mut self) -> io::Result<Option<Box<dyn Link>>> {
        loop {
            let socket = match &mut self.kind {
                Kind::Connection { taken: true } => return Ok(None),
                Kind::Connection { taken } => {
                    *taken = true;
                    self.socket.try_clone()
                }
                Kind::Listening { .. } => self.socket.accept().map(|(socket, _)| socket),
            };
            match socket.and_then(SocketLink::new) {
                Ok(link) => return Ok(Some(Box::new(link))),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(None),
                    // The peer gave up before we came to it, or before we could ask who it was.
                    io::ErrorKind::ConnectionAborted | io::ErrorKind::NotConnected => {}
                    io::ErrorKind::Interrupted => {}
                    _ => return Err(error),
                },
            }
        }
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.woken.clone()
    }

    fn address(&self) -> String {
        self.address.to_string()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Kind::Listening { remove: Some(file) } = &self.kind {
            file.remove();
        }
    }
}

/// The file of a unix socket that was bound here.
struct SocketFile {
    path: PathBuf,
    /// Device and inode. The socket holds on to the inode, so no other file has its number while the socket is open.
    identity: (u64, u64),
}

impl SocketFile {
    /// `None` if somebody has removed it already.
    fn at(path: &Path) -> Option<Self> {
        let path = std::path::absolute(path).ok()?;
        let identity = Self::identity(&path)?;
        Some(Self { path, identity })
    }

    /// Removes it, unless another file is there by now: a listener that came later has taken the path over.
    fn remove(&self) {
        if Self::identity(&self.path) == Some(self.identity) {
            // If it is gone meanwhile, that is what was wanted.
            let _ = std::fs::remove_file(&self.path);
        }
    }

    fn identity(path: &Path) -> Option<(u64, u64)> {
        std::fs::symlink_metadata(path).ok().map(|found| (found.dev(), found.ino()))
    }
}

/// All channels of the largest migration may be waiting at once: a full queue would make a source believe
/// that it is connected when it is not.
const BACKLOG: i32 = 512;

fn listen_tcp(host: &str, port: u16) -> io::Result<Socket> {
    let host = if host.is_empty() { "::" } else { host };
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host name has no address");
    for address in (host, port).to_socket_addrs()? {
        let listen = || {
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            socket.bind(&address.into())?;
            socket.listen(BACKLOG)?;
            Ok(socket)
        };
        match listen() {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn listen_unix(path: &Path) -> io::Result<Socket> {
    if std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        std::fs::remove_file(path)?;
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A listener that ended removed the path, and with it the socket of the one that had taken the path over.
    #[test]
    fn listener_that_ends_removes_its_own_socket_and_no_other() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let address = Address::Unix(path.clone());
        let first = Listener::bind(&address).expect("bound");
        let second = Listener::bind(&address).expect("bound in its place");
        drop(first);
        assert!(path.exists(), "the second one's socket");
        std::os::unix::net::UnixStream::connect(&path).expect("the second one listens");
        drop(second);
        assert!(!path.exists());
    }
}
