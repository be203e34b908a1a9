//! What the destination says to the source.
//!
//! Nothing is taken from it before the guest has stopped: a destination says little until then. Twice something is waited
//! for: that it has all of RAM, and whether it has the guest. A last word that comes before it can be true is no good news,
//! whatever it says.

use std::{
    io::{self, Cursor, Read},
    time::{Duration, Instant},
};

use multifd::{
    channel::Stop,
    live::{LastWord, Owner, Verdict},
};

use super::writer::failed;
use crate::{
    connection::{Connection, is_late},
    error::{Error, Place, StreamKind, Unsupported, Violation},
    format::{Message, Reader, VERDICT_MARK},
};

/// What the destination has said.
#[derive(Debug, Default)]
pub(super) struct Heard {
    /// Bytes that were not acted upon yet.
    bytes: Vec<u8>,
    /// Bytes of the return path before them.
    before: u64,
    /// The destination has said that it never closes without SHUT.
    always_speaks: bool,
}

/// How long the end of a migration is waited for.
#[derive(Clone, Copy, Debug)]
pub(super) struct EndLimits {
    /// For a destination that has everything; `None` is for ever.
    pub(super) end: Option<Duration>,
    /// For one whose source has been cancelled meanwhile.
    pub(super) cancelled: Duration,
}

impl Heard {
    /// Waits until the destination has answered the PING of this value.
    pub(super) fn wait_for_pong<C: Connection>(
        &mut self,
        connection: &mut C,
        value: u32,
    ) -> Result<(), Error> {
        loop {
            while let Some((message, at)) = self.next()? {
                if message == Message::Pong(value) {
                    return Ok(());
                }
                no_last_word(&message, at)?;
            }
            if self.read_more(connection).map_err(|source| self.broken(source))? == 0 {
                return Err(Error::NoShut { at: self.place() });
            }
        }
    }

    /// Waits for SHUT, when everything has been sent.
    pub(super) fn wait_for_verdict<C: Connection>(
        &mut self,
        connection: &mut C,
        stop: &Stop,
        limits: EndLimits,
    ) -> Verdict {
        let verdict = self.verdict(connection, stop, limits);
        // Whoever has the connection next has no deadline of ours; one that is gone needs none.
        let _ = connection.set_read_timeout(None);
        verdict
    }

