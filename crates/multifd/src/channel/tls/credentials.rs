//! Who we are and whom we trust: the files of a folder, named as QEMU names them.
//!
//! | File | Read by |
//! | --- | --- |
//! | `ca-cert.pem` | both: the authorities whose certificates are taken |
//! | `ca-crl.pem` | both, if it is there: what the authorities have taken back |
//! | `server-cert.pem`, `server-key.pem` | the destination |
//! | `client-cert.pem`, `client-key.pem` | the source, if they are there: a destination may ask for them |

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::{Resumption, WebPkiServerVerifier},
    crypto::ring,
    pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, pem::PemObject},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};

/// What a source shows and asks for.
#[derive(Clone)]
pub struct ClientCredentials {
    pub(super) config: Arc<ClientConfig>,
    pub(super) name: ServerName<'static>,
}

/// What a destination shows and asks for.
#[derive(Clone)]
pub struct ServerCredentials {
    pub(super) config: Arc<ServerConfig>,
    pub(super) authz: Arc<[String]>,
}

impl ClientCredentials {
    /// Reads the folder. `name` is the host name or IP address that the destination's certificate must hold among
    /// its alternative names: `tls-hostname`, or the host of the address.
    ///
    /// # Errors
    /// [`CredentialsError`], which names the file.
    pub fn load(folder: &Path, name: &str) -> Result<Self, CredentialsError> {
        let refused = |file: &str, error: rustls::Error| CredentialsError::new(folder.join(file), error);
        let checked = ServerName::try_from(name.to_owned()).map_err(|_| CredentialsError {
            what: format!("tls-hostname: expected a host name or an IP address, met {name:?}"),
            source: None,
        })?;
        let provider = Arc::new(ring::default_provider());
        let verifier = WebPkiServerVerifier::builder_with_provider(authorities(folder)?, provider.clone())
            .with_crls(revocations(folder)?)
            .allow_unknown_revocation_status()
            .build()
            .map_err(|error| CredentialsError::new(folder.join(CA), error))?;
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| refused(CA, error))?
            .with_webpki_verifier(verifier);
        let mut config = if folder.join(CLIENT_CERT).exists() {
            let (chain, key) = identity(folder, CLIENT_CERT, CLIENT_KEY)?;
            builder.with_client_auth_cert(chain, key).map_err(|error| refused(CLIENT_KEY, error))?
        } else {
            builder.with_no_client_auth()
        };
        config.enable_sni = false;
        config.resumption = Resumption::disabled();
        Ok(Self { config: Arc::new(config), name: checked })
    }
}

impl ServerCredentials {
    /// Reads the folder. A source must show a certificate of one of its authorities. `authz` is the list of subjects
    /// that may come, as `CN=source,O=Example`, with the parts in the certificate's order or in the reverse, as
    /// RFC 4514 has it; an empty list takes every subject.
    ///
    /// # Errors
    /// [`CredentialsError`], which names the file.
    pub fn load(folder: &Path, authz: Vec<String>) -> Result<Self, CredentialsError> {
        let provider = Arc::new(ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(authorities(folder)?, provider.clone())
            .with_crls(revocations(folder)?)
            .allow_unknown_revocation_status()
            .build()
            .map_err(|error| CredentialsError::new(folder.join(CA), error))?;
        let (chain, key) = identity(folder, SERVER_CERT, SERVER_KEY)?;
        let refused = |error| CredentialsError::new(folder.join(SERVER_KEY), error);
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(refused)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(refused)?;
        // A channel's source never reads: whatever we send would lie in its socket, and reset it when it closes.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Self { config: Arc::new(config), authz: authz.into() })
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
    if !path.exists() {
        return Ok(Vec::new());
    }
    let lists = CertificateRevocationListDer::pem_file_iter(&path).and_then(Iterator::collect);
    lists.map_err(|error| CredentialsError::new(path, error))
}

fn certificates(folder: &Path, name: &str) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    let path = folder.join(name);
    let read = CertificateDer::pem_file_iter(&path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(found) if found.is_empty() => {
            let none = io::Error::new(io::ErrorKind::InvalidData, "it holds no certificate");
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
    let key = PrivateKeyDer::from_pem_file(&path).map_err(|error| CredentialsError::new(path, error))?;
    Ok((chain, key))
}

const CA: &str = "ca-cert.pem";
const CRL: &str = "ca-crl.pem";
const SERVER_CERT: &str = "server-cert.pem";
const SERVER_KEY: &str = "server-key.pem";
const CLIENT_CERT: &str = "client-cert.pem";
const CLIENT_KEY: &str = "client-key.pem";
