//! The messages of the destination, read by a thread of their own: requests for pages go to the schedule, everything else
//! to the thread that waits for it.

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use multifd::{
    channel::{Stop, Stream},
    error::UntrustedText,
    postcopy::{PageRun, Schedule},
    ram::{BlockIndex, PageBitmap, PageIndex},
};

use super::{
    opening::{DISCARDED, LOADED},
    progress::Counts,
};
use crate::{
    error::{Error, Malformed, Place, Reached, StreamKind, Violation},
    format::{BlockList, Message, OtherFormat, Reader},
    outgoing::writer::failed,
};

/// What the destination has reported.
pub(super) struct Replies<'a> {
    list: &'a BlockList,
    counts: &'a Counts,
    /// A destination that always sends SHUT: a connection that closes without it was closed by the network.
    always_speaks: bool,
    /// Where requests go; set before the destination can send one.
    schedule: OnceLock<Arc<Schedule>>,
    state: Mutex<State>,
    changed: Condvar,
}

/// What the source has sent, as far as it decides which messages may come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Sent {
    #[default]
    Nothing,
    /// The command that starts the guest.
    Package,
    /// The end of RAM.
    End,
}

#[derive(Default)]
struct State {
    /// What was sent, or is being sent.
    sent: Sent,
    /// It has forgotten the pages that follow, so it accepts post-copy.
    ready: bool,
    /// It has loaded the devices: the guest starts now.
    loaded: bool,
    shut: bool,
    /// RESUME was sent, and the reply to it has arrived.
    resumes: bool,
    resumed: bool,
    /// The bitmaps that it was asked for and has not sent, and those that it has sent.
    asked: HashSet<BlockIndex>,
    bitmaps: HashMap<BlockIndex, PageBitmap>,
    /// The thread has ended, with this error if it is not the end that SHUT announces.
    ended: bool,
    error: Option<multifd::Error>,
    /// The destination itself has ended: it has reported a failure, or closed the connection.
    has_failed: bool,
    has_closed: bool,
    /// The system has reported to a writer that the connection is broken. It reports that once, so the reader finds an end that
    /// the destination may not have sent.
    broken: bool,
}

/// Why a wait has ended without what was awaited.
pub(super) enum Missing {
    /// The destination has ended.
    Ended,
    /// The time limit has passed.
    Late,
}

impl<'a> Replies<'a> {
    pub(super) fn new(list: &'a BlockList, counts: &'a Counts, always_speaks: bool) -> Self {
        let (schedule, state, changed) = (OnceLock::new(), Mutex::default(), Condvar::new());
        Self { list, counts, always_speaks, schedule, state, changed }
    }

    /// Sends requests to this schedule from now on.
    pub(super) fn serve(&self, schedule: Arc<Schedule>) {
        // It is called once for each set of connections.
        let _ = self.schedule.set(schedule);
    }

    /// Reads until SHUT. An error fails `stop`: nobody can continue without the destination.
    pub(super) fn read(&self, stream: Stream, stop: &Stop) {
        let mut reader = Reader::with_capacity(stream, StreamKind::ReturnPath, BUFFER);
        let error = self.read_all(&mut reader).err();
        // After the stop it is this side that has shut the connection down.
        let closed = matches!(error, Some(Error::NoShut { .. } | Error::Cut { expected: SHUT, .. }));
        let closed = closed && !stop.is_stopped();
        let has_failed = matches!(error, Some(Error::DestinationFailed { .. }));
        let error = error.map(failed);
        let mut state = self.lock();
        state.ended = true;
        (state.has_failed, state.has_closed) = (has_failed, closed);
        state.error.clone_from(&error);
        self.changed.notify_all();
        drop(state);
        if let Some(error) = error {
            stop.fail(error);
        }
    }

