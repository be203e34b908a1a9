//! The connection to the source, which is never closed without SHUT.
//!
//! After OPEN_RETURN_PATH the source waits for SHUT. If the connection is dropped before, the migration has failed, and SHUT 1
//! is sent: without it the source cannot know whether its guest runs here.

use std::{
    fmt, io,
    ops::{Deref, DerefMut},
    sync::Arc,
    time::{Duration, Instant},
};

use multifd::{channel::CloseWatch, error::chain};

use super::events::Events;
use crate::{
    connection::{Connection, is_late},
    error::{Error, Place, StreamKind, Violation},
    format::{Message, Reader},
};

/// The events of main, and the return path.
#[derive(Debug)]
pub(super) struct Line<C: Connection> {
    /// `None` after the connection was returned.
    events: Option<Events<C>>,
    /// The source waits for SHUT.
    waited_for: bool,
    /// Detects that the source closes the connection.
    watch: Option<CloseWatch>,
    /// The source understands [`Message::Reason`].
    asks_why: bool,
    /// Why SHUT will be a failure; the last reason counts.
    reason: Option<String>,
    /// The source has switched to post-copy. This is called before a failure is sent.
    switched: Option<BeforeRefusal>,
}

/// What a caller does before the source learns of a failure. `false`: the guest runs here, and the source must not learn of it, because it
/// would take its guest back.
#[derive(Clone, Default)]
pub(crate) struct BeforeRefusal(pub(crate) Option<Arc<dyn Fn() -> bool + Send + Sync>>);

impl fmt::Debug for BeforeRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("BeforeRefusal").field(&self.0.is_some()).finish()
    }
}

impl<C: Connection> Line<C> {
    pub(super) fn new(connection: C) -> Self {
        let (waited_for, watch, asks_why, reason, switched) = (false, None, false, None, None);
        Self { events: Some(Events::new(connection)), waited_for, watch, asks_why, reason, switched }
    }

    /// The source has switched to post-copy: a failure has to reach it before its connection ends.
    pub(super) fn switch(&mut self, before_refusal: BeforeRefusal) {
        self.switched = Some(before_refusal);
    }

    /// The source may switch to post-copy: what it has sent is read to its end, because it shows whether it has switched.
    pub(super) fn read_to_end(&mut self) {
        self.watch = None;
    }

    /// The source has returned over another connection, on which it waits for SHUT again.
    pub(super) fn resume(&mut self, connection: C) {
        self.reason = None;
        self.waited_for = true;
        self.deref_mut().resume(connection);
    }

    /// The source has opened the return path.
    pub(super) fn open_return_path(&mut self, watch: Option<CloseWatch>) {
        self.waited_for = true;
        self.watch = watch;
    }

    /// Sets the time limit of the next reads.
    pub(super) fn limit(&mut self, limit: Option<Duration>) -> Result<(), Error> {
        let at = self.here();
        let set = self.get_mut().set_read_timeout(limit);
        set.map_err(|source| Error::Io { at, doing: "set a time limit", source })
    }

    /// The source understands a reason.
    pub(super) fn send_reason(&mut self) {
        self.asks_why = true;
    }

    /// Sets the reason that is sent if SHUT is a failure.
    pub(super) fn set_reason(&mut self, reason: &(dyn std::error::Error + 'static)) {
        self.reason = Some(chain(reason).to_string());
    }

    pub(super) fn say(&mut self, message: &Message) -> Result<(), Error> {
        self.say_all(std::slice::from_ref(message))
    }

    /// Sends these messages in one write.
    pub(super) fn say_all(&mut self, messages: &[Message]) -> Result<(), Error> {
        let mut bytes = Vec::new();
        for message in messages {
            tracing::debug!(?message, "return path");
            message.encode(&mut bytes);
        }
        let at = Place { stream: StreamKind::ReturnPath, offset: 0 };
        let connection = self.get_mut();
        let written = connection.write_all(&bytes).and_then(|()| connection.flush());
        written.map_err(|source| Error::Io { at, doing: "write", source })
    }

    /// Sends SHUT, once, and only if the source waits for it and a failure [may be sent](BeforeRefusal). The reason of a failure is
    /// before it: a source reads nothing after SHUT.
    pub(super) fn shut(&mut self, code: u32) -> Result<(), Error> {
        self.watch = None;
        if !std::mem::take(&mut self.waited_for) {
            return Ok(());
        }
        let shut = Message::Shut(code);
        let switched = self.switched.take().filter(|_| code != 0);
        if let Some(BeforeRefusal(Some(before))) = &switched
            && !before()
        {
            return Ok(());
        }
        match self.reason.take().filter(|_| code != 0 && self.asks_why) {
            Some(reason) => self.say_all(&[Message::Reason(reason.into()), shut]),
            None => self.say(&shut),
        }?;
        if switched.is_some() {
            self.read_off();
        }
        Ok(())
    }

    /// Reads what the source still sends, until it closes the connection. A source that cannot write its pages takes the connection
    /// for broken, and does not take its guest back.
    fn read_off(&mut self) {
        let connection = self.get_mut();
        let (begun, mut rest) = (Instant::now(), vec![0; Reader::<C>::CAPACITY]);
        while begun.elapsed() < READS_OFF && connection.set_read_timeout(Some(READS_OFF)).is_ok() {
            match connection.read(&mut rest) {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
    }

    /// Refuses a source that has closed the connection instead of waiting for SHUT, or has sent more bytes.
    pub(super) fn still_there(&mut self) -> Result<(), Error> {
        self.watch = None;
        let at = self.here();
        let more =
            || Violation::Misplaced { record: "more data", place: "after the end of the stream" }.at(at);
        if !self.is_drained() {
            return Err(more());
        }
        let io = |source| Error::Io { at, doing: "check whether the source is still connected", source };
        let connection = self.get_mut();
        while connection.is_readable().map_err(io)? {
            connection.set_read_timeout(Some(GLANCE)).map_err(io)?;
            let read = connection.read(&mut [0]);
            let _ = connection.set_read_timeout(None);
            match read {
                Ok(0) => return Err(Error::SourceGone { at }),
                Ok(_) => return Err(more()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The bytes belong to the transport, such as a TLS record without contents.
                Err(error) if is_late(&error) => break,
                Err(_) => return Err(Error::SourceGone { at }),
            }
        }
        Ok(())
    }

    /// The connection, after SHUT.
    pub(super) fn into_inner(mut self) -> Option<C> {
        self.events.take().map(Events::into_inner)
    }
}

impl<C: Connection> Deref for Line<C> {
    type Target = Events<C>;

    fn deref(&self) -> &Events<C> {
        self.events.as_ref().expect("it is given back by value alone")
    }
}

impl<C: Connection> DerefMut for Line<C> {
    fn deref_mut(&mut self) -> &mut Events<C> {
        self.events.as_mut().expect("it is given back by value alone")
    }
}

impl<C: Connection> Drop for Line<C> {
    fn drop(&mut self) {
        if self.events.is_none() {
            return;
        }
        let why = if std::thread::panicking() { PANICKED } else { DROPPED };
        self.reason.get_or_insert_with(|| why.to_owned());
        if let Err(error) = self.shut(1) {
            tracing::debug!(%error, "the failure could not be reported to the source");
        }
    }
}

const GLANCE: Duration = Duration::from_millis(1);
/// How long a source may take to close the connection after a failure.
const READS_OFF: Duration = Duration::from_secs(5);
/// Why a program may end without a result.
const PANICKED: &str = "a thread of the destination's program panicked";
const DROPPED: &str = "the destination's program ended the migration without a reason";
