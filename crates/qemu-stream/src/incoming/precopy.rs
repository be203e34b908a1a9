//! A pre-copy migration: a loop over the events of its stream, with replies and time limits.
//!
//! ```text
//! Events ─▶ configuration ─ commands ─ blocks ─ sync points ─ pages ─ … ─ devices ─▶ Loaded
//!               │              │          └───────────┴──────────┴──▶ Destination
//!               ▼              ▼
//!           PONG, SHUT: Line
//! ```
//!
//! Commands of COLO are refused by name, as are commands that are out of order. Those of post-copy: `postcopy.rs`.

use std::{sync::Arc, time::Duration};

use multifd::{channel::Stop, error::chain};

use super::{
    counts::MainCounts,
    destination::{Destination, refused},
    known::{Known, Postcopy},
    line::Line,
    loaded::Loaded,
};
use crate::{
    connection::{Connection, Judge},
    error::{Error, Place, StreamKind, Usage, Violation},
    format::{
        BlockList, Command, Configuration, DISCARDED_PING, DevicePart, Event, Message,
        POSTCOPY_CHANNELS_MARK, POSTCOPY_CHANNELS_PING, READY_PING, REASON_PING, SyncMode, VERDICT_MARK,
    },
};

/// The result of loading, which is reported to the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All data has arrived and is durable: the source may forget the guest.
    Loaded,
    /// The guest must continue at the source.
    Failed,
}

/// An incoming pre-copy migration.
#[derive(Debug)]
#[must_use]
pub struct Incoming<C: Connection> {
    pub(super) line: Line<C>,
    switchover_ack: bool,
    silence: Duration,
    stall: Option<Duration>,
    pause: Option<Duration>,
    pub(super) return_path: bool,
    /// The source has reported that its guest is stopped.
    pub(super) guest_stands: bool,
    pub(super) loaded: bool,
    stop: Option<Stop>,
    sends_reason: bool,
    counts: Arc<MainCounts>,
    pub(super) postcopy: Postcopy,
    pub(super) channels_may_break: bool,
    pub(super) known: Known,
}

impl<C: Connection> Incoming<C> {
    /// A migration whose main stream arrives over `connection`.
    pub fn new(connection: C) -> Self {
        Self {
            line: Line::new(connection),
            switchover_ack: false,
            silence: SILENCE,
            stall: Some(STALL),
            pause: Some(PAUSE),
            return_path: false,
            guest_stands: false,
            loaded: false,
            stop: None,
            sends_reason: true,
            counts: Arc::default(),
            postcopy: Postcopy::default(),
            channels_may_break: false,
            known: Known::default(),
        }
    }

    /// Makes `stop` fail as soon as a source with a return path closes main, even while this side waits for something else, such
    /// as a channel. By default a closed connection is detected when main is read next.
    pub fn stopping(mut self, stop: &Stop) -> Self {
        self.stop = Some(stop.clone());
        self
    }

    /// Keeps the number of bytes in `counts`.
    pub(crate) fn counted(mut self, counts: Arc<MainCounts>) -> Self {
        self.counts = counts;
        self
    }

    /// Sends SWITCHOVER_ACK as soon as there is a return path. Needed if, and only if, capability switchover-ack is on at the
    /// source, which the stream does not show. Off by default.
    pub fn switchover_ack(mut self, on: bool) -> Self {
        self.switchover_ack = on;
        self
    }

    /// Expects no description of the devices (machine option suppress-vmdesc, on for machine types up to 2.2). Off by default.
    /// The end of the stream is then found so:
    ///
    /// | sections have | no return path | return path |
    /// | --- | --- | --- |
    /// | footers | the source closes after one; also if this is off | [silence](Self::silence) after one |
    /// | no footers | the source closes: a source that dies there is not detected | not at all: refused |
    pub fn suppress_vmdesc(mut self, on: bool) -> Self {
        self.line.set_suppress_vmdesc(on);
        self
    }

    /// Time limit for a source with a return path that is silent after what looks like the end of its devices. Such a source
    /// sends no description; it is refused unless [that is expected](Self::suppress_vmdesc). Default 10 s.
    pub fn silence(mut self, limit: Duration) -> Self {
        self.silence = limit;
        self
    }

