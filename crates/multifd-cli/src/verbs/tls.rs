//! TLS according to the command line: the connector and the listener.
//!
//! Without `--tls-creds` both are plain. An error names a file of the folder.

use std::sync::Arc;

use multifd::channel::{
    Connect, Listen, Listener,
    tls::{ClientCredentials, ServerCredentials, TlsConnector, TlsListener},
};

use crate::{
    args::{ReceiveArgs, SendArgs},
    output::outcome::While,
};

/// The connector for the address of `args`.
pub(super) fn connector(args: &SendArgs) -> Result<Arc<dyn Connect>, While> {
    let plain = Arc::new(args.address.clone());
    let Some(folder) = &args.tls.tls_creds else { return Ok(plain) };
    let name = args.tls.hostname(&args.address).map_err(|error| While::new("cannot set TLS up", error))?;
    let credentials = ClientCredentials::load(folder, name);
    let credentials = credentials.map_err(|error| While::new("cannot set TLS up", error))?;
    Ok(Arc::new(TlsConnector::new(plain, credentials)))
}

/// The certificates of this side, and its rules for peers; `None` without TLS.
pub(super) fn credentials(args: &ReceiveArgs) -> Result<Option<ServerCredentials>, While> {
    let Some(folder) = &args.tls.tls_creds else { return Ok(None) };
    let credentials = ServerCredentials::load(folder, args.tls.tls_authz.clone());
    credentials.map(Some).map_err(|error| While::new("cannot set TLS up", error))
}

/// The listener that wraps `listener`.
pub(super) fn listen(credentials: Option<ServerCredentials>, listener: Listener) -> Box<dyn Listen> {
    match credentials {
        Some(credentials) => Box::new(TlsListener::new(Box::new(listener), credentials)),
        None => Box::new(listener),
    }
}
