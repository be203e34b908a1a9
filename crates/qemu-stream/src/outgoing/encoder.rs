//! Encodes events as the bytes of a main stream: the counterpart of `incoming/events/`.
//!
//! Appends the bytes of an [`Event`] to a buffer. It keeps the state that later records depend on, and checks that a page exists.
//! The caller checks the order of events.

use multifd::ram::{PageIndex, PageSize};

use crate::{
    error::Usage,
    format::{
        BlockIndex, BlockList, Command, CurrentBlock, DevicePart, Event, Put, Record, Section, SectionHead,
        SectionId, SyncMark, devices_of_package, encode_footer, encode_header,
    },
};

const EOF: u8 = 0x00;

/// The state that earlier events have set.
#[derive(Debug)]
pub(super) struct Encoder {
    ignore_shared: bool,
    section: SectionId,
    blocks: BlockList,
    current: CurrentBlock,
    footers: bool,
    /// The number of bytes of other sections before the end of RAM.
    early: usize,
    /// The number of bytes after the end of RAM; `None` before it.
    behind_ram: Option<usize>,
    /// The package of post-copy, from PACKAGED on.
    package: Option<Package>,
}

/// What was written of a package.
#[derive(Clone, Copy, Debug)]
struct Package {
    /// Bytes that are still to be written.
    left: usize,
    /// Bytes of devices, without their description.
    devices: usize,
}

impl Encoder {
    /// The state at the beginning of a stream.
    pub(super) fn new() -> Self {
        Self {
            ignore_shared: false,
            section: SectionId(0),
            blocks: BlockList::none(PageSize::default()),
            current: CurrentBlock::default(),
            footers: false,
            early: 0,
            behind_ram: None,
            package: None,
        }
    }

    /// Appends an event. For [`Event::End`] nothing is appended: see [`rest`](Self::rest).
    ///
    /// # Errors
    /// If there is no such page, or its bytes are not a page. Nothing is appended then.
    pub(super) fn encode(&mut self, event: &Event<'_>, out: &mut Vec<u8>) -> Result<(), Usage> {
        match event {
            Event::Configuration(configuration) => {
                self.ignore_shared = configuration.is_some_and(|configuration| configuration.ignore_shared);
                encode_header(*configuration, out);
            }
            Event::Command(command) => self.command(command, out)?,
            Event::Devices(bytes) if self.is_in_package() => {
                self.take_from_package(bytes.len(), false)?;
                if let Some(package) = &mut self.package {
                    package.devices += devices_of_package(bytes).len();
                }
                out.put(bytes);
            }
            Event::OtherSection { bytes, .. } | Event::Devices(bytes) => {
                *self.behind_ram.as_mut().unwrap_or(&mut self.early) += bytes.len();
                out.put(bytes);
            }
            Event::Blocks { section, blocks } => self.begin_ram(*section, (*blocks).clone(), out),
            // These have no bytes of their own: the marks are other events.
            Event::SyncMode(_) | Event::SyncPoint(SyncMark::Eos) => {}
            Event::SyncPoint(SyncMark::Flush) => self.record(Record::MultifdFlush, out)?,
            Event::Eos => self.record(Record::Eos, out)?,
            Event::SectionEnd { footer } => {
                self.footers = *footer;
                if *footer {
                    encode_footer(self.section, out);
                }
            }
            Event::Pass { last: false } => Section::Part(self.section).encode(out),
            Event::Pass { last: true } => Section::End(self.section).encode(out),
            Event::ZeroPage { block, page } => self.record(Record::Zero(*block, *page), out)?,
            Event::Page { block, page, bytes } => {
                self.check_page(bytes)?;
                self.page_head(*block, *page, out)?;
                out.put(bytes);
            }
            Event::Xbzrle { block, page, delta } => {
                let bytes = delta.as_bytes();
                let length = u16::try_from(bytes.len()).map_err(|_| {
                    let why = format!("{:#x} bytes do not fit a record", bytes.len());
                    Usage::Value { what: "delta", why }
                })?;
                self.record(Record::Xbzrle(*block, *page, length), out)?;
                out.put(bytes);
            }
            Event::EndOfRam => self.behind_ram = Some(0),
            Event::End(_) => {}
        }
        Ok(())
    }

