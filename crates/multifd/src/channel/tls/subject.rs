//! Whose certificate it is, and whether they may come.

use std::io;

use rustls::pki_types::CertificateDer;
use x509_cert::{Certificate, der::Decode};

/// Refuses a peer whose certificate's subject is not in the list; an empty list takes everybody.
pub(super) fn admit(authz: &[String], shown: Option<&[CertificateDer<'_>]>) -> io::Result<()> {
    if authz.is_empty() {
        return Ok(());
    }
    let [certificate, ..] = shown.unwrap_or_default() else {
        return Err(denied("the source shows no certificate, and tls-authz asks for one"));
    };
    let certificate = Certificate::from_der(certificate)
        .map_err(|error| denied(&format!("the source's certificate cannot be read: {error}")))?;
    let subject = certificate.tbs_certificate.subject;
    let parts: Vec<String> = subject.0.iter().map(ToString::to_string).collect();
    let (forward, reverse) = (parts.join(","), parts.iter().rev().cloned().collect::<Vec<_>>().join(","));
    if authz.iter().any(|accepted| *accepted == forward || *accepted == reverse) {
        return Ok(());
    }
    Err(denied(&format!("the source's subject {reverse:?} is not in the list of tls-authz")))
}

fn denied(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, why)
}
