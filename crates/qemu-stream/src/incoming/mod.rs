//! The destination's side of the main stream.
//!
//! ```text
//! connection ─▶ Reader ─▶ header ─ commands ─ ram records ─ … ─ device part ─▶ Loaded
//!     ▲                       │        │          │
//!     └── PONG, SHUT ─────────┴────────┴──────────┴──▶ Destination: configuration, blocks, pages, sync
//! ```
//!
//! [`Incoming`] reads a whole precopy migration in the caller's thread and tells a [`Destination`]
//! what it reads. It owns the connection and one buffer. What it cannot take it refuses by name;
//! nothing a peer sends makes it allocate, loop or index beyond `format/limits.rs`.

mod destination;
mod device_part;
mod events;
mod line;
mod loader;
mod ram;

use std::time::Duration;

use multifd::{channel::Stop, live::RunState};

pub use crate::format::{Delta, Event, SyncMark};
use crate::{
    connection::{Connection, Judge},
    error::{CallerMistake, Error, PeerMisbehaved, Place, Stream, Unsupported},
    format::{
        BlockList, Command, Configuration, DevicePart, DeviceSection, EarlyPart, EndFinder, Message,
        READY_PING, Section, SectionHead, SectionId, SyncMode, VERDICT_MARK, decode_footer, decode_header,
        footer_follows,
    },
    refuse,
};
pub use destination::Destination;
use destination::refused;
use device_part::{Without, set_limit};
pub use events::Events;
use line::Line;
pub use loader::{Expected, LeftOut, Loader, MainPages};
use ram::Ram;

/// What has been loaded, beside RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Loaded {
    /// The configuration; `None` from machine types up to 2.3.
    pub configuration: Option<Configuration>,
    /// The RAM blocks.
    pub blocks: BlockList,
    /// The RAM section's number, which the devices' sections have left free.
    pub section: SectionId,
    /// How the ends of dirty rounds were marked. Legacy as well when multifd is off at the source.
    pub sync_mode: SyncMode,
    /// Whether the source waits for our SHUT.
    pub return_path: bool,
    /// Whether SWITCHOVER_START was sent.
    pub switchover_start: bool,
    /// Whether sections have footers.
    pub footers: bool,
    /// The devices and their description, if the source has sent one.
    pub devices: DevicePart,
    /// Bytes of the main stream.
    pub bytes: u64,
}

impl Loaded {
    /// Whether the guest ran at the source; `None` if the source does not say. A guest that was paused stays paused.
    pub fn run_state(&self) -> Option<RunState> {
        self.devices.run_state()
    }

    /// The device of this name and instance: its section and its state.
    pub fn device(&self, name: &str, instance: u32) -> Option<(&DeviceSection, &[u8])> {
        self.devices.find(name, instance)
    }
}

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
    r: Line<C>,
    switchover_ack: bool,
    suppress_vmdesc: bool,
    silence: Duration,
    stall: Option<Duration>,
    return_path: bool,
    /// The source has said that its guest stands.
    guest_stands: bool,
    early: EarlyPart,
    loaded: bool,
    stop: Option<Stop>,
}

impl<C: Connection> Incoming<C> {
    /// A migration whose main stream comes over `connection`.
    pub fn new(connection: C) -> Self {
        let r = Line::new(connection);
        let early = EarlyPart::default();
        Self {
            r,
            switchover_ack: false,
            suppress_vmdesc: false,
            silence: SILENCE,
            stall: Some(STALL),
            return_path: false,
            guest_stands: false,
            early,
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
        self.suppress_vmdesc = on;
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
        set_limit(&mut self.r, self.stall)?;
        let configuration = decode_header(&mut self.r)?;
        if configuration.as_ref().is_some_and(|configuration| configuration.mapped_ram) {
            let (what, capability) = ("mapped-ram stream over a connection", "mapped-ram");
            return Err(Unsupported::Capability { what, capability }.at(self.r.place()));
        }
        let taken = destination.configuration(configuration.as_ref());
        taken.map_err(|e| refused(&self.r, "the configuration", e))?;
        let section = self.until_ram(destination)?;
        let page_size = configuration.as_ref().map(Configuration::page_size).unwrap_or_default();
        let shared = configuration.as_ref().is_some_and(|configuration| configuration.ignore_shared);
        let blocks = BlockList::decode(&mut self.r, page_size, shared)?;
        tracing::debug!(blocks = blocks.entries().len(), total = blocks.total(), "ram section starts");
        destination.blocks(&blocks).map_err(|e| refused(&self.r, "the ram blocks", e))?;

        let mut ram = Ram::new(&blocks);
        let sync_mode = ram.start(&mut self.r, destination)?;
        // Not what the machine type says: a property of the source may differ.
        self.wait_for_more()?;
        let footers = footer_follows(&mut self.r)?;
        if footers {
            decode_footer(section, &mut self.r)?;
        }
        let switchover_start = self.passes(&mut ram, sync_mode, section, footers, destination)?;
        destination.end_of_ram().map_err(|e| refused(&self.r, "the end of ram", e))?;
        self.early.finish(&mut self.r, footers)?;
        let finder = EndFinder::new(footers).early(std::mem::take(&mut self.early));
        let without = Without {
            return_path: self.return_path,
            expected: self.suppress_vmdesc,
            silence: self.silence,
            stall: self.stall,
        };
        let devices = device_part::collect(&mut self.r, finder, footers, &without)?;
        tracing::debug!(devices = devices.sections().len(), bytes = self.r.position(), "stream is complete");
        self.loaded = true;
        Ok(Loaded {
            configuration,
            blocks,
            section,
            sync_mode,
            return_path: self.return_path,
            switchover_start,
            footers,
            devices,
            bytes: self.r.position(),
        })
    }

    /// Whether the source has opened the return path, so far.
    pub fn has_return_path(&self) -> bool {
        self.return_path
    }

    /// The connection. What has been read of it and what not is this driver's affair.
    pub fn connection(&mut self) -> &mut C {
        self.r.get_mut()
    }

    /// Bytes of the main stream read so far.
    pub fn bytes(&self) -> u64 {
        self.r.position()
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
            return Err(CallerMistake::OutOfOrder { call: "finish", state: "before all is loaded" }.into());
        }
        if outcome == Outcome::Loaded && self.return_path {
            self.r.still_there()?;
        }
        self.r.shut(u32::from(outcome == Outcome::Failed))?;
        let at = self.r.here();
        self.r.into_inner().ok_or(Error::Cut { at, expected: "a connection" })
    }

