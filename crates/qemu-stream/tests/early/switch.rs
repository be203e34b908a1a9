//! The stream of a source that switches to post-copy, part by part. The fuzz targets begin with it, too.

use multifd::ram::{BlockName, PageSize};
use qemu_stream::{
    format::{
        BlockEntry, BlockList, Command, Configuration, MachineType, PageSizes, Section, SectionHead,
        SectionId, SectionName, encode_footer,
    },
    incoming::Event,
    outgoing::EventWriter,
};

/// The number of the RAM section.
pub(crate) const RAM: SectionId = SectionId(1);

pub(crate) fn name(name: &str) -> BlockName {
    BlockName::new(name).expect("a name")
}

pub(crate) fn command(command: Command) -> Vec<u8> {
    let mut bytes = Vec::new();
    Section::Command(command).encode(&mut bytes);
    bytes
}

pub(crate) fn discard(block: &str, ranges: &[(u64, u64)]) -> Vec<u8> {
    command(Command::PostcopyRamDiscard { block: name(block), ranges: ranges.to_vec() })
}

/// Everything up to the switch, of a machine with these blocks: names, and numbers of pages.
pub(crate) fn begin(machine: MachineType, blocks: &[(&str, u64)]) -> Vec<u8> {
    let configuration = Configuration::new(machine);
    let entries = blocks.iter().map(|(block, pages)| BlockEntry::new(name(block), pages << 12));
    let blocks = BlockList::new(entries.collect(), PageSize::KIB_4).expect("a list");
    let sizes = PageSizes { host: 0x1000, target: 0x1000 };
    let mut writer = EventWriter::new(Vec::new());
    for event in [
        Event::Configuration(Some(&configuration)),
        Event::Command(&Command::OpenReturnPath),
        Event::Command(&Command::Ping(1)),
        Event::Command(&Command::PostcopyAdvise(Some(sizes))),
        Event::Blocks { section: RAM, blocks: &blocks },
        Event::Eos,
        Event::SectionEnd { footer: true },
    ] {
        writer.write(&event).expect("in order");
    }
    writer.flush().expect("into memory");
    writer.into_inner()
}

/// A section of a device.
pub(crate) fn device(id: u32, name: &str, body: &[u8]) -> Vec<u8> {
    let (id, name) = (SectionId(id), SectionName::new(name).expect("a name"));
    let mut bytes = Vec::new();
    Section::Full(SectionHead { id, name, instance: 0, version: 1 }).encode(&mut bytes);
    bytes.extend(body);
    encode_footer(id, &mut bytes);
    bytes
}

pub(crate) fn packaged(contents: &[&[u8]]) -> Vec<u8> {
    let contents = contents.concat();
    [command(Command::Packaged(u32::try_from(contents.len()).expect("small"))), contents].concat()
}

/// The package with these sections of devices.
pub(crate) fn package(devices: &[u8]) -> Vec<u8> {
    let (listen, run) = (command(Command::PostcopyListen), command(Command::PostcopyRun));
    packaged(&[&listen, devices, &command(Command::Ping(3)), &run])
}