    fn read_all(&self, reader: &mut Reader<Stream>) -> Result<(), Error> {
        let mut block = None;
        let mut reason: Option<UntrustedText> = None;
        let bitmap = self.list.iter().map(|(block, _)| bitmap_bytes(self.pages(block))).max().unwrap_or(0);
        if OtherFormat::of(reader.arrived()?) == Some(OtherFormat::Tls) {
            return Err(crate::error::Unsupported::TlsAtDestination.at(reader.here()));
        }
        loop {
            let at = reader.here();
            let Some(message) = Message::decode_within(reader, bitmap)? else {
                return Err(match self.lock().sent {
                    Sent::Nothing => Error::NoShut { at, reached: Reached::Nothing },
                    // That it has closed does not prove that it has no guest.
                    Sent::Package | Sent::End => reader.cut(SHUT),
                });
            };
            match message {
                Message::Pong(LOADED) => {
                    self.counts.guest_started();
                    self.lock().loaded = true;
                    self.changed.notify_all();
                }
                Message::Pong(DISCARDED) => {
                    self.lock().ready = true;
                    self.changed.notify_all();
                }
                // Neither is waited for.
                Message::Pong(_) | Message::SwitchoverAck => {}
                Message::Reason(text) => reason = Some(text),
                Message::Shut(0) => {
                    let mut state = self.lock();
                    let place = match state.sent {
                        Sent::Nothing => "before the package",
                        Sent::Package => "before the end of RAM",
                        Sent::End => {
                            state.shut = true;
                            self.changed.notify_all();
                            return Ok(());
                        }
                    };
                    return Err(Violation::Misplaced { record: "SHUT 0", place }.at(at));
                }
                Message::Shut(code) => {
                    let state = self.lock();
                    let started = state.loaded && state.sent > Sent::Nothing;
                    let reached = if started { Reached::Guest } else { Reached::Configuration };
                    return Err(Error::DestinationFailed { code, reached, reason });
                }
                Message::ReqPages { block: named, start, length } => {
                    if let Some(name) = named {
                        let found = self.list.position(&name);
                        block = Some(found.ok_or_else(|| Violation::UnknownBlock(name).at(at))?);
                    }
                    let unnamed = || Violation::Misplaced {
                        record: "a request for pages without a block",
                        place: "before a request that names one",
                    };
                    let block = block.ok_or_else(|| unnamed().at(at))?;
                    self.request(block, start, length, at)?;
                }
                Message::RecvBitmap { block, bitmap } => self.bitmap(block, &bitmap, at)?,
                Message::ResumeAck => {
                    let mut state = self.lock();
                    if !state.resumes {
                        let (record, place) = ("RESUME_ACK", "before RESUME");
                        return Err(Violation::Misplaced { record, place }.at(at));
                    }
                    state.resumed = true;
                    self.changed.notify_all();
                }
            }
        }
    }

    fn request(&self, block: BlockIndex, start: u64, length: u32, at: Place) -> Result<(), Error> {
        let schedule = self.schedule.get();
        let early = || Violation::Misplaced { record: "a request for pages", place: "before the switch" };
        let schedule = schedule.ok_or_else(|| early().at(at))?;
        let page_size = self.list.page_size().bytes() as u64;
        let whole = start.is_multiple_of(page_size) && u64::from(length).is_multiple_of(page_size);
        let run = PageRun {
            block,
            first: PageIndex(start / page_size),
            count: if whole { u64::from(length) / page_size } else { 0 },
        };
        match schedule.request(run) {
            Ok(claimed) => {
                self.counts.requested(claimed);
                Ok(())
            }
            Err(why) => {
                let name = self.list.entry(block).map(|entry| entry.name.clone());
                let refused = Violation::Request { block: name, start, length, why };
                Err(refused.at(at))
            }
        }
    }

    fn bitmap(&self, name: multifd::ram::BlockName, bytes: &[u8], at: Place) -> Result<(), Error> {
        let block = self.list.position(&name).ok_or_else(|| Violation::UnknownBlock(name).at(at))?;
        if !self.lock().asked.remove(&block) {
            let (record, place) = ("a bitmap that was not asked for", "on the return path");
            return Err(Violation::Misplaced { record, place }.at(at));
        }
        let pages = self.pages(block);
        let expected = bitmap_bytes(pages);
        if bytes.len() as u64 != expected {
            let field = "size of a bitmap";
            return Err(
                Malformed::value(field, "a bit for each page of its block", bytes.len() as u64).at(at)
            );
        }
        let bitmap = PageBitmap::new(pages);
        let word = |eight: &[u8]| eight.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        // The bits behind the last page mean nothing.
        let pages_of = |at: u64| match pages.saturating_sub(at * 64) {
            left @ ..64 => (1 << left) - 1,
            _ => u64::MAX,
        };
        bitmap.merge((0..).zip(bytes.chunks(8)).map(|(at, eight)| word(eight) & pages_of(at)));
        self.lock().bitmaps.insert(block, bitmap);
        self.changed.notify_all();
        Ok(())
    }

