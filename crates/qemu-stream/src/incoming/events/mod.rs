//! The main stream, event by event.
//!
//! ```text
//! Header ─▶ BeforeRam ─ START ─▶ Body ─ EOS ─▶ Footer ─▶ Between ─ PART or END ─▶ Body …
//!                                                 │         └─ PACKAGED ─▶ Package ─ RUN ─▶ Between
//!                                                 └─ after END ─▶ RamDone ─▶ BehindRam ─▶ Devices ─▶ Complete ─▶ Finished
//! ```
//!
//! Reads from any [`Read`] and returns an [`Event`] for each call of [`Events::next`]. It knows the order of the stream and
//! nothing else: it sends no replies, has no clock and does not access guest memory. Nothing that a peer sends makes it allocate,
//! loop or index beyond `format/limits.rs`. A page is borrowed from the reader's buffer.

mod devices;
mod postcopy;
mod ram;
mod resume;

use std::{fmt, io::Read, mem};

use crate::{
    error::{Error, Place, StreamKind, Unsupported, Usage, Violation},
    format::{
        Command, Configuration, Delta, DevicePart, EarlyPart, Event, Reader, Record, Section, Skip, SyncMark,
        SyncMode, decode_footer, decode_header, footer_follows,
    },
    refuse,
};
use devices::Collected;
use postcopy::{Contents, Piece, Postcopy};
use ram::{Part, Ram};

/// Reads a main stream as [events](Event), one for each call of [`next`](Self::next).
///
/// This is the layer below [`Incoming`](super::Incoming), for a program that acts in the middle of a stream: it inspects the
/// stream, forwards it, or stores it in another form. `Events` sends no replies. Every command is an event, also those that
/// [`Incoming`](super::Incoming) refuses. It refuses what it cannot read and what is out of order.
///
/// It has no time limit of its own. If a read of the connection times out, `next` returns [`Error::TimedOut`]. Where the source
/// may pause ([`may_pause`](Self::may_pause)) and among the devices nothing is lost then, and `next` can be called again. After
/// any other error it cannot.
///
/// # Example
///
/// ```
/// use qemu_stream::{incoming::{Event, Events}, outgoing::EventWriter};
/// # use multifd::ram::{BlockName, PageIndex, PageSize};
/// # use qemu_stream::format::{BlockEntry, BlockIndex, BlockList, Configuration, DevicePart, MachineType, SectionId, SyncMode};
/// # use qemu_stream::incoming::SyncMark;
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let machine = Configuration::new(MachineType::new("my-vmm-1")?);
/// # let ram = BlockEntry::new(BlockName::new("ram0").ok_or("a name")?, 1 << 20);
/// # let blocks = BlockList::new(vec![ram], PageSize::KIB_4)?;
/// # let mut source = EventWriter::new(Vec::new());
/// # for event in [
/// #     Event::Configuration(Some(&machine)),
/// #     Event::Blocks { section: SectionId(1), blocks: &blocks },
/// #     Event::SyncMode(SyncMode::Legacy),
/// #     Event::SyncPoint(SyncMark::Eos),
/// #     Event::Eos,
/// #     Event::SectionEnd { footer: true },
/// #     Event::Pass { last: true },
/// #     Event::Page { block: BlockIndex(0), page: PageIndex(7), bytes: &[42; 4096] },
/// #     Event::SyncPoint(SyncMark::Eos),
/// #     Event::Eos,
/// #     Event::SectionEnd { footer: true },
/// #     Event::EndOfRam,
/// #     Event::End(Box::new(DevicePart::build(&[], 4096, SectionId(2))?)),
/// # ] {
/// #     source.write(&event)?;
/// # }
/// # let stream = source.into_inner();
/// let (mut pages, mut passes) = (0, 0);
/// let mut events = Events::new(&stream[..]);
/// let mut copy = EventWriter::new(Vec::new());
/// loop {
///     let event = events.next()?;
///     copy.write(&event)?; // writes the same bytes
///     match event {
///         Event::Blocks { blocks, .. } => println!("{} bytes of RAM", blocks.total()),
///         Event::Pass { .. } => passes += 1,
///         Event::Page { .. } | Event::ZeroPage { .. } => pages += 1,
///         Event::End(devices) => {
///             println!("{} devices", devices.sections().len());
///             break;
///         }
///         _ => {}
///     }
/// }
/// assert_eq!((pages, passes), (1, 1));
/// assert_eq!(copy.into_inner(), stream);
/// # Ok(())
/// # }
/// ```
pub struct Events<R> {
    r: Reader<R>,
    state: State,
    /// The offset at which the last event begins.
    begin: u64,
    configuration: Option<Configuration>,
    ram: Ram,
    early: EarlyPart,
    /// The last section head and the last command, which events borrow.
    head: Option<Section>,
    command: Option<Command>,
    return_path: bool,
    postcopy: Postcopy,
    suppress_vmdesc: bool,
    /// Bytes of earlier connections.
    earlier: u64,
    /// A further section of RAM has begun: no device may be sent before the end of RAM any more.
    passes: bool,
}