    fn verdict<C: Connection>(&mut self, connection: &mut C, stop: &Stop, limits: EndLimits) -> Verdict {
        let late = |at| Error::TimedOut { at, expected: "a message" };
        let mut end = limits.end.map(|limit| Instant::now() + limit);
        let mut cancelled = false;
        loop {
            loop {
                match self.next() {
                    Ok(None) => break,
                    // In precopy neither is waited for.
                    Ok(Some((Message::Pong(_) | Message::SwitchoverAck, _))) => {}
                    Ok(Some((Message::Shut(code), at))) => {
                        return self.after(LastWord::Shut(code), refusal(&Message::Shut(code), at));
                    }
                    Ok(Some((other, at))) => return self.after(LastWord::Nonsense, refusal(&other, at)),
                    Err(error) => return self.after(LastWord::Nonsense, error),
                }
            }
            if !cancelled && stop.error().is_some() {
                // The sending side is closed by now, so the destination knows that its word is wanted.
                cancelled = true;
                let soon = Instant::now() + limits.cancelled;
                end = Some(end.map_or(soon, |end| end.min(soon)));
            }
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return self.after(LastWord::Nothing, late(self.place()));
            }
            // The stop ends no read here: it is looked at now and then.
            let look = (limits.cancelled / LOOKS).max(GLANCE);
            let read = connection
                .set_read_timeout(Some(left.map_or(look, |left| left.min(look))))
                .and_then(|()| self.read_more(connection));
            match read {
                Ok(0) => {
                    let at = self.place();
                    let why =
                        if self.always_speaks { Error::CutBeforeShut { at } } else { Error::NoShut { at } };
                    return self.after(LastWord::Closed, why);
                }
                Ok(_) => {}
                Err(error) if is_late(&error) => {}
                // A TLS alert, sealed as all that it says: it refuses, and has not said SHUT 0 before.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    return self.after(LastWord::Nonsense, self.broken(error));
                }
                Err(error) => return self.after(LastWord::Nothing, self.broken(error)),
            }
        }
    }

    /// Who has the guest after this word, and why if it is not the destination.
    fn after(&self, word: LastWord, why: Error) -> Verdict {
        match word.owner(self.always_speaks) {
            Owner::Destination => Verdict::Taken,
            Owner::Source => Verdict::Refused(failed(why)),
            Owner::Unknown => Verdict::Unknown(failed(why)),
        }
    }

    /// Why the destination has closed, if it has said so. Waits no longer than a moment: after a failed
    /// write either the message is there or it never will be.
    pub(super) fn last_word<C: Connection>(&mut self, connection: &mut C) -> Option<Error> {
        let end = Instant::now() + MOMENT;
        let word = loop {
            match self.next() {
                Ok(None) => {}
                Ok(Some((Message::Shut(code @ 1..), _))) => break Some(Error::DestinationFailed { code }),
                Ok(Some(_)) => continue,
                Err(_) => break None,
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || connection.set_read_timeout(Some(left)).is_err() {
                break None;
            }
            match self.read_more(connection) {
                Ok(0) => break Some(Error::NoShut { at: self.place() }),
                Ok(_) => {}
                Err(error) if is_late(&error) => {}
                Err(_) => break None,
            }
        };
        let _ = connection.set_read_timeout(None);
        word
    }

    /// Looks, without waiting, whether the destination has given its last word.
    ///
    /// # Errors
    /// If it has, whatever it says: there is more to come that it needs.
    pub(super) fn is_undecided<C: Connection>(&mut self, connection: &mut C) -> Result<(), Error> {
        let closed = self.take_in(connection);
        while let Some((message, at)) = self.next()? {
            no_last_word(&message, at)?;
        }
        if closed { Err(Error::NoShut { at: self.place() }) } else { Ok(()) }
    }

    /// Takes in what is there; says whether the destination has closed.
    fn take_in<C: Connection>(&mut self, connection: &mut C) -> bool {
        let mut closed = false;
        while !closed && self.bytes.len() < BUFFER && connection.is_readable().is_ok_and(|readable| readable)
        {
            let read = connection.set_read_timeout(Some(GLANCE)).and_then(|()| self.read_more(connection));
            match read {
                Ok(0) => closed = true,
                Ok(_) => {}
                // What is there is for the connection alone; or it has broken, and the next write tells of it.
                Err(_) => break,
            }
        }
        let _ = connection.set_read_timeout(None);
        closed
    }

    /// The next message that is here as a whole.
    fn next(&mut self) -> Result<Option<(Message, Place)>, Error> {
        let mut r = Reader::with_capacity(Cursor::new(&self.bytes), StreamKind::ReturnPath, BUFFER);
        r.jump(Cursor::new(&self.bytes), self.before);
        let read = Message::decode(&mut r);
        let (length, at) = (r.position() - self.before, self.place());
        match read {
            Ok(None) => Ok(None),
            Err(Error::Cut { .. }) if self.bytes.len() < BUFFER => Ok(None),
            Err(error) => Err(error),
            Ok(Some(message)) => {
                tracing::debug!(?message, "return path");
                self.bytes.drain(..usize::try_from(length).unwrap_or(usize::MAX).min(self.bytes.len()));
                self.before += length;
                self.always_speaks |= message == Message::Pong(VERDICT_MARK);
                Ok(Some((message, at)))
            }
        }
    }

    /// Reads what is there, or waits for the first byte; says how many came.
    fn read_more<C: Read>(&mut self, connection: &mut C) -> io::Result<usize> {
        let mut bytes = [0; BUFFER];
        loop {
            match connection.read(&mut bytes) {
                Ok(some) => {
                    let read = bytes.get(..some).ok_or_else(|| io::Error::other("a read gave too much"))?;
                    self.bytes.extend(read);
                    return Ok(some);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // It closed without reading all that we sent; it said no more than one that closes in order.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(0),
                Err(error) => return Err(error),
            }
        }
    }

    fn place(&self) -> Place {
        Place { stream: StreamKind::ReturnPath, offset: self.before }
    }

    fn broken(&self, source: io::Error) -> Error {
        Error::Io { at: self.place(), doing: "read", source }
    }
}

/// The first last word among bytes that the destination has sent: why it has failed.
pub(super) fn failure_in(bytes: &[u8]) -> Option<Error> {
    let mut heard = Heard { bytes: bytes.to_vec(), ..Heard::default() };
    while let Ok(Some((message, _))) = heard.next() {
        if let Message::Shut(code @ 1..) = message {
            return Some(Error::DestinationFailed { code });
        }
    }
    None
}

/// Takes what a destination may say before it has everything.
fn no_last_word(message: &Message, at: Place) -> Result<(), Error> {
    match message {
        Message::Pong(_) | Message::SwitchoverAck => Ok(()),
        Message::Shut(0) => Err(Violation::EarlyShut.at(at)),
        other => Err(refusal(other, at)),
    }
}

/// What a message means that ends the migration.
fn refusal(message: &Message, at: Place) -> Error {
    match message {
        Message::Shut(code) => Error::DestinationFailed { code: *code },
        _ => {
            let (what, capability) = ("a postcopy message on the return path", "postcopy-ram");
            Unsupported::Capability { what, capability }.at(at)
        }
    }
}

/// Enough for the longest message.
const BUFFER: usize = 1 << 10;
const MOMENT: Duration = Duration::from_millis(200);
/// The guest stands meanwhile.
const GLANCE: Duration = Duration::from_millis(1);
/// How often a wait looks within its limit.
const LOOKS: u32 = 8;
