//! What the destination says to the source.

use std::{
    io::{self, Read},
    time::{Duration, Instant},
};

use crate::{
    connection::Connection,
    error::{Error, Stream, Unsupported},
    format::{Message, Reader},
};

/// Reads messages until SHUT.
pub(super) fn wait_for_shut<C: Connection>(
    connection: &mut C,
    deadline: Option<Instant>,
) -> Result<(), Error> {
    let mut r = Reader::with_capacity(Until { connection, deadline }, Stream::ReturnPath, BUFFER);
    let ended = until_shut(&mut r);
    // Whoever has the connection next has no deadline of ours; one that is gone needs none.
    let _ = r.get_mut().connection.set_read_timeout(None);
    ended
}

/// Why the destination has closed, if it has said so. Waits no longer than a moment: after a failed
/// write either the message is there or it never will be.
pub(super) fn last_word<C: Connection>(connection: &mut C) -> Option<Error> {
    let ended = wait_for_shut(connection, Some(Instant::now() + MOMENT));
    ended.err().filter(|error| matches!(error, Error::DestinationFailed { .. } | Error::NoShut { .. }))
}

fn until_shut<R: Read>(r: &mut Reader<R>) -> Result<(), Error> {
    loop {
        let at = r.here();
        let Some(message) = Message::decode(r)? else {
            return Err(Error::NoShut { at });
        };
        tracing::debug!(?message, "return path");
        match message {
            Message::Shut(0) => return Ok(()),
            Message::Shut(code) => return Err(Error::DestinationFailed { code }),
            // In precopy neither is waited for.
            Message::Pong(_) | Message::SwitchoverAck => {}
            Message::ReqPages { .. } | Message::RecvBitmap { .. } | Message::ResumeAck => {
                let (what, capability) = ("a postcopy message on the return path", "postcopy-ram");
                return Err(Unsupported::Capability { what, capability }.at(at));
            }
        }
    }
}

/// A connection whose reads end at a deadline, however few bytes each of them brings.
struct Until<'a, C> {
    connection: &'a mut C,
    deadline: Option<Instant>,
}

impl<C: Connection> Read for Until<'_, C> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if let Some(deadline) = self.deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.connection.set_read_timeout(Some(left))?;
        }
        match self.connection.read(into) {
            // It closed without reading all that we sent; it said no more than one that closes in order.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(0),
            read => read,
        }
    }
}

/// Enough for the longest message.
const BUFFER: usize = 1 << 10;
const MOMENT: Duration = Duration::from_millis(200);
