//! The records of a file, in its order.

use std::{io, time::SystemTime};

use super::{Bytes, FileHead, RecordHead};
use crate::error::{Error, Place, StreamKind};

/// A recording that was opened.
#[derive(Debug)]
pub struct Recording<B> {
    file: B,
    head: FileHead,
    length: u64,
}

/// A record that is complete in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its head.
    pub head: RecordHead,
    /// Where its body is in the file.
    pub body: u64,
}

/// The records, one after the other.
#[derive(Debug)]
pub struct Records<'a, B> {
    recording: &'a Recording<B>,
    position: u64,
}

impl<B: Bytes> Recording<B> {
    /// Opens a recording.
    ///
    /// # Errors
    /// If it is none, or cannot be read.
    pub fn open(file: B) -> Result<Self, Error> {
        let length = file.length().map_err(|source| unreadable(0, source))?;
        let mut recording = Self { file, head: FileHead { started: SystemTime::UNIX_EPOCH }, length };
        let mut head = [0; FileHead::LEN];
        if !recording.fill(&mut head, 0)? {
            let at = Place { stream: StreamKind::Recording, offset: length };
            return Err(Error::Cut { at, expected: "the head of a recording" });
        }
        recording.head = FileHead::decode(&head)?;
        Ok(recording)
    }

    /// When the recorder was started.
    pub fn started(&self) -> SystemTime {
        self.head.started
    }

    /// The number of bytes of the file, when it was opened.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// All records.
    pub fn records(&self) -> Records<'_, B> {
        Records { recording: self, position: FileHead::LEN as u64 }
    }

    /// The body of a record as text; unprintable bytes are escaped by the caller.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn text(&self, record: &Record) -> Result<String, Error> {
        let mut bytes = vec![0; TEXT.min(record.head.length as usize)];
        self.fill(&mut bytes, record.body)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Reads some bytes at `offset`.
    ///
    /// # Errors
    /// If they cannot be read.
    pub(super) fn some(&self, into: &mut [u8], offset: u64) -> Result<usize, Error> {
        self.file.read_at(into, offset).map_err(|source| unreadable(offset, source))
    }

    /// Fills `into`; `false` if the file ends before.
    fn fill(&self, into: &mut [u8], offset: u64) -> Result<bool, Error> {
        let mut done = 0;
        while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.some(rest, offset + done as u64)? {
                0 => return Ok(false),
                count => done += count,
            }
        }
        Ok(true)
    }
}

impl<'a, B: Bytes> Records<'a, B> {
    /// The records from a [`position`](Self::position) on.
    pub(super) fn resume(recording: &'a Recording<B>, position: u64) -> Self {
        Self { recording, position }
    }

    /// The next record; `None` where the file ends, or ends within a record.
    ///
    /// # Errors
    /// If a record is malformed, or cannot be read.
    #[expect(clippy::should_implement_trait, reason = "it can fail, and must not be called again then")]
    pub fn next(&mut self) -> Result<Option<Record>, Error> {
        let mut bytes = [0; RecordHead::LEN];
        if self.position + RecordHead::LEN as u64 > self.recording.length
            || !self.recording.fill(&mut bytes, self.position)?
        {
            return Ok(None);
        }
        let head = RecordHead::decode(&bytes, self.position)?;
        let body = self.position + RecordHead::LEN as u64;
        let end = body + u64::from(head.length);
        if end > self.recording.length {
            return Ok(None);
        }
        self.position = end;
        Ok(Some(Record { head, body }))
    }

    /// Where the next record begins: after [`next`](Self::next) has returned `None`, the bytes up to the end of the file belong to an
    /// incomplete record.
    pub fn position(&self) -> u64 {
        self.position
    }
}

fn unreadable(offset: u64, source: io::Error) -> Error {
    Error::Io { at: Place { stream: StreamKind::Recording, offset }, doing: "read", source }
}

/// The greatest length of a text.
const TEXT: usize = 1024;
