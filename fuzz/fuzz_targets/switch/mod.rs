//! The stream of a source that switches to post-copy.

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

/// Everything before the package: two blocks, of which some pages are discarded.
pub(crate) fn before() -> Vec<u8> {
    let configuration = Configuration::new(MachineType::new("pc-q35-10.0").expect("a name"));
    let entry =
        |(name, pages): (&str, u64)| BlockEntry::new(BlockName::new(name).expect("a name"), pages << 12);
    let blocks = BlockList::new([("a", 100), ("b", 3)].map(entry).to_vec(), PageSize::KIB_4).expect("a list");
    let sizes = PageSizes { host: 0x1000, target: 0x1000 };
    let ranges = vec![(0, 0x3000), (0x10000, 0x1000)];
    let discard = Command::PostcopyRamDiscard { block: BlockName::new("a").expect("a name"), ranges };
    let mut writer = EventWriter::new(Vec::new());
    for event in [
        Event::Configuration(Some(&configuration)),
        Event::Command(&Command::OpenReturnPath),
        Event::Command(&Command::Ping(1)),
        Event::Command(&Command::PostcopyAdvise(Some(sizes))),
        Event::Blocks { section: RAM, blocks: &blocks },
        Event::Eos,
        Event::SectionEnd { footer: true },
        Event::Command(&discard),
        Event::Command(&Command::Ping(2)),
    ] {
        writer.write(&event).expect("in order");
    }
    writer.flush().expect("into memory");
    writer.into_inner()
}

/// The package with these sections of devices.
pub(crate) fn package(devices: &[u8]) -> Vec<u8> {
    let (mut contents, mut bytes) = (Vec::new(), Vec::new());
    Section::Command(Command::PostcopyListen).encode(&mut contents);
    contents.extend(devices);
    Section::Command(Command::Ping(3)).encode(&mut contents);
    Section::Command(Command::PostcopyRun).encode(&mut contents);
    let length = u32::try_from(contents.len()).expect("an input is small");
    Section::Command(Command::Packaged(length)).encode(&mut bytes);
    bytes.extend(contents);
    bytes
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
