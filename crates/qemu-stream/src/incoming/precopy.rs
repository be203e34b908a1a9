//! A pre-copy migration: a loop over the events of its stream, with replies and time limits.
//!
//! ```text
//! Events ─▶ configuration ─ commands ─ blocks ─ sync points ─ pages ─ … ─ devices ─▶ Loaded
//!               │              │          └───────────┴──────────┴──▶ Destination
//!               ▼              ▼
//!           PONG, SHUT: Line
//! ```
//!
//! What belongs to post-copy or COLO is refused by name, and so is a command out of place.

use std::time::Duration;

use multifd::channel::Stop;

use super::{
    destination::{Destination, refused},
    line::Line,
    loaded::Loaded,
};
use crate::{
    connection::{Connection, Judge},
    error::{Error, Place, StreamKind, Usage, Violation},
    format::{
        BlockList, Command, Configuration, DevicePart, Event, Message, READY_PING, SectionId, SyncMode,
        VERDICT_MARK,
    },
    refuse,
};

/// How loading ended, for the source to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All is here and durable: the source may forget the guest.
    Loaded,
    /// The guest must go on at the source.
    Failed,
}

/// A precopy migration coming in.
#[derive(Debug)]
#[must_use]
pub struct Incoming<C: Connection> {
    line: Line<C>,
    switchover_ack: bool,
    silence: Duration,
    stall: Option<Duration>,
    return_path: bool,
    /// The source has said that its guest stands.
    guest_stands: bool,
    loaded: bool,
    stop: Option<Stop>,
}

impl<C: Connection> Incoming<C> {
    /// A migration whose main stream comes over `connection`.
    pub fn new(connection: C) -> Self {
        Self {
            line: Line::new(connection),
            switchover_ack: false,
            silence: SILENCE,
            stall: Some(STALL),
            return_path: false,
            guest_stands: false,
            loaded: false,
            stop: None,
        }
    }

    /// Has `stop` fail as soon as a source with a return path closes main, whatever this side waits for: channels that do not
    /// move, say. By default that is found out when main is read next.
    pub fn stopping(mut self, stop: &Stop) -> Self {
        self.stop = Some(stop.clone());
        self
    }

    /// Says SWITCHOVER_ACK as soon as there is a return path. Needed if, and only if, the source has
    /// capability switchover-ack on, which nothing in the stream tells. Off by default.
    pub fn switchover_ack(mut self, on: bool) -> Self {
        self.switchover_ack = on;
        self
    }

    /// Takes it that the source sends no description of its devices: machine option suppress-vmdesc, on for machine
    /// types up to 2.2. Off by default. What tells the end then:
    ///
    /// | sections have | no return path | return path |
    /// | --- | --- | --- |
    /// | footers | the source closes behind one; also if this is off | [silence](Self::silence) behind one |
    /// | no footers | the source closes: a source that dies there goes unnoticed | nothing: refused |
    pub fn suppress_vmdesc(mut self, on: bool) -> Self {
        self.line.set_suppress_vmdesc(on);
        self
    }

    /// How long a source with a return path may be silent behind what looks like the end of its devices. Such a source
    /// sends no description; it is refused, unless [that is expected](Self::suppress_vmdesc). Default 10 s.
    pub fn silence(mut self, limit: Duration) -> Self {
        self.silence = limit;
        self
    }

    /// How long the source may be silent where something is due: before RAM's first section has ended, in the middle
    /// of any section, and behind the end of RAM. Default 120 s; `None` is for ever, as QEMU waits. Between the
    /// sections of RAM a source may be silent for as long as it likes: one that pauses before the switchover is; but a source
    /// of this library has a limit there, too, from when its guest stands and all of its RAM has come. The footer of a section counts as what is between, for QEMU keeps it back that long.
    ///
    /// A long section is silent on this connection while its pages come over channels. The connection that
    /// [`Receiver::wait_main`](multifd::Receiver::wait_main) gives knows of them; with another one of your own, and
    /// channels, say `None`.
    pub fn stall_timeout(mut self, limit: Option<Duration>) -> Self {
        self.stall = limit;
        self
    }

