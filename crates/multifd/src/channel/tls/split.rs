//! A TLS session whose two directions belong to two threads.
//!
//! ```text
//! sender:   plain ─▶ [session: encrypt] ─▶ connection         the session is locked only between the brackets,
//! receiver: connection ─▶ [session: decrypt] ─▶ plain         never during a wait for the connection
//! ```
//!
//! Only the sender writes to the connection, so records leave in the order in which the session has made them. What the
//! session answers to the other side, such as new keys, leaves with the sender's next bytes.

use std::{
    io::{self, Write},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustls::Connection;

use super::session::{Keys, Received, copy_out, explained, session_closed};
use crate::{
    channel::{Host, Link, PeerSignal, Wake, link::send_all},
    ram::{Part, PartMut},
};

/// The session of both directions. Locked for as long as bytes are encrypted or decrypted.
type Session = Arc<Mutex<Connection>>;

/// The direction in which bytes are sent.
pub(super) struct Sending {
    link: Box<dyn Link>,
    session: Session,
    keys: Keys,
    plain: Box<[u8]>,
    sealed: Vec<u8>,
    /// Whether the closing alert is sent at the end, as a destination does.
    alerts: bool,
}

impl Drop for Sending {
    fn drop(&mut self) {
        if self.alerts {
            let _ = self.alert();
        }
    }
}

/// The direction in which bytes are received.
pub(super) struct Receiving {
    link: Box<dyn Link>,
    session: Session,
    received: Received,
    failed: Option<io::Error>,
}

/// Splits a session whose handshake is done. `links` are the two directions of the connection.
pub(super) fn split(
    session: Connection,
    keys: Keys,
    (received, failed): (Received, Option<io::Error>),
    plain: usize,
    (receives, sends): (Box<dyn Link>, Box<dyn Link>),
) -> (Receiving, Sending) {
    let session = Arc::new(Mutex::new(session));
    let receiving = Receiving { link: receives, session: session.clone(), received, failed };
    let plain = vec![0; plain].into();
    (receiving, Sending { link: sends, session, keys, plain, sealed: Vec::new(), alerts: false })
}

fn lock(session: &Session) -> MutexGuard<'_, Connection> {
    session.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sending {
    /// Sends the closing alert when this is dropped.
    pub(super) fn alert_at_end(&mut self, on: bool) {
        self.alerts = on;
    }

    fn alert(&mut self) -> io::Result<()> {
        let mut session = lock(&self.session);
        session.send_close_notify();
        while session.wants_write() {
            session.write_tls(&mut self.sealed)?;
        }
        drop(session);
        self.flush()
    }

    /// Sends what the session has made, without its lock.
    fn flush(&mut self) -> io::Result<()> {
        let sent = send_all(&mut *self.link, &mut [Part::from(&self.sealed[..])]);
        self.sealed.clear();
        sent
    }
}

impl Link for Sending {
    fn send(&mut self, parts: &[Part<'_>]) -> io::Result<usize> {
        let mut taken = 0;
        for part in parts {
            let copied = part.copy_to(&mut self.plain[taken..]);
            taken += copied;
            if copied < part.len() {
                break;
            }
        }
        let mut session = lock(&self.session);
        self.keys.spend(&mut session, taken, &*self.link)?;
        session.writer().write_all(&self.plain[..taken])?;
        while session.wants_write() {
            session.write_tls(&mut self.sealed)?;
        }
        drop(session);
        self.flush()?;
        Ok(taken)
    }

    fn recv(&mut self, _: &mut [PartMut<'_>]) -> io::Result<usize> {
        Err(only("sends"))
    }

    fn set_recv_timeout(&mut self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }

    fn is_readable(&mut self) -> io::Result<bool> {
        Ok(false)
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.link.waker()
    }

    fn send_waker(&self) -> Arc<dyn Wake> {
        self.link.send_waker()
    }

    fn recv_waker(&self) -> Arc<dyn Wake> {
        self.link.recv_waker()
    }

    fn peer_signal(&self) -> io::Result<Option<PeerSignal>> {
        Ok(self.link.peer_signal()?.map(|signal| PeerSignal { plain: false, ..signal }))
    }

    fn limit_backlog(&mut self, limit: Option<u64>) {
        self.link.limit_backlog(limit);
    }

    fn round_trip(&self) -> Option<Duration> {
        self.link.round_trip()
    }

    fn peer(&self) -> String {
        self.link.peer()
    }

    fn host(&self) -> Option<Host> {
        self.link.host()
    }

    fn close_send(&mut self) -> io::Result<()> {
        self.alerts = false;
        self.alert()?;
        self.link.close_send()
    }

    fn finish(&mut self) -> io::Result<()> {
        self.link.finish()
    }
}

impl Link for Receiving {
    fn send(&mut self, _: &[Part<'_>]) -> io::Result<usize> {
        Err(only("receives"))
    }

    fn recv(&mut self, parts: &mut [PartMut<'_>]) -> io::Result<usize> {
        loop {
            let mut session = lock(&self.session);
            let copied = copy_out(&mut session, parts)?;
            if copied > 0 || self.received.ended || session_closed(&mut session) {
                return Ok(copied);
            }
            drop(session);
            if let Some(error) = self.failed.take() {
                return Err(error);
            }
            self.received.fill(&mut *self.link)?;
            let mut session = lock(&self.session);
            if let Err(error) = self.received.give(&mut session) {
                // Bytes before it in the same call are valid.
                self.failed = Some(error);
            } else if let Err(error) = session.process_new_packets() {
                self.failed = Some(explained(error));
            }
        }
    }

    fn set_recv_timeout(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.link.set_recv_timeout(limit)
    }

    fn is_readable(&mut self) -> io::Result<bool> {
        self.link.is_readable()
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.link.waker()
    }

    fn send_waker(&self) -> Arc<dyn Wake> {
        self.link.send_waker()
    }

    fn recv_waker(&self) -> Arc<dyn Wake> {
        self.link.recv_waker()
    }

    fn peer_signal(&self) -> io::Result<Option<PeerSignal>> {
        Ok(self.link.peer_signal()?.map(|signal| PeerSignal { plain: false, ..signal }))
    }

    fn peer(&self) -> String {
        self.link.peer()
    }

    fn host(&self) -> Option<Host> {
        self.link.host()
    }

    fn close_send(&mut self) -> io::Result<()> {
        Err(only("receives"))
    }

    fn finish(&mut self) -> io::Result<()> {
        self.link.finish()
    }
}

fn only(does: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, format!("this half of a connection only {does}"))
}
