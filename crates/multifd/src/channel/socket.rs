//! A link over a socket: gathering and scattering calls directly from and to guest memory.
//!
//! UNSAFETY: the system reads and writes the memory that the parts point to; each part carries the lifetime of what it
//! borrows, and the calls end before it does.
#![expect(unsafe_code, reason = "system calls on vectors over guest memory")]

use std::{
    io,
    mem::MaybeUninit,
    net::Shutdown,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    path::Path,
    sync::Arc,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use socket2::{Domain, SockAddr, Socket};

use super::{
    Context, Host, Link, PeerSignal, StallTimer, TcpOptions, Wake, ZeroCopy,
    alive::Watched,
    backlog::Backlog,
    completions::Completions,
    notice::Notice,
    shut::{Shut, ShutRecv, ShutSend},
    socket_option::set_option,
    stall_timer,
    tcp_info::TcpInfo,
};
use crate::{
    error::UntrustedText,
    ram::{Part, PartMut},
    sync_types::Instant,
};

/// A connected stream socket.
pub struct SocketLink {
    socket: Arc<Socket>,
    peer: String,
    host: Option<Host>,
    watched: Option<Watched>,
    /// Set by `set_recv_timeout`.
    recv_timeout: bool,
    /// The completions of zero-copy sends.
    completions: Completions,
    stall_timer: StallTimer,
    backlog: Backlog,
    tcp: bool,
    /// Whether it is a TCP connection that a source has opened; the source sends more than it receives.
    incoming: bool,
    /// Whether both ends are on this machine.
    local: bool,
}

impl std::fmt::Debug for SocketLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SocketLink")
            .field("peer", &self.peer)
            .field("incoming", &self.incoming)
            .field("local", &self.local)
            .finish_non_exhaustive()
    }
}

impl SocketLink {
    /// Creates a link over a connected socket: blocking, with Nagle's algorithm off if the socket has it, and with a
    /// send buffer that fits into caches if the other end is on the same machine. A TCP peer is checked as
    /// [`TcpOptions::default`] specifies.
    ///
    /// # Errors
    /// If the system refuses an option.
    pub fn new(socket: Socket, context: &Context) -> io::Result<Self> {
        Self::with_options(socket, &TcpOptions::default(), context)
    }

    /// Like [`new`](Self::new), with `options`; they have no effect if it is not TCP.
    ///
    /// # Errors
    /// If the system refuses an option.
    pub fn with_options(socket: Socket, options: &TcpOptions, context: &Context) -> io::Result<Self> {
        socket.set_nonblocking(false)?;
        let address = socket.peer_addr()?;
        let (peer, host) = (describe(&address), host_of(&socket, &address));
        let (mut watched, mut local) = (None, socket.domain()? == Domain::UNIX);
        let tcp = matches!(socket.domain()?, Domain::IPV4 | Domain::IPV6);
        if tcp {
            socket.set_tcp_nodelay(true)?;
            local = is_local(&socket)?;
            watched = Watched::set_up(&socket, options)?;
        }
        let buffer = local.then(|| (LOCAL_BUFFERS / usize::from(context.channels.get())).max(LOCAL_BUFFER));
        if let Some(bytes) = buffer {
            socket.set_send_buffer_size(bytes)?;
        }
        let link = Self {
            socket: Arc::new(socket),
            peer,
            host,
            watched,
            recv_timeout: false,
            completions: Completions::default(),
            stall_timer: context.stall_timer.clone(),
            backlog: Backlog::new(buffer),
            tcp,
            incoming: false,
            local,
        };
        link.socket.set_write_timeout(link.send_interval())?;
        Ok(link)
    }

    /// Like [`with_options`](Self::with_options), for a connection that a listener has accepted. When it is woken, its
    /// peer is notified at once.
    ///
    /// # Errors
    /// If the system refuses an option.
    pub(super) fn incoming(socket: Socket, options: &TcpOptions, context: &Context) -> io::Result<Self> {
        let link = Self::with_options(socket, options, context)?;
        Ok(Self { incoming: link.tcp, ..link })
    }

