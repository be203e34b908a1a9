//! Our own certificate and the trusted authorities: the files of a folder, with QEMU's names.
//!
//! | File | Read by |
//! | --- | --- |
//! | `ca-cert.pem` | both: the authorities whose certificates are accepted |
//! | `ca-crl.pem` | both, if it exists: the certificates that the authorities have revoked |
//! | `server-cert.pem`, `server-key.pem` | the destination |
//! | `client-cert.pem`, `client-key.pem` | the source, if they exist: a destination may ask for them |

use std::{
    fmt,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    CertificateError, ClientConfig, RootCertStore, ServerConfig,
    client::{Resumption, WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor},
    crypto::{CryptoProvider, ring},
    pki_types::{
        CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject,
    },
    server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier, danger::ClientCertVerifier},
};
use x509_cert::{crl::CertificateList, der::Decode};

use super::subject::Listed;
use crate::channel::file_kind::open_regular;

/// What a source presents and requires.
#[derive(Clone)]
pub struct ClientCredentials {
    pub(super) config: Arc<ClientConfig>,
    pub(super) name: ServerName<'static>,
    pub(super) rekey_after: u64,
}

impl fmt::Debug for ClientCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The configuration holds the private key.
        f.debug_struct("ClientCredentials").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What a destination presents and requires.
#[derive(Clone)]
pub struct ServerCredentials {
    pub(super) config: Arc<ServerConfig>,
    pub(super) rekey_after: u64,
}

impl fmt::Debug for ServerCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The configuration holds the private key.
        f.debug_struct("ServerCredentials").finish_non_exhaustive()
    }
}

impl ClientCredentials {
    /// Reads the folder. `name` is the host name or IP address that the destination's certificate must contain among
    /// its alternative names: `tls-hostname`, or the host of the address.
    ///
    /// # Errors
    /// [`CredentialsError`], which names the file. Also if our own certificate is not valid now or not signed by this
    /// folder's authority, and if the revocation list is out of date.
    pub fn load(folder: &Path, name: &str) -> Result<Self, CredentialsError> {
        let refused = |file: &str, error: rustls::Error| CredentialsError::new(folder.join(file), error);
        let checked = ServerName::try_from(name.to_owned()).map_err(|_| CredentialsError {
            what: format!("tls-hostname: expected a host name or an IP address, found {name:?}"),
            source: None,
        })?;
        let provider = Arc::new(ring::default_provider());
        let roots = authorities(folder)?;
        let verifier = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone())
            .with_crls(revocations(folder)?)
            .allow_unknown_revocation_status()
            .enforce_revocation_expiration()
            .build()
            .map_err(|error| CredentialsError::new(folder.join(CA), error))?;
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| refused(CA, error))?
            .with_webpki_verifier(verifier);
        let mut config = if is_there(&folder.join(CLIENT_CERT))? {
            let (chain, key) = identity(folder, CLIENT_CERT, CLIENT_KEY)?;
            let usual = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
            let usual = usual.map_err(|error| CredentialsError::new(folder.join(CA), error))?;
            let vouched = usual.verify_client_cert(&chain[0], &chain[1..], UnixTime::now());
            vouched.map_err(|error| CredentialsError::of_own(folder.join(CLIENT_CERT), error))?;
            builder.with_client_auth_cert(chain, key).map_err(|error| refused(CLIENT_KEY, error))?
        } else {
            builder.with_no_client_auth()
        };
        config.enable_sni = false;
        config.resumption = Resumption::disabled();
        Ok(Self { config: Arc::new(config), name: checked, rekey_after: u64::MAX })
    }

    /// Makes every connection change its keys after `records` records of up to 16 KiB, at least 1. TLS 1.2 cannot
    /// change keys: the connection then ends with an error. The default is the limit of the cipher: 2^24 records of
    /// AES-GCM. Peers may refuse many changes in a short time.
    #[must_use]
    pub fn rekey_after(mut self, records: u64) -> Self {
        self.rekey_after = records;
        self
    }
}

impl ServerCredentials {
    /// Reads the folder. A source must present a certificate of one of its authorities. `authz` is the list of allowed
    /// subjects in QEMU's notation: as in RFC 4514, but with the parts in the certificate's order, for example
    /// `O=Example,CN=source`. An empty list allows every subject.
    ///
    /// # Errors
    /// [`CredentialsError`], which names the file. Also if our own certificate is not valid now or not signed by this
    /// folder's authority, and if the revocation list is out of date.
    pub fn load(folder: &Path, authz: Vec<String>) -> Result<Self, CredentialsError> {
        let provider = Arc::new(ring::default_provider());
        let roots = authorities(folder)?;
        let verifier: Arc<dyn ClientCertVerifier> =
            WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
                .with_crls(revocations(folder)?)
                .allow_unknown_revocation_status()
                .enforce_revocation_expiration()
                .build()
                .map_err(|error| CredentialsError::new(folder.join(CA), error))?;
        let verifier = if authz.is_empty() { verifier } else { Arc::new(Listed { inner: verifier, authz }) };
        let (chain, key) = identity(folder, SERVER_CERT, SERVER_KEY)?;
        vouched(&provider, &roots, &chain)
            .map_err(|error| CredentialsError::of_own(folder.join(SERVER_CERT), error))?;
        let refused = |error| CredentialsError::new(folder.join(SERVER_KEY), error);
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(refused)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(refused)?;
        // The source of a channel never reads: bytes that we send would stay in its socket, and reset the connection
        // when the source closes it.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Self { config: Arc::new(config), rekey_after: u64::MAX })
    }

