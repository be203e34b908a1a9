//! What the destination says to the source.
//!
//! Nothing is read before the devices are to be sent: a destination says little, and its last word comes when it has
//! everything. One that has come before that is no good news, whatever it says.

use std::{
    io::{self, Read},
    time::{Duration, Instant},
};

use crate::{
    connection::Connection,
    error::{Error, PeerMisbehaved, Place, Stream, Unsupported},
    format::{Message, Reader},
};

/// What the destination has said so far: all bytes, of which none was acted upon.
#[derive(Debug, Default)]
pub(super) struct Heard(Vec<u8>);

impl Heard {
    /// Reads messages until SHUT.
    pub(super) fn wait_for_shut<C: Connection>(
        &self,
        connection: &mut C,
        deadline: Option<Instant>,
    ) -> Result<(), Error> {
        let rest = Until { connection: &mut *connection, deadline };
        let ended = until_shut(&mut reader(self.0.chain(rest))).map(drop);
        // Whoever has the connection next has no deadline of ours; one that is gone needs none.
        let _ = connection.set_read_timeout(None);
        ended
    }

    /// Why the destination has closed, if it has said so. Waits no longer than a moment: after a failed
    /// write either the message is there or it never will be.
    pub(super) fn last_word<C: Connection>(&self, connection: &mut C) -> Option<Error> {
        let ended = self.wait_for_shut(connection, Some(Instant::now() + MOMENT));
        ended.err().filter(|error| matches!(error, Error::DestinationFailed { .. } | Error::NoShut { .. }))
    }

    /// Looks, without waiting, whether the destination has given its last word.
    ///
    /// # Errors
    /// If it has, whatever it says: there is more to come that it needs.
    pub(super) fn is_undecided<C: Connection>(&mut self, connection: &mut C) -> Result<(), Error> {
        let closed = self.take_in(connection);
        match until_shut(&mut reader(&self.0[..])) {
            Ok(at) => Err(PeerMisbehaved::EarlyShut.at(at)),
            // It has closed, or just said no more than this by now.
            Err(Error::NoShut { .. } | Error::Cut { .. }) if !closed => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Takes in what is there; says whether the destination has closed.
    fn take_in<C: Connection>(&mut self, connection: &mut C) -> bool {
        let mut closed = false;
        while !closed && self.0.len() < BUFFER && connection.is_readable().is_ok_and(|readable| readable) {
            let (mut bytes, deadline) = ([0; BUFFER], Some(Instant::now() + GLANCE));
            match (Until { connection, deadline }).read(&mut bytes) {
                Ok(0) => closed = true,
                Ok(some) => self.0.extend(&bytes[..some]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // What is there is for the connection alone; or it has broken, and the next write tells of it.
                Err(_) => break,
            }
        }
        let _ = connection.set_read_timeout(None);
        closed
    }
}

fn reader<R: Read>(from: R) -> Reader<R> {
    Reader::with_capacity(from, Stream::ReturnPath, BUFFER)
}

/// Where SHUT 0 stands.
fn until_shut<R: Read>(r: &mut Reader<R>) -> Result<Place, Error> {
    loop {
        let at = r.here();
        let Some(message) = Message::decode(r)? else {
            return Err(Error::NoShut { at });
        };
        tracing::debug!(?message, "return path");
        match message {
            Message::Shut(0) => return Ok(at),
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
/// The guest stands meanwhile.
const GLANCE: Duration = Duration::from_millis(1);
