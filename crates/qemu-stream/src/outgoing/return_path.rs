//! The messages from the destination to the source.
//!
//! They are evaluated after the guest has stopped, because a destination sends few before. The source waits twice: until
//! the destination has all of RAM, and until it reports whether it has the guest. A result that arrives too early to be
//! true is an error, even a success.

use std::{
    collections::BTreeSet,
    io::{self, Cursor, Read},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use multifd::{
    channel::Stop,
    error::UntrustedText,
    live::{LastWord, Owner, Verdict},
    wire::ChannelId,
};

use super::writer::failed;
use crate::{
    connection::{Connection, is_late},
    error::{Error, Place, Reached, StreamKind, Unsupported, Violation},
    format::{
        Message, OtherFormat, POSTCOPY_CHANNELS_MARK, READY_PING, ROUND_MARK, Reader, VERDICT_MARK,
        as_lost_channel,
    },
};

/// The messages of the destination.
#[derive(Debug, Default)]
pub(super) struct Replies {
    /// Bytes that were not evaluated yet.
    bytes: Vec<u8>,
    /// The number of bytes of the return path before them.
    before: u64,
    /// The destination has announced that it never closes the connection without SHUT.
    always_speaks: bool,
    /// It takes pages over channels after the switch to post-copy.
    takes_channels: bool,
    /// It continues without a channel that breaks.
    tolerates: bool,
    /// The channels that it has named as lost.
    lost: BTreeSet<ChannelId>,
    /// What its replies show.
    reached: Reached,
    /// Why it will report a failure.
    reason: Option<UntrustedText>,
    /// What was read after a failed write. It is missing in the connection then, where the [judge](Replies::judge) looks.
    last_read: Arc<Mutex<Vec<u8>>>,
}

/// Whether the destination continues without a channel that breaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Agreement {
    /// It was not asked.
    #[default]
    Unasked,
    /// It does not.
    Refused,
    /// It does.
    Agreed,
}

/// The time limits for the end of a migration.
#[derive(Clone, Copy, Debug)]
pub(super) struct EndLimits {
    /// For a destination that has received everything; `None` is no limit.
    pub(super) end: Option<Duration>,
    /// The same after the source was cancelled.
    pub(super) cancelled: Duration,
}

/// What a destination has shown before the switch to post-copy.
#[derive(Debug, Default)]
pub(crate) struct Peer {
    /// Bytes of the return path that were read and not evaluated.
    pub(super) unread: Vec<u8>,
    pub(super) always_speaks: bool,
    pub(super) takes_channels: bool,
}

impl Replies {
    /// Waits until the destination has replied to the PING with this value, for `limit` at most; `None` waits until the
    /// connection is shut down.
    pub(super) fn wait_for_pong<C: Connection>(
        &mut self,
        connection: &mut C,
        value: u32,
        limit: Option<Duration>,
    ) -> Result<(), Error> {
        let replied = self.pong(connection, value, limit);
        if limit.is_some() {
            // The next wait has its own limit. An error does not matter: the connection has ended then.
            let _ = connection.set_read_timeout(None);
        }
        replied
    }