    fn send_with(&self, parts: &[Part<'_>], flags: libc::c_int) -> io::Result<usize> {
        let message = message(parts.as_ptr().cast(), parts.len());
        let flags = flags | libc::MSG_NOSIGNAL;
        let mut begun = None;
        loop {
            // SAFETY: `message` holds `parts.len()` vectors, each of which borrows memory that can be read for its
            // length until this call has ended. The kernel itself keeps the memory that it sends in place.
            let sent = unsafe { libc::sendmsg(self.socket.as_raw_fd(), &raw const message, flags) };
            match usize::try_from(sent).map_err(|_| io::Error::last_os_error()) {
                // The socket blocks, so this is a wait whose time limit has passed.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.look_at_send(&mut begun)?,
                sent => {
                    self.moved(&sent);
                    return sent;
                }
            }
        }
    }

    /// The socket.
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Receives by `recv`, which returns the number of bytes, again and again until there are some, or the time is over.
    pub(super) fn recv_by(
        &self,
        mut recv: impl FnMut(BorrowedFd<'_>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        loop {
            match recv(self.socket.as_fd()) {
                // The socket blocks, so this is a wait whose time limit has passed.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.look()?;
                    if self.recv_timeout {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                }
                received => {
                    self.moved(&received);
                    return received;
                }
            }
        }
    }

    /// Called after a wait to send has reached its time limit. All such waits have lasted since `begun`.
    fn look_at_send(&self, begun: &mut Option<Instant>) -> io::Result<()> {
        self.look()?;
        let interval = self.send_interval().unwrap_or_default();
        self.stall_timer.check_send(*begun.get_or_insert_with(|| stall_timer::begun(interval)))
    }

    /// The time limit of a wait to send before the peer is checked.
    fn send_interval(&self) -> Option<Duration> {
        let stalled = self.stall_timer.limit().map(stall_timer::interval);
        self.watched.map(Watched::interval).into_iter().chain(stalled).min()
    }

    fn moved(&self, bytes: &io::Result<usize>) {
        if let Ok(1..) = bytes {
            self.stall_timer.moved();
        }
    }

    /// Called after a wait has reached its time limit: fails unless the peer's host still answers.
    fn look(&self) -> io::Result<()> {
        self.watched.map_or(Ok(()), |watched| watched.check(&self.socket))
    }
}

impl Link for SocketLink {
    fn send(&mut self, parts: &[Part<'_>]) -> io::Result<usize> {
        self.send_with(parts, 0)
    }

    fn send_more(&mut self, parts: &[Part<'_>]) -> io::Result<usize> {
        self.send_with(parts, libc::MSG_MORE)
    }

    fn limit_backlog(&mut self, limit: Option<u64>) {
        if self.tcp {
            self.backlog.limit(&self.socket, limit);
        }
    }

    fn round_trip(&self) -> Option<Duration> {
        self.tcp.then(|| TcpInfo::of(&self.socket).ok().flatten()).flatten()?.round_trip
    }

    fn zero_copy(&mut self) -> Option<&mut dyn ZeroCopy> {
        if self.tcp { Some(self) } else { None }
    }

    fn recv(&mut self, parts: &mut [PartMut<'_>]) -> io::Result<usize> {
        let mut message = message(parts.as_ptr().cast(), parts.len());
        self.recv_by(|socket| {
            // SAFETY: `message` holds `parts.len()` vectors, each of which borrows memory that can be written for
            // its length until this call has ended.
            let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0) };
            usize::try_from(received).map_err(|_| io::Error::last_os_error())
        })
    }

    fn is_readable(&mut self) -> io::Result<bool> {
        let mut fds = [PollFd::new(&*self.socket, PollFlags::IN)];
        loop {
            match poll(&mut fds, Some(&Timespec::default())) {
                Ok(ready) => return Ok(ready > 0),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn set_recv_timeout(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.socket.set_read_timeout(limit.or(self.watched.map(Watched::interval)))?;
        self.recv_timeout = limit.is_some();
        Ok(())
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::new(Shut { socket: self.socket.clone(), reset: self.incoming })
    }

    fn send_waker(&self) -> Arc<dyn Wake> {
        Arc::new(ShutSend(self.socket.clone()))
    }

    fn recv_waker(&self) -> Arc<dyn Wake> {
        Arc::new(ShutRecv(self.socket.clone()))
    }

    fn peer_signal(&self) -> io::Result<Option<PeerSignal>> {
        Ok(Some(PeerSignal { descriptor: self.socket.as_fd().try_clone_to_owned()?, plain: true }))
    }

    fn peer(&self) -> String {
        self.peer.clone()
    }

    fn host(&self) -> Option<Host> {
        self.host
    }

    fn close_send(&mut self) -> io::Result<()> {
        self.socket.shutdown(Shutdown::Write)
    }

    fn finish(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn can_split(&self) -> bool {
        true
    }

    fn split(self: Box<Self>) -> io::Result<(Box<dyn Link>, Box<dyn Link>)> {
        let receiver = Self {
            socket: self.socket.clone(),
            peer: self.peer.clone(),
            completions: Completions::default(),
            stall_timer: self.stall_timer.clone(),
            ..*self
        };
        Ok((Box::new(receiver), self))
    }
}

impl ZeroCopy for SocketLink {
    fn enable(&mut self) -> io::Result<()> {
        set_option(&self.socket, libc::SOL_SOCKET, libc::SO_ZEROCOPY, 1)
    }

    fn send_in_place(&mut self, parts: &[Part<'_>]) -> io::Result<usize> {
        let sent = self.send_with(parts, libc::MSG_ZEROCOPY)?;
        if sent > 0 {
            self.completions.sent();
        }
        Ok(sent)
    }

    fn completed(&mut self, calls: u64) -> io::Result<(u64, u64)> {
        let (mut gone, mut woken) = (false, false);
        let mut begun = None;
        loop {
            let before = self.completions.done();
            while let Some(notice) = Notice::next(self.socket.as_fd())? {
                self.completions.complete(notice.first, notice.last, notice.copied)?;
            }
            if self.completions.done() > before {
                self.moved(&Ok(1));
                begun = None;
            }
            if self.completions.done() >= calls {
                return Ok((self.completions.done(), self.completions.copied()));
            }
            if gone {
                return Err(self.socket.take_error()?.unwrap_or_else(|| io::ErrorKind::BrokenPipe.into()));
            }
            // This is an error without a notice, which would be reported again and again.
            if woken
                && self.completions.done() == before
                && let Some(error) = self.socket.take_error()?
            {
                return Err(error);
            }
            // No events are requested: notices and the end of the connection are always reported.
            let mut fds = [PollFd::new(&*self.socket, PollFlags::empty())];
            let limit = self.send_interval().and_then(|interval| Timespec::try_from(interval).ok());
            match poll(&mut fds, limit.as_ref()) {
                Ok(0) => self.look_at_send(&mut begun)?,
                Ok(_) => (gone, woken) = (fds[0].revents().contains(PollFlags::HUP), true),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Takes over a descriptor that this process has inherited.
pub(super) fn inherited(fd: RawFd) -> io::Result<Socket> {
    // SAFETY: the number is only borrowed to query what it is; if it is not open the call fails.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    // The copy is ours to close. The caller's number, which may be 0 to 2, stays as it is.
    let owned = rustix::io::fcntl_dupfd_cloexec(borrowed, 3)?;
    rustix::net::sockopt::socket_type(&owned)?;
    Ok(Socket::from(owned))
}

/// Whether the other end is on this machine.
fn is_local(socket: &Socket) -> io::Result<bool> {
    let (here, there) = (socket.local_addr()?.as_socket(), socket.peer_addr()?.as_socket());
    Ok(here.zip(there).is_some_and(|(here, there)| here.ip() == there.ip()))
}

/// The bytes in transit within this machine, sent from this side, over all connections. By default, the system queues
/// megabytes per connection, as a distant network needs. Data that was copied in is then out of the caches when it is
/// copied out. Both ends of a connection must be able to work at the same time; with a smaller buffer they would wait
/// for each other.
const LOCAL_BUFFERS: usize = 1 << 20;
/// Over one connection, at least.
const LOCAL_BUFFER: usize = 256 << 10;

/// An address for messages.
pub(super) fn describe(address: &SockAddr) -> String {
    if let Some(address) = address.as_socket() {
        return address.to_string();
    }
    if let Some((cid, port)) = address.as_vsock_address() {
        return format!("vsock:{cid}:{port}");
    }
    let shown = |path: &Path| UntrustedText::from_bytes(path.as_os_str().as_encoded_bytes()).to_string();
    address.as_pathname().map_or_else(|| "a local process".into(), shown)
}

/// The host at the other end of `socket`.
fn host_of(socket: &Socket, address: &SockAddr) -> Option<Host> {
    if let Some(address) = address.as_socket() {
        return Some(Host::ip(address.ip()));
    }
    if let Some((cid, _)) = address.as_vsock_address() {
        return Some(Host::Vsock(cid));
    }
    if address.is_unix() { process_of(socket) } else { None }
}

/// The process at the other end of a unix socket; `None` if it is in a process namespace that is not visible here.
fn process_of(socket: &Socket) -> Option<Host> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = libc::socklen_t::try_from(size_of_val(&peer)).ok()?;
    // SAFETY: the system writes at most `length` bytes to `peer`, which is as long and exists until the call has ended.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut length,
        )
    };
    let pid = u32::try_from(peer.pid).ok().filter(|pid| got == 0 && *pid > 0)?;
    Some(Host::Process { pid, uid: peer.uid })
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

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        os::unix::net::UnixStream,
    };

    use super::*;
    use crate::channel::Stop;

    fn context() -> Context {
        Context::new(&Stop::new())
    }

    #[test]
    fn the_host_of_a_socket_is_its_address_or_its_process() {
        let (one, _other) = UnixStream::pair().expect("a pair");
        let unix = SocketLink::new(Socket::from(one), &context()).expect("a link");
        assert_eq!(
            unix.host(),
            Some(Host::Process { pid: std::process::id(), uid: rustix::process::geteuid().as_raw() })
        );
        for listen in ["127.0.0.1:0", "[::1]:0", "[::ffff:127.0.0.1]:0"] {
            let Ok(listener) = TcpListener::bind(listen) else {
                assert!(listen.contains("::"), "IPv4 is there");
                continue;
            };
            let _near = TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
            let far = SocketLink::new(Socket::from(listener.accept().expect("accepted").0), &context())
                .expect("a link");
            let expected = if listen.contains("127") { "127.0.0.1" } else { "::1" };
            assert_eq!(far.host(), Some(Host::ip(expected.parse().expect("an address"))), "{listen}");
        }
    }

    #[test]
    fn connections_within_this_machine_send_from_buffers_that_fit_into_caches() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let near = TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
        let far = listener.accept().expect("accepted").0;
        let most: usize = std::fs::read_to_string("/proc/sys/net/core/wmem_max")
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .expect("a limit of buffers");
        let (one, other) = UnixStream::pair().expect("a pair");
        for socket in [Socket::from(near), Socket::from(far), Socket::from(one), Socket::from(other)] {
            let received = socket.recv_buffer_size().expect("a size");
            for (channels, expected) in [(1, 1 << 20), (2, 512 << 10), (4, 256 << 10), (255, 256 << 10)] {
                let again = socket.try_clone().expect("a descriptor");
                let link = SocketLink::new(again, &context().channels(channels)).expect("a link");
                // The system doubles the requested size, for its own bookkeeping.
                let sent = link.socket.send_buffer_size().expect("a size");
                assert_eq!(sent, 2 * most.min(expected), "{channels} channels");
            }
            assert_eq!(socket.recv_buffer_size().expect("a size"), received);
        }
    }
}
