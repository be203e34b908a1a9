//! The source's side of the main stream.
//!
//! ```text
//! begin ─ setup ─┬─ begin_part ─ pages ─ end_part ─┬─ switchover ─ begin_end ─ pages ─ end_part ─ devices ─ complete
//!                └──────────◀──────────────────────┘                                     wait for SHUT ──┘
//! ```
//!
//! [`Outgoing`] writes in the caller's thread, and refuses calls out of order. It owns the connection and a buffer.
//! [`EventWriter`] is the layer below: it writes what [`incoming`](crate::incoming) reads, event by event; both share the
//! encoder. The mark of a sync point is written before the call returns: the destination's channels wait until it arrives,
//! so keeping it in the buffer while channels are full would be a deadlock. Between sync points only a full buffer is
//! written.

#![warn(clippy::indexing_slicing)]

mod encoder;
mod event_writer;
mod main_stream;
mod options;
pub mod postcopy;
mod return_path;
mod rounds;
mod writer;

use std::{io, time::Duration};

use multifd::{
    Synced,
    channel::{CloseWatch, Stop},
    live::Verdict,
    ram::{BlockIndex, PageIndex},
    wire::ChannelId,
};

pub use event_writer::EventWriter;
pub use main_stream::MainStream;
pub use options::Options;
pub(crate) use options::{END, VERDICT};

use crate::{
    connection::Connection,
    error::{Error, Usage},
    format::{
        BlockList, Command, DevicePart, Event, POSTCOPY_CHANNELS_PING, READY_PING, REASON_PING, SyncMark,
        SyncMode,
    },
};
use encoder::Encoder;
use return_path::{Agreement, EndLimits, Peer, Replies};
use writer::{Writer, failed};

/// An outgoing pre-copy migration.
///
/// Each of [`setup`](Self::setup) and [`end_part`](Self::end_part) is a sync point. It needs a [`Synced`], which proves
/// that a SYNC was sent on every channel.
#[derive(Debug)]
#[must_use]
pub struct Outgoing<C> {
    writer: Writer<C>,
    options: Options,
    encoder: Encoder,
    channels: u8,
    stage: Stage,
    early: bool,
    replies: Replies,
    agreement: Agreement,
    /// Channels that the destination knows to be lost.
    known_lost: Vec<ChannelId>,
}

/// The progress of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    New,
    Begun,
    Between,
    InPart,
    InEnd,
    RamDone,
    Closed,
    Broken,
}

impl<C: Connection> Outgoing<C> {
    /// A migration whose main stream goes over `connection`.
    ///
    /// # Errors
    /// If the options contradict each other.
    pub fn new(connection: C, options: Options) -> Result<Self, Usage> {
        options.check()?;
        let (encoder, stage) = (Encoder::new(), Stage::New);
        let (writer, replies) = (Writer::new(connection), Replies::default());
        let (agreement, known_lost) = (Agreement::default(), Vec::new());
        let (channels, early) = (0, false);
        Ok(Self { writer, options, encoder, channels, stage, early, replies, agreement, known_lost })
    }

    /// Writes header and configuration, opens the return path, and announces the number of channels there: 0 if multifd is
    /// off. Without a return path nothing is announced. Call this when the connection is established and before the
    /// channels connect: this order works with every peer.
    ///
    /// # Errors
    /// If there are channels and the options have no [sync mode](Options::sync_mode), or the reverse; if the connection
    /// fails.
    pub fn begin(&mut self, channels: u8) -> Result<(), Error> {
        self.expect("begin", Stage::New)?;
        let multifd = self.options.sync_mode.is_some();
        if multifd != (channels > 0) {
            let state = if multifd { "on" } else { "off" };
            let why = format!("{channels}, but multifd is {state} in the options (sync_mode)");
            return Err(Usage::Value { what: "number of channels", why }.into());
        }
        self.channels = channels;
        let configuration = Event::Configuration(self.options.configuration.as_ref());
        self.encoder.encode(&configuration, self.writer.buffer())?;
        if self.options.return_path {
            self.put(&Event::Command(&Command::OpenReturnPath))?;
            self.put(&Event::Command(&Command::Ping(FIRST_PING)))?;
            // After the PING that every source sends, so that a program that reads the first bytes finds the usual ones. The
            // destination may refuse the number of channels, so it must know before that a reason is understood.
            self.put(&Event::Command(&Command::Ping(REASON_PING)))?;
            self.put(&Event::Command(&Command::announce_channels(channels)))?;
        }
        if let Some(sizes) = self.options.advise {
            self.put(&Event::Command(&Command::PostcopyAdvise(Some(sizes))))?;
            if channels > 0 {
                self.put(&Event::Command(&Command::Ping(POSTCOPY_CHANNELS_PING)))?;
            }
        }
        self.leave(Stage::Begun)
    }

