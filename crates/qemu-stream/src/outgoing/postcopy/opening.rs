//! The bytes of main around the pages: the opening, the switch, the return after a broken connection, the end.
//!
//! ```text
//! header, configuration ─ OPEN_RETURN_PATH ─ PING 1 ─ ADVISE ─ START: block list ─ PART: pages that were sent first
//! [SWITCHOVER_START] ─ DISCARD … ─ PING 2 ─ PACKAGED { LISTEN, devices, PING 3, RUN } ─ PING 4 ─ pages …
//! ```

use multifd::ram::{BlockName, PageBitmap, PageSize, joined};

use crate::{
    error::Usage,
    format::{
        BYE_PING, BlockList, Command, CurrentBlock, DISCARDED_PING, DevicePart, LOADED_PING, PageSizes, Put,
        Record, Section, SectionHead, SectionId, encode_footer, encode_header,
    },
    outgoing::options::Options,
};

/// A machine that starts at its destination before its RAM is there.
#[derive(Debug)]
pub(in crate::outgoing) struct Machine {
    options: Options,
    blocks: BlockList,
    devices: DevicePart,
}

impl Machine {
    /// # Errors
    /// If the machine has state that post-copy cannot carry, or its devices do not fit a package.
    pub(in crate::outgoing) fn new(
        options: Options,
        blocks: BlockList,
        devices: DevicePart,
    ) -> Result<Self, Usage> {
        let refused = |why: String| Err(Usage::Value { what: "devices", why });
        options.check()?;
        devices.check_beside(options.section)?;
        if let Some(live) = devices.live().first() {
            return refused(format!("{} is sent in pieces, which post-copy does not carry", live.name));
        }
        if options.ignore_shared() {
            let why = "x-ignore-shared is on in the machine's configuration, which excludes post-copy";
            return refused(why.to_owned());
        }
        if devices.has_footers() != options.footers {
            return refused("have footers and the machine type has none, or the reverse".to_owned());
        }
        let machine = Self { options, blocks, devices };
        match u32::try_from(machine.package(true).len()) {
            Ok(_) => Ok(machine),
            Err(_) => refused(format!("{:#x} bytes do not fit a package", machine.devices.blob().len())),
        }
    }

    pub(super) fn blocks(&self) -> &BlockList {
        &self.blocks
    }

    pub(super) fn page_size(&self) -> PageSize {
        self.options.page_size()
    }

    pub(super) fn section(&self) -> RamSection {
        RamSection { id: self.options.section, footers: self.options.footers }
    }

    /// From the header to the end of START, and the devices that come early.
    pub(super) fn opening(&self, host_page: u64) -> Vec<u8> {
        let mut out = Vec::new();
        encode_header(self.options.configuration.as_ref(), &mut out);
        let own = self.blocks.entries().iter().filter_map(|entry| entry.host_page_size);
        let host = own.fold(host_page, |all, size| all | size);
        let target = self.page_size().bytes() as u64;
        for command in [
            Command::OpenReturnPath,
            Command::Ping(FIRST),
            Command::PostcopyAdvise(Some(PageSizes { host, target })),
        ] {
            Section::Command(command).encode(&mut out);
        }
        Section::Start(SectionHead::ram(self.options.section)).encode(&mut out);
        self.blocks.encode(self.options.ignore_shared(), &mut out);
        self.section().end(&mut out);
        out.put(self.devices.early());
        out
    }

    /// Everything before the package: forget all pages of which `keep` has no bit.
    pub(in crate::outgoing) fn discards(&self, keep: &[PageBitmap]) -> Vec<u8> {
        let mut out = Vec::new();
        if self.options.switchover_start {
            Section::Command(Command::SwitchoverStart).encode(&mut out);
        }
        for (entry, keep) in self.blocks.entries().iter().zip(keep) {
            let page_size = self.page_size().bytes() as u64;
            let ranges = joined(keep.clear_runs());
            let ranges = ranges.map(|(first, count)| (first.0 * page_size, count * page_size));
            let ranges: Vec<(u64, u64)> = ranges.collect();
            for ranges in ranges.chunks(RANGES) {
                let (block, ranges) = (entry.name.clone(), ranges.to_vec());
                Section::Command(Command::PostcopyRamDiscard { block, ranges }).encode(&mut out);
            }
        }
        Section::Command(Command::Ping(DISCARDED)).encode(&mut out);
        out
    }