    /// Time limit for a silent source before the end of the first section of RAM, within any section, and after the end of RAM.
    /// Default 120 s; `None` is no limit, as in QEMU. Between the sections of RAM, and before their footers, which QEMU delays,
    /// it applies only if more of a pass [must follow](super::Destination::is_within_pass); otherwise
    /// [another limit](Self::pause_timeout) does, since a source that pauses before the switchover is silent. A source of this
    /// library has the limit there as well once its guest is stopped and all of its RAM has arrived.
    ///
    /// During a long section this connection is silent while pages arrive over channels. The connection that
    /// [`Receiver::wait_main`](multifd::Receiver::wait_main) returns takes them into account. With another connection and
    /// channels, set `None`.
    pub fn stall_timeout(mut self, limit: Option<Duration>) -> Self {
        self.stall = limit;
        self
    }

    /// Time limit for a source that is silent between two sections of RAM, as one with pause-before-switchover is until its
    /// operator lets it continue. Default 3600 s; `None` is no limit. A source that is frozen there looks the same. The limit also
    /// applies to a source that has [switched to post-copy](Self::postcopy) and returns after a broken connection.
    ///
    /// **Warning:** a QEMU 7.2 with multifd on that is continued after this limit can stop replying to its monitor. One that is
    /// cancelled replies.
    pub fn pause_timeout(mut self, limit: Option<Duration>) -> Self {
        self.pause = limit;
        self
    }

    /// See [`pause_timeout`](Self::pause_timeout).
    pub(crate) fn pause_limit(&self) -> Option<Duration> {
        self.pause
    }

    /// Whether a source of this library is sent the reason if this side fails or refuses: the texts of the error and its
    /// causes, at most 512 bytes. They may contain paths and addresses of this host. On by default. A QEMU source gets no
    /// reason, because its format has none.
    pub fn send_reason(mut self, on: bool) -> Self {
        self.sends_reason = on;
        self
    }

    /// Sets the reason that is [sent](Self::send_reason) if this side ends the migration with a failure. By default it is
    /// the error of [`run`](Self::run), or that of a failed [`finish`](Self::finish).
    pub fn set_reason(&mut self, reason: &(dyn std::error::Error + 'static)) {
        self.line.set_reason(reason);
    }

    /// Reads until the RAM blocks are announced. [`run`](Self::run) continues there. The destination receives everything
    /// before the blocks; they themselves are passed to it by `run`. The source waits in the meantime.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn announced<D: Destination>(
        &mut self,
        destination: &mut D,
    ) -> Result<(Option<&Configuration>, &BlockList), Error> {
        if self.known.ram.is_none() {
            self.read(destination)?;
        }
        let Some((_, blocks)) = &self.known.ram else {
            return Err(self.misplaced("end of the stream", "before the start of ram"));
        };
        Ok((self.known.configuration.as_ref(), blocks))
    }

    /// Reads the whole stream, as [`run_resumable`](Self::run_resumable) does with a source that never returns.
    ///
    /// # Errors
    /// As there.
    pub fn run<D: Destination>(&mut self, destination: &mut D) -> Result<Loaded, Error> {
        self.run_resumable(destination, Err)
    }

