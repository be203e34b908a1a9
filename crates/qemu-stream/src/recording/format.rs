//! The heads of a recording: one at the start of the file, one before each record. The recorder writes them, [`Records`] reads them.
//!
//! ```text
//! file:   0 "\x93MFDREC\n" | 8 u32 version 1 | 12 u32 reserved | 16 u64 microseconds since 1970 | 24
//! record: 0 u8 kind | 1 u8 side | 2 u16 connection | 4 u32 length | 8 u64 at, ns | 16 u32 sending, µs | 20 u32 held, µs | 24 body
//! ```
//!
//! [`Records`]: super::Records

use std::time::{Duration, SystemTime};

use crate::error::{Error, Malformed, Place, StreamKind};

const MAGIC: [u8; 8] = *b"\x93MFDREC\n";
const VERSION: u32 = 1;
/// The greatest body of a record: four times what the recorder receives at once.
const BODY: u32 = 1 << 20;
/// The greatest number of a connection: every channel, main and some others, in some migrations that were resumed.
const CONNECTIONS: u16 = 4095;

/// The head of a recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileHead {
    /// When the recorder was started.
    pub started: SystemTime,
}

/// Which end of a connection has sent something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// The source of the migration, which has opened the connection.
    Source,
    /// The destination.
    Destination,
}

/// The number of a connection in a recording, in the order in which they were opened, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionNumber(u16);

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RecordKind {
    /// A connection was opened. The body is the address of the source's end.
    Opened,
    /// Bytes.
    Data,
    /// The side has closed its direction.
    Closed,
    /// The connection to the side has failed. The body says why.
    Broken,
    /// The recorder has ended the recording. The body says why, if it was before the end of the migration.
    Ended,
}

/// The head of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHead {
    /// What it is.
    pub kind: RecordKind,
    /// Whose bytes, or whose end.
    pub side: Side,
    /// The connection.
    pub connection: ConnectionNumber,
    /// The length of the body in bytes, at most [`MOST`](Self::MOST).
    pub length: u32,
    /// When it was received, since the start.
    pub at: Duration,
    /// How long it took until the other side had accepted the bytes.
    pub sending: Duration,
    /// How long the recorder did not receive before this, because it waited for its own disk.
    pub held: Duration,
}

impl FileHead {
    /// The length of the head in bytes.
    pub const LEN: usize = 24;

    /// Whether a file that begins with these bytes is a recording.
    pub fn is_begun_by(bytes: &[u8]) -> bool {
        bytes.starts_with(&MAGIC)
    }

    /// The bytes of the head.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let since = self.started.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let micros = u64::try_from(since.as_micros()).unwrap_or(u64::MAX);
        join(&[&MAGIC, &VERSION.to_be_bytes(), &[0; 4], &micros.to_be_bytes()])
    }

    /// Decodes a head.
    ///
    /// # Errors
    /// If the file is not a recording, or of a later version.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, Error> {
        let [m0, m1, m2, m3, m4, m5, m6, m7, v0, v1, v2, v3, _, _, _, _, rest @ ..] = *bytes;
        let magic = [m0, m1, m2, m3, m4, m5, m6, m7];
        let at = |offset| Place { stream: StreamKind::Recording, offset };
        if magic != MAGIC {
            let (expected, found) = (format!("{:#x}", u64::from_be_bytes(MAGIC)), u64::from_be_bytes(magic));
            return Err(Malformed::value("magic of a recording", expected, found).at(at(0)));
        }
        let version = u32::from_be_bytes([v0, v1, v2, v3]);
        if version != VERSION {
            return Err(Malformed::value("version of a recording", "1", version).at(at(8)));
        }
        let since = Duration::from_micros(u64::from_be_bytes(rest));
        Ok(Self { started: SystemTime::UNIX_EPOCH.checked_add(since).unwrap_or(SystemTime::UNIX_EPOCH) })
    }
}

impl ConnectionNumber {
    /// The connection with this number; `None` above the greatest number, 4095.
    pub fn new(number: u16) -> Option<Self> {
        (number <= CONNECTIONS).then_some(Self(number))
    }

    /// The number.
    pub fn number(self) -> u16 {
        self.0
    }
}

impl RecordHead {
    /// The length of a head in bytes.
    pub const LEN: usize = 24;
    /// The greatest length of a body in bytes.
    pub const MOST: u32 = BODY;

    /// The bytes of the head. Times that are too long are written as the longest.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let kind = match self.kind {
            RecordKind::Opened => 1,
            RecordKind::Data => 2,
            RecordKind::Closed => 3,
            RecordKind::Broken => 4,
            RecordKind::Ended => 5,
        };
        let side = match self.side {
            Side::Source => 0,
            Side::Destination => 1,
        };
        let nanos = u64::try_from(self.at.as_nanos()).unwrap_or(u64::MAX);
        let micros = |time: Duration| u32::try_from(time.as_micros()).unwrap_or(u32::MAX).to_be_bytes();
        join(&[
            &[kind, side],
            &self.connection.0.to_be_bytes(),
            &self.length.to_be_bytes(),
            &nanos.to_be_bytes(),
            &micros(self.sending),
            &micros(self.held),
        ])
    }

    /// Decodes the head at `offset` of the file.
    ///
    /// # Errors
    /// If a field is above its bound or has an unknown value.
    pub fn decode(bytes: &[u8; Self::LEN], offset: u64) -> Result<Self, Error> {
        let [
            kind,
            side,
            c0,
            c1,
            l0,
            l1,
            l2,
            l3,
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            s0,
            s1,
            s2,
            s3,
            h0,
            h1,
            h2,
            h3,
        ] = *bytes;
        let at = |field| Place { stream: StreamKind::Recording, offset: offset + field };
        let kind = match kind {
            1 => RecordKind::Opened,
            2 => RecordKind::Data,
            3 => RecordKind::Closed,
            4 => RecordKind::Broken,
            5 => RecordKind::Ended,
            unknown => return Err(Malformed::value("kind of a record", "1 to 5", unknown).at(at(0))),
        };
        let side = match side {
            0 => Side::Source,
            1 => Side::Destination,
            unknown => return Err(Malformed::value("side of a record", "0 or 1", unknown).at(at(1))),
        };
        let number = u16::from_be_bytes([c0, c1]);
        let connection = ConnectionNumber::new(number).ok_or_else(|| {
            Malformed::too_long("connection of a record", CONNECTIONS.into(), number.into()).at(at(2))
        })?;
        let length = u32::from_be_bytes([l0, l1, l2, l3]);
        if length > BODY {
            return Err(Malformed::too_long("length of a record", BODY.into(), length.into()).at(at(4)));
        }
        let micros = |bytes| Duration::from_micros(u32::from_be_bytes(bytes).into());
        Ok(Self {
            kind,
            side,
            connection,
            length,
            at: Duration::from_nanos(u64::from_be_bytes([a0, a1, a2, a3, a4, a5, a6, a7])),
            sending: micros([s0, s1, s2, s3]),
            held: micros([h0, h1, h2, h3]),
        })
    }
}

/// Puts fields one after the other.
fn join<const N: usize>(fields: &[&[u8]]) -> [u8; N] {
    let mut all = [0; N];
    for (into, from) in all.iter_mut().zip(fields.iter().copied().flatten()) {
        *into = *from;
    }
    all
}
