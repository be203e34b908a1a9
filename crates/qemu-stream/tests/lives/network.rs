//! Connections between two hosts of one process, which a destination can close without a message.

use std::{
    io,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use multifd::channel::{
    Connect, Context, Link, Listen, Listener, Wake, memory,
    tls::{ClientCredentials, ServerCredentials, TlsConnector, TlsListener},
};

use crate::plan::Transport;

/// Credentials of both sides, and a folder for sockets.
pub(crate) struct Means {
    pub(crate) client: ClientCredentials,
    pub(crate) server: ServerCredentials,
    pub(crate) folder: tempfile::TempDir,
}

/// The two ends of a network, and the wakers of all connections that the destination has accepted.
pub(crate) struct Network {
    pub(crate) connector: Arc<dyn Connect>,
    pub(crate) listener: Box<dyn Listen>,
    pub(crate) taken: Taken,
}

/// The connections that a destination has accepted.
#[derive(Clone, Default)]
pub(crate) struct Taken(Arc<Mutex<Vec<Arc<dyn Wake>>>>);

impl Taken {
    /// Closes them without a message.
    pub(crate) fn close(&self) {
        let wakers = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        wakers.iter().for_each(|waker| waker.wake());
    }

    /// Leaves them to their owners: until then, the wakers keep them open.
    pub(crate) fn forget(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn note(&self, link: Box<dyn Link>) -> Box<dyn Link> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(link.waker());
        link
    }
}

/// Creates a network. With `closes`, the destination's connections are recorded, which keeps them open until they are
/// forgotten.
pub(crate) fn network(transport: Transport, tls: bool, closes: bool, means: &Means) -> Network {
    let (connector, listener): (Arc<dyn Connect>, Box<dyn Listen>) = match transport {
        Transport::Memory => {
            let (connector, listener) = memory::network(1 << 16);
            (Arc::new(connector), Box::new(listener))
        }
        Transport::Tcp => bound("tcp:127.0.0.1:0"),
        Transport::Unix => bound(&unix(means.folder.path())),
    };
    let taken = Taken::default();
    let listener = if closes { Box::new(Noting { inner: listener, taken: taken.clone() }) } else { listener };
    if !tls {
        return Network { connector, listener, taken };
    }
    let connector = Arc::new(TlsConnector::new(connector, means.client.clone()));
    Network { connector, listener: Box::new(TlsListener::new(listener, means.server.clone())), taken }
}

fn bound(wanted: &str) -> (Arc<dyn Connect>, Box<dyn Listen>) {
    let listener = Listener::bind(&wanted.parse().expect("an address")).expect("listening");
    (Arc::new(listener.local_address().clone()), Box::new(listener))
}

fn unix(folder: &Path) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::SeqCst);
    format!("unix:{}", folder.join(format!("socket{number}")).display())
}

/// Records the connections that it accepts.
struct Noting {
    inner: Box<dyn Listen>,
    taken: Taken,
}

impl Listen for Noting {
    fn accept(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>> {
        Ok(self.inner.accept(context)?.map(|link| self.taken.note(link)))
    }

    fn accept_waiting(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>> {
        Ok(self.inner.accept_waiting(context)?.map(|link| self.taken.note(link)))
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.inner.waker()
    }

    fn address(&self) -> String {
        self.inner.address()
    }
}