    /// Reads the whole stream. The result is not reported to the source: call [`finish`](Self::finish) when the loaded data is
    /// durable, or loading has failed.
    ///
    /// If the connection breaks after a [switch to post-copy](Self::postcopy), `again` is called with the error, and waits for the
    /// source to return over another connection: QEMU does that with `migrate` and `resume: true`, once its migration is
    /// `postcopy-paused`. `again` returns that connection, or the error that ends the migration.
    ///
    /// # Errors
    /// If the stream is malformed, cut or uses what is not supported, or the destination fails.
    pub fn run_resumable<D: Destination>(
        &mut self,
        destination: &mut D,
        mut again: impl FnMut(Error) -> Result<C, Error>,
    ) -> Result<Loaded, Error> {
        self.announced(destination)?;
        if let Some((_, blocks)) = &self.known.ram {
            let taken = destination.blocks(blocks);
            let taken = taken.map_err(|e| refused(self.line.here(), "the ram blocks", e));
            self.noted(taken)?;
        }
        loop {
            match self.read(destination) {
                Ok(Some(devices)) => return self.complete(devices),
                Ok(None) => return Err(self.misplaced("start of ram", "after the start of ram")),
                Err(error) if self.is_interrupted(&error) => {
                    let text = chain(&error).to_string();
                    let connection = again(error);
                    let connection = self.noted(connection)?;
                    let resumed = self.resume(connection, destination, text);
                    self.noted(resumed)?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Executes the events up to the block list, with `None`, or up to the end of the stream, with the devices.
    pub(super) fn read<D: Destination>(&mut self, destination: &mut D) -> Result<Option<DevicePart>, Error> {
        let read = self.read_events(destination);
        self.noted(read)
    }

    /// Notes an error as the reason of the failure.
    fn noted<T>(&mut self, done: Result<T, Error>) -> Result<T, Error> {
        done.inspect_err(|error| self.line.set_reason(error))
    }

    fn read_events<D: Destination>(&mut self, destination: &mut D) -> Result<Option<DevicePart>, Error> {
        self.line.limit(self.stall)?;
        // The page that an XBZRLE delta is applied to; empty before the first one.
        let mut page_now = Vec::new();
        loop {
            self.wait_for_more(destination)?;
            let may_have_ended = self.limit_silence()?;
            self.count();
            let event = match self.line.next() {
                Err(Error::TimedOut { .. }) if may_have_ended => {
                    self.line.limit(self.stall)?;
                    self.line.end_at_silence()?;
                    continue;
                }
                event => event?,
            };
            match event {
                Event::Configuration(configuration) => {
                    self.known.configuration = configuration.cloned();
                    if let Err(error) = destination.configuration(configuration) {
                        let error = refused(self.line.here(), "the configuration", error);
                        self.hear_out();
                        return Err(error);
                    }
                }
                Event::Command(command) => {
                    let command = command.clone();
                    self.command(&command, destination)?;
                }
                Event::Blocks { section, blocks } => {
                    let (count, total) = (blocks.entries().len(), blocks.total());
                    tracing::debug!(blocks = count, total, "ram section starts");
                    self.known.ram = Some((section, blocks.clone()));
                    return Ok(None);
                }
                Event::SyncMode(mode) => {
                    tracing::debug!(?mode, "sync mode recognised");
                    self.known.sync_mode = Some(mode);
                    if mode == SyncMode::Round {
                        let taken = destination.multifd();
                        taken.map_err(|e| refused(self.line.here(), "multifd", e))?;
                    }
                }
                Event::SyncPoint(_) => {
                    destination.sync().map_err(|e| refused(self.line.here(), "a sync point", e))?;
                }
                Event::ZeroPage { block, page } => {
                    let taken = destination.zero_page(block, page);
                    taken.map_err(|e| refused(self.line.here(), "a zero page", e))?;
                }
                Event::Page { block, page, bytes } => {
                    let taken = destination.page(block, page, bytes);
                    taken.map_err(|e| refused(self.line.here(), "a page", e))?;
                }
                Event::Xbzrle { block, page, delta } => {
                    page_now.resize(self.known.page_size(), 0);
                    let read = destination.read_page(block, page, &mut page_now);
                    read.map_err(|e| refused(delta.place(), "a page to be changed", e))?;
                    delta.apply(&mut page_now)?;
                    let taken = destination.page(block, page, &page_now);
                    taken.map_err(|e| refused(self.line.here(), "a page", e))?;
                }
                Event::SectionEnd { footer } => self.known.footers = footer,
                Event::EndOfRam => {
                    let taken = destination.end_of_ram();
                    taken.map_err(|e| refused(self.line.here(), "the end of ram", e))?;
                }
                Event::Devices(_) => {
                    if may_have_ended {
                        self.line.limit(self.stall)?;
                    }
                }
                Event::Pass { .. } if self.postcopy.resuming => {
                    return Err(self.misplaced("a section of ram", "before POSTCOPY_RESUME"));
                }
                Event::Pass { last } => {
                    destination.section(last).map_err(|e| refused(self.line.here(), "a pass", e))?;
                }
                Event::OtherSection { .. } | Event::Eos => {}
                Event::End(devices) => {
                    let devices = *devices;
                    self.count();
                    return Ok(Some(devices));
                }
            }
        }
    }

    /// Whether the source has opened the return path.
    pub fn has_return_path(&self) -> bool {
        self.return_path
    }

    /// The connection. Reading from it loses bytes of the stream.
    pub fn connection(&mut self) -> &mut C {
        self.line.get_mut()
    }

    /// Bytes of the main stream read so far.
    pub fn bytes(&self) -> u64 {
        self.line.bytes()
    }

    /// Reports the result to the source, and returns the connection. Without a return path nothing is sent: such a source does
    /// not wait for a result.
    ///
    /// Before [`Outcome::Loaded`] is reported, the connection is checked once more: a source with a return path that has closed
    /// it keeps its guest. **Warning:** after an error the guest must not run here.
    ///
    /// # Errors
    /// If [`Outcome::Loaded`] is given and [`run`](Self::run) has not succeeded; [`Error::SourceGone`] if the source has closed the
    /// connection; if SHUT cannot be sent: then the source keeps its guest.
    pub fn finish(mut self, outcome: Outcome) -> Result<C, Error> {
        if outcome == Outcome::Loaded && !self.loaded {
            return Err(Usage::OutOfOrder { call: "finish", state: "before all is loaded" }.into());
        }
        if outcome == Outcome::Loaded && self.return_path {
            let is_there = self.line.still_there();
            self.noted(is_there)?;
        }
        self.line.shut(u32::from(outcome == Outcome::Failed))?;
        let at = self.line.here();
        self.line.into_inner().ok_or(Error::Cut { at, expected: "a connection" })
    }

    /// Executes a command, or refuses it.
    fn command<D: Destination>(&mut self, command: &Command, destination: &mut D) -> Result<(), Error> {
        let at = self.line.place();
        let before_ram = self.known.ram.is_none();
        match command {
            Command::OpenReturnPath => {
                self.return_path = true;
                let watch = self
                    .stop
                    .as_ref()
                    .and_then(|stop| self.line.get_ref().watch_peer(stop, CHANNELS_END, closed()));
                self.line.open_return_path(watch);
                if self.switchover_ack {
                    self.line.say(&Message::SwitchoverAck)?;
                }
                Ok(())
            }
            Command::Ping(_) if !self.return_path => Err(Violation::PingWithoutReturnPath.at(at)),
            // The guest runs when they are sent.
            Command::Ping(value) if self.line.is_in_package() && self.postcopy.early.is_some() => {
                self.postcopy.withheld.push(*value);
                Ok(())
            }
            Command::Ping(value) if self.round_ping(*value, destination)? => Ok(()),
            Command::Ping(value) => {
                self.postcopy.asked |= *value == DISCARDED_PING && self.postcopy.advised;
                match self.line.say(&Message::Pong(*value)) {
                    // The rest of what has arrived shows whether the source has switched to post-copy.
                    Err(error) if self.postcopy.listening => tracing::debug!(%error, "a reply is lost"),
                    said => said?,
                }
                if *value == REASON_PING && before_ram && self.sends_reason {
                    self.line.send_reason();
                }
                self.guest_stands |= *value == READY_PING && !before_ram;
                if *value == POSTCOPY_CHANNELS_PING && before_ram && self.postcopy.early.is_some() {
                    self.line.say(&Message::Pong(POSTCOPY_CHANNELS_MARK))?;
                }
                match command.announced_channels().filter(|_| before_ram) {
                    Some(channels) => self.announced_channels(channels, destination),
                    None => Ok(()),
                }
            }
            Command::SwitchoverStart if before_ram => {
                let (record, place) = ("SWITCHOVER_START", "before the start of ram");
                Err(Violation::Misplaced { record, place }.at(at))
            }
            Command::SwitchoverStart => {
                self.known.switchover_start = true;
                Ok(())
            }
            other => self.postcopy_command(other, destination),
        }
    }

    /// Reads the commands with which a source opens the return path, after its configuration was refused: only then the
    /// refusal can be reported. They arrive together with the configuration.
    fn hear_out(&mut self) {
        let limited = self.line.limit(Some(HEARD_OUT));
        for _ in 0..3 {
            match self.line.next() {
                Ok(Event::Command(Command::OpenReturnPath)) if limited.is_ok() => {
                    self.return_path = true;
                    self.line.open_return_path(None);
                }
                // No reply: it would mean that the configuration was accepted.
                Ok(Event::Command(Command::Ping(value))) if self.return_path => {
                    if *value == REASON_PING && self.sends_reason {
                        self.line.send_reason();
                    }
                }
                _ => return,
            }
        }
    }

    /// A source that announces its channels is one of this library.
    fn announced_channels<D: Destination>(&mut self, channels: u8, destination: &mut D) -> Result<(), Error> {
        tracing::debug!(channels, "the source announces its channels");
        self.postcopy.ours = true;
        // Such a source understands this PONG: this side never closes the connection without SHUT.
        self.line.say(&Message::Pong(VERDICT_MARK))?;
        let taken = destination.channels(channels);
        taken.map_err(|e| refused(self.line.here(), "the number of channels", e))
    }

    /// Waits for the next event where the source may pause, unless the guest is known to be stopped. If nothing has arrived for
    /// the stall timeout, and no more of the pass must follow, the rest of the pause timeout is waited for.
    fn wait_for_more<D: Destination>(&mut self, destination: &D) -> Result<(), Error> {
        if !self.line.may_pause() || self.guest_stands || !self.line.is_drained() {
            return Ok(());
        }
        let first = [self.stall, self.pause].into_iter().flatten().min();
        self.line.limit(first)?;
        let waited = match self.line.wait() {
            Err(Error::TimedOut { at, .. }) if self.stall == first && destination.is_within_pass() => {
                Err(Error::TimedOut { at, expected: "more of a pass" })
            }
            Err(Error::TimedOut { .. }) if self.pause != first => {
                let rest = self.pause.map(|pause| pause.saturating_sub(first.unwrap_or_default()));
                self.line.limit(rest)?;
                self.line.wait().map_err(paused)
            }
            waited => waited.map_err(paused),
        };
        waited?;
        self.line.limit(self.stall)
    }

    /// Records the bytes of main so far.
    fn count(&self) {
        self.counts.set_bytes(self.line.bytes());
    }

    /// Sets the time limit of silence if the stream may have ended. Returns whether it may.
    fn limit_silence(&mut self) -> Result<bool, Error> {
        let may_have_ended = self.return_path && self.line.may_have_ended();
        if may_have_ended {
            self.line.limit(Some(self.silence))?;
        }
        Ok(may_have_ended)
    }

    pub(super) fn misplaced(&self, record: &'static str, place: &'static str) -> Error {
        Violation::Misplaced { record, place }.at(self.line.here())
    }
}

/// The error of a source that was silent for too long where it may pause.
fn paused(error: Error) -> Error {
    match error {
        Error::TimedOut { at, .. } => {
            let expected = "the next section of RAM (pause-timeout: the source was paused before its switchover, or frozen; \
                            cancel the migration there, do not continue it)";
            Error::TimedOut { at, expected }
        }
        other => other,
    }
}

/// The error of a source that closes the connection before SHUT.
fn closed() -> Judge {
    Box::new(|_, closed| {
        let at = Place { stream: StreamKind::Main, offset: 0 };
        closed.then(|| Error::SourceGone { at }.while_doing("cannot receive the guest"))
    })
}

/// How long channels continue after the source has closed main. A QEMU that is cancelled closes main first and its channels a
/// moment later. If the channels are reset in between, some versions wait for them without limit (seen with 7.2.22 and 10.0.2).
pub(crate) const CHANNELS_END: Duration = Duration::from_secs(1);
/// How long a source whose configuration was refused may take to open the return path.
const HEARD_OUT: Duration = Duration::from_secs(1);
pub(crate) const SILENCE: Duration = Duration::from_secs(10);
pub(crate) const STALL: Duration = Duration::from_secs(120);
pub(crate) const PAUSE: Duration = Duration::from_secs(3600);
