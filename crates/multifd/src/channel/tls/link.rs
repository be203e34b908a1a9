//! A session as a link.
//!
//! Bytes to send are copied out of guest memory first, for it changes while they are packed; bytes received are
//! unpacked in private memory and copied in. Keys are changed by whoever sends, as often as the cipher asks for; the
//! answer to a change, and an alert, leave with the next thing that is sent or received.

use std::{
    io::{self, BufRead, IoSlice, Write},
    sync::Arc,
    time::{Duration, Instant},
};

use arrayvec::ArrayVec;
use rustls::{AlertDescription, ClientConnection, Connection, Error as TlsError, ServerConnection};

use super::{ClientCredentials, ServerCredentials, subject};
use crate::{
    channel::{Link, Wake, deadline},
    ram::{Part, PartMut},
};

/// A connection with a session on it.
pub(super) struct TlsLink {
    link: Box<dyn Link>,
    session: Connection,
    /// Who may come, until the session has told who it is.
    authz: Option<Arc<[String]>>,
    /// A private copy of what is sent next.
    plain: Box<[u8]>,
    received: Received,
    timeout: Option<Duration>,
    /// The connection was given a shorter limit than `timeout`.
    limited: bool,
}

/// Bytes of the connection that the session has not looked at.
struct Received {
    buffer: Box<[u8]>,
    from: usize,
    to: usize,
    ended: bool,
}

impl TlsLink {
    /// A source's end; the handshake is still to come.
    pub(super) fn client(link: Box<dyn Link>, credentials: &ClientCredentials) -> io::Result<Self> {
        let session = ClientConnection::new(credentials.config.clone(), credentials.name.clone());
        Ok(Self::new(link, session.map_err(io::Error::other)?.into(), None))
    }

    /// A destination's end; the handshake comes with the first read.
    pub(super) fn server(link: Box<dyn Link>, credentials: &ServerCredentials) -> io::Result<Self> {
        let session = ServerConnection::new(credentials.config.clone());
        Ok(Self::new(link, session.map_err(io::Error::other)?.into(), Some(credentials.authz.clone())))
    }

    fn new(link: Box<dyn Link>, mut session: Connection, authz: Option<Arc<[String]>>) -> Self {
        // What is sent leaves in the same call.
        session.set_buffer_limit(None);
        let received = Received { buffer: vec![0; CIPHERED].into(), from: 0, to: 0, ended: false };
        Self { link, session, authz, plain: vec![0; PLAIN].into(), received, timeout: None, limited: false }
    }

    /// Agrees with the peer on keys and on who is who.
    pub(super) fn handshake(&mut self, end: Option<Instant>) -> io::Result<()> {
        while self.session.is_handshaking() {
            if self.session.wants_write() {
                self.flush()?;
            } else {
                self.receive(end)?;
                if self.received.ended && self.session.is_handshaking() {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, CLOSED));
                }
            }
        }
        self.flush()?;
        if std::mem::take(&mut self.limited) {
            // The handshake's limit is not that of the reads to come.
            self.link.set_recv_timeout(self.timeout)?;
        }
        if let Some(authz) = self.authz.take() {
            let admitted = subject::admit(&authz, self.session.peer_certificates());
            if admitted.is_err() {
                // It is told only that it may not; there is no better word for it in TLS.
                self.session.send_close_notify();
                let _ = self.flush();
            }
            admitted?;
        }
        Ok(())
    }

    /// Sends all that the session has made.
    fn flush(&mut self) -> io::Result<()> {
        while self.session.wants_write() {
            self.session.write_tls(&mut Out(&mut *self.link))?;
        }
        Ok(())
    }

    /// Lets the session look at more bytes, waiting for them if none are there.
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
            (received.from, received.to) = (0, 0);
            received.to = self.link.recv(&mut [PartMut::from(&mut *received.buffer)])?;
            received.ended = received.to == 0;
        }
        let mut bytes = &received.buffer[received.from..received.to];
        let before = bytes.len();
        self.session.read_tls(&mut bytes)?;
        received.from += before - bytes.len();
        if let Err(error) = self.session.process_new_packets() {
            // The peer is told why, if it still listens.
            let _ = self.flush();
            return Err(told(error));
        }
        self.flush()
    }

    /// A write that failed because the peer has hung up: why, if it has said so.
    fn last_word(&mut self, error: io::Error) -> io::Error {
        let hung_up = matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset);
        if !hung_up {
            return error;
        }
        let end = deadline(MOMENT);
        while !self.received.ended {
            match self.receive(Some(end)) {
                Ok(()) if self.session_closed() => {
                    let why = "the other side has closed the session: does its tls-authz list our certificate's subject?";
                    return io::Error::new(error.kind(), Refused { why: why.into() });
                }
                Ok(()) => {}
                Err(alert) if alert.get_ref().is_some_and(|inner| inner.is::<Refused>()) => return alert,
                Err(_) => break,
            }
        }
        let why = format!(
            "{error}: it may refuse our client-cert.pem, or miss one in the folder of tls-creds; its own log says why"
        );
        io::Error::new(error.kind(), Refused { why })
    }
}

