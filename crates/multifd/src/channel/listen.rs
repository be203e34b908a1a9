//! Listens for a source: accepts all waiting connections, and can be woken from a wait for more.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs},
    sync::Arc,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};
use socket2::{Domain, SockAddr, Socket, Type};

use super::{
    Address, Context, Link, Listen, TcpOptions, Wake,
    check::refused,
    descriptors::explained,
    event_fd::EventFd,
    exec::{ExecLink, Started},
    socket::{SocketLink, inherited},
    unix_socket::{self, SocketFile},
};

/// A listening socket, or the one connection of a command or an inherited descriptor.
pub struct Listener {
    /// The listening socket; `None` for a command, which is a connection already.
    socket: Option<Socket>,
    woken: Arc<EventFd>,
    address: Address,
    /// The options of the connections that it accepts.
    options: TcpOptions,
    kind: Kind,
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener").field("address", &self.address).finish_non_exhaustive()
    }
}

enum Kind {
    /// Accepts connections; a unix socket's file is removed at the end.
    Listening { remove: Option<SocketFile> },
    /// A connection that existed from the start, returned once.
    Connection(Option<Ready>),
}

/// What becomes the one connection.
enum Ready {
    Command(Started),
    Inherited(Socket),
}

impl Ready {
    fn link(self, context: &Context) -> io::Result<Box<dyn Link>> {
        Ok(match self {
            Self::Command(started) => Box::new(ExecLink::new(started, context)?),
            Self::Inherited(socket) => Box::new(SocketLink::new(socket, context)?),
        })
    }
}

impl Listener {
    /// Listens on `address`. A unix socket at the path is replaced if nobody listens at it. The new one is accessible to its
    /// owner only (mode 0600), independent of the umask.
    ///
    /// # Errors
    /// If the system refuses the address. [`AddrInUse`](io::ErrorKind::AddrInUse) if another process listens at the path of
    /// a unix socket, [`AlreadyExists`](io::ErrorKind::AlreadyExists) if the path names anything but a socket.
    pub fn bind(address: &Address) -> io::Result<Self> {
        Self::open(address).map_err(explained)
    }

    fn open(address: &Address) -> io::Result<Self> {
        address.check_listen().map_err(refused)?;
        let mut options = TcpOptions::default();
        let listening = Kind::Listening { remove: None };
        let (socket, kind) = match address {
            Address::Tcp { host, port, options: given } => {
                options = given.clone();
                (listen_tcp(host, *port, given)?, listening)
            }
            Address::Unix(path) => {
                let (socket, file) = unix_socket::listen(path, BACKLOG)?;
                (socket, Kind::Listening { remove: Some(file) })
            }
            Address::Vsock { cid, port } => {
                let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
                socket.bind(&SockAddr::vsock(*cid, *port))?;
                socket.listen(BACKLOG)?;
                (socket, listening)
            }
            Address::Exec(command) => {
                return Self::connected(Ready::Command(Started::new(command)?), address);
            }
            Address::Fd(fd) => {
                let socket = inherited(*fd)?;
                if !rustix::net::sockopt::socket_acceptconn(&socket)? {
                    return Self::connected(Ready::Inherited(socket), address);
                }
                (socket, listening)
            }
        };
        let local = socket.local_addr()?;
        let address = match (address, local.as_socket(), local.as_vsock_address()) {
            (Address::Tcp { options, .. }, Some(bound), _) => {
                let (host, port) = (bound.ip().to_string(), bound.port());
                Address::Tcp { host, port, options: options.clone() }
            }
            (Address::Vsock { .. }, _, Some((cid, port))) => Address::Vsock { cid, port },
            _ => address.clone(),
        };
        socket.set_nonblocking(true)?;
        Ok(Self { socket: Some(socket), woken: EventFd::new()?, address, options, kind })
    }

    fn connected(ready: Ready, address: &Address) -> io::Result<Self> {
        let kind = Kind::Connection(Some(ready));
        let (address, options) = (address.clone(), TcpOptions::default());
        Ok(Self { socket: None, woken: EventFd::new()?, address, options, kind })
    }

    /// The address on which it listens, with the port that the system chose.
    pub fn local_address(&self) -> &Address {
        &self.address
    }
}

