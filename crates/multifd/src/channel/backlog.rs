//! How many bytes wait in a TCP connection: those that the peer has not acknowledged yet.

use socket2::Socket;

use super::socket_option::set_option;

/// The limit of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backlog {
    /// What the send buffer has without a limit; `None` if the system chooses.
    usual: Option<usize>,
    limit: Option<u64>,
    /// Whether the system can choose again. Where it cannot, there is no limit.
    returns: Option<bool>,
}

impl Backlog {
    pub(super) fn new(usual: Option<usize>) -> Self {
        Self { usual, limit: None, returns: usual.map(|_| true) }
    }

    /// Sets the limit, or ends it.
    pub(super) fn limit(&mut self, socket: &Socket, limit: Option<u64>) {
        let limit = limit.filter(|limit| *limit <= MOST);
        let near = |old: u64, new: u64| old.abs_diff(new) <= old / 4;
        if limit == self.limit || self.limit.zip(limit).is_some_and(|(old, new)| near(old, new)) {
            return;
        }
        let returns = *self.returns.get_or_insert_with(|| unlock(socket));
        let set = match limit.map(usize::try_from) {
            Some(_) if !returns => return,
            // The system doubles it, because it counts what it needs itself.
            Some(Ok(bytes)) => socket.set_send_buffer_size(bytes / 2).is_ok(),
            _ => {
                self.usual.map_or_else(|| unlock(socket), |bytes| socket.set_send_buffer_size(bytes).is_ok())
            }
        };
        tracing::trace!(?limit, set, "backlog");
        self.limit = limit;
    }
}

/// Lets the system choose the size of the send buffer. `false` if it cannot, before Linux 5.14.
fn unlock(socket: &Socket) -> bool {
    set_option(socket, libc::SOL_SOCKET, SO_BUF_LOCK, 0).is_ok()
}

/// The C library does not define it yet.
const SO_BUF_LOCK: libc::c_int = 72;
/// Above it, the system's own limit for buffers of a fixed size is near, and a limit would cost throughput.
const MOST: u64 = 256 << 10;

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        net::{TcpListener, TcpStream},
    };

    use super::*;

    /// The bytes that a connection takes whose peer reads nothing.
    fn taken(socket: &Socket) -> u64 {
        socket.set_nonblocking(true).unwrap();
        let mut all = 0;
        while let Ok(sent) = (&*socket).write(&[7; 4096]) {
            all += sent as u64;
        }
        all
    }

    fn connection() -> (Socket, TcpStream) {
        let listener = Socket::from(TcpListener::bind("127.0.0.1:0").unwrap());
        listener.set_recv_buffer_size(4096).unwrap();
        let listener = TcpListener::from(listener);
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near.into(), listener.accept().unwrap().0)
    }

    #[test]
    fn less_waits_in_a_connection_with_a_limit_and_as_much_as_before_without_it() {
        let limit = 32 << 10;
        for usual in [None, Some(1 << 20)] {
            let (socket, _peer) = connection();
            usual.into_iter().for_each(|bytes| socket.set_send_buffer_size(bytes).unwrap());
            let unlimited = socket.send_buffer_size().unwrap();
            let mut backlog = Backlog::new(usual);
            backlog.limit(&socket, Some(limit));
            let bytes = taken(&socket);
            assert!(bytes <= 2 * limit, "{bytes}");
            backlog.limit(&socket, None);
            if usual.is_some() {
                assert_eq!(socket.send_buffer_size().unwrap(), unlimited);
                assert!(taken(&socket) > 2 * limit);
            }
        }
    }

    #[test]
    fn limits_that_are_near_or_too_large_change_nothing() {
        let (socket, _peer) = connection();
        let mut backlog = Backlog::new(Some(1 << 20));
        backlog.limit(&socket, Some(64 << 10));
        let size = socket.send_buffer_size().unwrap();
        backlog.limit(&socket, Some(70 << 10));
        assert_eq!(socket.send_buffer_size().unwrap(), size);
        backlog.limit(&socket, Some(MOST + 1));
        assert!(socket.send_buffer_size().unwrap() > size, "it is as large as usual");
    }
}
