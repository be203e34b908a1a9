//! Wakers that end the waits of a socket's owner from another thread.

use std::{net::Shutdown, sync::Arc, time::Duration};

use socket2::Socket;

use super::Wake;

/// Shuts a socket down in both directions; the descriptor stays open until its owner drops it.
pub(super) struct Shut {
    pub(super) socket: Arc<Socket>,
    /// Whether closing the socket must cause a reset.
    pub(super) reset: bool,
}

impl Wake for Shut {
    fn wake(&self) {
        if self.reset {
            // An owner that reads to the end after the shutdown leaves nothing unread, so the close would be a normal
            // one. A source whose bytes fill the network would then continue to ask for room, until the system has
            // forgotten the connection a minute later. With this option the close is a reset.
            let _ = self.socket.set_linger(Some(Duration::ZERO));
        }
        // The peer may have closed it already, which is fine.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// Ends only receiving, so that a last message can still be sent.
pub(super) struct ShutRecv(pub(super) Arc<Socket>);

impl Wake for ShutRecv {
    fn wake(&self) {
        let _ = self.0.shutdown(Shutdown::Read);
    }
}

/// Ends only sending: what was sent arrives, then the end; incoming bytes can still be received.
pub(super) struct ShutSend(pub(super) Arc<Socket>);

impl Wake for ShutSend {
    fn wake(&self) {
        let _ = self.0.shutdown(Shutdown::Write);
    }
}
