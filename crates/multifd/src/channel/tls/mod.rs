//! TLS on a connection: every one, main and channels alike, is a session of its own.
//!
//! ```text
//! TlsConnector ── connect, then handshake ──▶ TlsLink ═════ TlsLink ◀── accept, handshake at the first read ── TlsListener
//!   (ClientCredentials: name, CA, certificate)                  (ServerCredentials: CA, certificate, who may come)
//! ```
//!
//! A source hands main its finished session before it opens channels, for QEMU takes the first session that is ready
//! for main; the channels' handshakes run in their threads, side by side. A destination's handshake runs in the thread
//! that asks a connection what it is, under that question's time limit. No name is sent (SNI), as QEMU sends none.
//!
//! A session may end without a closing alert: a stream that is whole says so itself, by sync points and its closing
//! description, and QEMU's main never sends one.

mod credentials;
mod link;
mod subject;

use std::{io, sync::Arc};

pub use credentials::{ClientCredentials, CredentialsError, ServerCredentials};
use link::TlsLink;

use super::{Connect, Context, Link, Listen, Wake};

/// Opens connections and makes each a session.
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

/// Takes connections, each of which must become a session.
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
        Ok(Box::new(TlsLink::server(link, &self.credentials)?))
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
