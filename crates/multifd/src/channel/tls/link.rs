//! A link over a TLS session.
//!
//! Bytes to send are copied out of guest memory first, because it may change while they are encrypted. Received bytes
//! are decrypted in private memory and copied in. The sender changes keys before the cipher requires it. The answer to
//! a change of keys, and an alert, are sent with the next send or receive.

use std::{
    io::{self, BufRead, IoSlice, Write},
    ops::{Deref, DerefMut},
    sync::Arc,
    time::Duration,
};

use arrayvec::ArrayVec;
use rustls::{ClientConnection, Connection, ServerConnection};

use super::{
    ClientCredentials, ServerCredentials,
    session::{Keys, RECORD, Received, Refused, copy_out, explained, session_closed},
    split::{Receiving, Sending, split},
};
use crate::{
    channel::{Host, Link, PeerSignal, Wake, deadline},
    ram::{Part, PartMut},
    sync_types::Instant,
};

/// A connection with a session on it.
pub(super) struct TlsLink {
    link: Box<dyn Link>,
    session: Connection,
    keys: Keys,
    /// Whether the closing alert is still to be sent. It is sent once: by a source when it closes its side, by a
    /// destination when it is finished.
    open: bool,
    /// A private copy of the bytes to be sent next; empty before the first send.
    plain: Box<[u8]>,
    received: Received,
    /// The error to report after everything before it has been read.
    failed: Option<io::Error>,
    timeout: Option<Duration>,
    /// Whether the connection was given a shorter limit than `timeout`.
    limited: bool,
}

impl TlsLink {
    /// The two directions.
    ///
    /// # Errors
    /// If the handshake is not done: neither direction could complete it alone.
    fn halves(self) -> io::Result<(Receiving, Sending)> {
        if self.session.is_handshaking() {
            let why = "a TLS connection cannot be split before its handshake is done";
            return Err(io::Error::new(io::ErrorKind::NotConnected, why));
        }
        let Self { link, session, keys, received, failed, .. } = self;
        Ok(split(session, keys, (received, failed), PLAIN, link.split()?))
    }

    /// Creates a source's end; the handshake is still to be done.
    pub(super) fn client(link: Box<dyn Link>, credentials: &ClientCredentials) -> io::Result<Self> {
        let session = ClientConnection::new(credentials.config.clone(), credentials.name.clone());
        Ok(Self::new(link, session.map_err(io::Error::other)?.into(), credentials.rekey_after))
    }

    /// Creates a destination's end; the first read does the handshake.
    pub(super) fn server(link: Box<dyn Link>, credentials: &ServerCredentials) -> io::Result<Self> {
        let session = ServerConnection::new(credentials.config.clone());
        Ok(Self::new(link, session.map_err(io::Error::other)?.into(), credentials.rekey_after))
    }

    fn new(link: Box<dyn Link>, mut session: Connection, rekey_after: u64) -> Self {
        // Bytes to be sent leave in the same call.
        session.set_buffer_limit(None);
        // Hundreds of connections may be in their handshake, so until its end a session has the smallest buffers.
        let received = Received { buffer: vec![0; CIPHERED_RECORD].into(), from: 0, to: 0, ended: false };
        Self {
            link,
            session,
            keys: Keys { spent: 0, rekey_after },
            open: false,
            plain: Box::default(),
            received,
            failed: None,
            timeout: None,
            limited: false,
        }
    }

