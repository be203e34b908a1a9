//! What is read as events is written as the same bytes.

use std::{
    fs,
    io::{self, Read},
    path::Path,
};

use multifd::ram::{BlockIndex, BlockName, PageIndex, PageSize};
use proptest::prelude::*;
use qemu_stream::{
    Error,
    error::{StreamKind, Usage},
    format::{
        BlockEntry, BlockList, Command, Configuration, DevicePart, EarlyPart, EndFinder, Reader, Section,
        SectionHead, SectionId, SectionName, encode_footer,
    },
    incoming::{Event, Events, SyncMark},
    outgoing::{EventWriter, Options, Outgoing},
};

use super::name;
use crate::kit::{Tape, all_options, blocks, devices, q35, stream, synced};

/// Gives this many bytes a call.
struct Slow<'a>(&'a [u8], usize);

impl Read for Slow<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = into.len().min(self.1);
        self.0.read(&mut into[..count])
    }
}

/// Reads a stream to its end and writes what it was, event by event; without the pieces of the devices if `whole_devices`.
fn written(stream: impl Read, whole_devices: bool) -> Vec<u8> {
    let mut events = Events::new(stream).suppress_vmdesc(true);
    let mut copy = EventWriter::new(Vec::new());
    let mut package = false;
    loop {
        let event = events.next().unwrap();
        // A package has its length before them, so they cannot be left out.
        package |= matches!(event, Event::Command(Command::PostcopyListen));
        if whole_devices && !package && matches!(event, Event::Devices(_)) {
            continue;
        }
        copy.write(&event).unwrap_or_else(|error| panic!("{}: {error}", name(&event)));
        if matches!(event, Event::End(_)) {
            assert_eq!(copy.bytes(), events.bytes());
            return copy.into_inner();
        }
    }
}

/// Asserts that these bytes come out as they went in, however they arrive.
pub(super) fn assert_written_alike(stream: &[u8], what: &str) {
    for whole_devices in [false, true] {
        assert!(written(stream, whole_devices) == stream, "{what}");
    }
    // One byte a call takes its time with millions.
    let counts = if stream.len() < 1 << 20 { &[1, 7, 4096][..] } else { &[997, 4096] };
    for count in counts.iter().copied() {
        assert!(written(Slow(stream, count), false) == stream, "{what}: {count} bytes at a time");
    }
}

/// A machine with a device that is sent early, and a section that is sent in pieces, the last one behind RAM.
fn with_other_sections() -> DevicePart {
    let head = |id, name, version| SectionHead {
        id: SectionId(id),
        name: SectionName::new(name).unwrap(),
        instance: 0,
        version,
    };
    let mut before = Vec::new();
    Section::Full(head(9, "early", 1)).encode(&mut before);
    before.extend([1, 2]);
    encode_footer(SectionId(9), &mut before);
    Section::Start(head(0x33, "s390-storage_attributes", 0)).encode(&mut before);
    before.extend(1_u64.to_be_bytes());
    encode_footer(SectionId(0x33), &mut before);
    let mut behind = Vec::new();
    Section::End(SectionId(0x33)).encode(&mut behind);
    behind.extend([8_u64.to_be_bytes(), 1_u64.to_be_bytes()].concat());
    encode_footer(SectionId(0x33), &mut behind);

    let end_of_ram = b"\x03\0\0\0\x01";
    let bytes = [&before[..], end_of_ram, &behind].concat();
    let mut r = Reader::new(&bytes[..], StreamKind::Main);
    let mut early = EarlyPart::default();
    loop {
        let at = r.here();
        let section = Section::decode(&mut r).unwrap();
        if early.offer(&mut r, section, at, SectionId(1), true).unwrap().is_some() {
            break;
        }
    }
    early.finish(&mut r, true).unwrap();
    let json = r#"{"devices": [{"name": "early", "instance_id": 0, "fields": [{"size": 2}]},
        {"name": "d", "instance_id": 0, "fields": [{"size": 2}]}]}"#;
    behind.extend(b"\x04\0\0\0\x05\x01d\0\0\0\0\0\0\0\x01\xaa\xaa\x7e\0\0\0\x05\0\x06");
    behind.extend(u32::try_from(json.len()).unwrap().to_be_bytes());
    behind.extend(json.bytes());
    EndFinder::new(true).early(early).find(&mut behind).unwrap().unwrap()
}

