//! One direction of a connection: receive, send, hand over to the writer.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use multifd::{
    channel::{Link, Wake},
    ram::{Part, PartMut},
};
use qemu_stream::recording::{ConnectionNumber, RecordKind, Side};

use super::{
    live::Life,
    store::{Buffer, Store},
};

/// One direction.
pub(super) struct Pass {
    pub(super) from: Box<dyn Link>,
    pub(super) to: Box<dyn Link>,
    /// Whose bytes pass.
    pub(super) side: Side,
    pub(super) number: ConnectionNumber,
    pub(super) store: Arc<Store>,
    /// Shut down both connections.
    pub(super) wakers: [Arc<dyn Wake>; 2],
    pub(super) life: Life,
}

impl Pass {
    /// Passes bytes on until the end.
    pub(super) fn run(mut self) {
        let (mut buffer, mut held) = (Buffer::new(), Duration::ZERO);
        loop {
            let count = match self.from.recv(&mut [PartMut::from(buffer.room())]) {
                Ok(0) => {
                    self.store.note(RecordKind::Closed, self.side, self.number, "");
                    if let Err(error) = self.to.close_send() {
                        tracing::debug!(%error, "cannot pass on the end of a connection");
                    }
                    return;
                }
                Ok(count) => count,
                Err(error) => return self.broken(&error, "receive"),
            };
            let received = Instant::now();
            self.life.carried();
            let sent = send_all(&mut *self.to, buffer.first(count));
            let sending = received.elapsed();
            (buffer, held) = self.store.put(buffer, self.side, self.number, count, (received, sending, held));
            if let Err(error) = sent {
                return self.broken(&error, "send");
            }
        }
    }

    /// Ends both directions: what failed on one side must fail on the other.
    fn broken(&self, error: &io::Error, doing: &str) {
        let other = if self.side == Side::Source { "destination" } else { "source" };
        let which = match (doing, self.side) {
            ("receive", Side::Source) => "source",
            ("receive", Side::Destination) => "destination",
            _ => other,
        };
        self.store.note(RecordKind::Broken, self.side, self.number, &format!("{doing}, {which}: {error}"));
        self.wakers.iter().for_each(|waker| waker.wake());
    }
}

/// Sends all bytes.
pub(in crate::verbs) fn send_all(link: &mut dyn Link, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let sent = link.send(&[Part::from(bytes)])?;
        if sent == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        bytes = bytes.get(sent..).unwrap_or_default();
    }
    Ok(())
}