    /// Announces the blocks. A sync point.
    ///
    /// # Errors
    /// If `synced` is missing, or is for another number of channels than was [announced](Self::begin); if the connection
    /// fails.
    pub fn setup(&mut self, blocks: BlockList, synced: Option<Synced<'_>>) -> Result<(), Error> {
        self.expect("setup", Stage::Begun)?;
        self.check_synced(synced)?;
        let expected = self.options.page_size();
        if blocks.page_size() != expected {
            let why = format!("{}, but the configuration has {expected}", blocks.page_size());
            return Err(Usage::Value { what: "page size of the block list", why }.into());
        }
        self.encoder.begin_ram(self.options.section, blocks, self.writer.buffer());
        self.end_body(Stage::Between)
    }

    /// Writes sections that precede the end of RAM, devices and pieces of live sections, if there are any. Call it after
    /// [`setup`](Self::setup) and before the first pass.
    ///
    /// # Errors
    /// If the call is out of order, a device has the RAM section's number, or the connection fails.
    pub fn early(&mut self, devices: &DevicePart) -> Result<(), Error> {
        self.expect("early", Stage::Between)?;
        devices.check_beside(self.options.section)?;
        self.early = true;
        if devices.early().is_empty() {
            return Ok(());
        }
        let written = self.writer.flush().and_then(|()| self.writer.write_through(devices.early()));
        self.finish_write(written, Stage::Between)
    }

    /// A pass over RAM begins while the guest runs.
    ///
    /// # Errors
    /// If the call is out of order.
    pub fn begin_part(&mut self) -> Result<(), Error> {
        self.expect("begin_part", Stage::Between)?;
        self.put(&Event::Pass { last: false })?;
        self.stage = Stage::InPart;
        Ok(())
    }

    /// The last pass begins; the guest has stopped.
    ///
    /// # Errors
    /// If the call is out of order.
    pub fn begin_end(&mut self) -> Result<(), Error> {
        self.expect("begin_end", Stage::Between)?;
        self.put(&Event::Pass { last: true })?;
        self.stage = Stage::InEnd;
        Ok(())
    }

    /// A page that is zero. It must not go over a channel in the same pass.
    ///
    /// # Errors
    /// If there is no such page, no pass has begun, or the connection fails.
    pub fn zero_page(&mut self, block: BlockIndex, page: PageIndex) -> Result<(), Error> {
        self.expect_pass("zero_page")?;
        self.put(&Event::ZeroPage { block, page })?;
        self.spill()
    }