/// The stream of a machine with these devices.
fn sent(devices: &DevicePart, options: Options, blocks: BlockList) -> Vec<u8> {
    let multifd = options.chosen_sync_mode().is_some();
    let after = || multifd.then(synced).flatten();
    let mut out = Outgoing::new(Tape::default(), options).unwrap();
    out.begin(if multifd { 2 } else { 0 }).unwrap();
    out.setup(blocks, after()).unwrap();
    out.early(devices).unwrap();
    for pass in 0..3 {
        out.begin_part().unwrap();
        out.zero_page(BlockIndex(0), PageIndex(pass)).unwrap();
        if !multifd {
            out.page(BlockIndex(1), PageIndex(1), &[7; 4096]).unwrap();
        }
        out.zero_page(BlockIndex(1), PageIndex(0)).unwrap();
        out.end_part(after()).unwrap();
    }
    out.switchover().unwrap();
    out.begin_end().unwrap();
    out.end_part(after()).unwrap();
    out.devices(devices).unwrap();
    out.into_inner().output
}

#[test]
fn every_way_to_write_a_stream_is_written_alike() {
    for options in all_options() {
        assert_written_alike(&stream(options.clone()), &format!("{options:?}"));
    }
}

#[test]
fn other_sections_shared_memory_and_addresses_are_written_alike() {
    let shared = Configuration { ignore_shared: true, ..q35("10.0") };
    let entry = |name, address| BlockEntry {
        address: Some(address),
        ..BlockEntry::new(BlockName::new(name).unwrap(), 0x1_0000)
    };
    let listed = BlockList::new(vec![entry("a", 0), entry("b", 0xfffc_0000)], PageSize::KIB_4).unwrap();
    for (configuration, blocks) in [(q35("8.0"), blocks()), (shared, listed)] {
        let options = Options::new(configuration);
        for options in [options.clone(), options.clone().unconfirmed(), options.sync_mode(None)] {
            for devices in [devices(), with_other_sections()] {
                let bytes = sent(&devices, options.clone(), blocks.clone());
                assert_written_alike(&bytes, &format!("{options:?}"));
            }
        }
    }
}

#[test]
fn devices_without_a_description_are_written_alike() {
    for options in [Options::new(q35("10.0")), Options::without_configuration()] {
        let mut bytes = stream(options.unconfirmed());
        let json = bytes.windows(3).rposition(|window| window == b"\0\x06\0").unwrap();
        bytes.truncate(json + 1);
        assert_written_alike(&bytes, "no description");
    }
}

#[test]
fn a_delta_a_surplus_flush_and_other_commands_are_written_alike() {
    let mut bytes = stream(Options::new(q35("10.0")).sync_mode(None));
    let mark = b"\0\0\0\0\0\0\x10\x08\x06pc.rom";
    let at = bytes.windows(mark.len()).position(|window| window == mark).unwrap();
    bytes.splice(at..at, *b"\0\0\0\0\0\0\x40\x60\x01\0\x04\x02\x02\x09\x09\0\0\0\0\0\0\x02\0");
    let last = b"\x03\0\0\0\x01";
    let at = bytes.windows(last.len()).position(|window| window == last).unwrap();
    for command in [Command::PostcopyListen, Command::Ping(77), Command::EnableColo] {
        let mut piece = Vec::new();
        Section::Command(command).encode(&mut piece);
        bytes.splice(at..at, piece);
    }
    assert_written_alike(&bytes, "records");
}

/// `fuzz/seeds/main_stream` has whole main streams of QEMU 7.2.22 and 10.0.2, machine `none`, with two channels beside them.
#[test]
fn streams_of_qemu_that_are_kept_are_written_alike() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/main_stream");
    let mut count = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        assert_written_alike(&fs::read(&path).unwrap(), &path.display().to_string());
        count += 1;
    }
    assert!(count >= 2);
}

