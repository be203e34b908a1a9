//! Creates certificates in folders in QEMU's form, newly for each test.

use std::{fs, path::Path};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType, Error,
    IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber, date_time_ymd,
};

/// An authority that signs certificates.
pub struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The issuer holds the private key.
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}

/// A certificate to be signed.
#[derive(Debug)]
pub struct Subject<'a> {
    /// The names in its subject, outermost first: organisation, then common name.
    pub organisation: &'a str,
    /// The common name.
    pub name: &'a str,
    /// Host names and IP addresses for which it is valid.
    pub hosts: &'a [&'a str],
    /// Whether its time has passed.
    pub expired: bool,
}

impl Authority {
    /// Creates a new authority.
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

    /// Writes the authority's own certificate to a folder, as `ca-cert.pem`.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn write(&self, folder: &Path) -> std::io::Result<()> {
        fs::write(folder.join("ca-cert.pem"), &self.pem)
    }

    /// Signs a certificate, and writes `ROLE-cert.pem` and `ROLE-key.pem` to a folder.
    ///
    /// # Errors
    ///
    /// When it cannot be made or written.
    pub fn sign(&self, folder: &Path, role: &str, subject: &Subject<'_>) -> std::io::Result<()> {
        let (certificate, key) = self.signed(subject, serial(role)).map_err(std::io::Error::other)?;
        fs::write(folder.join(format!("{role}-cert.pem")), certificate)?;
        fs::write(folder.join(format!("{role}-key.pem")), key)
    }

    /// Revokes the certificate of `role`: writes a revocation list to a folder, as `ca-crl.pem`.
    ///
    /// # Errors
    ///
    /// When it cannot be made or written.
    pub fn take_back(&self, folder: &Path, role: &str, outdated: bool) -> std::io::Result<()> {
        let revoked = RevokedCertParams {
            serial_number: serial(role),
            revocation_time: date_time_ymd(2020, 6, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2020, 6, 1),
            next_update: if outdated { date_time_ymd(2021, 1, 1) } else { date_time_ymd(2120, 1, 1) },
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list =
            params.signed_by(&self.issuer).and_then(|list| list.pem()).map_err(std::io::Error::other)?;
        fs::write(folder.join("ca-crl.pem"), list)
    }

    fn signed(&self, subject: &Subject<'_>, serial: SerialNumber) -> Result<(String, String), Error> {
        let key = KeyPair::generate()?;
        let hosts: Vec<String> = subject.hosts.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(hosts)?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, subject.organisation);
        params.distinguished_name.push(DnType::CommonName, subject.name);
        // QEMU 10.0 requires the second.
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.serial_number = Some(serial);
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after =
            if subject.expired { date_time_ymd(2021, 1, 1) } else { date_time_ymd(2120, 1, 1) };
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }
}

fn serial(role: &str) -> SerialNumber {
    SerialNumber::from(if role == "server" { 1 } else { 2 })
}

/// Creates a folder with everything that both ends need on this host.
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