    /// Does the handshake: both ends agree on keys and verify identities.
    pub(super) fn handshake(&mut self, end: Option<Instant>) -> io::Result<()> {
        let begins = self.session.is_handshaking();
        while self.session.is_handshaking() {
            if self.session.wants_write() {
                self.flush().map_err(closed_meanwhile)?;
            } else {
                match self.receive(end) {
                    Err(error) if self.session.is_handshaking() => return Err(closed_meanwhile(error)),
                    // The error came after the handshake, in the same call: the next read reports it.
                    Err(error) => self.failed = Some(error),
                    Ok(()) => {}
                }
                if self.received.ended && self.session.is_handshaking() {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, CLOSED));
                }
            }
        }
        self.flush()?;
        if begins {
            self.open = matches!(self.session, Connection::Server(_));
        }
        if std::mem::take(&mut self.limited) {
            // The handshake's limit does not apply to later reads.
            self.link.set_recv_timeout(self.timeout)?;
        }
        Ok(())
    }

    /// Sends all bytes that the session has produced.
    fn flush(&mut self) -> io::Result<()> {
        while self.session.wants_write() {
            self.session.write_tls(&mut Out(&mut *self.link))?;
        }
        Ok(())
    }

    /// Passes more bytes to the session, and waits for them if none have arrived.
    fn receive(&mut self, end: Option<Instant>) -> io::Result<()> {
        let received = &mut self.received;
        if received.from == received.to {
            if let Some(end) = end {
                let left = end.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                self.link.set_recv_timeout(Some(left))?;
                self.limited = true;
            }
            if !self.session.is_handshaking() && received.buffer.len() < CIPHERED {
                received.buffer = vec![0; CIPHERED].into();
            }
        }
        received.fill(&mut *self.link)?;
        received.give(&mut self.session)?;
        if let Err(error) = self.session.process_new_packets() {
            // The peer is sent the reason, in case it still reads. Nothing more is read from it: a peer that believes
            // it has sent everything believes that the migration is complete.
            self.open = false;
            let _ = self.flush();
            return Err(explained(error));
        }
        self.flush()
    }

    /// Closes the connection so that the last bytes sent arrive. If unread bytes remain when the socket is closed, the
    /// system resets the connection, and bytes in transit are lost.
    fn part(&mut self, limit: Duration) {
        self.open = false;
        let end = deadline(limit);
        // A broken connection has nothing in transit.
        let _ = self.link.close_send();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let waits = !left.is_zero() && self.link.set_recv_timeout(Some(left)).is_ok();
            if !waits || !matches!(self.link.recv(&mut [PartMut::from(&mut *self.received.buffer)]), Ok(1..))
            {
                break;
            }
        }
    }

    /// Explains a write that failed because the peer has closed: with the peer's reason, if it has sent one.
    fn last_word(&mut self, error: io::Error) -> io::Error {
        let hung_up = matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset);
        if !hung_up {
            return error;
        }
        let end = deadline(MOMENT);
        while !self.received.ended {
            match self.receive(Some(end)) {
                Ok(()) if session_closed(&mut self.session) => {
                    let why = "the other side has closed the session: check that its tls-authz lists our certificate's \
                               subject";
                    return io::Error::new(error.kind(), Refused { why: why.into() });
                }
                Ok(()) => {}
                Err(alert) if alert.get_ref().is_some_and(|inner| inner.is::<Refused>()) => return alert,
                Err(_) => break,
            }
        }
        let why = format!(
            "{error}: it may have refused our client-cert.pem, or require one in the folder of tls-creds; its own log has \
             the reason"
        );
        io::Error::new(error.kind(), Refused { why })
    }
}