    /// Appends a command. A package that it ends has the announced size.
    fn command(&mut self, command: &Command, out: &mut Vec<u8>) -> Result<(), Usage> {
        let mut bytes = Vec::new();
        Section::Command(command.clone()).encode(&mut bytes);
        if self.is_in_package() {
            self.take_from_package(bytes.len(), *command == Command::PostcopyRun)?;
        }
        if let Command::Packaged(length) = command {
            let left = usize::try_from(*length).unwrap_or(usize::MAX);
            self.package = Some(Package { left, devices: 0 });
        }
        out.put(&bytes);
        Ok(())
    }

    fn is_in_package(&self) -> bool {
        self.package.is_some_and(|package| package.left > 0)
    }

    /// Counts bytes of a package, with which it has to end if they are the `last` ones.
    fn take_from_package(&mut self, count: usize, last: bool) -> Result<(), Usage> {
        let Some(package) = &mut self.package else { return Ok(()) };
        match package.left.checked_sub(count) {
            Some(left) if (left == 0) == last => {
                package.left = left;
                Ok(())
            }
            _ => {
                let left = package.left;
                let why = format!("{count:#x} bytes where {left:#x} bytes of the package are left");
                Err(Usage::Value { what: "package", why })
            }
        }
    }

    /// Appends the head of START and the block list.
    pub(super) fn begin_ram(&mut self, section: SectionId, blocks: BlockList, out: &mut Vec<u8>) {
        Section::Start(SectionHead::ram(section)).encode(out);
        blocks.encode(self.ignore_shared, out);
        (self.section, self.blocks) = (section, blocks);
    }

    /// Appends the record of a page. The caller appends the contents.
    ///
    /// # Errors
    /// If there is no such page.
    pub(super) fn page_head(
        &mut self,
        block: BlockIndex,
        page: PageIndex,
        out: &mut Vec<u8>,
    ) -> Result<(), Usage> {
        self.record(Record::Page(block, page), out)
    }

    /// Refuses contents that do not have the length of a page.
    pub(super) fn check_page(&self, bytes: &[u8]) -> Result<(), Usage> {
        let length = self.blocks.page_size().bytes();
        if bytes.len() == length {
            return Ok(());
        }
        let why = format!("expected {length:#x} bytes, found {:#x}", bytes.len());
        Err(Usage::Value { what: "page", why })
    }

    /// The bytes of the device part that no earlier event has contained.
    ///
    /// # Errors
    /// If lengths or footers show that these are not the devices of this stream.
    pub(super) fn rest<'p>(&self, devices: &'p DevicePart) -> Result<&'p [u8], Usage> {
        let refused = |why: &str| Usage::Value { what: "devices", why: why.to_owned() };
        if devices.early().len() != self.early {
            return Err(refused("have other sections before the end of ram than were written"));
        }
        if devices.has_footers() != self.footers {
            return Err(refused("have footers and ram has none, or have none and ram has them"));
        }
        let behind_ram = self.behind_ram.unwrap_or_default();
        if let Some(package) = self.package {
            // The devices were in the package, and a description is not sent.
            return match devices.blob().len() == behind_ram + package.devices {
                true => Ok(&[EOF]),
                false => Err(refused("are not those of the package")),
            };
        }
        let rest = devices.as_bytes().get(behind_ram..);
        rest.ok_or_else(|| refused("have fewer bytes than were written after the end of ram"))
    }

    fn record(&mut self, record: Record, out: &mut Vec<u8>) -> Result<(), Usage> {
        record.encode(&self.blocks, &mut self.current, out)
    }
}