impl Link for TlsLink {
    fn send(&mut self, parts: &[Part<'_>]) -> io::Result<usize> {
        let end = self.timeout.map(deadline);
        self.handshake(end)?;
        let mut taken = 0;
        for part in parts {
            let copied = part.copy_to(&mut self.plain[taken..]);
            taken += copied;
            if copied < part.len() {
                break;
            }
        }
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
            match self.receive(end) {
                Ok(()) => {}
                // An end is an end, with a closing alert or without.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                Err(error) => return Err(error),
            }
            if self.session_closed() {
                return copy_out(&mut self.session, parts);
            }
        }
    }

    fn set_recv_timeout(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.timeout = limit;
        self.link.set_recv_timeout(limit)
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.link.waker()
    }

    fn peer(&self) -> String {
        self.link.peer()
    }

    fn close_send(&mut self) -> io::Result<()> {
        self.session.send_close_notify();
        self.flush()?;
        self.link.close_send()?;
        // Whatever the peer has sent to a side that does not read, its tickets for example, must not lie here when the
        // socket is closed: the system would reset the connection, and what is still on its way would be lost.
        self.link.set_recv_timeout(Some(DRAIN))?;
        while matches!(self.link.recv(&mut [PartMut::from(&mut *self.received.buffer)]), Ok(1..)) {}
        self.link.set_recv_timeout(self.timeout)
    }

    fn finish(&mut self) -> io::Result<()> {
        self.link.finish()
    }
}

impl TlsLink {
    fn session_closed(&mut self) -> bool {
        // Nothing to read, and nothing will ever come.
        matches!(self.session.reader().fill_buf(), Ok([]))
    }
}

/// Copies what the session has unpacked into `parts`; says how many bytes.
fn copy_out(session: &mut Connection, parts: &mut [PartMut<'_>]) -> io::Result<usize> {
    let (mut copied, mut at, mut into) = (0, 0, 0);
    let mut reader = session.reader();
    while at < parts.len() {
        let chunk = match reader.fill_buf() {
            Ok([]) => break,
            Ok(chunk) => chunk,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
            Err(error) => return Err(error),
        };
        let some = parts[at].copy_from_at(into, chunk);
        reader.consume(some);
        (copied, into) = (copied + some, into + some);
        if into == parts[at].len() {
            (at, into) = (at + 1, 0);
        }
    }
    Ok(copied)
}

/// The connection as a place to write to.
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

/// Why there is no session, for a person.
#[derive(Debug)]
struct Refused {
    why: String,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.why)
    }
}

impl std::error::Error for Refused {}

fn told(error: TlsError) -> io::Error {
    use AlertDescription as Alert;
    let hint = match &error {
        TlsError::InvalidMessage(_) => ": does the other side speak TLS, is its tls-creds set?",
        TlsError::NoCertificatesPresented => ": give the source client-cert.pem and client-key.pem",
        TlsError::AlertReceived(alert) => match alert {
            Alert::UnknownCA | Alert::DecryptError => {
                ": its ca-cert.pem does not know the authority of our certificate"
            }
            Alert::BadCertificate | Alert::CertificateUnknown => ": it does not take our certificate",
            Alert::CertificateExpired => ": our certificate is not valid at this time",
            Alert::CertificateRequired | Alert::HandshakeFailure => {
                ": it may want a certificate; put client-cert.pem and client-key.pem into the folder of tls-creds"
            }
            _ => "",
        },
        TlsError::InvalidCertificate(
            rustls::CertificateError::NotValidForName
            | rustls::CertificateError::NotValidForNameContext { .. },
        ) => ": give the name in its certificate's subjectAltName as tls-hostname",
        TlsError::InvalidCertificate(
            rustls::CertificateError::UnknownIssuer | rustls::CertificateError::BadSignature,
        ) => ": our ca-cert.pem does not know its authority",
        TlsError::EncryptError => ": too much for one session of TLS 1.2, use TLS 1.3",
        _ => "",
    };
    let why = match &error {
        TlsError::AlertReceived(alert) => format!("the other side refused with TLS alert {alert:?}{hint}"),
        _ => format!("TLS: {error}{hint}"),
    };
    io::Error::new(io::ErrorKind::InvalidData, Refused { why })
}

const CLOSED: &str =
    "the other side closed during the TLS handshake: does it speak TLS, is its tls-creds set?";
/// Eight records in one call: more gained nothing.
const PLAIN: usize = 8 * (16 << 10);
/// As many records, and the next one.
const CIPHERED: usize = PLAIN + (18 << 10);
const RECORDS: usize = 16;
const MOMENT: Duration = Duration::from_millis(200);
const DRAIN: Duration = Duration::from_millis(1);
