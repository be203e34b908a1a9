//! Certificates in folders as QEMU reads them, made anew for each test.

use std::{fs, path::Path};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, Error, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};

/// Somebody who signs certificates.
pub struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate to be signed.
pub struct Subject<'a> {
    /// The names in its subject, outermost first: organisation, then common name.
    pub organisation: &'a str,
    /// The common name.
    pub name: &'a str,
    /// Host names and IP addresses that it is good for.
    pub hosts: &'a [&'a str],
    /// Whether its time is over.
    pub expired: bool,
}

impl Authority {
    /// A new authority.
    ///
    /// # Errors
    ///
    /// When keys cannot be made.
    pub fn new(name: &str) -> Result<Self, Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::CommonName, name);
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { pem, issuer: Issuer::new(params, key) })
    }

    /// Puts the authority's own certificate into a folder, as `ca-cert.pem`.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn write(&self, folder: &Path) -> std::io::Result<()> {
        fs::write(folder.join("ca-cert.pem"), &self.pem)
    }

    /// Signs, and puts `ROLE-cert.pem` and `ROLE-key.pem` into a folder.
    ///
    /// # Errors
    ///
    /// When it cannot be made or written.
    pub fn sign(&self, folder: &Path, role: &str, subject: &Subject<'_>) -> std::io::Result<()> {
        let (certificate, key) = self.signed(subject).map_err(std::io::Error::other)?;
        fs::write(folder.join(format!("{role}-cert.pem")), certificate)?;
        fs::write(folder.join(format!("{role}-key.pem")), key)
    }

    fn signed(&self, subject: &Subject<'_>) -> Result<(String, String), Error> {
        let key = KeyPair::generate()?;
        let hosts: Vec<String> = subject.hosts.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(hosts)?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, subject.organisation);
        params.distinguished_name.push(DnType::CommonName, subject.name);
        // QEMU 10.0 insists on the second.
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after =
            if subject.expired { date_time_ymd(2021, 1, 1) } else { date_time_ymd(2120, 1, 1) };
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }
}

/// A folder with all that both ends need on this host.
///
/// # Errors
///
/// When it cannot be made or written.
pub fn write_both(folder: &Path) -> std::io::Result<()> {
    let authority = Authority::new("Test Authority").map_err(std::io::Error::other)?;
    authority.write(folder)?;
    let hosts = &["127.0.0.1", "localhost"];
    let server = Subject { organisation: "Test", name: "destination", hosts, expired: false };
    authority.sign(folder, "server", &server)?;
    let client = Subject { organisation: "Test", name: "source", hosts: &[], expired: false };
    authority.sign(folder, "client", &client)
}
