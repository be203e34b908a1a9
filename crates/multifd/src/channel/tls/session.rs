//! The session of a connection, without the connection: its keys, what was received for it, and its errors.

use std::io::{self, BufRead};

use rustls::{
    AlertDescription, CertificateError, Connection, Error as TlsError, ProtocolVersion, SupportedCipherSuite,
};

use super::subject;
use crate::{channel::Link, ram::PartMut};

/// The number of records sent since the keys were changed, and its limit.
pub(super) struct Keys {
    pub(super) spent: u64,
    pub(super) rekey_after: u64,
}

impl Keys {
    /// Counts the records of `bytes` more bytes, and changes the keys if the present ones have reached their limit.
    pub(super) fn spend(
        &mut self,
        session: &mut Connection,
        bytes: usize,
        link: &dyn Link,
    ) -> io::Result<()> {
        let records = bytes.div_ceil(RECORD) as u64;
        let cipher = match session.negotiated_cipher_suite() {
            Some(SupportedCipherSuite::Tls12(suite)) => suite.common.confidentiality_limit,
            Some(SupportedCipherSuite::Tls13(suite)) => suite.common.confidentiality_limit,
            None => u64::MAX,
        };
        let limit = self.rekey_after.min(cipher.saturating_sub(HANDSHAKE_RECORDS));
        if self.spent.saturating_add(records) > limit {
            if session.protocol_version() != Some(ProtocolVersion::TLSv1_3) {
                let why = format!(
                    "TLS 1.2 cannot change keys, and {} records were sent with the keys of this connection: use TLS 1.3 \
                     on both sides, or more channels",
                    self.spent
                );
                return Err(io::Error::new(io::ErrorKind::InvalidData, Refused { why }));
            }
            session.refresh_traffic_keys().map_err(io::Error::other)?;
            tracing::debug!(peer = link.peer(), records = self.spent, "new keys");
            self.spent = 0;
        }
        self.spent += records;
        Ok(())
    }
}

/// Bytes of the connection that the session has not processed.
pub(super) struct Received {
    pub(super) buffer: Box<[u8]>,
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) ended: bool,
}

impl Received {
    /// Waits for bytes, if all that have arrived were given to the session.
    pub(super) fn fill(&mut self, link: &mut dyn Link) -> io::Result<()> {
        if self.from == self.to {
            (self.from, self.to) = (0, 0);
            self.to = link.recv(&mut [PartMut::from(&mut *self.buffer)])?;
            self.ended = self.to == 0;
        }
        Ok(())
    }

    /// Gives bytes to the session, which has to process them.
    pub(super) fn give(&mut self, session: &mut Connection) -> io::Result<()> {
        let mut bytes = &self.buffer[self.from..self.to];
        let before = bytes.len();
        session.read_tls(&mut bytes)?;
        self.from += before - bytes.len();
        Ok(())
    }
}

/// Whether there is nothing to read, and nothing more will arrive.
pub(super) fn session_closed(session: &mut Connection) -> bool {
    matches!(session.reader().fill_buf(), Ok([]))
}

/// Copies what the session has decrypted into `parts`. Returns the number of bytes.
pub(super) fn copy_out(session: &mut Connection, parts: &mut [PartMut<'_>]) -> io::Result<usize> {
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

/// Why there is no session, as a readable text.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) why: String,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.why)
    }
}

impl std::error::Error for Refused {}

pub(super) fn explained(error: TlsError) -> io::Error {
    use AlertDescription as Alert;
    let hint = match &error {
        TlsError::InvalidMessage(_) => ": check that the other side uses TLS (tls-creds)",
        TlsError::NoCertificatesPresented => {
            ": the source needs client-cert.pem and client-key.pem in tls-creds"
        }
        TlsError::AlertReceived(alert) => match alert {
            Alert::UnknownCA | Alert::DecryptError => {
                ": its ca-cert.pem does not contain the authority of our certificate"
            }
            Alert::BadCertificate | Alert::CertificateUnknown => ": it does not accept our certificate",
            Alert::CertificateExpired => ": our certificate is not valid at this time",
            Alert::AccessDenied => ": check that its tls-authz lists our certificate's subject",
            Alert::CertificateRequired | Alert::HandshakeFailure => {
                ": it may require a certificate: put client-cert.pem and client-key.pem into the folder of tls-creds"
            }
            _ => "",
        },
        TlsError::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => ": set tls-hostname to the name in its certificate's subjectAltName",
        TlsError::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            ": our ca-cert.pem does not contain its authority"
        }
        _ => "",
    };
    let why = match &error {
        TlsError::InvalidCertificate(CertificateError::ApplicationVerificationFailure) => {
            subject::denied().unwrap_or_else(|| format!("TLS: {error}"))
        }
        TlsError::AlertReceived(alert) => format!("the other side refused with TLS alert {alert:?}{hint}"),
        _ => format!("TLS: {error}{hint}"),
    };
    // Distinguishes what the other side itself has sent from damage to its bytes in transit.
    let kind = match &error {
        TlsError::AlertReceived(_) => io::ErrorKind::ConnectionRefused,
        _ => io::ErrorKind::InvalidData,
    };
    io::Error::new(kind, Refused { why })
}

/// The greatest size of a record.
pub(super) const RECORD: usize = 16 << 10;
/// More records than a handshake and the answers to its peer's changes of keys can use.
const HANDSHAKE_RECORDS: u64 = 1 << 16;
