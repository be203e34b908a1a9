//! A destination that accepts every connection and reads nothing from it.

use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use rustls::{
    ServerConfig, ServerConnection,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};

/// A destination that reads nothing, or nothing after the TLS handshake, until it is dropped.
#[derive(Debug)]
pub struct Silent {
    address: SocketAddr,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Silent {
    /// Listens on a port of the loopback interface. With `tls`, a folder with the certificate and key of a server, each
    /// connection begins with a handshake.
    ///
    /// # Errors
    /// If the system refuses, or the folder has no usable certificate and key.
    pub fn start(tls: Option<&Path>) -> io::Result<Self> {
        let tls = tls.map(config).transpose()?;
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let (address, ended) = (listener.local_addr()?, Arc::new(AtomicBool::new(false)));
        let thread = thread::Builder::new().name("silent".into()).spawn({
            let ended = ended.clone();
            move || hold(&listener, tls.as_ref(), &ended)
        })?;
        Ok(Self { address, ended, thread: Some(thread) })
    }

    /// Its address in QEMU's form.
    pub fn address(&self) -> String {
        format!("tcp:{}", self.address)
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        // Ends the wait in `accept`. If it fails, the listener has ended already.
        drop(TcpStream::connect(self.address));
        if let Some(thread) = self.thread.take() {
            // A thread that panicked holds nothing any more.
            let _ = thread.join();
        }
    }
}

/// Accepts and holds connections until the end.
fn hold(listener: &TcpListener, tls: Option<&Arc<ServerConfig>>, ended: &AtomicBool) {
    let mut held = Vec::new();
    while let Ok((mut connection, _)) = listener.accept() {
        if ended.load(Ordering::Relaxed) {
            return;
        }
        // A client that does not finish its handshake is held as well.
        if let Some(mut session) = tls.and_then(|config| ServerConnection::new(config.clone()).ok()) {
            while session.is_handshaking() && session.complete_io(&mut connection).is_ok() {}
        }
        held.push(connection);
    }
}

fn config(folder: &Path) -> io::Result<Arc<ServerConfig>> {
    let chain = CertificateDer::pem_file_iter(folder.join("server-cert.pem")).map_err(io::Error::other)?;
    let chain = chain.collect::<Result<Vec<_>, _>>().map_err(io::Error::other)?;
    let key = PrivateKeyDer::from_pem_file(folder.join("server-key.pem")).map_err(io::Error::other)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(io::Error::other)?;
    Ok(Arc::new(config))
}
