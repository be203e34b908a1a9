//! What the system knows about a TCP connection.
//!
//! UNSAFETY: one system call fills a structure of plain numbers, whose size is passed to it.
#![expect(unsafe_code, reason = "the safe crates do not know TCP_INFO")]

use std::{io, mem::MaybeUninit, os::fd::AsRawFd, time::Duration};

use socket2::Socket;

/// The system's counters.
pub(super) struct TcpInfo {
    /// How often the same data or probes of a closed window were sent again since the peer's last answer.
    pub(super) unanswered: u8,
    /// The time since the peer's last answer.
    pub(super) silent: Duration,
    /// The shortest round trip of the last minutes; `None` if none is known.
    pub(super) round_trip: Option<Duration>,
}

impl TcpInfo {
    /// Reads the counters; `None` if the system does not provide them.
    pub(super) fn of(socket: &Socket) -> io::Result<Option<Self>> {
        let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
        let Ok(mut length) = libc::socklen_t::try_from(size_of::<libc::tcp_info>()) else { return Ok(None) };
        // SAFETY: `info` has `length` bytes to be written, and is not used otherwise during the call.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                info.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: every byte was zero before the call, and any bytes are numbers.
        let info = unsafe { info.assume_init() };
        // Until it has measured one, the system says that it is as long as can be.
        let measured = (1..u32::MAX).contains(&info.tcpi_min_rtt);
        Ok(Some(Self {
            unanswered: info.tcpi_retransmits.max(info.tcpi_probes),
            silent: Duration::from_millis(info.tcpi_last_ack_recv.into()),
            round_trip: measured.then(|| Duration::from_micros(info.tcpi_min_rtt.into())),
        }))
    }
}
