//! Where the other end of a connection is: what tells a channel of this migration from a stranger's.

use std::net::IpAddr;

/// Where the other end of a connection is, as the system reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Host {
    /// An IP address. An IPv4 address that is mapped into IPv6 is given as [`Host::ip`] gives it: as IPv4.
    Ip(IpAddr),
    /// A context id of vsock.
    Vsock(u32),
    /// The process that opened the connection, for a unix socket.
    Process(u32),
}

impl Host {
    /// The host with this IP address.
    pub fn ip(address: IpAddr) -> Self {
        Self::Ip(address.to_canonical())
    }
}
