//! A listener that is lent to one migration after another, so that its socket stays open in between: what connects then waits in
//! the socket's queue for the next migration.

use std::{
    io,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
};

use multifd::channel::{Context, Link, Listen, Wake};

/// A listener that goes back to its owner when it is dropped.
pub(super) struct Lent {
    listener: Option<Box<dyn Listen>>,
    back: Sender<Box<dyn Listen>>,
}

/// Lends a listener. It comes back through the receiver when the migration has ended.
pub(super) fn lend(listener: Box<dyn Listen>) -> (Lent, Receiver<Box<dyn Listen>>) {
    let (back, comes) = channel();
    (Lent { listener: Some(listener), back }, comes)
}

impl Lent {
    fn listener(&mut self) -> io::Result<&mut Box<dyn Listen>> {
        self.listener.as_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl Listen for Lent {
    fn accept(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>> {
        self.listener()?.accept(context)
    }

    fn accept_waiting(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>> {
        self.listener()?.accept_waiting(context)
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.listener.as_ref().map_or_else(|| Arc::new(Nobody) as Arc<dyn Wake>, |listener| listener.waker())
    }

    fn address(&self) -> String {
        self.listener.as_ref().map(|listener| listener.address()).unwrap_or_default()
    }

    fn is_single(&self) -> bool {
        self.listener.as_ref().is_some_and(|listener| listener.is_single())
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(listener) = self.listener.take() {
            // The owner may have ended; then the listener ends here.
            let _ = self.back.send(listener);
        }
    }
}

/// The waker of a listener that has gone back: nobody waits in it.
struct Nobody;

impl Wake for Nobody {
    fn wake(&self) {}
}
