//! The part of a stream that exists only with post-copy: the package of the devices, and the end without them.
//!
//! ```text
//! DISCARD* ─ PACKAGED ─▶ Unread ─ LISTEN ─▶ Devices ─▶ Pings ─▶ Run ─▶ PART … END ─▶ EOF
//! ```
//!
//! The package is read whole, because its devices have no lengths; its bound is that of the devices of any other stream. It is
//! returned as the commands and the bytes in it.

use std::io::Read;

use multifd::ram::{BlockName, BlockOffset};

use super::ram::Ram;
use crate::{
    error::{Error, Malformed, Place, Violation},
    format::{BlockList, Command, DevicePart, EarlyPart, Package, Reader, Section, limits},
};

/// The progress of post-copy.
#[derive(Debug, Default)]
pub(super) struct Postcopy {
    advised: bool,
    /// The devices of the package, from PACKAGED on.
    devices: Option<Vec<u8>>,
    /// RUN was read.
    running: bool,
}

/// A piece of a package.
pub(super) enum Piece {
    Command(Command),
    /// The sections of all devices.
    Devices(Vec<u8>),
}

/// What of a package comes next.
pub(super) enum Contents {
    /// This number of bytes was not read yet.
    Unread(u32),
    Devices(Package),
    /// The PINGs that were not returned yet, the last one first.
    Pings(Vec<u32>),
}

impl Postcopy {
    pub(super) fn advise(&mut self) {
        self.advised = true;
    }

    /// Whether POSTCOPY_ADVISE was read: blocks may have host page sizes, and post-copy may follow.
    pub(super) fn is_advised(&self) -> bool {
        self.advised
    }

    /// Whether all of the package was read: the guest is stopped for good, and its last pages follow.
    pub(super) fn has_switched(&self) -> bool {
        self.running
    }

    /// Whether the devices were read, and not returned.
    pub(super) fn has_devices(&self) -> bool {
        self.devices.is_some()
    }

    /// Refuses to forget what is not whole pages of a block, or pages that were sent after the switch.
    pub(super) fn check_discard(
        &self,
        blocks: &BlockList,
        name: &BlockName,
        ranges: &[(u64, u64)],
        at: Place,
    ) -> Result<(), Error> {
        if self.devices.is_some() {
            let (record, place) = ("POSTCOPY_RAM_DISCARD", "after PACKAGED");
            return Err(Violation::Misplaced { record, place }.at(at));
        }
        let block = blocks.position(name).and_then(|index| blocks.entry(index));
        let Some(block) = block else { return Err(Violation::UnknownBlock(name.clone()).at(at)) };
        let page_size = blocks.page_size().bytes() as u64;
        for (start, length) in ranges {
            if start % page_size != 0 || length % page_size != 0 || *length == 0 {
                let found = if start % page_size == 0 { *length } else { *start };
                let field = format!("range of POSTCOPY_RAM_DISCARD in block \"{name}\"");
                return Err(Malformed::value(field, "whole pages", found).at(at));
            }
            if start.checked_add(*length).is_none_or(|end| end > block.used_length) {
                let (block, used_length) = (name.clone(), block.used_length);
                let offset = BlockOffset(start.saturating_add(*length));
                return Err(Violation::PageOutside { block, offset, used_length }.at(at));
            }
        }
        Ok(())
    }

    pub(super) fn begin_package(&mut self, length: u32, at: Place) -> Result<(), Error> {
        if self.devices.is_some() {
            let (record, place) = ("second PACKAGED", "in one stream");
            return Err(Violation::Misplaced { record, place }.at(at));
        }
        let max = limits::DEVICE_PART as u64;
        if u64::from(length) > max {
            return Err(Malformed::too_long("length of a package", max, length.into()).at(at));
        }
        self.devices = Some(Vec::new());
        Ok(())
    }
}

impl Postcopy {
    /// Keeps the devices of the package.
    pub(super) fn keep(&mut self, devices: Vec<u8>) -> &[u8] {
        self.devices.insert(devices)
    }

    /// The devices of the package, which was read to its end.
    pub(super) fn devices_now(&self, early: &EarlyPart, ram: &Ram, at: Place) -> Result<DevicePart, Error> {
        let devices = self.devices.clone().unwrap_or_default();
        let page_size = ram.blocks.page_size().bytes();
        DevicePart::of_package(early.clone(), devices, ram.footers == Some(true), page_size, at)
    }

    /// RUN was read, the last record of the package.
    pub(super) fn run(&mut self) {
        self.running = true;
    }

    /// Reads the end of a stream whose devices were in the package. `at` is its place.
    pub(super) fn end<R: Read>(
        &mut self,
        r: &mut Reader<R>,
        early: EarlyPart,
        ram: &Ram,
        at: Place,
    ) -> Result<DevicePart, Error> {
        match Section::decode(r)? {
            Section::Eof => {
                let devices = self.devices.take().unwrap_or_default();
                let page_size = ram.blocks.page_size().bytes();
                DevicePart::of_package(early, devices, ram.footers == Some(true), page_size, at)
            }
            other => {
                let (record, place) = (other.name(), "after the end of ram of post-copy");
                Err(Violation::Misplaced { record, place }.at(at))
            }
        }
    }
}

impl Contents {
    /// The next piece of the package, and what follows it; `None` after RUN.
    pub(super) fn next<R: Read>(
        self,
        r: &mut Reader<R>,
        footers: bool,
    ) -> Result<(Piece, Option<Self>), Error> {
        match self {
            Self::Unread(length) => {
                let at = r.here();
                let bytes = r.bytes(length.into(), limits::DEVICE_PART as u64, "a package")?;
                let package = Package::parse(bytes, footers, at)?;
                Ok((Piece::Command(Command::PostcopyListen), Some(Self::Devices(package))))
            }
            Self::Devices(Package { devices, mut pings }) => {
                pings.reverse();
                Ok((Piece::Devices(devices), Some(Self::Pings(pings))))
            }
            Self::Pings(mut pings) => match pings.pop() {
                Some(value) => Ok((Piece::Command(Command::Ping(value)), Some(Self::Pings(pings)))),
                None => Ok((Piece::Command(Command::PostcopyRun), None)),
            },
        }
    }
}
