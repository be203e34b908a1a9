//! The host at the other end of a connection: it distinguishes this migration's channels from foreign connections.

use std::net::IpAddr;

/// The host at the other end of a connection, as the system reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Host {
    /// An IP address. [`Host::ip`] converts an IPv4 address that is mapped into IPv6 to IPv4.
    Ip(IpAddr),
    /// A context id of vsock.
    Vsock(u32),
    /// The process that opened the connection, for a unix socket.
    Process {
        /// Its number.
        pid: u32,
        /// The number of its user.
        uid: u32,
    },
}

impl Host {
    /// The host with this IP address.
    pub fn ip(address: IpAddr) -> Self {
        Self::Ip(address.to_canonical())
    }
}
