//! Connects to a destination; a stop can interrupt every wait.

use std::{
    io,
    net::{SocketAddr, ToSocketAddrs},
    os::unix::fs::FileTypeExt,
    path::Path,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use socket2::{Domain, SockAddr, Socket, Type};

use super::{
    Address, Connect, Context, Link, Stop, TcpOptions,
    check::refused,
    deadline,
    descriptors::explained,
    event_fd::EventFd,
    exec::ExecLink,
    socket::{SocketLink, inherited},
};
use crate::{ram::kind_of_file, sync_types::Instant};

impl Connect for Address {
    fn connect(&self, context: &Context) -> io::Result<Box<dyn Link>> {
        self.open(context).map_err(explained)
    }

    fn target(&self) -> String {
        self.to_string()
    }

    fn is_single(&self) -> bool {
        matches!(self, Self::Exec(_) | Self::Fd(_))
    }
}

impl Address {
    fn open(&self, context: &Context) -> io::Result<Box<dyn Link>> {
        let (stop, deadline) = (&context.stop, deadline(context.connect_timeout));
        self.check_connect().map_err(refused)?;
        let socket = match self {
            Self::Tcp { host, port, options } => {
                let host = if host.is_empty() { "localhost" } else { host };
                let addresses = options.of_families((host, *port).to_socket_addrs()?)?;
                let socket = connect_any(&addresses, stop, deadline)?;
                return Ok(Box::new(SocketLink::with_options(socket, options, context)?));
            }
            Self::Unix(_) => connect_unix(self, context)?,
            Self::Vsock { cid, port } => {
                let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
                connect_one(&socket, &SockAddr::vsock(*cid, *port), stop, deadline)?;
                socket
            }
            Self::Exec(command) => return Ok(Box::new(ExecLink::start(command, context)?)),
            Self::Fd(fd) => inherited(*fd)?,
        };
        Ok(Box::new(SocketLink::new(socket, context)?))
    }
}

/// Explains why there is no connection to the socket at `path`.
fn at_path(path: &Path, error: io::Error) -> io::Error {
    let why = match path.metadata() {
        Ok(found) if !found.file_type().is_socket() => {
            format!("it is {}, expected a socket", kind_of_file(&found))
        }
        Ok(_) if error.kind() == io::ErrorKind::ConnectionRefused => {
            "no process listens at this socket: start the destination first".to_owned()
        }
        _ => return error,
    };
    io::Error::new(error.kind(), why)
}

/// Connects to a unix socket.
pub(super) fn connect_unix(address: &Address, context: &Context) -> io::Result<Socket> {
    let Address::Unix(path) = address else { return Err(io::ErrorKind::Unsupported.into()) };
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    let limit = deadline(context.connect_timeout);
    let connected = connect_one(&socket, &SockAddr::unix(path)?, &context.stop, limit);
    connected.map_err(|error| at_path(path, error))?;
    Ok(socket)
}

impl TcpOptions {
    /// The addresses of the families to use, in the given order.
    pub(super) fn of_families(
        &self,
        addresses: impl Iterator<Item = SocketAddr>,
    ) -> io::Result<Vec<SocketAddr>> {
        let used = |address: &SocketAddr| match address {
            SocketAddr::V4(_) => self.uses_ipv4(),
            SocketAddr::V6(_) => self.uses_ipv6(),
        };
        let left: Vec<SocketAddr> = addresses.filter(used).collect();
        if left.is_empty() {
            let family = match (self.uses_ipv4(), self.uses_ipv6()) {
                (true, false) => "IPv4 ",
                (false, true) => "IPv6 ",
                _ => "",
            };
            let text = format!("the host has no {family}address");
            return Err(io::Error::new(io::ErrorKind::NotFound, text));
        }
        Ok(left)
    }
}

/// Tries the addresses in order; reports the last failure.
fn connect_any(addresses: &[SocketAddr], stop: &Stop, deadline: Instant) -> io::Result<Socket> {
    let mut last = io::ErrorKind::NotFound.into();
    for (address, left) in addresses.iter().zip((1..=addresses.len()).rev()) {
        let socket = Socket::new(Domain::for_address(*address), Type::STREAM, None)?;
        // Each address gets a share of the time, so that an address that never answers leaves time for the next.
        let time =
            deadline.saturating_duration_since(Instant::now()) / u32::try_from(left).unwrap_or(u32::MAX);
        match connect_one(&socket, &(*address).into(), stop, Instant::now() + time) {
            Ok(()) => return Ok(socket),
            Err(error) => last = error,
        }
        if stop.is_stopped() {
            break;
        }
    }
    Err(last)
}

fn connect_one(socket: &Socket, address: &SockAddr, stop: &Stop, deadline: Instant) -> io::Result<()> {
    let woken = EventFd::new()?;
    let _watch = stop.watch(woken.clone());
    socket.set_nonblocking(true)?;
    loop {
        match socket.connect(address) {
            Ok(()) => return Ok(()),
            Err(error) if error.raw_os_error() == Some(Errno::INPROGRESS.raw_os_error()) => break,
            // The queue of a unix listener is full. There is nothing to poll for. A blocking connect would wait for
            // room, but nothing could wake it early, not even a shutdown of the socket.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if stop.pause(Duration::from_millis(10)).is_err() || Instant::now() >= deadline {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            Err(error) => return Err(error),
        }
    }
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(socket, PollFlags::OUT), PollFd::new(woken.fd(), PollFlags::IN)];
        match poll(&mut fds, Some(&Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) if !fds[1].revents().is_empty() => return Err(io::ErrorKind::Interrupted.into()),
            Ok(_) => return socket.take_error()?.map_or(Ok(()), Err),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