/// What comes next. An error leaves [`State::Broken`].
enum State {
    Header,
    BeforeRam,
    /// In the body of a section of RAM.
    Body(Part),
    /// The FLUSH that showed the sync mode was read; its sync point is the next event.
    SyncAtFlush(Part),
    /// The EOS that showed the sync mode was read; its sync point is the next event.
    SyncAtEos(Part),
    /// An EOS was read and its sync point returned; the EOS is the next event.
    Eos(Part),
    /// After the EOS of a section of RAM.
    Footer(Part),
    Between,
    /// In the package of post-copy.
    Package(Box<Contents>),
    RamDone,
    BehindRam,
    Devices(Box<Collected>),
    Complete(Box<DevicePart>),
    /// The content after a command cannot be read.
    Unserved(Box<Error>),
    Finished,
    Broken,
}

impl<R> fmt::Debug for Events<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Pages and device state belong to the guest and are not printed.
        f.debug_struct("Events").field("begin", &self.begin).finish_non_exhaustive()
    }
}

impl<R: Read> Events<R> {
    /// Reads the main stream that arrives over `connection`.
    pub fn new(connection: R) -> Self {
        Self::of(connection, StreamKind::Main)
    }

    /// Reads a main stream of this kind, which errors name.
    pub(crate) fn of(connection: R, kind: StreamKind) -> Self {
        Self {
            r: Reader::new(connection, kind),
            state: State::Header,
            begin: 0,
            configuration: None,
            ram: Ram::none(),
            early: EarlyPart::default(),
            head: None,
            command: None,
            return_path: false,
            postcopy: Postcopy::default(),
            suppress_vmdesc: false,
            earlier: 0,
            passes: false,
        }
    }

    /// Jumps over the contents of pages, in an input with random access: their events have no bytes, and end where the page ends.
    pub(crate) fn without_contents(mut self, skip: Skip<R>) -> Self {
        self.r.jumping(skip);
        self
    }

    /// Expects no description of the devices: see [`Incoming::suppress_vmdesc`](super::Incoming::suppress_vmdesc). Default off.
    #[must_use]
    pub fn suppress_vmdesc(mut self, on: bool) -> Self {
        self.suppress_vmdesc = on;
        self
    }