#[test]
fn only_pages_wait_in_the_buffer() {
    let bytes = sent(&devices(), Options::new(q35("10.0")).sync_mode(None), blocks());
    let mut events = Events::new(&bytes[..]);
    let mut copy = EventWriter::new(Vec::new());
    loop {
        let event = events.next().unwrap();
        copy.write(&event).unwrap();
        let left = copy.get_ref().len() as u64;
        match event {
            Event::Pass { .. } | Event::Page { .. } | Event::ZeroPage { .. } => assert!(left < copy.bytes()),
            Event::End(_) => break,
            // What marks it follows.
            Event::SyncPoint(SyncMark::Eos) => {}
            _ => assert_eq!(left, copy.bytes(), "{}", name(&event)),
        }
    }
    assert_eq!(copy.get_ref(), &bytes);
}

#[test]
fn an_event_out_of_order_is_refused_and_leaves_no_byte() {
    let bytes = stream(Options::new(q35("10.0")).sync_mode(None));
    let mut events = Events::new(&bytes[..]);
    let mut copy = EventWriter::new(Vec::new());
    let page = || Event::Page { block: BlockIndex(0), page: PageIndex(0), bytes: &[0; 4096] };
    let wrong = |copy: &mut EventWriter<Vec<u8>>, event: &Event<'_>, state: &str| {
        let before = copy.bytes();
        match copy.write(event) {
            Err(Error::Usage(Usage::OutOfOrder { call, state: found })) => {
                assert_eq!((call, found), (event.name(), state));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(copy.bytes(), before);
    };
    wrong(&mut copy, &page(), "before the configuration");
    let mut in_pass = 0;
    loop {
        let event = events.next().unwrap();
        copy.write(&event).unwrap();
        match &event {
            Event::Configuration(_) => wrong(&mut copy, &event, "before the start of ram"),
            Event::Blocks { .. } => wrong(&mut copy, &page(), "in the first section of ram"),
            Event::Eos => wrong(&mut copy, &event, "after the end of records"),
            Event::SectionEnd { .. } => wrong(&mut copy, &Event::EndOfRam, {
                in_pass += 1;
                if in_pass < 3 { "between two passes" } else { break }
            }),
            Event::Pass { .. } => {
                wrong(&mut copy, &event, "within a pass");
                for event in [
                    Event::ZeroPage { block: BlockIndex(0), page: PageIndex(1 << 20) },
                    Event::Page { block: BlockIndex(7), page: PageIndex(0), bytes: &[0; 4096] },
                    Event::Page { block: BlockIndex(0), page: PageIndex(0), bytes: &[0; 4095] },
                ] {
                    let before = copy.bytes();
                    assert!(matches!(copy.write(&event), Err(Error::Usage(_))));
                    assert_eq!(copy.bytes(), before);
                }
            }
            _ => {}
        }
    }
    copy.write(&Event::EndOfRam).unwrap();
    wrong(&mut copy, &Event::SyncPoint(SyncMark::Flush), "after the end of ram");
    // Devices of another stream.
    let refused = copy.write(&Event::End(Box::new(with_other_sections())));
    assert!(matches!(refused, Err(Error::Usage(Usage::Value { what: "devices", .. }))));
    copy.write(&Event::End(Box::new(devices()))).unwrap();
    wrong(&mut copy, &Event::EndOfRam, "after the end of the stream");
    assert_eq!(copy.into_inner(), bytes);
}

proptest! {
    /// A damaged stream that can still be read: what the reader gives the writer takes, and it is read again as it was.
    #[test]
    fn whatever_is_read_can_be_written_and_is_read_again_alike(
        options in 0..all_options().len(), at in 0.0_f64..1.0, to: u8, cut in 0.5_f64..3.0,
    ) {
        let mut bytes = stream(all_options().swap_remove(options));
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a length")]
        let place = |share: f64| (bytes.len() as f64 * share) as usize;
        let (at, cut) = (place(at), place(cut).min(bytes.len()));
        bytes[at] = to;
        let read = |bytes: &[u8]| {
            let mut events = Events::new(bytes);
            let (mut copy, mut names) = (EventWriter::new(Vec::new()), Vec::new());
            while let Ok(event) = events.next() {
                names.push(name(&event));
                copy.write(&event).unwrap();
            }
            copy.flush().unwrap();
            names.retain(|name| name != "devices");
            (copy.into_inner(), names)
        };
        let (once, names) = read(&bytes[..cut]);
        let (twice, again) = read(&once);
        // A stream cut at the first footer looks as if it had none.
        prop_assert!(again.starts_with(&names), "{names:?}, then {again:?}");
        prop_assert_eq!(once, twice);
    }
}
