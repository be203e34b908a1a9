//! What the threads of one set of connections share.

use std::{
    io, ptr,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    thread,
    time::Duration,
};

use multifd::{
    Error, SendOptions,
    channel::{Connect, Context, Stop, Watch},
};

use super::{
    contents::Contents,
    pages::{PageWriter, Unreadable},
    replies::{Missing, Replies},
};
use crate::{error, outgoing::writer::failed};

/// How channels are made again.
#[derive(Clone)]
pub(super) struct Channels {
    pub(super) send: SendOptions,
    pub(super) connector: Arc<dyn Connect>,
}

/// What the threads of a session share.
pub(super) struct Session<'a> {
    pub(super) source: &'a Contents,
    pub(super) context: Context,
    pub(super) stop: Stop,
    pub(super) replies: &'a Replies<'a>,
    pub(super) main: &'a PageWriter<'a>,
    /// Closes the schedule at the stop, until all threads have ended.
    pub(super) closes: OnceLock<Watch>,
    /// The first page that could not be read, and the number of such pages.
    pub(super) unreadable: Mutex<Option<(Unreadable, u64)>>,
}

impl Session<'_> {
    pub(super) fn write(&self, bytes: &[u8]) -> Result<(), Error> {
        self.main.write(bytes).map_err(|error| self.write_failed(self.main, error))?;
        self.source.counts.other_bytes(bytes.len() as u64);
        Ok(())
    }

    pub(super) fn write_failed(&self, writer: &PageWriter<'_>, source: io::Error) -> Error {
        if ptr::eq(writer, self.main) {
            self.replies.write_failed(&source);
        }
        let at = error::Place { stream: error::StreamKind::Main, offset: 0 };
        failed(error::Error::Io { at, doing: "write", source })
    }

    /// The error of a wait: the destination's own, if it has ended.
    pub(super) fn missing(&self, why: Missing, expected: &'static str) -> Error {
        let late = || failed(error::Error::TimedOut { at: Replies::place(), expected });
        match why {
            Missing::Late => late(),
            Missing::Ended => self.replies.error_within(Duration::ZERO).unwrap_or_else(late),
        }
    }

    /// The error to report: that of the session's stop if there is one; for a broken connection, what the destination has
    /// reported, or reports within a moment.
    pub(super) fn explained(&self, error: Error) -> Error {
        if let Some(first) = self.stop.error() {
            return first;
        }
        let said = if error.fault() == multifd::Fault::Connection {
            self.replies.error_within(MOMENT)
        } else {
            None
        };
        self.stop.fail(said.unwrap_or(error))
    }

    pub(super) fn note_unreadable(&self, bad: Unreadable, pages: u64) {
        let offset = self.source.blocks.get(bad.block).and_then(|block| block.offset_of(bad.page));
        tracing::error!(block = bad.block.0, ?offset, error = %bad.error, "a page cannot be read and is not sent");
        self.source.counts.unreadable(pages);
        let mut unreadable = self.unreadable.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *unreadable {
            Some((_, more)) => *more += pages,
            None => *unreadable = Some((bad, pages)),
        }
    }
}

/// Fails the stop if the thread that holds it panics: others wait for what it does.
pub(super) struct Alarm<'a>(pub(super) &'a Stop);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.fail(Error::text("a thread of this program has panicked"));
        }
    }
}

const MOMENT: Duration = Duration::from_millis(300);
