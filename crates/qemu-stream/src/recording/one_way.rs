//! One direction of one connection, as bytes. It remembers when those arrived that were read last.

use std::{
    collections::VecDeque,
    io::{self, Read},
    time::Duration,
};

use super::{Bytes, ConnectionNumber, RecordHead, RecordKind, Recording, Records, Side};

/// The bytes of one direction of one connection.
#[derive(Debug)]
pub struct OneWay<'a, B> {
    recording: &'a Recording<B>,
    cursor: Cursor,
}

/// How far one direction of one connection was read.
#[derive(Debug)]
pub(super) struct Cursor {
    connection: ConnectionNumber,
    side: Side,
    /// Where the next record is in the file; `None` before the first one.
    next: Option<u64>,
    /// The rest of the current record in the file.
    at: u64,
    left: u64,
    /// The number of bytes read so far.
    position: u64,
    /// Where the last records begin in this direction, and when they arrived.
    arrived: VecDeque<(u64, Duration)>,
    last: Option<RecordHead>,
}

impl<'a, B: Bytes> OneWay<'a, B> {
    /// The bytes that `side` has sent over `connection`, from the first one on.
    pub fn new(recording: &'a Recording<B>, connection: ConnectionNumber, side: Side) -> Self {
        Self { recording, cursor: Cursor::new(connection, side) }
    }

    /// When the byte at `offset` arrived. It must be one of the last 256 KiB that were read.
    pub fn arrived(&self, offset: u64) -> Duration {
        let arrived = &self.cursor.arrived;
        let after = arrived.partition_point(|(from, _)| *from <= offset);
        after.checked_sub(1).and_then(|at| arrived.get(at)).map_or(Duration::ZERO, |(_, at)| *at)
    }

    /// Goes to the next record with bytes, after all bytes of this one were read; `None` at the end of the direction.
    ///
    /// # Errors
    /// If the file is malformed, or cannot be read.
    pub fn next_record(&mut self) -> Result<Option<RecordHead>, crate::Error> {
        self.cursor.next_record(self.recording)
    }

    /// The bytes that are left of the current record.
    pub fn left(&self) -> u64 {
        self.cursor.left
    }

    /// The last record of this direction that was reached: its end, after the last byte.
    pub fn last(&self) -> Option<RecordHead> {
        self.cursor.last
    }

    /// Skips bytes without reading them; returns how many there were.
    pub(super) fn skip(&mut self, count: u64) -> Result<u64, crate::Error> {
        let mut skipped = 0;
        while skipped < count {
            if self.cursor.left == 0 && self.next_record()?.is_none() {
                break;
            }
            let step = self.cursor.left.min(count - skipped);
            self.cursor.taken(step);
            skipped += step;
        }
        Ok(skipped)
    }

    /// Reads some bytes; 0 at the end of the direction.
    pub(super) fn read_some(&mut self, into: &mut [u8]) -> Result<usize, crate::Error> {
        self.cursor.read_some(self.recording, into)
    }
}

impl Cursor {
    /// Before the first byte.
    pub(super) fn new(connection: ConnectionNumber, side: Side) -> Self {
        let arrived = VecDeque::new();
        Self { connection, side, next: None, at: 0, left: 0, position: 0, arrived, last: None }
    }

    /// Reads some bytes; 0 at the end of the direction.
    pub(super) fn read_some<B: Bytes>(
        &mut self,
        recording: &Recording<B>,
        into: &mut [u8],
    ) -> Result<usize, crate::Error> {
        if into.is_empty() || (self.left == 0 && self.next_record(recording)?.is_none()) {
            return Ok(0);
        }
        let most = into.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let room = into.get_mut(..most).unwrap_or_default();
        let count = recording.some(room, self.at)?;
        self.taken(count as u64);
        Ok(count)
    }

    fn next_record<B: Bytes>(
        &mut self,
        recording: &Recording<B>,
    ) -> Result<Option<RecordHead>, crate::Error> {
        let mut records = match self.next {
            None => recording.records(),
            Some(position) => Records::resume(recording, position),
        };
        let found = self.find(&mut records);
        self.next = Some(records.position());
        found
    }

    fn find<B: Bytes>(&mut self, records: &mut Records<'_, B>) -> Result<Option<RecordHead>, crate::Error> {
        while let Some(record) = records.next()? {
            let head = record.head;
            if (head.connection, head.side) != (self.connection, self.side) {
                continue;
            }
            self.last = Some(head);
            match head.kind {
                RecordKind::Data if head.length > 0 => {
                    (self.at, self.left) = (record.body, head.length.into());
                    self.arrived.push_back((self.position, head.at));
                    while self.arrived.get(1).is_some_and(|(from, _)| from + KEPT <= self.position) {
                        self.arrived.pop_front();
                    }
                    return Ok(Some(head));
                }
                RecordKind::Closed | RecordKind::Broken => return Ok(None),
                _ => {}
            }
        }
        Ok(None)
    }

    fn taken(&mut self, count: u64) {
        self.at += count;
        self.left -= count;
        self.position += count;
    }
}

impl<B: Bytes> Read for OneWay<'_, B> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.read_some(into).map_err(io::Error::other)
    }
}

/// A parser has at most half of this in its buffer.
const KEPT: u64 = 512 << 10;
