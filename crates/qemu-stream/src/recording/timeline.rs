//! A recording taken apart: one reading of all heads, then the main connection, then the channels.

use std::time::Duration;

use multifd::{
    ram::PageSize,
    wire::{ChannelId, INITIAL_LEN},
};

use super::{
    Bytes, ChannelLine, ConnectionNumber, Downtime, Moment, OneWay, Record, RecordKind, Recording, Side,
    channel, main_stream::MainStream,
};
use crate::error::Error;

/// What a recording shows.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Timeline {
    /// When the last record was received.
    pub length: Duration,
    /// How the recording ends.
    pub ending: Ending,
    /// All connections, in the order of their opening.
    pub connections: Vec<Connection>,
    /// The steps of the main connection, by time.
    pub moments: Vec<Moment>,
    /// Steps that are not in `moments`, because there were too many.
    pub omitted: u64,
    /// Requests for pages (post-copy).
    pub requests: u64,
    /// The parts of the downtime, if the stream contains them.
    pub downtime: Option<Downtime>,
    /// The time of one bar of [`Flow::bars`].
    pub bar: Duration,
}

/// How a recording ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The recorder has ended it after the last connection.
    Complete,
    /// The recorder has ended it before, for this reason.
    GivenUp(String),
    /// The recorder was killed, or is still running. The file has this number of bytes after its last complete record.
    Cut(u64),
}

/// A connection.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Connection {
    /// Its number.
    pub number: ConnectionNumber,
    /// What it is.
    pub kind: ConnectionKind,
    /// When it was opened.
    pub opened: Duration,
    /// What the source has sent.
    pub source: Flow,
    /// What the destination has sent.
    pub destination: Flow,
    /// The packets, if it is a channel and the page size is known.
    pub channel: Option<ChannelLine>,
}

/// What a connection is, by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConnectionKind {
    /// The main connection.
    Main,
    /// A channel.
    Channel(ChannelId),
    /// Encrypted.
    Tls,
    /// Another one, or nothing was sent.
    Other,
}

/// One direction of a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Flow {
    /// The number of bytes.
    pub bytes: u64,
    /// When the last of them was received.
    pub last: Option<Duration>,
    /// How long nothing came, between the first and the last byte: the sender was waited for.
    pub waited_for_sender: Duration,
    /// How long sending took in all: the receiver was waited for.
    pub waited_for_receiver: Duration,
    /// How long the recorder waited for its disk.
    pub held: Duration,
    /// When it was closed.
    pub closed: Option<Duration>,
    /// Why it broke.
    pub broken: Option<String>,
    /// The bytes, and the time in which the receiver was waited for, in each [bar](Timeline::bar). At most 256.
    pub bars: Vec<(u64, Duration)>,
    /// When the previous bytes had been sent.
    free: Option<Duration>,
}

impl Timeline {
    /// Takes a recording apart.
    ///
    /// # Errors
    /// If the file is malformed, or cannot be read. What is malformed in the migration itself is a part of the result.
    pub fn of<B: Bytes>(recording: &Recording<B>) -> Result<Self, Error> {
        let mut found = survey(recording)?;
        let mut main = MainStream::default();
        for connection in &mut found.connections {
            connection.kind = kind(recording, connection.number)?;
        }
        if let Some(first) = found.connections.iter().find(|found| found.kind == ConnectionKind::Main) {
            main = MainStream::read(recording, first.number);
        }
        found.downtime = main.downtime();
        let page_size = main.page_size.unwrap_or(PageSize::KIB_4);
        for connection in &mut found.connections {
            if let ConnectionKind::Channel(_) = connection.kind {
                let way = OneWay::new(recording, connection.number, Side::Source);
                connection.channel = Some(ChannelLine::read(way, page_size));
            }
        }
        (found.moments, found.omitted, found.requests) = (main.moments, main.omitted, main.requests);
        Ok(found)
    }
}