    fn pong<C: Connection>(
        &mut self,
        connection: &mut C,
        value: u32,
        limit: Option<Duration>,
    ) -> Result<(), Error> {
        let end = limit.map(deadline);
        loop {
            while let Some((message, at)) = self.next()? {
                if message == Message::Pong(value) {
                    return Ok(());
                }
                self.no_last_word(&message, at)?;
            }
            if let Some(end) = end {
                let left = end.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(Error::NoReply { at: self.place() });
                }
                connection.set_read_timeout(Some(left)).map_err(|source| self.broken(source))?;
            }
            match self.read_more(connection) {
                Ok(0) => return Err(self.no_shut()),
                Ok(_) => {}
                Err(error) if end.is_some() && is_late(&error) => {}
                Err(error) => return Err(self.broken(error)),
            }
        }
    }

    /// Whether the destination is known to be of this library.
    pub(super) fn always_speaks(&self) -> bool {
        self.always_speaks
    }

    /// Whether the destination continues without a channel that breaks, and the channels that it has named as lost, in order.
    pub(super) fn lost_channels(&self) -> (bool, Vec<ChannelId>) {
        (self.tolerates, self.lost.iter().copied().collect())
    }

    /// What is known about the destination, for the one who reads its replies from now on.
    pub(super) fn into_peer(self) -> Peer {
        let Self { bytes, always_speaks, takes_channels, .. } = self;
        Peer { unread: bytes, always_speaks, takes_channels }
    }

    /// Waits for SHUT after everything was sent.
    pub(super) fn wait_for_verdict<C: Connection>(
        &mut self,
        connection: &mut C,
        stop: &Stop,
        limits: EndLimits,
    ) -> Verdict {
        let verdict = self.verdict(connection, stop, limits);
        // The next user of the connection must not inherit the time limit. An error does not matter: the connection has
        // ended then.
        let _ = connection.set_read_timeout(None);
        verdict
    }

    fn verdict<C: Connection>(&mut self, connection: &mut C, stop: &Stop, limits: EndLimits) -> Verdict {
        let late = |at| Error::TimedOut { at, expected: "a message" };
        let mut end = limits.end.map(deadline);
        let mut cancelled = false;
        loop {
            loop {
                match self.next() {
                    Ok(None) => break,
                    // Pre-copy waits for neither of them.
                    Ok(Some((Message::Pong(_) | Message::SwitchoverAck | Message::Reason(_), _))) => {}
                    Ok(Some((Message::Shut(code), _))) => {
                        return self.after(LastWord::Shut(code), self.destination_failed(code));
                    }
                    Ok(Some((other, at))) => return self.after(LastWord::Nonsense, self.refusal(&other, at)),
                    Err(error) => return self.after(LastWord::Nonsense, error),
                }
            }
            if !cancelled && stop.error().is_some() {
                // The sending side is closed by now, so the destination knows that a reply is expected.
                cancelled = true;
                let soon = deadline(limits.cancelled);
                end = Some(end.map_or(soon, |end| end.min(soon)));
            }
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return self.after(LastWord::Nothing, late(self.place()));
            }
            // The stop does not interrupt a read here, so it is checked at intervals.
            let interval = (limits.cancelled / CHECKS).max(GLANCE);
            let read = connection
                .set_read_timeout(Some(left.map_or(interval, |left| left.min(interval))))
                .and_then(|()| self.read_more(connection));
            match read {
                Ok(0) => {
                    let at = self.place();
                    let why = if self.always_speaks { Error::CutBeforeShut { at } } else { self.no_shut() };
                    return self.after(LastWord::Closed, why);
                }
                Ok(_) => {}
                Err(error) if is_late(&error) => {}
                // A TLS alert, which is authenticated like all data: the destination refuses, and has not sent SHUT 0
                // before.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    return self.after(LastWord::Nonsense, self.broken(error));
                }
                Err(error) => return self.after(LastWord::Nothing, self.broken(error)),
            }
        }
    }

    /// The owner of the guest after this last word, with the error if it is not the destination.
    fn after(&self, word: LastWord, why: Error) -> Verdict {
        match word.owner(self.always_speaks) {
            Owner::Destination => Verdict::Taken,
            Owner::Source => Verdict::Refused(failed(why)),
            Owner::Unknown => Verdict::Unknown(failed(why)),
        }
    }

    /// Why the destination has closed the connection, if it has sent that. Waits only for a moment: after a failed write
    /// the message has either arrived or never will.
    pub(super) fn last_word<C: Connection>(&mut self, connection: &mut C) -> Option<Error> {
        let end = deadline(MOMENT);
        let last_read = Arc::clone(&self.last_read);
        // Held until nothing more is read, so that the judge finds all of it.
        let mut last_read = last_read.lock().unwrap_or_else(PoisonError::into_inner);
        let word = loop {
            match self.next() {
                Ok(None) => {}
                Ok(Some((Message::Shut(code @ 1..), _))) => break Some(self.destination_failed(code)),
                Ok(Some(_)) => continue,
                Err(error) => break tls(error),
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || connection.set_read_timeout(Some(left)).is_err() {
                break None;
            }
            match self.read_more(connection) {
                Ok(0) => break Some(self.no_shut()),
                Ok(read) => last_read.extend(self.bytes.iter().skip(self.bytes.len() - read)),
                Err(error) if is_late(&error) => {}
                Err(_) => break None,
            }
        };
        let _ = connection.set_read_timeout(None);
        word
    }

    /// Judges the first bytes of the return path, which were not read yet, and whether the destination has closed it. Bytes
    /// that [`last_word`](Self::last_word) has read meanwhile count first.
    pub(super) fn judge(&self) -> impl Fn(&[u8], bool) -> Option<Error> + Send + 'static {
        let last_read = Arc::clone(&self.last_read);
        move |bytes, closed| {
            let read = last_read.lock().unwrap_or_else(PoisonError::into_inner);
            failure_in(if read.is_empty() { bytes } else { &read }, closed)
        }
    }

    /// Checks, without waiting, that the destination has not reported a result.
    ///
    /// # Errors
    /// If it has reported a result, even a success: it does not have all data yet.
    pub(super) fn is_undecided<C: Connection>(&mut self, connection: &mut C) -> Result<(), Error> {
        let closed = self.take_in(connection);
        while let Some((message, at)) = self.next()? {
            self.no_last_word(&message, at)?;
        }
        if closed { Err(self.no_shut()) } else { Ok(()) }
    }

    /// Reads the bytes that have arrived. Returns whether the destination has closed the connection.
    fn take_in<C: Connection>(&mut self, connection: &mut C) -> bool {
        let mut closed = false;
        while !closed && self.bytes.len() < BUFFER && connection.is_readable().is_ok_and(|readable| readable)
        {
            let read = connection.set_read_timeout(Some(GLANCE)).and_then(|()| self.read_more(connection));
            match read {
                Ok(0) => closed = true,
                Ok(_) => {}
                // The bytes that have arrived only concern the transport, or the connection has failed and the next write
                // reports it.
                Err(_) => break,
            }
        }
        let _ = connection.set_read_timeout(None);
        closed
    }

    /// The next message that has arrived completely.
    fn next(&mut self) -> Result<Option<(Message, Place)>, Error> {
        if self.before == 0 && OtherFormat::of(&self.bytes) == Some(OtherFormat::Tls) {
            return Err(Unsupported::TlsAtDestination.at(self.place()));
        }
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
                self.takes_channels |= message == Message::Pong(POSTCOPY_CHANNELS_MARK);
                if let Message::Pong(value) = message {
                    self.tolerates |= value == ROUND_MARK;
                    self.lost.extend(as_lost_channel(value));
                }
                self.reached = self.reached.max(match &message {
                    Message::Pong(READY_PING) => Reached::Ram,
                    _ => Reached::Configuration,
                });
                if let Message::Reason(reason) = &message {
                    self.reason = Some(reason.clone());
                }
                Ok(Some((message, at)))
            }
        }
    }

    /// Reads the bytes that have arrived, or waits for the first one. Returns their number.
    fn read_more<C: Read>(&mut self, connection: &mut C) -> io::Result<usize> {
        let mut bytes = [0; BUFFER];
        loop {
            match connection.read(&mut bytes) {
                Ok(some) => {
                    let read = bytes
                        .get(..some)
                        .ok_or_else(|| io::Error::other("a read returned more than its buffer"))?;
                    self.bytes.extend(read);
                    return Ok(some);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The destination closed the connection before it had read everything, which means no more than an orderly
                // close.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(0),
                Err(error) => return Err(error),
            }
        }
    }

    /// Accepts the messages that a destination may send before it has everything.
    fn no_last_word(&self, message: &Message, at: Place) -> Result<(), Error> {
        match message {
            Message::Pong(_) | Message::SwitchoverAck | Message::Reason(_) => Ok(()),
            Message::Shut(0) => Err(Violation::EarlyShut.at(at)),
            other => Err(self.refusal(other, at)),
        }
    }

    /// The error for a message that ends the migration.
    fn refusal(&self, message: &Message, at: Place) -> Error {
        match message {
            Message::Shut(code) => self.destination_failed(*code),
            _ => {
                let (what, capability) = ("a postcopy message on the return path", "postcopy-ram");
                Unsupported::DestinationCapability { what, capability }.at(at)
            }
        }
    }

    fn destination_failed(&self, code: u32) -> Error {
        Error::DestinationFailed { code, reached: self.reached, reason: self.reason.clone() }
    }

    fn no_shut(&self) -> Error {
        Error::NoShut { at: self.place(), reached: self.reached }
    }

    fn place(&self) -> Place {
        Place { stream: StreamKind::ReturnPath, offset: self.before }
    }

    fn broken(&self, source: io::Error) -> Error {
        Error::Io { at: self.place(), doing: "read", source }
    }
}