impl Listener {
    /// Waits until a connection may be there; `false` if the waker ended the wait.
    fn wait(&mut self) -> io::Result<bool> {
        loop {
            let mut fds = vec![PollFd::new(self.woken.fd(), PollFlags::IN)];
            // If there is no socket, the one connection was returned: there is nothing more to wait for.
            fds.extend(self.socket.as_ref().map(|socket| PollFd::new(socket, PollFlags::IN)));
            match poll(&mut fds, None) {
                // First, because hosts that connect again and again may keep the queue full.
                Ok(_) if !fds[0].revents().is_empty() => {
                    self.woken.drain();
                    return Ok(false);
                }
                Ok(_) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits for the next connection at the listening socket.
    pub(super) fn accept_link(&mut self, context: &Context) -> io::Result<Option<SocketLink>> {
        while self.wait()? {
            if let Some(link) = self.accept_waiting_link(context)? {
                return Ok(Some(link));
            }
        }
        Ok(None)
    }

    /// The next connection that waits at the listening socket.
    pub(super) fn accept_waiting_link(&mut self, context: &Context) -> io::Result<Option<SocketLink>> {
        let Some(socket) = &self.socket else { return Ok(None) };
        loop {
            let socket = socket.accept().map(|(socket, _)| socket);
            match socket.and_then(|socket| SocketLink::incoming(socket, &self.options, context)) {
                Ok(link) => return Ok(Some(link)),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(None),
                    // The peer gave up before the connection was accepted, or before its host could be queried.
                    io::ErrorKind::ConnectionAborted | io::ErrorKind::NotConnected => {}
                    io::ErrorKind::Interrupted => {}
                    _ => return Err(explained(error)),
                },
            }
        }
    }
}

impl Listen for Listener {
    fn accept(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>> {
        if let Kind::Connection(Some(_)) = self.kind {
            return self.accept_waiting(context);
        }
        let link = self.accept_link(context)?;
        Ok(link.map(|link| Box::new(link) as Box<dyn Link>))
    }

    fn accept_waiting(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>> {
        if let Kind::Connection(ready) = &mut self.kind {
            return ready.take().map(|ready| ready.link(context)).transpose();
        }
        let link = self.accept_waiting_link(context)?;
        Ok(link.map(|link| Box::new(link) as Box<dyn Link>))
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.woken.clone()
    }

    fn address(&self) -> String {
        self.address.to_string()
    }

    fn is_single(&self) -> bool {
        matches!(self.kind, Kind::Connection(_))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Kind::Listening { remove: Some(file) } = &self.kind {
            file.remove();
        }
    }
}

/// All channels of the largest migration may be waiting at once, after hundreds of foreign connections. With a full queue, a
/// source would believe that it is connected when it is not.
const BACKLOG: i32 = 1024;

fn listen_tcp(host: &str, port: u16, options: &TcpOptions) -> io::Result<Socket> {
    let every = [(Ipv6Addr::UNSPECIFIED, port).into(), (Ipv4Addr::UNSPECIFIED, port).into()];
    let addresses: Vec<SocketAddr> =
        if host.is_empty() { every.into() } else { (host, port).to_socket_addrs()?.collect() };
    let mut last = io::ErrorKind::NotFound.into();
    for address in options.of_families(addresses.into_iter())? {
        let listen = || {
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            if address.is_ipv6() {
                // The address of all IPv6 interfaces also accepts IPv4, if IPv4 is used.
                socket.set_only_v6(!options.uses_ipv4())?;
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Regression: a host that connected again and again kept the queue full, and no sync point was passed.
    #[test]
    fn wake_is_reported_before_connections_that_wait() {
        let mut listener = Listener::bind(&"tcp:127.0.0.1:0".parse().expect("an address")).expect("bound");
        let Address::Tcp { port, .. } = *listener.local_address() else { unreachable!("bound above") };
        let _waiting = std::net::TcpStream::connect(("127.0.0.1", port)).expect("connected");
        listener.waker().wake();
        let context = Context::new(&crate::channel::Stop::new());
        assert!(listener.accept(&context).expect("woken").is_none());
        assert!(listener.accept(&context).expect("no wake").is_some(), "the connection has waited");
    }

    /// Regression: a listener that ended removed the path, even after another listener had taken it over.
    #[test]
    fn listener_that_ends_removes_its_own_socket_and_no_other() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let address = Address::Unix(path.clone());
        let first = Listener::bind(&address).expect("bound");
        std::fs::remove_file(&path).expect("removed, as by a QEMU that takes the path");
        let second = Listener::bind(&address).expect("bound in its place");
        drop(first);
        assert!(path.exists(), "the second one's socket");
        std::os::unix::net::UnixStream::connect(&path).expect("the second one listens");
        drop(second);
        assert!(!path.exists());
    }
}
