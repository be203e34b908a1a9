//! The connection for requested pages (capability `postcopy-preempt`), before the first of them.
//!
//! ```text
//! start, return:  Session::preempt ──────────────────────────────────▶ connect ─▶ PageWriter
//! a live source:  MainStream: begin ─▶ connect ─ Requests ─ check ─▶ Switch ─────▶ PageWriter
//! ```
//!
//! QEMU 7.2 reads nothing before it has this connection as well, so it is made as soon as main has its first bytes. Nothing is sent on it
//! before the guest runs at the destination, and a destination never sends anything on it.

use std::{io::Read, sync::Arc, time::Duration};

use multifd::{
    Error, Fault,
    channel::{Connect, Context, Stream},
};

use crate::connection::is_late;

/// Makes a connection of a session.
pub(super) fn connect(connector: &dyn Connect, context: &Context) -> Result<Stream, Error> {
    let link = connector.connect(context);
    let link = link.map_err(|error| Error::io(format!("connect to {}", connector.target()), error))?;
    Ok(Stream::new(link, context))
}

/// The connection of a guest that still runs here.
pub(crate) enum Requests {
    /// Main has not begun.
    Unconnected(Arc<dyn Connect>, Context),
    /// Main has begun.
    Connected(Stream),
}

impl Requests {
    /// Called when main has its first bytes.
    pub(in crate::outgoing) fn connect(&mut self) -> Result<(), Error> {
        if let Self::Unconnected(connector, context) = self {
            *self = Self::Connected(connect(&**connector, context)?);
        }
        Ok(())
    }

    /// Checks that the destination has not closed it: without it, the guest would wait for its pages.
    pub(in crate::outgoing) fn check(&mut self) -> Result<(), Error> {
        let Self::Connected(stream) = self else {
            return Err(Error::text("the connection for requested pages was not made"));
        };
        let failed = |why: &str| Err(Error::text(format!("{why}: {HINT}")).because(Fault::Connection));
        match stream.is_readable() {
            Ok(false) => return Ok(()),
            Ok(true) => {}
            Err(error) => return failed(&format!("{CLOSED} ({error})")),
        }
        let read = stream.set_read_timeout(Some(GLANCE)).and_then(|()| stream.read(&mut [0]));
        let unlimited = stream.set_read_timeout(None);
        match read {
            Ok(0) => failed(CLOSED),
            Ok(_) => failed("the destination has sent something on the connection for requested pages"),
            // Only the transport has sent something, such as a ticket of TLS.
            Err(error) if is_late(&error) => {
                unlimited.map_err(|error| Error::io("use the connection for requested pages", error))
            }
            Err(error) => failed(&format!("{CLOSED} ({error})")),
        }
    }

    /// The connection, for the session that follows.
    pub(super) fn into_stream(self) -> Option<Stream> {
        match self {
            Self::Connected(stream) => Some(stream),
            Self::Unconnected(..) => None,
        }
    }
}

/// Enough for bytes that have arrived already.
const GLANCE: Duration = Duration::from_millis(1);
const CLOSED: &str = "the destination has closed the connection for requested pages (postcopy-preempt)";
const HINT: &str = "switch its capability postcopy-preempt on, or PostcopyOptions::preempt off";