    /// A page and its contents, when multifd is off. `fill` writes them directly into the stream's buffer. They may change
    /// meanwhile if the page is sent again.
    ///
    /// # Errors
    /// If there is no such page, no pass has begun, multifd is on, or the connection fails.
    pub fn page_with(
        &mut self,
        block: BlockIndex,
        page: PageIndex,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<(), Error> {
        if self.options.sync_mode.is_some() {
            return Err(Usage::OutOfOrder { call: "page", state: "while multifd is on" }.into());
        }
        self.expect_pass("page")?;
        self.encoder.page_head(block, page, self.writer.buffer())?;
        let length = self.options.page_size().bytes();
        let buffer = self.writer.buffer();
        let from = buffer.len();
        buffer.resize(from + length, 0);
        fill(buffer.get_mut(from..).unwrap_or_default());
        self.spill()
    }

    /// A page and its contents, when multifd is off.
    ///
    /// # Errors
    /// As for [`page_with`](Self::page_with), or if `bytes` has not the length of a page.
    pub fn page(&mut self, block: BlockIndex, page: PageIndex, bytes: &[u8]) -> Result<(), Error> {
        let length = self.options.page_size().bytes();
        if bytes.len() != length {
            let why = format!("expected {length:#x} bytes, found {:#x}", bytes.len());
            return Err(Usage::Value { what: "page", why }.into());
        }
        self.page_with(block, page, |into| into.copy_from_slice(bytes))
    }

    /// The pass is over. A sync point.
    ///
    /// # Errors
    /// If no pass has begun, `synced` is missing or is for another number of channels than was [announced](Self::begin), or
    /// the connection fails.
    pub fn end_part(&mut self, synced: Option<Synced<'_>>) -> Result<(), Error> {
        let next = match self.stage {
            Stage::InPart => Stage::Between,
            Stage::InEnd => Stage::RamDone,
            _ => return Err(self.out_of_order("end_part")),
        };
        self.name_lost(synced.as_ref())?;
        self.check_synced(synced)?;
        self.end_body(next)
    }

    /// The guest has stopped: writes SWITCHOVER_START if the options have it on. Call it before
    /// [`begin_end`](Self::begin_end).
    ///
    /// # Errors
    /// If the call is out of order or the connection fails.
    pub fn switchover(&mut self) -> Result<(), Error> {
        self.expect("switchover", Stage::Between)?;
        if self.options.switchover_start {
            self.put(&Event::Command(&Command::SwitchoverStart))?;
        }
        self.leave(Stage::Between)
    }

    /// Writes the devices and ends the stream, unless the destination has already reported its result.
    ///
    /// # Errors
    /// If RAM is not complete, only one of devices and machine type has footers, a device has the RAM section's number, the
    /// connection fails, or the destination has reported a result. A success is an error too, because it cannot be true
    /// before the devices are sent.
    pub fn devices(&mut self, devices: &DevicePart) -> Result<(), Error> {
        self.expect("devices", Stage::RamDone)?;
        devices.check_beside(self.options.section)?;
        if devices.has_footers() != self.options.has_footers() {
            let why =
                "have footers and the machine type has none, or have none and the machine type has them"
                    .to_owned();
            return Err(Usage::Value { what: "devices", why }.into());
        }
        if !self.early && !devices.early().is_empty() {
            let why = "have sections before the end of ram that were not written there".to_owned();
            return Err(Usage::Value { what: "devices", why }.into());
        }
        if self.options.return_path {
            let undecided = self.replies.is_undecided(self.writer.connection());
            self.finish_write(undecided, Stage::RamDone)?;
        }
        let written = self.writer.flush().and_then(|()| self.writer.write_through(devices.as_bytes()));
        self.finish_write(written, Stage::Closed)
    }

    /// Asks the destination, between two passes, whether it has all of RAM so far, and waits for its reply. Without a
    /// return path it cannot be asked, and nothing is done.
    ///
    /// # Errors
    /// If the call is out of order, the destination has failed, or the connection fails.
    pub fn ready(&mut self) -> Result<(), Error> {
        self.ready_within(None)
    }

    /// The same, with a time limit.
    pub(super) fn ready_within(&mut self, limit: Option<Duration>) -> Result<(), Error> {
        self.expect("ready", Stage::Between)?;
        if !self.options.return_path {
            return Ok(());
        }
        self.put(&Event::Command(&Command::Ping(READY_PING)))?;
        self.leave(Stage::Between)?;
        let answered = self.replies.wait_for_pong(self.writer.connection(), READY_PING, limit);
        if answered.is_err() {
            self.stage = Stage::Broken;
        }
        answered
    }

    /// Writes `discards`, which end with the PING [`DISCARDED`](postcopy), and waits for its PONG, `limit` at most. Returns whether the
    /// destination is one of this library. The guest can still stay.
    ///
    /// # Errors
    /// If the call is out of order, the destination has failed, or the connection fails.
    pub(super) fn discard(&mut self, discards: &[u8], limit: Option<Duration>) -> Result<bool, Error> {
        self.expect("discard", Stage::Between)?;
        let written = self.writer.flush().and_then(|()| self.writer.write_through(discards));
        self.finish_write(written, Stage::Between)?;
        let answered = self.replies.wait_for_pong(self.writer.connection(), postcopy::DISCARDED, limit);
        let undecided = answered.and_then(|()| self.replies.is_undecided(self.writer.connection()));
        self.finish_write(undecided, Stage::Between)?;
        Ok(self.replies.always_speaks())
    }

    /// Writes the package that moves the guest, after [`discard`](Self::discard).
    ///
    /// # Errors
    /// If the call is out of order, or the connection fails: then the destination lacks a part of the package, and does not run the
    /// guest.
    pub(super) fn package(&mut self, package: &[u8]) -> Result<(), Error> {
        self.expect("package", Stage::Between)?;
        let written = self.writer.write_through(package);
        self.finish_write(written, Stage::Closed)
    }

    /// The connection, and what is known about the destination, after [`package`](Self::package).
    pub(super) fn into_parts(self) -> (C, Peer) {
        (self.writer.into_inner(), self.replies.into_peer())
    }

    /// Waits until the destination reports whether it has the guest, for `end` at most; `None` waits without limit, as QEMU
    /// does. If `stop` has failed, or fails meanwhile, it waits for `cancelled` at most: the [sending
    /// side](Connection::write_waker) is closed then, and a destination replies to that.
    ///
    /// Without a return path the destination sends no result, and only the connection's own result counts: for a command,
    /// its exit status. Any other connection has accepted all bytes, which counts as success, as in QEMU.
    pub fn complete(&mut self, stop: &Stop, end: Option<Duration>, cancelled: Duration) -> Verdict {
        if let Err(error) = self.expect("complete", Stage::Closed) {
            return Verdict::Refused(failed(error));
        }
        if !self.options.return_path {
            return match self.writer.finish() {
                Ok(()) => Verdict::Taken,
                Err(error) => Verdict::Refused(failed(error)),
            };
        }
        self.replies.wait_for_verdict(self.writer.connection(), stop, EndLimits { end, cancelled })
    }

    /// Makes `stop` fail as soon as the destination reports a failure or closes the connection, even while this side waits
    /// for something else. It ends when the guard is dropped, which must be before [`ready`](Self::ready). `None` without a
    /// return path, or if the connection cannot detect it.
    pub fn watch(&self, stop: &Stop) -> Option<CloseWatch> {
        if !self.options.return_path {
            return None;
        }
        let judge = self.replies.judge();
        let judge = Box::new(move |bytes: &[u8], closed: bool| judge(bytes, closed).map(failed));
        self.writer.connection_ref().watch_peer(stop, Duration::ZERO, judge)
    }

    /// The connection.
    pub fn connection(&self) -> &C {
        self.writer.connection_ref()
    }

    /// The number of bytes written, including those in the buffer.
    pub fn bytes(&self) -> u64 {
        self.writer.bytes()
    }

    /// The options of this migration.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The connection, to close it when the migration is over.
    pub fn into_inner(self) -> C {
        self.writer.into_inner()
    }

    fn check_synced(&self, synced: Option<Synced<'_>>) -> Result<(), Usage> {
        let found = synced.map_or(0, |synced| synced.channels());
        let announced = self.channels;
        if found == announced {
            return Ok(());
        }
        let why = format!("a SYNC was sent on {found} channels, and {announced} were announced");
        Err(Usage::Value { what: "sync point", why })
    }

    /// Ends the records of a section with a sync point, and then the section.
    fn end_body(&mut self, next: Stage) -> Result<(), Error> {
        if self.options.sync_mode == Some(SyncMode::Round) {
            self.put(&Event::SyncPoint(SyncMark::Flush))?;
        }
        self.put(&Event::Eos)?;
        self.put(&Event::SectionEnd { footer: self.options.has_footers() })?;
        self.leave(next)
    }

    fn expect_pass(&self, call: &'static str) -> Result<(), Error> {
        match self.stage {
            Stage::InPart | Stage::InEnd => Ok(()),
            _ => Err(self.out_of_order(call)),
        }
    }

    fn put(&mut self, event: &Event<'_>) -> Result<(), Error> {
        Ok(self.encoder.encode(event, self.writer.buffer())?)
    }

    /// Writes the buffer if it is full.
    fn spill(&mut self) -> Result<(), Error> {
        let written = self.writer.spill();
        self.finish_write(written, self.stage)
    }

    /// Writes the buffer, so that nothing stays in it.
    fn leave(&mut self, next: Stage) -> Result<(), Error> {
        let written = self.writer.flush();
        self.finish_write(written, next)
    }

    /// Sets the next stage. After a failed write the destination's last message is the error, if there is one: it is more
    /// precise than the system's error.
    fn finish_write(&mut self, written: Result<(), Error>, next: Stage) -> Result<(), Error> {
        self.stage = if written.is_ok() { next } else { Stage::Broken };
        // A TLS session explains why the destination has closed it, and has read what was left.
        let explained = |error: &Error| {
            matches!(error, Error::Io { source, .. } if source.get_ref().is_some()
                && matches!(source.kind(), io::ErrorKind::ConnectionRefused
                    | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe))
        };
        // What the destination has reported needs no other explanation.
        let is_broken = |error: &Error| matches!(error, Error::Io { .. }) && !explained(error);
        written.map_err(|error| match self.options.return_path && is_broken(&error) {
            true => self.replies.last_word(self.writer.connection()).unwrap_or(error),
            false => error,
        })
    }

    fn expect(&self, call: &'static str, stage: Stage) -> Result<(), Error> {
        if self.stage == stage { Ok(()) } else { Err(self.out_of_order(call)) }
    }

    fn out_of_order(&self, call: &'static str) -> Error {
        let state = match self.stage {
            Stage::New => "before begin",
            Stage::Begun => "before setup",
            Stage::Between => "between two passes",
            Stage::InPart | Stage::InEnd => "within a pass",
            Stage::RamDone => "after the last pass",
            Stage::Closed => "after the end of the stream",
            Stage::Broken => "after the connection failed",
        };
        Usage::OutOfOrder { call, state }.into()
    }
}

/// The value of the PING after OPEN_RETURN_PATH, the same as QEMU's.
const FIRST_PING: u32 = 1;
