//! Checks whether the host at the other end of a TCP connection still answers.
//!
//! Keep-alive covers a connection without data in flight. While data are in flight, or the peer's window is closed,
//! keep-alive is inactive, and the system retries for a quarter of an hour. `TCP_USER_TIMEOUT` would shorten that. But
//! it would also end a connection whose peer answers every probe and reads nothing: a guest that is stopped, a disk
//! that is slow. So the waits of a socket end from time to time, and the system's own counters are checked: how often
//! the peer has left the same data or the same probe unanswered, and when the peer last answered.
//!
//! The system retransmits repeatedly and doubles the interval each time, up to two minutes. After a network failure of
//! one minute, it would notice the recovery only long after the host counts as lost. So the interval is bounded, if the
//! system supports it (Linux 6.15 and later).

use std::{fmt, io, time::Duration};

use socket2::{Socket, TcpKeepalive};

use super::{TcpOptions, socket_option::set_option, tcp_info::TcpInfo};

/// How a TCP connection is watched.
#[derive(Clone, Copy, Debug)]
pub(super) struct Watched {
    limit: Duration,
}

impl Watched {
    /// Sets up the socket as `options` specify; `None` if this is left to the system.
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

    /// The longest wait until the peer is checked.
    pub(super) fn interval(self) -> Duration {
        self.limit / 3
    }

    /// # Errors
    /// [`io::ErrorKind::TimedOut`] if the host has not answered for the time set.
    pub(super) fn check(self, socket: &Socket) -> io::Result<()> {
        let Some(answers) = TcpInfo::of(socket)? else { return Ok(()) };
        if answers.unanswered >= UNANSWERED && answers.silent >= self.limit {
            return Err(io::Error::new(io::ErrorKind::TimedOut, Gone { silent: answers.silent }));
        }
        Ok(())
    }
}

/// The host at the other end does not answer any more.
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

/// Whether an error means that a host is lost, according to our check or the system.
pub(crate) fn is_of_a_host(error: &io::Error) -> bool {
    let ours = error.get_ref().is_some_and(|inner| inner.is::<Gone>());
    ours || error.kind() == io::ErrorKind::TimedOut && error.raw_os_error().is_some()
}

/// Makes the system retransmit unanswered data at intervals of at most a ninth of `limit`. A system that cannot do this
/// keeps its own intervals.
fn bound_pauses(socket: &Socket, limit: Duration) {
    let bound = (limit / QUESTIONS).clamp(Duration::from_secs(1), LONGEST_PAUSE);
    let Ok(millis) = libc::c_int::try_from(bound.as_millis()) else { return };
    let set = set_option(socket, libc::IPPROTO_TCP, TCP_RTO_MAX_MS, millis);
    tracing::trace!(set = set.is_ok(), millis, "tcp_rto_max");
}

/// The C library does not define it yet.
const TCP_RTO_MAX_MS: libc::c_int = 44;
/// The system's own interval, and the greatest that it accepts.
const LONGEST_PAUSE: Duration = Duration::from_secs(120);
/// The least number of probes before a host counts as lost.
const QUESTIONS: u32 = 9;

/// One probe is pending at any time.
const UNANSWERED: u8 = 2;

/// For 90 s: after 30 s without an answer, six probes, 10 s apart.
fn keepalive(limit: Duration) -> TcpKeepalive {
    let second = Duration::from_secs(1);
    TcpKeepalive::new()
        .with_time((limit / 3).max(second))
        .with_interval((limit / QUESTIONS).max(second))
        .with_retries(6)
}
