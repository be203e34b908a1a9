//! How another thread ends what the owner of a socket waits for.

use std::{net::Shutdown, sync::Arc, time::Duration};

use socket2::Socket;

use super::Wake;

/// Shuts a socket down both ways; the descriptor stays open until its owner drops it.
pub(super) struct Shut {
    pub(super) socket: Arc<Socket>,
    /// Whether its close is to be a reset.
    pub(super) reset: bool,
}

impl Wake for Shut {
    fn wake(&self) {
        if self.reset {
            // Whoever reads on to the end after the shutdown leaves nothing unread, so that the close would be a quiet one:
            // a source whose bytes fill the network would go on asking for room, until the system has forgotten the
            // connection, a minute later. With this the close is a reset.
            let _ = self.socket.set_linger(Some(Duration::ZERO));
        }
        // It may be closed by the peer already, which is as good.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// Ends receiving alone, so that a last word can still be sent.
pub(super) struct ShutRecv(pub(super) Arc<Socket>);

impl Wake for ShutRecv {
    fn wake(&self) {
        let _ = self.0.shutdown(Shutdown::Read);
    }
}

/// Ends sending alone: what was sent arrives, then the end; what comes can still be received.
pub(super) struct ShutSend(pub(super) Arc<Socket>);

impl Wake for ShutSend {
    fn wake(&self) {
        let _ = self.0.shutdown(Shutdown::Write);
    }
}
