//! The buffers between the connections and the file, and the thread that writes them.
//!
//! Threads of connections put full buffers and take empty ones. They wait for an empty one only if all [`MOST`] are full, and not longer
//! than [`PATIENCE`] without a write. The writer is the only one that uses the file. It ends after [`Store::finish`].

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Write},
    mem,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use qemu_stream::recording::{ConnectionNumber, FileHead, RecordHead, RecordKind, Side};

use crate::output::{outcome::While, outlet::say};

/// A record that is being made: its head, and room for bytes.
pub(super) struct Buffer {
    bytes: Box<[u8]>,
    used: usize,
}

/// Full and empty buffers.
pub(super) struct Store {
    state: Mutex<State>,
    /// A buffer is full, or the store is closed. The writer waits for it.
    full: Condvar,
    /// A buffer is empty, the recording has ended, or the writer has ended. Connections and `finish` wait for it.
    moved: Condvar,
    start: Instant,
}

#[derive(Default)]
struct State {
    full: VecDeque<Buffer>,
    empty: Vec<Buffer>,
    /// How many buffers were made.
    made: usize,
    closed: bool,
    ended: bool,
    /// The number of buffers that were written, to see that the writer moves.
    writes: u64,
    totals: Totals,
}

/// What was recorded.
#[derive(Clone, Default)]
pub(super) struct Totals {
    /// From the source and from the destination, whether recorded or not.
    pub(super) bytes: [u64; 2],
    /// To the file.
    pub(super) written: u64,
    pub(super) held: Duration,
    /// Why the recording has ended before the migration.
    pub(super) given_up: Option<String>,
}

impl Buffer {
    pub(super) fn new() -> Self {
        Self { bytes: vec![0; RecordHead::LEN + CAPACITY].into(), used: 0 }
    }

    /// The room for bytes.
    pub(super) fn room(&mut self) -> &mut [u8] {
        self.bytes.get_mut(RecordHead::LEN..).unwrap_or_default()
    }

    /// The first bytes.
    pub(super) fn first(&self, count: usize) -> &[u8] {
        self.bytes.get(RecordHead::LEN..RecordHead::LEN + count).unwrap_or_default()
    }

    /// Makes it a record.
    fn seal(&mut self, head: &RecordHead) {
        if let Some(into) = self.bytes.first_chunk_mut() {
            *into = head.encode();
        }
        self.used = RecordHead::LEN + head.length as usize;
    }
}

impl Store {
    /// Writes the head of the file, and starts the writer.
    pub(super) fn start(mut file: File, head: FileHead, start: Instant) -> Result<Arc<Self>, While> {
        file.write_all(&head.encode()).map_err(|error| While::new("cannot write the recording", error))?;
        let state = Mutex::new(State {
            totals: Totals { written: FileHead::LEN as u64, ..Totals::default() },
            ..State::default()
        });
        let store = Arc::new(Self { state, full: Condvar::new(), moved: Condvar::new(), start });
        let writer = store.clone();
        // It is not joined: `finish` waits for its end, with a limit, because a write can hang.
        std::thread::Builder::new()
            .name("record_writer".into())
            .spawn(move || {
                let ended = Ended(&writer);
                writer.write(file);
                drop(ended);
            })
            .map_err(|error| While::new("cannot start a thread", error))?;
        Ok(store)
    }

    /// Notes something about a connection.
    pub(super) fn note(&self, kind: RecordKind, side: Side, connection: ConnectionNumber, text: &str) {
        let mut buffer = Buffer { bytes: vec![0; RecordHead::LEN + TEXT].into(), used: 0 };
        let length = text.len().min(TEXT);
        if let (Some(into), Some(from)) = (buffer.room().get_mut(..length), text.as_bytes().get(..length)) {
            into.copy_from_slice(from);
        }
        let (at, zero) = (self.start.elapsed(), Duration::ZERO);
        let length = u32::try_from(length).unwrap_or(0);
        buffer.seal(&RecordHead { kind, side, connection, length, at, sending: zero, held: zero });
        let mut state = self.lock();
        if state.totals.given_up.is_none() {
            state.full.push_back(buffer);
            self.full.notify_one();
        }
    }

