//! TLS on a connection: each connection, main and channels alike, is a separate session.
//!
//! ```text
//! TlsConnector ── connect, then handshake ──▶ TlsLink ═════ TlsLink ◀── accept, handshake at the first read ── TlsListener
//!   (ClientCredentials: name, CA, certificate)                  (ServerCredentials: CA, certificate, authz)
//! ```
//!
//! A source completes the session of main before it opens channels, because QEMU uses the first session that is ready
//! for main. The channels' handshakes run in parallel in their threads. A destination's handshake runs in the thread
//! that identifies a connection, under the time limit of the identification. No name is sent (SNI), as in QEMU.
//!
//! A session may end without a closing alert. A complete stream proves this itself, by sync points and its closing
//! description, and QEMU's main never sends the alert.

mod credentials;
mod link;
mod session;
mod split;
mod subject;

use std::{io, sync::Arc};

pub use credentials::{ClientCredentials, CredentialsError, ServerCredentials};
use link::{ServerLink, TlsLink};

use super::{Connect, Context, Link, Listen, Wake};

/// Opens connections and makes each one a session.
pub struct TlsConnector {
    inner: Arc<dyn Connect>,
    credentials: ClientCredentials,
}

impl std::fmt::Debug for TlsConnector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsConnector")
            .field("target", &self.target())
            .field("credentials", &self.credentials)
            .finish()
    }
}

impl TlsConnector {
    /// Sessions over what `inner` opens.
    pub fn new(inner: Arc<dyn Connect>, credentials: ClientCredentials) -> Self {
        Self { inner, credentials }
    }
}

impl Connect for TlsConnector {
    fn connect(&self, context: &Context) -> io::Result<Box<dyn Link>> {
        let end = super::deadline(context.connect_timeout);
        let link = self.inner.connect(context)?;
        let _watch = context.stop.watch(link.waker());
        let mut session = TlsLink::client(link, &self.credentials)?;
        session.handshake(Some(end))?;
        Ok(Box::new(session))
    }

    fn target(&self) -> String {
        self.inner.target()
    }

    fn is_single(&self) -> bool {
        self.inner.is_single()
    }
}

/// Accepts connections, each of which must become a session.
pub struct TlsListener {
    inner: Box<dyn Listen>,
    credentials: ServerCredentials,
}

impl std::fmt::Debug for TlsListener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsListener")
            .field("address", &self.address())
            .field("credentials", &self.credentials)
            .finish()
    }
}

impl TlsListener {
    /// Sessions over what `inner` takes.
    pub fn new(inner: Box<dyn Listen>, credentials: ServerCredentials) -> Self {
        Self { inner, credentials }
    }

    fn session(&self, link: Box<dyn Link>) -> io::Result<Box<dyn Link>> {
        Ok(Box::new(ServerLink::new(TlsLink::server(link, &self.credentials)?)))
    }
}

impl Listen for TlsListener {
    fn accept(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>> {
        self.inner.accept(context)?.map(|link| self.session(link)).transpose()
    }

    fn accept_waiting(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>> {
        self.inner.accept_waiting(context)?.map(|link| self.session(link)).transpose()
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.inner.waker()
    }

    fn address(&self) -> String {
        self.inner.address()
    }

    fn is_single(&self) -> bool {
        self.inner.is_single()
    }
}
