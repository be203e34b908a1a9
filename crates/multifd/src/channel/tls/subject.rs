//! Checks the subject of a certificate and whether it is allowed. The check is a part of the handshake, so that the
//! alert contains the result.

use std::{cell::Cell, fmt::Write, sync::Arc};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    pki_types::{CertificateDer, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use x509_cert::{
    Certificate,
    attr::AttributeTypeAndValue,
    der::{Decode, Encode, Tag, Tagged},
    name::Name,
};

use crate::error::UntrustedText;

thread_local! {
    /// Why this thread's handshake fails. TLS itself only has a code for the reason.
    static DENIED: Cell<Option<String>> = const { Cell::new(None) };
}

/// Why the handshake that has just failed in this thread was denied.
pub(super) fn denied() -> Option<String> {
    DENIED.take()
}

/// Accepts what `inner` accepts, but only these subjects.
#[derive(Debug)]
pub(super) struct Listed {
    pub(super) inner: Arc<dyn ClientCertVerifier>,
    pub(super) authz: Vec<String>,
}

impl ClientCertVerifier for Listed {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.inner.verify_client_cert(certificate, intermediates, now)?;
        let why = match Certificate::from_der(certificate) {
            Ok(read) => {
                let subject = in_full(&read.tbs_certificate.subject);
                if self.authz.contains(&subject) {
                    return Ok(verified);
                }
                format!(
                    "the source's subject {:?} is not in the list of tls-authz",
                    UntrustedText::from(subject)
                )
            }
            Err(error) => format!("the subject of the source's certificate cannot be read: {error}"),
        };
        DENIED.set(Some(why));
        Err(CertificateError::ApplicationVerificationFailure.into())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// A subject as QEMU writes and compares it: RFC 4514, but in the certificate's own order.
fn in_full(subject: &Name) -> String {
    let mut text = String::new();
    for parts in &subject.0 {
        for (at, part) in parts.0.iter().enumerate() {
            text += match (text.is_empty(), at) {
                (true, _) => "",
                (_, 0) => ",",
                _ => "+",
            };
            write_part(&mut text, part);
        }
    }
    text
}

fn write_part(text: &mut String, part: &AttributeTypeAndValue) {
    let oid = part.oid.to_string();
    let known = NAMES.iter().find(|(known, _)| *known == oid);
    let value = match part.value.tag() {
        Tag::PrintableString | Tag::Utf8String | Tag::Ia5String => {
            std::str::from_utf8(part.value.value()).ok()
        }
        _ => None,
    };
    let (Some((_, name)), Some(value)) = (known, value) else {
        *text += &oid;
        *text += "=#";
        for byte in part.value.to_der().unwrap_or_default() {
            // Writing to a string cannot fail.
            let _ = write!(text, "{byte:02x}");
        }
        return;
    };
    *text += name;
    text.push('=');
    let last = value.chars().count().saturating_sub(1);
    for (at, char) in value.chars().enumerate() {
        let escaped = match char {
            '"' | '+' | ',' | ';' | '<' | '>' | '\\' => true,
            '#' => at == 0,
            ' ' => at == 0 || at == last,
            _ => false,
        };
        if escaped {
            text.push('\\');
        }
        text.push(char);
    }
}

/// As written by a QEMU that was asked to accept a certificate with all of these.
const NAMES: [(&str, &str); 21] = [
    ("2.5.4.3", "CN"),
    ("2.5.4.4", "surName"),
    ("2.5.4.5", "serialNumber"),
    ("2.5.4.6", "C"),
    ("2.5.4.7", "L"),
    ("2.5.4.8", "ST"),
    ("2.5.4.9", "street"),
    ("2.5.4.10", "O"),
    ("2.5.4.11", "OU"),
    ("2.5.4.12", "title"),
    ("2.5.4.13", "description"),
    ("2.5.4.15", "businessCategory"),
    ("2.5.4.17", "postalCode"),
    ("2.5.4.41", "name"),
    ("2.5.4.42", "givenName"),
    ("2.5.4.43", "initials"),
    ("2.5.4.46", "dnQualifier"),
    ("2.5.4.65", "pseudonym"),
    ("0.9.2342.19200300.100.1.1", "UID"),
    ("0.9.2342.19200300.100.1.25", "DC"),
    ("1.2.840.113549.1.9.1", "EMAIL"),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// A name of UTF-8 strings in DER.
    fn name(parts: &[&[(&str, &str)]]) -> Name {
        use std::str::FromStr;
        let text = parts.iter().rev().map(|multi| {
            let parts = multi.iter().map(|(oid, value)| {
                let mut der = vec![0x0c, u8::try_from(value.len()).expect("short")];
                der.extend(value.as_bytes());
                let hex: String = der.iter().map(|byte| format!("{byte:02x}")).collect();
                format!("{oid}=#{hex}")
            });
            parts.collect::<Vec<_>>().join("+")
        });
        Name::from_str(&text.collect::<Vec<_>>().join(",")).expect("a name")
    }

    /// The output of QEMU 7.2 and 10.0 for such certificates.
    #[test]
    fn subjects_are_written_as_qemu_writes_them() {
        let plain = name(&[
            &[("2.5.4.6", "DE")],
            &[("2.5.4.8", "Sta=te")],
            &[("2.5.4.7", "Lo;ca<l>")],
            &[("2.5.4.10", r#"Ex, am+ple "x" \b"#)],
            &[("2.5.4.11", "#hash")],
            &[("2.5.4.11", "été")],
            &[("2.5.4.11", " lead")],
            &[("1.2.840.113549.1.9.1", "a@b.c")],
            &[("2.3.4", "custom")],
            &[("2.5.4.3", "source")],
        ]);
        let expected = r#"C=DE,ST=Sta=te,L=Lo\;ca\<l\>,O=Ex\, am\+ple \"x\" \\b,OU=\#hash,OU=été,OU=\ lead,EMAIL=a@b.c,2.3.4=#0c06637573746f6d,CN=source"#;
        assert_eq!(in_full(&plain), expected);
        let multi = name(&[&[("2.5.4.11", "a"), ("2.5.4.3", "multi")], &[("2.5.4.3", "source")]]);
        assert!(["OU=a+CN=multi,CN=source", "CN=multi+OU=a,CN=source"].contains(&&*in_full(&multi)));
    }
}
