//! Whether the host at the other end of a TCP connection still answers.
//!
//! Keep-alive looks after a connection on which nothing is under way. Where data are under way, or the peer's window is
//! shut, it is silent, and the system goes on for a quarter of an hour. `TCP_USER_TIMEOUT` would end that, and would
//! also end a connection whose peer answers every probe and takes nothing in: a guest that is stopped, a disk that is slow.
//! So the waits of a socket end now and then, and the system's own account is looked at: how often the peer has left
//! the same data, or the same question, unanswered, and when it was last heard of.
//!
//! The system asks again and again, each time twice as long after the last, up to two minutes: a network that was away for one
//! would be found out to be there again long after the host was given up. So the time between is bounded, where the system
//! can do that (Linux 6.15 and later).
//!
//! UNSAFETY: one system call fills a structure of plain numbers, whose size it is told.
#![expect(unsafe_code, reason = "the safe crates do not know TCP_INFO")]

use std::{fmt, io, mem::MaybeUninit, os::fd::AsRawFd, time::Duration};

use socket2::{Socket, TcpKeepalive};

use super::{TcpOptions, socket_option::set_option};

/// How a TCP connection is watched.
#[derive(Clone, Copy, Debug)]
pub(super) struct Watched {
    limit: Duration,
}

impl Watched {
    /// Sets the socket up as `options` say; `None` if it is left to the system.
    pub(super) fn set_up(socket: &Socket, options: &TcpOptions) -> io::Result<Option<Self>> {
        let limit = options.user_timeout;
        if options.keep_alive {
            let limit = limit.unwrap_or_else(|| TcpOptions::default().user_timeout.unwrap_or_default());
            socket.set_tcp_keepalive(&keepalive(limit))?;
        }
        let Some(limit) = limit else { return Ok(None) };
        let watched = Self { limit };
        bound_pauses(socket, limit);
        socket.set_write_timeout(Some(watched.interval()))?;
        socket.set_read_timeout(Some(watched.interval()))?;
        Ok(Some(watched))
    }

    /// How long a wait takes at most before the peer is looked at.
    pub(super) fn interval(self) -> Duration {
        self.limit / 3
    }

    /// # Errors
    /// [`io::ErrorKind::TimedOut`] if the host has not answered for the time set.
    pub(super) fn check(self, socket: &Socket) -> io::Result<()> {
        let Some(answers) = Answers::of(socket)? else { return Ok(()) };
        if answers.unanswered >= UNANSWERED && answers.silent >= self.limit {
            return Err(io::Error::new(io::ErrorKind::TimedOut, Gone { silent: answers.silent }));
        }
        Ok(())
    }
}

/// The host at the other end is given up.
#[derive(Debug)]
struct Gone {
    silent: Duration,
}

impl fmt::Display for Gone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the host has not answered for {} s", self.silent.as_secs())
    }
}

impl std::error::Error for Gone {}

/// Whether an error is of a host that has gone, by our account or by the system's.
pub(crate) fn is_of_a_host(error: &io::Error) -> bool {
    let ours = error.get_ref().is_some_and(|inner| inner.is::<Gone>());
    ours || error.kind() == io::ErrorKind::TimedOut && error.raw_os_error().is_some()
}

/// Has the system send unanswered data again after no more than a ninth of `limit`. One that cannot keeps to its own times.
fn bound_pauses(socket: &Socket, limit: Duration) {
    let bound = (limit / QUESTIONS).clamp(Duration::from_secs(1), LONGEST_PAUSE);
    let Ok(millis) = libc::c_int::try_from(bound.as_millis()) else { return };
    let set = set_option(socket, libc::IPPROTO_TCP, TCP_RTO_MAX_MS, millis);
    tracing::trace!(set = set.is_ok(), millis, "tcp_rto_max");
}

/// The C library does not know it yet.
const TCP_RTO_MAX_MS: libc::c_int = 44;
/// The system's own, and the most it takes.
const LONGEST_PAUSE: Duration = Duration::from_secs(120);
/// How often a host is asked, at least, before it is given up.
const QUESTIONS: u32 = 9;

/// One is under way at any time.
const UNANSWERED: u8 = 2;

/// 90 s: after 30 s without a sign of life, six questions, 10 s apart.
fn keepalive(limit: Duration) -> TcpKeepalive {
    let second = Duration::from_secs(1);
    TcpKeepalive::new()
        .with_time((limit / 3).max(second))
        .with_interval((limit / QUESTIONS).max(second))
        .with_retries(6)
}

/// What the system knows of the peer.
struct Answers {
    /// Times that the same data were sent again, or probes of a shut window, since the peer was last heard of.
    unanswered: u8,
    /// Since it was last heard of.
    silent: Duration,
}

impl Answers {
    /// `None` where the system does not tell.
    fn of(socket: &Socket) -> io::Result<Option<Self>> {
        let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
        let Ok(mut length) = libc::socklen_t::try_from(size_of::<libc::tcp_info>()) else { return Ok(None) };
        // SAFETY: `info` has `length` bytes to be written, and is not used otherwise during the call.
        let told = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                info.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        if told != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: every byte was zero before the call, and any bytes are numbers.
        let info = unsafe { info.assume_init() };
        Ok(Some(Self {
            unanswered: info.tcpi_retransmits.max(info.tcpi_probes),
            silent: Duration::from_millis(info.tcpi_last_ack_recv.into()),
        }))
    }
}
