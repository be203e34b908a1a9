//! A socket as a link: gathering and scattering calls straight from and to guest memory.
//!
//! UNSAFETY: the system reads and writes the memory that the parts point to; each part carries the lifetime
//! of what it borrows, and the calls end before it does.
#![expect(unsafe_code, reason = "system calls on vectors over guest memory")]

use std::{
    io,
    mem::MaybeUninit,
    net::Shutdown,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
    sync::Arc,
    time::Duration,
};

use rustix::event::{EventfdFlags, eventfd};
use socket2::{Domain, SockAddr, Socket};

use super::{Link, TcpOptions, Wake, alive::Watched};
use crate::ram::{Part, PartMut};

/// A connected stream socket.
pub struct SocketLink {
    socket: Arc<Socket>,
    peer: String,
    watched: Option<Watched>,
    /// Set by `set_recv_timeout`.
    recv_timeout: bool,
}

impl SocketLink {
    /// A link over a connected socket, blocking, with Nagle's algorithm off where there is one. A TCP peer is looked
    /// after as [`TcpOptions::default`] has it.
    ///
    /// # Errors
    /// If the system refuses an option.
    pub fn new(socket: Socket) -> io::Result<Self> {
        Self::with_options(socket, &TcpOptions::default())
    }

    /// The same, looked after as `options` say; they are of no matter if it is no TCP.
    ///
    /// # Errors
    /// If the system refuses an option.
    pub fn with_options(socket: Socket, options: &TcpOptions) -> io::Result<Self> {
        socket.set_nonblocking(false)?;
        let peer = describe(&socket.peer_addr()?);
        let mut watched = None;
        if matches!(socket.domain()?, Domain::IPV4 | Domain::IPV6) {
            socket.set_tcp_nodelay(true)?;
            watched = Watched::set_up(&socket, options)?;
        }
        Ok(Self { socket: Arc::new(socket), peer, watched, recv_timeout: false })
    }

    /// After a wait that took its time: an error unless the peer's host still answers.
    fn look(&self) -> io::Result<()> {
        self.watched.map_or(Ok(()), |watched| watched.check(&self.socket))
    }
}

impl Link for SocketLink {
    fn send(&mut self, parts: &[Part<'_>]) -> io::Result<usize> {
        let message = message(parts.as_ptr().cast(), parts.len());
        loop {
            // SAFETY: `message` holds `parts.len()` vectors, each of which borrows memory that can be read for its
            // length until this call has ended.
            let sent =
                unsafe { libc::sendmsg(self.socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
            match usize::try_from(sent).map_err(|_| io::Error::last_os_error()) {
                // The socket blocks, so a wait took its time.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.look()?,
                sent => return sent,
            }
        }
    }

    fn recv(&mut self, parts: &mut [PartMut<'_>]) -> io::Result<usize> {
        let mut message = message(parts.as_ptr().cast(), parts.len());
        loop {
            // SAFETY: `message` holds `parts.len()` vectors, each of which borrows memory that can be written for
            // its length until this call has ended.
            let received = unsafe { libc::recvmsg(self.socket.as_raw_fd(), &raw mut message, 0) };
            match usize::try_from(received).map_err(|_| io::Error::last_os_error()) {
                // The socket blocks, so a wait took its time.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.recv_timeout {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    self.look()?;
                }
                received => return received,
            }
        }
    }

    fn set_recv_timeout(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.socket.set_read_timeout(limit.or(self.watched.map(Watched::interval)))?;
        self.recv_timeout = limit.is_some();
        Ok(())
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::new(Shut(self.socket.clone()))
    }

    fn peer(&self) -> String {
        self.peer.clone()
    }

    fn close_send(&mut self) -> io::Result<()> {
        self.socket.shutdown(Shutdown::Write)
    }
}

/// Shuts a socket down both ways; the descriptor stays open until its owner drops it.
struct Shut(Arc<Socket>);

impl Wake for Shut {
    fn wake(&self) {
        // It may be closed by the peer already, which is as good.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// A descriptor that becomes readable when woken, to be polled beside a socket.
pub(super) struct EventFd(OwnedFd);

impl EventFd {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    pub(super) fn fd(&self) -> &OwnedFd {
        &self.0
    }

    pub(super) fn drain(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl Wake for EventFd {
    fn wake(&self) {
        // It can only fail when the counter is full, and then the descriptor is readable.
        let _ = rustix::io::write(&self.0, &1_u64.to_be_bytes());
    }
}

/// Takes over a descriptor that this process has inherited.
pub(super) fn inherited(fd: RawFd) -> io::Result<Socket> {
    // SAFETY: the number is only borrowed to ask what it is; if it is not open the call says so.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    // A copy is ours to close: the caller's number, which may be 0 to 2, stays as it is.
    let owned = rustix::io::fcntl_dupfd_cloexec(borrowed, 3)?;
    rustix::net::sockopt::socket_type(&owned)?;
    Ok(Socket::from(owned))
}

/// An address for messages.
pub(super) fn describe(address: &SockAddr) -> String {
    if let Some(address) = address.as_socket() {
        return address.to_string();
    }
    if let Some((cid, port)) = address.as_vsock_address() {
        return format!("vsock:{cid}:{port}");
    }
    address.as_pathname().map_or_else(|| "a local process".into(), |path| path.display().to_string())
}

fn message(parts: *const libc::iovec, count: usize) -> libc::msghdr {
    // SAFETY: all zero is a message without address, vectors and control data.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    // The field is mutable for calls that receive; a sending call only reads through it.
    message.msg_iov = parts.cast_mut();
    #[allow(clippy::useless_conversion, reason = "the field's type differs between C libraries")]
    {
        message.msg_iovlen = count.try_into().unwrap_or(0);
    }
    message
}