    /// Commands up to the head of the RAM section, which must be the first.
    fn until_ram<D: Destination>(&mut self, destination: &mut D) -> Result<SectionId, Error> {
        loop {
            let at = self.r.here();
            match Section::decode(&mut self.r)? {
                Section::Start(head) if head.is_ram() => return head.check_ram(at).map(|()| head.id),
                Section::Full(head) => self.early.take(&mut self.r, &head, None, true)?,
                other => {
                    let announced = match &other {
                        Section::Command(command) => command.announced_channels(),
                        _ => None,
                    };
                    self.between(other, at, "before the start of ram")?;
                    if let Some(channels) = announced {
                        tracing::debug!(channels, "the source announces its channels");
                        // Such a source understands it: this side never closes without SHUT.
                        self.r.say(&Message::Pong(VERDICT_MARK))?;
                        let taken = destination.channels(channels);
                        taken.map_err(|e| refused(&self.r, "the number of channels", e))?;
                    }
                }
            }
        }
    }

    /// All sections of RAM behind the first; whether SWITCHOVER_START was between them.
    fn passes<D: Destination>(
        &mut self,
        ram: &mut Ram<'_>,
        mode: SyncMode,
        section: SectionId,
        footers: bool,
        destination: &mut D,
    ) -> Result<bool, Error> {
        let mut switchover_start = false;
        loop {
            let at = self.r.here();
            self.wait_for_more()?;
            let met = Section::decode(&mut self.r)?;
            let last = match self.early.offer(&mut self.r, met, at, section, footers)? {
                None => continue,
                Some(Section::Part(_)) => false,
                Some(Section::End(_)) => true,
                Some(Section::Command(Command::SwitchoverStart)) => {
                    switchover_start = true;
                    continue;
                }
                Some(other) => {
                    let ready = matches!(other, Section::Command(Command::Ping(READY_PING)));
                    self.between(other, at, "before the end of ram")?;
                    self.guest_stands |= ready;
                    continue;
                }
            };
            ram.body(&mut self.r, mode, destination)?;
            if footers {
                if !last {
                    // QEMU keeps it back until it has more to say.
                    self.wait_for_more()?;
                }
                decode_footer(section, &mut self.r)?;
            }
            if last {
                return Ok(switchover_start);
            }
        }
    }

    /// Waits for what comes next, without limit unless the guest is known to stand meanwhile.
    fn wait_for_more(&mut self) -> Result<(), Error> {
        if !self.guest_stands && self.r.is_drained() && self.stall.is_some() {
            set_limit(&mut self.r, None)?;
            self.r.peek()?;
            set_limit(&mut self.r, self.stall)?;
        }
        Ok(())
    }

    /// What may come anywhere, and the refusal of what may not.
    fn between(&mut self, section: Section, at: Place, place: &'static str) -> Result<(), Error> {
        match section {
            Section::Command(Command::OpenReturnPath) => {
                self.return_path = true;
                let watch = self
                    .stop
                    .as_ref()
                    .and_then(|stop| self.r.get_ref().watch_peer(stop, CHANNELS_END, closed()));
                self.r.open_return_path(watch);
                if self.switchover_ack {
                    self.r.say(&Message::SwitchoverAck)?;
                }
                Ok(())
            }
            Section::Command(Command::Ping(_)) if !self.return_path => {
                Err(PeerMisbehaved::PingWithoutReturnPath.at(at))
            }
            Section::Command(Command::Ping(value)) => self.r.say(&Message::Pong(value)),
            Section::Command(Command::SwitchoverStart) => {
                Err(PeerMisbehaved::Misplaced { record: "SWITCHOVER_START", place }.at(at))
            }
            Section::Command(command) => Err(refuse::command(&command, at)),
            Section::Start(head) => Err(self.not_ram(&head, at)),
            other => Err(PeerMisbehaved::Misplaced { record: other.name(), place }.at(at)),
        }
    }

    fn not_ram(&self, head: &SectionHead, at: Place) -> Error {
        if head.is_ram() {
            return PeerMisbehaved::Misplaced { record: "second START of ram", place: "in one stream" }
                .at(at);
        }
        refuse::iterative_section(head, at)
    }
}

/// What a source means that closes before it was told how it ended.
fn closed() -> Judge {
    Box::new(|_, closed| {
        let at = Place { stream: Stream::Main, offset: 0 };
        closed.then(|| Error::SourceGone { at }.while_doing("cannot receive the guest"))
    })
}

/// How long channels go on when the source has closed main. A QEMU that is cancelled closes main first and its channels a moment
/// later; where they are reset in between, some versions wait for them for ever (seen with 7.2.22 and 10.0.2).
pub(crate) const CHANNELS_END: Duration = Duration::from_secs(1);
pub(crate) const SILENCE: Duration = Duration::from_secs(10);
pub(crate) const STALL: Duration = Duration::from_secs(120);