    /// The next event. The last one is [`Event::End`].
    ///
    /// # Errors
    /// If the stream is malformed, out of order, cut, or continues with what cannot be read; if the connection fails;
    /// [`Usage::OutOfOrder`] after the end or an error.
    #[expect(
        clippy::should_implement_trait,
        reason = "an event lends from the reader, an iterator's item cannot"
    )]
    pub fn next(&mut self) -> Result<Event<'_>, Error> {
        self.begin = self.r.position();
        if self.may_pause() {
            self.r.peek()?;
        }
        match mem::replace(&mut self.state, State::Broken) {
            State::Header => self.header(),
            State::BeforeRam => self.before_ram(),
            State::Body(part) => {
                self.state = State::Body(part);
                self.record(part)
            }
            State::SyncAtFlush(part) => {
                self.state = State::Body(part);
                Ok(Event::SyncPoint(SyncMark::Flush))
            }
            State::SyncAtEos(part) => {
                self.state = State::Eos(part);
                Ok(Event::SyncPoint(SyncMark::Eos))
            }
            State::Eos(part) => {
                self.state = State::Footer(part);
                Ok(Event::Eos)
            }
            State::Footer(part) => self.footer(part),
            State::Between => self.between(),
            State::Package(contents) => self.package(*contents),
            State::RamDone => {
                self.state = State::BehindRam;
                Ok(Event::EndOfRam)
            }
            State::BehindRam => self.behind_ram(),
            State::Devices(collected) => self.devices(collected),
            State::Complete(part) => {
                self.state = State::Finished;
                Ok(Event::End(part))
            }
            State::Unserved(error) => Err(*error),
            State::Finished => {
                self.state = State::Finished;
                Err(Usage::OutOfOrder { call: "next", state: "after the end of the stream" }.into())
            }
            State::Broken => Err(Usage::OutOfOrder { call: "next", state: "after an error" }.into()),
        }
    }

    /// Where the last event begins, or the current place for an event without bytes.
    pub fn place(&self) -> Place {
        Place { offset: self.begin, ..self.r.here() }
    }

    /// Where the last event ends.
    pub fn here(&self) -> Place {
        self.r.here()
    }

    /// Bytes of the stream read so far.
    pub fn bytes(&self) -> u64 {
        self.earlier + self.r.position()
    }

    /// Whether the source may pause here without limit: between the sections of RAM, and before a footer that QEMU delays.
    /// Everywhere else the next event has to arrive without a pause.
    pub fn may_pause(&self) -> bool {
        match self.state {
            State::Between | State::Footer(Part::Start) => true,
            State::Footer(Part::Pass) => self.ram.footers == Some(true),
            _ => false,
        }
    }

    /// Whether the devices may be complete without a description. A source with a return path sends nothing more then, and does
    /// not close the connection. The caller has to set a time limit, and call [`end_at_silence`](Self::end_at_silence) when it
    /// expires.
    pub fn may_have_ended(&self) -> bool {
        matches!(&self.state, State::Devices(collected) if collected.may_have_ended())
    }

    /// Ends the stream here, because it [may have ended](Self::may_have_ended) and the source is silent. The next event is
    /// [`Event::End`].
    ///
    /// # Errors
    /// If a description [is expected](Self::suppress_vmdesc), if sections have no footers, or if the device part is incomplete;
    /// [`Usage::OutOfOrder`] if the stream has not reached the devices.
    pub fn end_at_silence(&mut self) -> Result<(), Error> {
        match mem::replace(&mut self.state, State::Broken) {
            State::Devices(collected) => {
                let part = collected.silent(self.r.here(), self.suppress_vmdesc)?;
                self.state = State::Complete(Box::new(part));
                Ok(())
            }
            other => {
                self.state = other;
                let state = "before or after the devices";
                Err(Usage::OutOfOrder { call: "end_at_silence", state }.into())
            }
        }
    }

    /// The connection.
    pub fn get_ref(&self) -> &R {
        self.r.get_ref()
    }

    /// The connection, to reply or to set a time limit. Reading from it loses bytes of the stream.
    pub fn get_mut(&mut self) -> &mut R {
        self.r.get_mut()
    }

    /// The connection. Bytes that were read ahead are lost; after [`Event::End`] nothing is lost.
    pub fn into_inner(self) -> R {
        self.r.into_inner()
    }

    /// Sets what [`suppress_vmdesc`](Self::suppress_vmdesc) sets.
    pub(super) fn set_suppress_vmdesc(&mut self, on: bool) {
        self.suppress_vmdesc = on;
    }

    /// Whether the next event waits for the connection.
    pub(super) fn is_drained(&self) -> bool {
        self.r.is_drained()
    }

    /// Whether the next event is in a package.
    pub(super) fn is_in_package(&self) -> bool {
        matches!(self.state, State::Package(_))
    }

    /// Waits until bytes or the end of the stream have arrived.
    pub(super) fn wait(&mut self) -> Result<(), Error> {
        self.r.peek().map(drop)
    }

    fn header(&mut self) -> Result<Event<'_>, Error> {
        self.configuration = decode_header(&mut self.r)?;
        if self.configuration.as_ref().is_some_and(|configuration| configuration.mapped_ram) {
            let (what, capability) = ("mapped-ram stream over a connection", "mapped-ram");
            return Err(Unsupported::Capability { what, capability }.at(self.r.place()));
        }
        self.state = State::BeforeRam;
        Ok(Event::Configuration(self.configuration.as_ref()))
    }

    fn before_ram(&mut self) -> Result<Event<'_>, Error> {
        let at = self.place();
        match Section::decode(&mut self.r)? {
            Section::Start(head) if head.is_ram() => {
                self.ram = Ram::begin(
                    &mut self.r,
                    &head,
                    at,
                    self.configuration.as_ref(),
                    self.postcopy.is_advised(),
                )?;
                self.state = State::Body(Part::Start);
                Ok(Event::Blocks { section: self.ram.section, blocks: &self.ram.blocks })
            }
            Section::Full(head) => {
                let from = self.early.as_bytes().len();
                self.early.take(&mut self.r, &head, None, true)?;
                self.state = State::BeforeRam;
                let bytes = self.early.as_bytes().get(from..).unwrap_or_default();
                Ok(Event::OtherSection { head: self.head.insert(Section::Full(head)), bytes })
            }
            Section::Command(command) => self.command(command, State::BeforeRam),
            other => Err(self.misplaced(other, "before the start of ram")),
        }
    }

    /// A record of a section of RAM. There are millions of them, so the state is only written when it changes.
    fn record(&mut self, part: Part) -> Result<Event<'_>, Error> {
        let Ram { blocks, current, mode, .. } = &mut self.ram;
        let record = Record::decode(&mut self.r, blocks, current);
        match record.inspect_err(|_| self.state = State::Broken)? {
            Record::Zero(..) | Record::Page(..) | Record::Xbzrle(..) if part == Part::Start => {
                self.state = State::Broken;
                let (record, place) = ("page", "in the first section of ram");
                Err(Violation::Misplaced { record, place }.at(self.r.place()))
            }
            Record::Zero(block, page) => Ok(Event::ZeroPage { block, page }),
            Record::Page(block, page) => {
                let bytes = self.r.lend_or_skip(blocks.page_size().bytes(), "a page");
                let bytes = bytes.inspect_err(|_| self.state = State::Broken)?;
                Ok(Event::Page { block, page, bytes })
            }
            Record::Xbzrle(block, page, length) => {
                let at = self.r.here();
                let bytes = self.r.lend(length.into(), "an xbzrle delta");
                let bytes = bytes.inspect_err(|_| self.state = State::Broken)?;
                Ok(Event::Xbzrle { block, page, delta: Delta::new(bytes, at) })
            }
            Record::MultifdFlush => match mode {
                Some(_) => Ok(Event::SyncPoint(SyncMark::Flush)),
                None => {
                    self.state = State::SyncAtFlush(part);
                    Ok(Event::SyncMode(*mode.insert(SyncMode::Round)))
                }
            },
            // Pages of post-copy come over main alone, so their sections are no sync points.
            Record::Eos if self.postcopy.has_switched() => {
                self.state = State::Footer(part);
                Ok(Event::Eos)
            }
            Record::Eos => match mode {
                Some(SyncMode::Round) => {
                    self.state = State::Footer(part);
                    Ok(Event::Eos)
                }
                Some(SyncMode::Legacy) => {
                    self.state = State::Eos(part);
                    Ok(Event::SyncPoint(SyncMark::Eos))
                }
                None => {
                    self.state = State::SyncAtEos(part);
                    Ok(Event::SyncMode(*mode.insert(SyncMode::Legacy)))
                }
            },
        }
    }

    fn between(&mut self) -> Result<Event<'_>, Error> {
        let (section, footers) = (self.ram.section, self.ram.footers == Some(true));
        let at = self.place();
        let head = Section::decode(&mut self.r)?;
        // Devices that are sent early come before the first pass. A background snapshot has saved all of them before RAM, and
        // sends them after the passes, without END of RAM.
        if self.passes && matches!(head, Section::Full(_)) {
            return Err(refuse::background_snapshot(at));
        }
        let from = self.early.as_bytes().len();
        match self.early.offer(&mut self.r, head.clone(), at, section, footers)? {
            None => {
                self.state = State::Between;
                let bytes = self.early.as_bytes().get(from..).unwrap_or_default();
                Ok(Event::OtherSection { head: self.head.insert(head), bytes })
            }
            Some(Section::Part(_)) => {
                self.passes = true;
                self.state = State::Body(Part::Pass);
                Ok(Event::Pass { last: false })
            }
            Some(Section::End(_)) => {
                self.state = State::Body(Part::Last);
                Ok(Event::Pass { last: true })
            }
            Some(Section::Command(command)) => self.command(command, State::Between),
            Some(other) => Err(self.misplaced(other, "before the end of ram")),
        }
    }

    /// After some commands follows content that is not supported.
    fn command(&mut self, command: Command, next: State) -> Result<Event<'_>, Error> {
        self.return_path |= command == Command::OpenReturnPath;
        let (at, between) = (self.place(), matches!(next, State::Between));
        self.state = match &command {
            Command::PostcopyAdvise(Some(_)) if !between => {
                self.postcopy.advise();
                next
            }
            Command::PostcopyRamDiscard { block, ranges } if between && self.postcopy.is_advised() => {
                self.postcopy.check_discard(&self.ram.blocks, block, ranges, at)?;
                next
            }
            Command::Packaged(length) if between && self.postcopy.is_advised() => {
                self.postcopy.begin_package(*length, at)?;
                State::Package(Box::new(Contents::Unread(*length)))
            }
            Command::Packaged(_) => State::Unserved(Box::new(refuse::command(&command, at))),
            _ => next,
        };
        Ok(Event::Command(self.command.insert(command)))
    }

    fn package(&mut self, contents: Contents) -> Result<Event<'_>, Error> {
        let (piece, next) = contents.next(&mut self.r, self.ram.footers == Some(true))?;
        self.state = next.map_or(State::Between, |contents| State::Package(Box::new(contents)));
        match piece {
            Piece::Devices(devices) => Ok(Event::Devices(self.postcopy.keep(devices))),
            Piece::Command(command) => {
                if command == Command::PostcopyRun {
                    self.postcopy.run();
                }
                Ok(Event::Command(self.command.insert(command)))
            }
        }
    }

    /// The end of a section of RAM. The first one shows whether there are footers. The machine type does not decide that: it is
    /// also a property of the source.
    fn footer(&mut self, part: Part) -> Result<Event<'_>, Error> {
        let footer = match self.ram.footers {
            Some(known) => known,
            None => footer_follows(&mut self.r)?,
        };
        if footer {
            decode_footer(self.ram.section, &mut self.r)?;
        }
        self.ram.footers = Some(footer);
        self.state = if part == Part::Last { State::RamDone } else { State::Between };
        Ok(Event::SectionEnd { footer })
    }

    /// After RAM follow the last pieces of live sections, then the devices.
    fn behind_ram(&mut self) -> Result<Event<'_>, Error> {
        let footers = self.ram.footers == Some(true);
        let from = self.early.ends().len();
        match self.early.last_piece(&mut self.r, footers)? {
            Some(head) => {
                self.state = State::BehindRam;
                let bytes = self.early.ends().get(from..).unwrap_or_default();
                Ok(Event::OtherSection { head: self.head.insert(head), bytes })
            }
            None if self.postcopy.has_switched() => {
                let (early, at) = (mem::take(&mut self.early), self.place());
                let part = self.postcopy.end(&mut self.r, early, &self.ram, at)?;
                self.state = State::Finished;
                Ok(Event::End(Box::new(part)))
            }
            None => {
                let early = mem::take(&mut self.early);
                self.devices(Box::new(Collected::new(early, footers)))
            }
        }
    }

    fn devices(&mut self, mut collected: Box<Collected>) -> Result<Event<'_>, Error> {
        let at = self.r.here();
        let count = match self.r.arrived() {
            Ok(arrived) => arrived.len(),
            Err(error) => {
                self.state = State::Devices(collected);
                return Err(error);
            }
        };
        if count == 0 {
            let part = collected.closed(at, self.return_path, self.suppress_vmdesc)?;
            self.state = State::Finished;
            return Ok(Event::End(Box::new(part)));
        }
        collected.check_room(count, at)?;
        let bytes = self.r.lend(count, "devices")?;
        self.state = match collected.take(bytes, at)? {
            Some(part) => State::Complete(Box::new(part)),
            None => State::Devices(collected),
        };
        Ok(Event::Devices(bytes))
    }

    fn misplaced(&self, section: Section, place: &'static str) -> Error {
        match section {
            Section::Start(head) if head.is_ram() => {
                Violation::Misplaced { record: "second START of ram", place: "in one stream" }
                    .at(self.place())
            }
            Section::Start(head) => refuse::iterative_section(&head, self.place()),
            other => Violation::Misplaced { record: other.name(), place }.at(self.place()),
        }
    }
}