    /// The package with its command, and the PING after it. When it has arrived, the guest runs. `described`: the devices have their
    /// description before them, for a destination of this library.
    pub(in crate::outgoing) fn switch(&self, described: bool) -> Vec<u8> {
        let package = self.package(described);
        let mut out = Vec::with_capacity(package.len() + 64);
        // `new` has checked that it fits.
        let length = u32::try_from(package.len()).unwrap_or(u32::MAX);
        Section::Command(Command::Packaged(length)).encode(&mut out);
        out.put(&package);
        Section::Command(Command::Ping(PACKAGED)).encode(&mut out);
        out
    }

    fn package(&self, described: bool) -> Vec<u8> {
        let mut out = Vec::new();
        Section::Command(Command::PostcopyListen).encode(&mut out);
        match described && self.devices.description().is_some() {
            true => out.put(&self.devices.for_package()),
            false => out.put(self.devices.blob()),
        }
        Section::Command(Command::Ping(LOADED)).encode(&mut out);
        Section::Command(Command::PostcopyRun).encode(&mut out);
        out
    }

    /// The record of a sync point of the channels.
    pub(super) fn sync_point(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.section().begin(&mut out);
        record(Record::MultifdFlush, &mut out);
        self.section().end(&mut out);
        out
    }

    /// The end of RAM and of the stream. `channels`: a SYNC was sent on each of them.
    pub(super) fn end(&self, channels: bool) -> Vec<u8> {
        let mut out = Vec::new();
        Section::End(self.options.section).encode(&mut out);
        if channels {
            record(Record::MultifdFlush, &mut out);
        }
        self.section().end(&mut out);
        Section::Eof.encode(&mut out);
        out
    }
}

/// The command that asks which pages of a block have arrived.
pub(super) fn ask_for_bitmap(block: &BlockName, out: &mut Vec<u8>) {
    Section::Command(Command::RecvBitmap(block.clone())).encode(out);
}

/// What a source of this library sends when it has got SHUT.
pub(super) fn bye() -> Vec<u8> {
    let mut out = Vec::new();
    Section::Command(Command::Ping(BYE_PING)).encode(&mut out);
    out
}

/// The command that continues after a broken connection.
pub(super) fn resume() -> Vec<u8> {
    let mut out = Vec::new();
    Section::Command(Command::PostcopyResume).encode(&mut out);
    out
}

/// The RAM section, whose pieces have a head and an end.
#[derive(Clone, Copy, Debug)]
pub(super) struct RamSection {
    id: SectionId,
    footers: bool,
}

impl RamSection {
    /// Begins a piece of records.
    pub(super) fn begin(self, out: &mut Vec<u8>) {
        Section::Part(self.id).encode(out);
    }

    /// Ends a piece of records.
    pub(super) fn end(self, out: &mut Vec<u8>) {
        end_of_records(out);
        if self.footers {
            encode_footer(self.id, out);
        }
    }
}

/// The record after which no more follow, in a section or on the connection for requested pages.
pub(super) fn end_of_records(out: &mut Vec<u8>) {
    record(Record::Eos, out);
}

fn record(record: Record, out: &mut Vec<u8>) {
    // It has no page, so no list can refuse it.
    let none = BlockList::none(PageSize::default());
    let _ = record.encode(&none, &mut CurrentBlock::default(), out);
}

/// The PING that every source sends first.
const FIRST: u32 = 1;
/// The PINGs around the package: the destination has forgotten pages; it has loaded the devices; it has the package.
pub(in crate::outgoing) const DISCARDED: u32 = DISCARDED_PING;
pub(super) const LOADED: u32 = LOADED_PING;
const PACKAGED: u32 = 4;
/// The number of ranges in a DISCARD, as QEMU sends them.
const RANGES: usize = 12;