    /// Records the first `count` bytes of a buffer. Returns an empty one, and how long that took.
    pub(super) fn put(
        &self,
        mut buffer: Buffer,
        side: Side,
        connection: ConnectionNumber,
        count: usize,
        (received, sending, held): (Instant, Duration, Duration),
    ) -> (Buffer, Duration) {
        let at = received.saturating_duration_since(self.start);
        let length = u32::try_from(count).unwrap_or(0);
        buffer.seal(&RecordHead { kind: RecordKind::Data, side, connection, length, at, sending, held });
        let mut state = self.lock();
        state.totals.bytes[usize::from(side == Side::Destination)] += u64::from(length);
        if state.totals.given_up.is_some() {
            return (buffer, Duration::ZERO);
        }
        state.full.push_back(buffer);
        self.full.notify_one();
        if let Some(empty) = state.empty.pop() {
            return (empty, Duration::ZERO);
        }
        if state.made < MOST {
            state.made += 1;
            drop(state);
            return (Buffer::new(), Duration::ZERO);
        }
        let begun = Instant::now();
        let (mut writes, mut since) = (state.writes, begun);
        loop {
            if let Some(empty) = state.empty.pop() {
                let held = begun.elapsed();
                state.totals.held += held;
                return (empty, held);
            }
            if state.writes != writes {
                (writes, since) = (state.writes, Instant::now());
            }
            let left = PATIENCE.saturating_sub(since.elapsed());
            if state.totals.given_up.is_some() || left.is_zero() {
                drop(state);
                let why = format!("the disk has accepted nothing for {} s", PATIENCE.as_secs());
                if self.give_up(&why) {
                    say(&format!("warning: {why}. The recording ends here, the migration continues"));
                }
                return (Buffer::new(), begun.elapsed());
            }
            state = self.moved.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Ends the recording, but not the migration. Returns `false` if it has ended before.
    pub(super) fn give_up(&self, why: &str) -> bool {
        let mut state = self.lock();
        let is_first = state.totals.given_up.is_none();
        if is_first {
            state.totals.given_up = Some(why.to_owned());
            self.full.notify_one();
            self.moved.notify_all();
        }
        is_first
    }

    /// Waits until everything is on the disk, and returns what was recorded.
    pub(super) fn finish(&self) -> Totals {
        let mut state = self.lock();
        state.closed = true;
        self.full.notify_one();
        let (mut writes, mut since) = (state.writes, Instant::now());
        while !state.ended {
            if state.writes != writes {
                (writes, since) = (state.writes, Instant::now());
            }
            let left = LAST_PATIENCE.saturating_sub(since.elapsed());
            if left.is_zero() {
                let why = format!("the disk has not finished within {} s", LAST_PATIENCE.as_secs());
                state.totals.given_up.get_or_insert(why);
                break;
            }
            state = self.moved.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.totals.clone()
    }

    /// Writes buffers until the store is closed and empty, or the recording has ended.
    fn write(&self, mut file: File) {
        let failed = |error: io::Error| {
            let why = format!("cannot write the recording: {error}");
            say(&format!("warning: {why}. The recording ends here, the migration continues"));
            self.give_up(&why);
        };
        loop {
            let mut state = self.lock();
            while state.full.is_empty() && !state.closed && state.totals.given_up.is_none() {
                state = self.full.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            let Some(buffer) = state.full.pop_front() else {
                let why = state.totals.given_up.clone();
                drop(state);
                if let Err(error) = self.end(&mut file, why.as_deref().unwrap_or_default()) {
                    failed(error);
                }
                return;
            };
            let whole = state.totals.written;
            drop(state);
            if let Err(error) = file.write_all(buffer.bytes.get(..buffer.used).unwrap_or_default()) {
                // What is left of a record would only be skipped.
                if let Err(error) = file.set_len(whole) {
                    tracing::debug!(%error, "cannot remove an incomplete record");
                }
                failed(error);
                mem::take(&mut self.lock().full);
                return;
            }
            let mut state = self.lock();
            state.totals.written += buffer.used as u64;
            state.writes += 1;
            if buffer.bytes.len() == RecordHead::LEN + CAPACITY {
                state.empty.push(buffer);
            }
            drop(state);
            self.moved.notify_all();
        }
    }

    /// Writes the last record, and brings everything to the disk.
    fn end(&self, file: &mut File, why: &str) -> io::Result<()> {
        let Some(connection) = ConnectionNumber::new(0) else { return Ok(()) };
        let why = why.as_bytes().get(..why.len().min(TEXT)).unwrap_or_default();
        let head = RecordHead {
            kind: RecordKind::Ended,
            side: Side::Source,
            connection,
            length: u32::try_from(why.len()).unwrap_or(0),
            at: self.start.elapsed(),
            sending: Duration::ZERO,
            held: Duration::ZERO,
        };
        let record = [&head.encode()[..], why].concat();
        file.write_all(&record)?;
        self.lock().totals.written += record.len() as u64;
        file.sync_all()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reports the end of the writer, also if it panics.
struct Ended<'a>(&'a Store);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.ended = true;
        if !state.closed && state.totals.given_up.is_none() {
            state.totals.given_up = Some("its writer has failed".to_owned());
        }
        self.0.moved.notify_all();
    }
}

/// What is received at once.
const CAPACITY: usize = 256 << 10;
/// The number of shared buffers: 64 MiB.
const MOST: usize = 256;
/// The bound of a text.
const TEXT: usize = 1024;
/// How long connections wait for a disk that accepts nothing.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the end waits for such a disk: nothing else waits then.
const LAST_PATIENCE: Duration = Duration::from_secs(60);