    fn pages(&self, block: BlockIndex) -> u64 {
        self.list.entry(block).map_or(0, |entry| self.list.page_size().whole_pages_in(entry.used_length))
    }

    /// Called before the destination can know that this was sent.
    pub(super) fn sends(&self, what: Sent) {
        self.lock().sent = what;
    }

    /// Called instead for a guest that was started over earlier connections. `loaded`: the destination has confirmed it.
    pub(super) fn continues(&self, loaded: bool) {
        let mut state = self.lock();
        (state.sent, state.loaded) = (Sent::Package, loaded);
    }

    /// Whether the destination has confirmed that it runs the guest.
    pub(super) fn has_started(&self) -> bool {
        self.lock().loaded
    }

    /// Called before the bitmaps of these blocks are asked for.
    pub(super) fn asks(&self, blocks: &[BlockIndex]) {
        self.lock().asked.extend(blocks);
    }

    /// Called before RESUME is sent.
    pub(super) fn resumes(&self) {
        self.lock().resumes = true;
    }

    /// A write to the connection has failed with this error.
    pub(super) fn write_failed(&self, error: &io::Error) {
        // A broken pipe only repeats that the connection has ended.
        if error.kind() != io::ErrorKind::BrokenPipe {
            self.lock().broken = true;
        }
    }

    /// Waits for the bitmaps of these blocks.
    pub(super) fn bitmaps(
        &self,
        blocks: &[BlockIndex],
        limit: Option<Duration>,
    ) -> Result<HashMap<BlockIndex, PageBitmap>, Missing> {
        let all = |state: &State| blocks.iter().all(|block| state.bitmaps.contains_key(block));
        self.wait(limit, all)?;
        Ok(std::mem::take(&mut self.lock().bitmaps))
    }

    /// Waits until the destination has accepted everything before the package.
    pub(super) fn ready(&self, limit: Option<Duration>) -> Result<(), Missing> {
        self.wait(limit, |state| state.ready)
    }

    /// Waits until the destination is ready to continue.
    pub(super) fn resumed(&self, limit: Option<Duration>) -> Result<(), Missing> {
        self.wait(limit, |state| state.resumed)
    }

    /// Waits until the destination has reported that it has everything.
    pub(super) fn shut(&self, limit: Option<Duration>) -> Result<(), Missing> {
        self.wait(limit, |state| state.shut)
    }

    /// Whether the guest may have started at the destination. It has not if it was not sent there, or if the destination has
    /// ended before it had loaded the devices: it replies to the PING before RUN. Of a connection that was reset, or that this
    /// side has shut down, this is not known.
    pub(super) fn may_have_started(&self) -> bool {
        let state = self.lock();
        let has_ended = state.has_failed || (state.has_closed && !state.broken && !self.always_speaks);
        state.sent > Sent::Nothing && (state.loaded || !has_ended)
    }

    /// Why the destination has ended, if it has, or does so within `limit`.
    pub(super) fn error_within(&self, limit: Duration) -> Option<multifd::Error> {
        let _ = self.wait(Some(limit), |state| state.ended);
        self.lock().error.clone()
    }

    /// How far the return path was read.
    pub(super) fn place() -> Place {
        Place { stream: StreamKind::ReturnPath, offset: 0 }
    }

    fn wait(&self, limit: Option<Duration>, done: impl Fn(&State) -> bool) -> Result<(), Missing> {
        let end = limit.and_then(|limit| Instant::now().checked_add(limit));
        let mut state = self.lock();
        loop {
            if done(&state) {
                return Ok(());
            }
            if state.ended {
                return Err(Missing::Ended);
            }
            state = match end {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(end) => {
                    let left = end.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(Missing::Late);
                    }
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The size of the bitmap of a block.
fn bitmap_bytes(pages: u64) -> u64 {
    pages.div_ceil(64) * 8
}

/// What is missing when the destination closes between two messages.
const SHUT: &str = "SHUT";
/// Space for many requests.
const BUFFER: usize = 64 << 10;