impl Link for TlsLink {
    fn send(&mut self, parts: &[Part<'_>]) -> io::Result<usize> {
        let end = self.timeout.map(deadline);
        self.handshake(end)?;
        if self.plain.is_empty() {
            self.plain = vec![0; PLAIN].into();
        }
        let mut taken = 0;
        for part in parts {
            let copied = part.copy_to(&mut self.plain[taken..]);
            taken += copied;
            if copied < part.len() {
                break;
            }
        }
        self.keys.spend(&mut self.session, taken, &*self.link)?;
        self.session.writer().write_all(&self.plain[..taken])?;
        self.flush().map_err(|error| self.last_word(error))?;
        Ok(taken)
    }

    fn recv(&mut self, parts: &mut [PartMut<'_>]) -> io::Result<usize> {
        let end = self.timeout.map(deadline);
        self.handshake(end)?;
        loop {
            let copied = copy_out(&mut self.session, parts)?;
            if copied > 0 || self.received.ended {
                return Ok(copied);
            }
            if let Some(error) = self.failed.take() {
                return Err(error);
            }
            match self.receive(end) {
                Ok(()) => {}
                // The end of the stream, with or without a closing alert.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                // The bytes before it in the same call are valid.
                Err(error) => self.failed = Some(error),
            }
            if self.failed.is_none() && session_closed(&mut self.session) {
                return copy_out(&mut self.session, parts);
            }
        }
    }

    /// Also `true` if what has arrived is not a whole record yet, or concerns only the session.
    fn is_readable(&mut self) -> io::Result<bool> {
        match self.session.reader().fill_buf() {
            Ok(_) => Ok(true),
            Err(_) => self.link.is_readable(),
        }
    }

    fn set_recv_timeout(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.timeout = limit;
        self.link.set_recv_timeout(limit)
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
        self.session.send_close_notify();
        self.flush()?;
        self.link.close_send()?;
        // A side that does not read was sent something nevertheless, for example tickets.
        self.part(DRAIN);
        self.link.set_recv_timeout(self.timeout)
    }

    fn finish(&mut self) -> io::Result<()> {
        self.link.finish()
    }

    fn can_split(&self) -> bool {
        self.link.can_split()
    }

    /// The handshake of a source is done when it has connected.
    fn split(self: Box<Self>) -> io::Result<(Box<dyn Link>, Box<dyn Link>)> {
        let (receiving, sending) = self.halves()?;
        Ok((Box::new(receiving), Box::new(sending)))
    }
}

/// A destination's end. When it is dropped, the source is sent the closing alert.
pub(super) struct ServerLink {
    /// `None` only while it is split or dropped.
    link: Option<TlsLink>,
}

impl ServerLink {
    pub(super) fn new(link: TlsLink) -> Self {
        Self { link: Some(link) }
    }
}

impl Deref for ServerLink {
    type Target = TlsLink;

    fn deref(&self) -> &TlsLink {
        self.link.as_ref().expect("only a split takes it, and consumes this")
    }
}

impl DerefMut for ServerLink {
    fn deref_mut(&mut self) -> &mut TlsLink {
        self.link.as_mut().expect("only a split takes it, and consumes this")
    }
}

impl Drop for ServerLink {
    fn drop(&mut self) {
        let Some(link) = &mut self.link else { return };
        if std::mem::take(&mut link.open) {
            link.session.send_close_notify();
            // A destination sends little, and there is room for it.
            let _ = link.flush();
        }
    }
}

impl Link for ServerLink {
    fn send(&mut self, parts: &[Part<'_>]) -> io::Result<usize> {
        (**self).send(parts)
    }

    fn recv(&mut self, parts: &mut [PartMut<'_>]) -> io::Result<usize> {
        (**self).recv(parts)
    }

    fn set_recv_timeout(&mut self, limit: Option<Duration>) -> io::Result<()> {
        (**self).set_recv_timeout(limit)
    }

    fn is_readable(&mut self) -> io::Result<bool> {
        (**self).is_readable()
    }

    fn waker(&self) -> Arc<dyn Wake> {
        (**self).waker()
    }

    fn send_waker(&self) -> Arc<dyn Wake> {
        (**self).send_waker()
    }

    fn recv_waker(&self) -> Arc<dyn Wake> {
        (**self).recv_waker()
    }

    fn peer_signal(&self) -> io::Result<Option<PeerSignal>> {
        (**self).peer_signal()
    }

    fn limit_backlog(&mut self, limit: Option<u64>) {
        (**self).limit_backlog(limit);
    }

    fn round_trip(&self) -> Option<Duration> {
        (**self).round_trip()
    }

    fn peer(&self) -> String {
        (**self).peer()
    }

    fn host(&self) -> Option<Host> {
        (**self).host()
    }

    fn close_send(&mut self) -> io::Result<()> {
        (**self).close_send()
    }

    fn send_more(&mut self, parts: &[Part<'_>]) -> io::Result<usize> {
        (**self).send_more(parts)
    }

    fn zero_copy(&mut self) -> Option<&mut dyn crate::channel::ZeroCopy> {
        (**self).zero_copy()
    }

    fn finish(&mut self) -> io::Result<()> {
        (**self).finish()
    }

    fn can_split(&self) -> bool {
        (**self).can_split()
    }

    /// The handshake of a destination is done when something was received. The closing alert is sent when the sending half is dropped.
    fn split(mut self: Box<Self>) -> io::Result<(Box<dyn Link>, Box<dyn Link>)> {
        let link = self.link.take().ok_or(io::ErrorKind::NotConnected)?;
        let open = link.open;
        let (receiving, mut sending) = link.halves()?;
        sending.alert_at_end(open);
        Ok((Box::new(receiving), Box::new(sending)))
    }
}

/// The connection as a writer.
struct Out<'a>(&'a mut dyn Link);

impl Write for Out<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.send(&[Part::from(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let parts: ArrayVec<Part<'_>, RECORDS> =
            slices.iter().take(RECORDS).map(|slice| Part::from(&**slice)).collect();
        self.0.send(&parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A side that does not expect a handshake closes the connection before it has read all of it, which is a reset here.
fn closed_meanwhile(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            io::Error::new(io::ErrorKind::UnexpectedEof, CLOSED)
        }
        _ => error,
    }
}

const CLOSED: &str =
    "the other side closed the connection during the TLS handshake: check that it uses TLS (tls-creds)";
/// Seven records per call. The system sends 64 KiB at a time. Four or eight records, each with its head and tag, end
/// just after that, and the receiver is woken for the rest: half the speed.
const PLAIN: usize = 7 * RECORD;
/// A record with everything around it.
const CIPHERED_RECORD: usize = 18 << 10;
/// As many records, and the next one.
const CIPHERED: usize = PLAIN + CIPHERED_RECORD;
const RECORDS: usize = 16;
const MOMENT: Duration = Duration::from_millis(200);
const DRAIN: Duration = Duration::from_millis(1);