    /// Reads the whole stream. Nothing is said to the source at the end: call
    /// [`finish`](Self::finish) when what was loaded is durable, or has failed.
    ///
    /// # Errors
    /// If the stream is malformed, cut or uses what is not served, or the destination fails.
    pub fn run<D: Destination>(&mut self, destination: &mut D) -> Result<Loaded, Error> {
        self.line.limit(self.stall)?;
        let mut known = Known::default();
        // The page that an XBZRLE delta is applied to; empty until one comes.
        let mut page_now = Vec::new();
        loop {
            self.wait_for_more()?;
            let may_have_ended = self.limit_silence()?;
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
                    known.configuration = configuration.cloned();
                    let taken = destination.configuration(configuration);
                    taken.map_err(|e| refused(self.line.here(), "the configuration", e))?;
                }
                Event::Command(command) => {
                    let command = command.clone();
                    self.command(&command, &mut known, destination)?;
                }
                Event::Blocks { section, blocks } => {
                    let (count, total) = (blocks.entries().len(), blocks.total());
                    tracing::debug!(blocks = count, total, "ram section starts");
                    known.ram = Some((section, blocks.clone()));
                    let taken = destination.blocks(blocks);
                    taken.map_err(|e| refused(self.line.here(), "the ram blocks", e))?;
                }
                Event::SyncMode(mode) => {
                    tracing::debug!(?mode, "sync mode recognised");
                    known.sync_mode = Some(mode);
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
                    page_now.resize(known.page_size(), 0);
                    let read = destination.read_page(block, page, &mut page_now);
                    read.map_err(|e| refused(delta.place(), "a page to be changed", e))?;
                    delta.apply(&mut page_now)?;
                    let taken = destination.page(block, page, &page_now);
                    taken.map_err(|e| refused(self.line.here(), "a page", e))?;
                }
                Event::SectionEnd { footer } => known.footers = footer,
                Event::EndOfRam => {
                    let taken = destination.end_of_ram();
                    taken.map_err(|e| refused(self.line.here(), "the end of ram", e))?;
                }
                Event::Devices(_) => {
                    if may_have_ended {
                        self.line.limit(self.stall)?;
                    }
                }
                Event::OtherSection { .. } | Event::Pass { .. } | Event::Eos => {}
                Event::End(devices) => return self.complete(known, *devices),
            }
        }
    }

    /// Whether the source has opened the return path, so far.
    pub fn has_return_path(&self) -> bool {
        self.return_path
    }

    /// The connection. What has been read of it and what not is this driver's affair.
    pub fn connection(&mut self) -> &mut C {
        self.line.get_mut()
    }

    /// Bytes of the main stream read so far.
    pub fn bytes(&self) -> u64 {
        self.line.bytes()
    }

    /// Tells the source how it ended, and gives the connection back. Without a return path nothing is
    /// sent: such a source has gone its way already.
    ///
    /// Before it says that all is here, it looks at the connection once more: a source with a return path that has closed it
    /// takes its guest back. An error means that the machine is not this side's: **do not run it**.
    ///
    /// # Errors
    /// If all is said to be loaded and it is not; [`Error::SourceGone`] if the source has closed; or SHUT cannot be sent: then
    /// the source has not forgotten its guest.
    pub fn finish(mut self, outcome: Outcome) -> Result<C, Error> {
        if outcome == Outcome::Loaded && !self.loaded {
            return Err(Usage::OutOfOrder { call: "finish", state: "before all is loaded" }.into());
        }
        if outcome == Outcome::Loaded && self.return_path {
            self.line.still_there()?;
        }
        self.line.shut(u32::from(outcome == Outcome::Failed))?;
        let at = self.line.here();
        self.line.into_inner().ok_or(Error::Cut { at, expected: "a connection" })
    }

    /// Does what a command asks for, or refuses it.
    fn command<D: Destination>(
        &mut self,
        command: &Command,
        known: &mut Known,
        destination: &mut D,
    ) -> Result<(), Error> {
        let at = self.line.place();
        let before_ram = known.ram.is_none();
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
            Command::Ping(value) => {
                self.line.say(&Message::Pong(*value))?;
                self.guest_stands |= *value == READY_PING && !before_ram;
                match command.announced_channels().filter(|_| before_ram) {
                    Some(channels) => self.announced(channels, destination),
                    None => Ok(()),
                }
            }
            Command::SwitchoverStart if before_ram => {
                let (record, place) = ("SWITCHOVER_START", "before the start of ram");
                Err(Violation::Misplaced { record, place }.at(at))
            }
            Command::SwitchoverStart => {
                known.switchover_start = true;
                Ok(())
            }
            other => Err(refuse::command(other, at)),
        }
    }

    /// A source that announces its channels is one of this library.
    fn announced<D: Destination>(&mut self, channels: u8, destination: &mut D) -> Result<(), Error> {
        tracing::debug!(channels, "the source announces its channels");
        // Such a source understands it: this side never closes without SHUT.
        self.line.say(&Message::Pong(VERDICT_MARK))?;
        let taken = destination.channels(channels);
        taken.map_err(|e| refused(self.line.here(), "the number of channels", e))
    }

    /// Waits for what comes next where the source may pause: without limit, unless the guest is known to stand meanwhile.
    fn wait_for_more(&mut self) -> Result<(), Error> {
        if self.line.may_pause() && !self.guest_stands && self.line.is_drained() && self.stall.is_some() {
            self.line.limit(None)?;
            self.line.wait()?;
            self.line.limit(self.stall)?;
        }
        Ok(())
    }

    /// Limits the wait for the next event if silence is how the stream may end; says whether it is.
    fn limit_silence(&mut self) -> Result<bool, Error> {
        let may_have_ended = self.return_path && self.line.may_have_ended();
        if may_have_ended {
            self.line.limit(Some(self.silence))?;
        }
        Ok(may_have_ended)
    }

    fn complete(&mut self, known: Known, devices: DevicePart) -> Result<Loaded, Error> {
        let bytes = self.line.bytes();
        tracing::debug!(devices = devices.sections().len(), bytes, "stream is complete");
        let Some((section, blocks)) = known.ram else {
            let (record, place) = ("end of the stream", "before the start of ram");
            return Err(Violation::Misplaced { record, place }.at(self.line.here()));
        };
        self.loaded = true;
        Ok(Loaded {
            configuration: known.configuration,
            blocks,
            section,
            sync_mode: known.sync_mode.unwrap_or(SyncMode::Legacy),
            return_path: self.return_path,
            switchover_start: known.switchover_start,
            footers: known.footers,
            devices,
            bytes,
        })
    }
}

/// What the events have brought that lasts.
#[derive(Default)]
struct Known {
    configuration: Option<Configuration>,
    ram: Option<(SectionId, BlockList)>,
    sync_mode: Option<SyncMode>,
    switchover_start: bool,
    footers: bool,
}

impl Known {
    fn page_size(&self) -> usize {
        self.ram.as_ref().map_or(0, |(_, blocks)| blocks.page_size().bytes())
    }
}

/// What a source means that closes before it was told how it ended.
fn closed() -> Judge {
    Box::new(|_, closed| {
        let at = Place { stream: StreamKind::Main, offset: 0 };
        closed.then(|| Error::SourceGone { at }.while_doing("cannot receive the guest"))
    })
}

/// How long channels go on when the source has closed main. A QEMU that is cancelled closes main first and its channels a moment
/// later; where they are reset in between, some versions wait for them for ever (seen with 7.2.22 and 10.0.2).
pub(crate) const CHANNELS_END: Duration = Duration::from_secs(1);
pub(crate) const SILENCE: Duration = Duration::from_secs(10);
pub(crate) const STALL: Duration = Duration::from_secs(120);