/// Reads all heads.
fn survey<B: Bytes>(recording: &Recording<B>) -> Result<Timeline, Error> {
    let mut length = Duration::ZERO;
    let mut records = recording.records();
    while let Some(record) = records.next()? {
        length = length.max(record.head.at.saturating_add(record.head.sending));
    }
    let mut found = Timeline {
        length,
        ending: Ending::Cut(recording.length().saturating_sub(records.position())),
        connections: Vec::new(),
        moments: Vec::new(),
        omitted: 0,
        requests: 0,
        downtime: None,
        bar: (length / BARS).max(Duration::from_millis(1)),
    };
    let mut records = recording.records();
    while let Some(record) = records.next()? {
        found.note(recording, &record)?;
    }
    Ok(found)
}

impl Timeline {
    fn note<B: Bytes>(&mut self, recording: &Recording<B>, record: &Record) -> Result<(), Error> {
        let head = record.head;
        match head.kind {
            RecordKind::Opened => {
                if !self.connections.iter().any(|known| known.number == head.connection) {
                    self.connections.push(Connection {
                        number: head.connection,
                        kind: ConnectionKind::Other,
                        opened: head.at,
                        source: Flow::default(),
                        destination: Flow::default(),
                        channel: None,
                    });
                }
                return Ok(());
            }
            RecordKind::Ended => {
                let why = recording.text(record)?;
                self.ending = if why.is_empty() { Ending::Complete } else { Ending::GivenUp(why) };
                return Ok(());
            }
            _ => {}
        }
        let bar = self.bar;
        let connection = self.connections.iter_mut().find(|known| known.number == head.connection);
        let Some(connection) = connection else { return Ok(()) };
        let flow = match head.side {
            Side::Source => &mut connection.source,
            Side::Destination => &mut connection.destination,
        };
        match head.kind {
            RecordKind::Closed => flow.closed = Some(head.at),
            RecordKind::Broken => flow.broken = Some(recording.text(record)?),
            _ => flow.add(record, bar),
        }
        Ok(())
    }
}

impl Flow {
    fn add(&mut self, record: &Record, bar: Duration) {
        let head = record.head;
        self.bytes = self.bytes.saturating_add(head.length.into());
        if let Some(free) = self.free {
            let idle = head.at.saturating_sub(free).saturating_sub(head.held);
            self.waited_for_sender = self.waited_for_sender.saturating_add(idle);
        }
        self.waited_for_receiver = self.waited_for_receiver.saturating_add(head.sending);
        self.held = self.held.saturating_add(head.held);
        self.last = Some(head.at);
        self.free = Some(head.at.saturating_add(head.sending));
        let at = usize::try_from(head.at.as_nanos() / bar.as_nanos().max(1)).unwrap_or(usize::MAX);
        let at = at.min(BARS as usize - 1);
        if self.bars.len() <= at {
            self.bars.resize(at + 1, (0, Duration::ZERO));
        }
        if let Some((bytes, waited)) = self.bars.get_mut(at) {
            *bytes += u64::from(head.length);
            *waited = waited.saturating_add(head.sending);
        }
    }
}

/// What a connection is, by the first bytes of the source.
fn kind<B: Bytes>(recording: &Recording<B>, number: ConnectionNumber) -> Result<ConnectionKind, Error> {
    let mut way = OneWay::new(recording, number, Side::Source);
    let mut first = Vec::new();
    let mut piece = [0; INITIAL_LEN];
    while first.len() < INITIAL_LEN {
        let room = piece.get_mut(..INITIAL_LEN - first.len()).unwrap_or_default();
        let count = way.read_some(room)?;
        if count == 0 {
            break;
        }
        first.extend_from_slice(piece.get(..count).unwrap_or_default());
    }
    Ok(match channel::id(&first) {
        Some(id) => ConnectionKind::Channel(id),
        None if first.starts_with(b"QEVM") => ConnectionKind::Main,
        None if first.starts_with(&[0x16, 0x03]) => ConnectionKind::Tls,
        None => ConnectionKind::Other,
    })
}

/// The number of bars.
const BARS: u32 = 256;