    /// As [`ClientCredentials::rekey_after`].
    #[must_use]
    pub fn rekey_after(mut self, records: u64) -> Self {
        self.rekey_after = records;
        self
    }
}

/// A folder of credentials that cannot be used.
#[derive(Debug)]
pub struct CredentialsError {
    what: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl CredentialsError {
    fn new(file: PathBuf, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self { what: format!("cannot use {}", file.display()), source: Some(Box::new(source)) }
    }

    /// Our own certificate would be refused by a peer.
    fn of_own(file: PathBuf, error: rustls::Error) -> Self {
        use CertificateError as Certificate;
        let why = match &error {
            rustls::Error::InvalidCertificate(why) => match why {
                Certificate::Expired | Certificate::ExpiredContext { .. } => "it has expired",
                Certificate::NotValidYet | Certificate::NotValidYetContext { .. } => "it is not valid yet",
                Certificate::UnknownIssuer | Certificate::BadSignature => {
                    "it was not issued by the authority in the ca-cert.pem of its folder"
                }
                Certificate::InvalidPurpose | Certificate::InvalidPurposeContext { .. } => {
                    "its extendedKeyUsage does not allow this side"
                }
                _ => return Self::new(file, error),
            },
            _ => return Self::new(file, error),
        };
        Self::new(file, io::Error::new(io::ErrorKind::InvalidData, why))
    }
}

impl fmt::Display for CredentialsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for CredentialsError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| &**source as _)
    }
}

fn authorities(folder: &Path) -> Result<Arc<RootCertStore>, CredentialsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(folder, CA)? {
        roots.add(certificate).map_err(|error| CredentialsError::new(folder.join(CA), error))?;
    }
    Ok(Arc::new(roots))
}

fn revocations(folder: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, CredentialsError> {
    let path = folder.join(CRL);
    if !is_there(&path)? {
        return Ok(Vec::new());
    }
    let bytes = read(&path)?;
    let lists = CertificateRevocationListDer::pem_slice_iter(&bytes).collect::<Result<Vec<_>, _>>();
    let lists = lists.map_err(|error| CredentialsError::new(path.clone(), error))?;
    for list in &lists {
        let read =
            CertificateList::from_der(list).map_err(|error| CredentialsError::new(path.clone(), error))?;
        let next = read.tbs_cert_list.next_update.map(|next| next.to_unix_duration());
        if next.is_some_and(|next| next.as_secs() < UnixTime::now().as_secs()) {
            let late = "it is out of date: get a newer one from the authority, or remove it";
            return Err(CredentialsError::new(path, io::Error::new(io::ErrorKind::InvalidData, late)));
        }
    }
    Ok(lists)
}

/// Whether a source with these authorities would accept our certificate.
fn vouched(
    provider: &CryptoProvider,
    roots: &RootCertStore,
    chain: &[CertificateDer<'_>],
) -> Result<(), rustls::Error> {
    let algorithms = provider.signature_verification_algorithms.all;
    let own = ParsedCertificate::try_from(&chain[0])?;
    verify_server_cert_signed_by_trust_anchor(&own, roots, &chain[1..], UnixTime::now(), algorithms)
}

fn certificates(folder: &Path, name: &str) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    let path = folder.join(name);
    let bytes = read(&path)?;
    match CertificateDer::pem_slice_iter(&bytes).collect::<Result<Vec<_>, _>>() {
        Ok(found) if found.is_empty() => {
            let none = io::Error::new(io::ErrorKind::InvalidData, "it contains no certificate");
            Err(CredentialsError::new(path, none))
        }
        Ok(found) => Ok(found),
        Err(error) => Err(CredentialsError::new(path, error)),
    }
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn identity(folder: &Path, certificate: &str, key: &str) -> Result<Identity, CredentialsError> {
    let chain = certificates(folder, certificate)?;
    let path = folder.join(key);
    let bytes = read(&path)?;
    let key = PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| CredentialsError::new(path, error))?;
    Ok((chain, key))
}

/// Whether there is a file of this name. One that cannot be reached is an error: it may be the list of what is revoked.
fn is_there(path: &Path) -> Result<bool, CredentialsError> {
    match path.symlink_metadata() {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(CredentialsError::new(path.to_owned(), error)),
    }
}

/// Reads a file of bounded size.
fn read(path: &Path) -> Result<Vec<u8>, CredentialsError> {
    let mut bytes = Vec::new();
    let read = open_regular(path).and_then(|file| file.take(FILE_MOST + 1).read_to_end(&mut bytes));
    let read = read.and_then(|read| match read as u64 {
        0..=FILE_MOST => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "it is larger than 16 MiB")),
    });
    read.map(|()| bytes).map_err(|error| CredentialsError::new(path.to_owned(), error))
}

/// More than any list of authorities or of revoked certificates has.
const FILE_MOST: u64 = 16 << 20;

const CA: &str = "ca-cert.pem";
const CRL: &str = "ca-crl.pem";
const SERVER_CERT: &str = "server-cert.pem";
const SERVER_KEY: &str = "server-key.pem";
const CLIENT_CERT: &str = "client-cert.pem";
const CLIENT_KEY: &str = "client-key.pem";