/// The failure that the destination has reported in these bytes, the first of the return path, if any. If it has `closed` the
/// connection, that is a failure too.
fn failure_in(bytes: &[u8], closed: bool) -> Option<Error> {
    let mut replies = Replies { bytes: bytes.to_vec(), ..Replies::default() };
    loop {
        match replies.next() {
            Ok(Some((Message::Shut(code @ 1..), _))) => return Some(replies.destination_failed(code)),
            Ok(Some(_)) => {}
            Ok(None) => return closed.then(|| replies.no_shut()),
            Err(error) => return tls(error).or_else(|| closed.then(|| replies.no_shut())),
        }
    }
}

/// The error, if it means that the destination uses TLS.
fn tls(error: Error) -> Option<Error> {
    matches!(error, Error::Unsupported { what: Unsupported::TlsAtDestination, .. }).then_some(error)
}

/// The time at which `limit` from now has passed. A limit beyond the clock's range becomes a century.
fn deadline(limit: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(limit).unwrap_or_else(|| now + CENTURY)
}

const CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
/// Space for the longest message.
const BUFFER: usize = 1 << 10;
const MOMENT: Duration = Duration::from_millis(200);
/// The guest is stopped during this time.
const GLANCE: Duration = Duration::from_millis(1);
/// The number of checks within a time limit.
const CHECKS: u32 = 8;

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::net::UnixStream};

    use super::*;

    /// Regression: under load, a refusal was reported as a closed connection: the sender had read it after a failed write, and
    /// the watch found an empty connection that was closed.
    #[test]
    fn what_the_sender_has_read_is_not_missing_where_the_connection_is_watched() {
        let (mut connection, mut destination) = UnixStream::pair().expect("a pair");
        let mut replies = Replies::default();
        let judge = replies.judge();
        assert!(matches!(judge(&[], true), Some(Error::NoShut { .. })));
        let mut bytes = Vec::new();
        Message::Reason("as told".to_owned().into()).encode(&mut bytes);
        Message::Shut(1).encode(&mut bytes);
        destination.write_all(&bytes).expect("written");
        drop(destination);
        let told = |error| match error {
            Some(Error::DestinationFailed { code: 1, reason, .. }) => reason.map(|reason| reason.to_string()),
            other => panic!("{other:?}"),
        };
        assert_eq!(told(judge(&bytes, true)), Some("as told".to_owned()));
        assert_eq!(told(replies.last_word(&mut connection)), Some("as told".to_owned()));
        assert_eq!(told(judge(&[], true)), Some("as told".to_owned()));
    }
}
