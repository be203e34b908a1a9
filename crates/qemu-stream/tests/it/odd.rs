//! Sources that are old, or configured to omit something: no configuration, no footers, no description, devices before
//! the end of RAM, pages of 16 and 64 KiB.

use std::{os::unix::fs::FileExt, time::Duration};

use multifd::ram::{BlockIndex, BlockName, PageIndex, PageSize};
use qemu_stream::{
    Error,
    error::{Malformed, StreamKind, Unsupported, Usage},
    format::{
        BlockEntry, BlockList, Configuration, DevicePart, EarlyPart, EndFinder, Reader, Section, SectionHead,
        SectionId, SectionName, SyncMode, encode_footer, limits,
    },
    incoming::{Incoming, Loaded, Outcome},
    mapped_ram::{Layout, MappedRamFile, Shape, Tail},
    outgoing::{Options, Outgoing},
};

use crate::kit::{
    Memory, Tape, blocks, complete, devices, devices_without_footers, pair, q35, send, stream, synced,
};

const EARLY: &str = "0000:00:01.0/virtio-mem-device-early";
const PART: &[u8] = b"\x02\0\0\0\x01";

fn early_head() -> SectionHead {
    let name = SectionName::new(EARLY).unwrap();
    SectionHead { id: SectionId(9), name, instance: 0, version: 1 }
}

/// A section of an early device.
fn early_section(body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    Section::Full(early_head()).encode(&mut bytes);
    bytes.extend(body);
    encode_footer(SectionId(9), &mut bytes);
    bytes
}

/// Reads the section at the beginning of `bytes`.
fn take(bytes: &[u8], footers: bool) -> Result<EarlyPart, Error> {
    let mut r = Reader::new(bytes, StreamKind::Main);
    let mut early = EarlyPart::default();
    let Section::Full(head) = Section::decode(&mut r)? else { panic!("a device") };
    early.take(&mut r, &head, Some(SectionId(1)), footers).map(|()| early)
}

/// One early device with this body, described with `length` bytes, and one after RAM.
fn with_early(body: &[u8], length: usize) -> Result<Option<DevicePart>, Error> {
    let early = take(&[&early_section(body), PART].concat(), true)?;
    let json = format!(
        r#"{{"devices": [{{"name": "{EARLY}", "instance_id": 0, "fields": [{{"size": {length}}}]}},
            {{"name": "d", "instance_id": 0, "fields": [{{"size": 2}}]}}]}}"#
    );
    let mut bytes = b"\x04\0\0\0\x05\x01d\0\0\0\0\0\0\0\x01\xaa\xaa\x7e\0\0\0\x05\0\x06".to_vec();
    bytes.extend(u32::try_from(json.len()).unwrap().to_be_bytes());
    bytes.extend(json.bytes());
    let bytes_before = bytes.clone();
    let found = EndFinder::new(true).early(early).find(&mut bytes).unwrap();
    assert!(found.is_none() || found.as_ref().unwrap().as_bytes() == bytes_before);
    Ok(found)
}

/// The stream of a machine with these devices.
fn sent(devices: &DevicePart, options: Options) -> Result<Vec<u8>, Error> {
    let mut out = Outgoing::new(Tape::default(), options)?;
    out.begin(2)?;
    out.setup(blocks(), synced())?;
    out.early(devices)?;
    out.begin_part()?;
    out.zero_page(BlockIndex(0), PageIndex(3))?;
    out.end_part(synced())?;
    out.switchover()?;
    out.begin_end()?;
    out.end_part(synced())?;
    out.devices(devices)?;
    Ok(out.into_inner().output)
}

fn received(bytes: &[u8]) -> Result<Loaded, Error> {
    Incoming::new(Tape::playing(bytes)).run(&mut Memory::default())
}

#[test]
fn a_device_before_the_end_of_ram_is_kept_in_its_place() {
    for body in [&b""[..], b"\x7e\0\0\0\x09", b"\x7e\0\0\0\x09\0\0\0\0\0\x7e\x7e\0\0\0", &[0x7e; 700]] {
        let devices = with_early(body, body.len()).unwrap().unwrap();
        assert_eq!(devices.early(), early_section(body));
        let [early, late] = devices.sections() else { panic!("{:?}", devices.sections()) };
        assert!(early.early && !late.early);
        assert_eq!(devices.body(early), Some(body));
        assert_eq!(devices.body(late), Some(&b"\xaa\xaa"[..]));
        let bytes = sent(&devices, Options::new(q35("10.0"))).unwrap();
        assert_eq!(received(&bytes).unwrap().devices, devices);
    }
}

/// As from a source that sends such devices even before RAM begins.
#[test]
fn a_device_before_the_start_of_ram_is_taken_too() {
    let devices = with_early(b"\x01\x02", 2).unwrap().unwrap();
    let mut bytes = sent(&devices, Options::new(q35("10.0"))).unwrap();
    let section = early_section(b"\x01\x02");
    let at = bytes.windows(section.len()).position(|window| window == section).unwrap();
    bytes.drain(at..at + section.len());
    let start = b"\x01\0\0\0\x01\x03ram";
    let at = bytes.windows(start.len()).position(|window| window == start).unwrap();
    bytes.splice(at..at, section);
    assert_eq!(received(&bytes).unwrap().devices, devices);
}

#[test]
fn an_early_device_that_the_description_does_not_fit_is_refused() {
    for length in [0, 1, 3, 7, 1 << 40] {
        assert_eq!(with_early(b"\x01\x02", length).unwrap(), None, "{length}");
    }
    // A body that looks like its own end, with a part of ram after it: the description reveals it.
    let trap = [&b"\x7e\0\0\0\x09"[..], PART].concat();
    assert_eq!(with_early(&trap, trap.len()).unwrap(), None);
}

#[test]
fn an_early_device_cut_anywhere_is_refused() {
    let whole = [&early_section(b"\x01\x7e\0\x03"), PART].concat();
    for length in 0..whole.len() {
        let error = take(&whole[..length], true).unwrap_err();
        assert!(matches!(error, Error::Cut { .. }), "cut at {length}: {error}");
    }
}

#[test]
fn early_devices_longer_than_any_are_refused() {
    let body = vec![0x7f; limits::EARLY_PART];
    let error = take(&[&early_section(&body), PART].concat(), true).unwrap_err();
    assert!(matches!(error, Error::Malformed { what: Malformed::TooLong { .. }, .. }), "{error}");
}

#[test]
fn an_early_device_without_footer_is_refused_by_name() {
    let error = take(&[&early_section(b""), PART].concat(), false).unwrap_err();
    assert!(matches!(error, Error::Unsupported { what: Unsupported::EarlyDevice { .. }, .. }));
    assert!(error.to_string().contains(EARLY), "{error}");
}

#[test]
fn early_devices_must_be_sent_early() {
    let devices = with_early(b"", 0).unwrap().unwrap();
    let mut out = Outgoing::new(Tape::default(), Options::new(q35("10.0"))).unwrap();
    out.begin(2).unwrap();
    out.setup(blocks(), synced()).unwrap();
    out.begin_end().unwrap();
    out.end_part(synced()).unwrap();
    let refused = out.devices(&devices);
    assert!(matches!(refused, Err(Error::Usage(Usage::Value { .. }))));
}

/// The stream of a machine whose source sends no description, and its result.
fn without_description(options: Options) -> Vec<u8> {
    let mut bytes = stream(options);
    let json = bytes.windows(3).rposition(|window| window == b"\0\x06\0").unwrap();
    bytes.truncate(json + 1);
    bytes
}

/// Receives with the option that no description is expected.
fn received_opaque(bytes: &[u8]) -> Result<Loaded, Error> {
    Incoming::new(Tape::playing(bytes)).suppress_vmdesc(true).run(&mut Memory::default())
}

#[test]
fn devices_without_a_description_end_where_the_source_closes() {
    for options in [Options::new(q35("10.0")), Options::without_configuration()] {
        let options = options.unconfirmed();
        let bytes = without_description(options.clone());
        let loaded = received_opaque(&bytes).unwrap();
        assert_eq!(loaded.devices.description(), None);
        assert!(loaded.devices.sections().is_empty());
        assert!(bytes.ends_with(loaded.devices.as_bytes()));
        assert_eq!(loaded.devices.blob().len() + 1, loaded.devices.as_bytes().len());
        // And can be sent again.
        let again = received_opaque(&sent(&loaded.devices, options).unwrap()).unwrap();
        assert_eq!(again.devices, loaded.devices);
        // With footers, the option is not needed.
        assert_eq!(received(&bytes).is_ok(), loaded.footers);
    }
}

#[test]
fn devices_without_a_description_that_are_cut_are_refused() {
    let bytes = without_description(Options::new(q35("10.0")).unconfirmed());
    for cut in 1..bytes.len() - 100 {
        assert!(received(&bytes[..bytes.len() - cut]).is_err(), "{cut} bytes less");
    }
    // A footer of a section that never began does not count.
    let mut forged = bytes.clone();
    let at = forged.len() - 2;
    forged[at] ^= 1;
    assert!(received(&forged).is_err());
}

#[test]
fn a_description_that_never_comes_fails_a_source_with_a_return_path() {
    let (mut source, destination) = pair();
    std::io::Write::write_all(&mut source, &without_description(Options::new(q35("10.0")))).unwrap();
    let mut incoming = Incoming::new(destination).silence(Duration::from_millis(50));
    let error = incoming.run(&mut Memory::default()).unwrap_err();
    assert!(matches!(error, Error::Unsupported { what: Unsupported::NoDescription { .. }, .. }), "{error}");
    assert!(error.to_string().contains("suppress-vmdesc"), "{error}");
    incoming.finish(Outcome::Failed).unwrap();
    // If the connection ends here, the source has closed it before it got the confirmation.
    let error = received(&without_description(Options::new(q35("10.0")))).unwrap_err();
    assert!(matches!(error, Error::Malformed { what: Malformed::NoDescription { .. }, .. }), "{error}");
}

#[test]
fn a_description_that_is_known_not_to_come_is_not_waited_for() {
    for (options, taken) in [(Options::new(q35("10.0")), true), (Options::without_configuration(), false)] {
        let (mut source, destination) = pair();
        std::io::Write::write_all(&mut source, &without_description(options)).unwrap();
        let mut incoming =
            Incoming::new(destination).suppress_vmdesc(true).silence(Duration::from_millis(50));
        assert_eq!(incoming.run(&mut Memory::default()).is_ok(), taken, "without footers nothing tells");
    }
}

#[test]
fn footers_follow_the_stream_and_not_the_machine_type() {
    let mut out = Outgoing::new(Tape::default(), Options::new(q35("10.0")).footers(false)).unwrap();
    out.begin(2).unwrap();
    out.setup(blocks(), synced()).unwrap();
    out.begin_end().unwrap();
    out.end_part(synced()).unwrap();
    out.devices(&devices_without_footers()).unwrap();
    let loaded = received(&out.into_inner().output).unwrap();
    assert!(!loaded.footers && loaded.configuration.is_some());
    assert_eq!(loaded.devices, devices_without_footers());
}

fn shape(configuration: Option<&Configuration>) -> Shape<'_> {
    let (section, ignored) = (SectionId(1), &[][..]);
    Shape { configuration, section, offset: 0, footers: true, ignored, sync_mode: None }
}

/// Writes a file whose pages are all absent, and reads it.
fn kept(shape: &Shape<'_>, blocks: &BlockList, devices: &DevicePart) -> Result<MappedRamFile, Error> {
    let file = tempfile::tempfile().unwrap();
    let layout = Layout::of(shape, blocks)?;
    layout.write(
        &file,
        &Tail { switchover_start: false, devices, about: None, base: None },
        |_, place| vec![0; usize::try_from(place.bitmap_words()).unwrap()],
    )?;
    MappedRamFile::open(file, shape.offset)
}

#[test]
fn a_file_keeps_what_is_odd() {
    let modern = q35("10.0");
    let early = with_early(b"\x01\x02", 2).unwrap().unwrap();
    let opaque =
        received_opaque(&without_description(Options::new(q35("10.0")).unconfirmed())).unwrap().devices;
    let bare = received_opaque(&without_description(Options::without_configuration().unconfirmed()))
        .unwrap()
        .devices;
    for (case, configuration, footers, devices) in [
        ("a plain one", Some(&modern), true, &devices()),
        ("no configuration", None, true, &devices()),
        ("no footers", Some(&modern), false, &devices_without_footers()),
        ("neither", None, false, &devices_without_footers()),
        ("an early device", Some(&modern), true, &early),
        ("no description", Some(&modern), true, &opaque),
        ("neither footers nor description", None, false, &bare),
    ] {
        for sync_mode in [None, Some(SyncMode::Legacy), Some(SyncMode::Round)] {
            for offset in [0, 0x1000] {
                let shape = Shape { footers, sync_mode, offset, ..shape(configuration) };
                let read = kept(&shape, &blocks(), devices).unwrap();
                assert_eq!(read.configuration().is_some(), configuration.is_some(), "{case}");
                assert_eq!(read.devices(), devices, "{case}");
                assert_eq!(read.sync_mode(), sync_mode, "{case}");
                assert_eq!(read.blocks(), &blocks(), "{case}");
            }
        }
    }
}

#[test]
fn a_file_without_footers_and_description_must_say_how_long_it_is() {
    let bare = received_opaque(&without_description(Options::without_configuration().unconfirmed()))
        .unwrap()
        .devices;
    let shape = Shape { footers: false, ..shape(None) };
    let read = kept(&shape, &blocks(), &bare).unwrap();
    let note = read.places()[0].pages_offset - 24;
    let file = read.file().try_clone().unwrap();
    let length = file.metadata().unwrap().len();
    file.set_len(length + 1).unwrap();
    assert_eq!(MappedRamFile::open(file.try_clone().unwrap(), 0).unwrap().trailing_bytes(), 1);
    file.set_len(length).unwrap();
    assert!(MappedRamFile::open(file.try_clone().unwrap(), 0).is_ok());
    file.write_all_at(&[0; 8], note).unwrap();
    assert!(MappedRamFile::open(file, 0).is_err(), "no note");
}

#[test]
fn a_note_of_another_version_is_no_note() {
    let read =
        kept(&Shape { sync_mode: Some(SyncMode::Round), ..shape(Some(&q35("8.0"))) }, &blocks(), &devices());
    let read = read.unwrap();
    let at = read.places()[0].pages_offset - 24;
    for (offset, byte) in [(0, b'M'), (11, 2), (15, 9)] {
        let mut before = [0];
        read.file().read_exact_at(&mut before, at + offset).unwrap();
        read.file().write_all_at(&[byte], at + offset).unwrap();
        let changed = MappedRamFile::open(read.file().try_clone().unwrap(), 0).unwrap();
        assert_eq!(changed.sync_mode(), None);
        read.file().write_all_at(&before, at + offset).unwrap();
    }
}

#[test]
fn a_block_that_does_not_travel_has_an_address_and_no_bitmap() {
    let shared = Configuration { ignore_shared: true, ..q35("10.0") };
    let entry = |name, address| BlockEntry {
        address: Some(address),
        ..BlockEntry::new(BlockName::new(name).unwrap(), 0x1_0000)
    };
    let list = BlockList::new(vec![entry("a", 0), entry("b", 1 << 32)], PageSize::KIB_4).unwrap();
    for ignored in [&[][..], &[BlockIndex(0)], &[BlockIndex(1)], &[BlockIndex(0), BlockIndex(1)]] {
        let read = kept(&Shape { ignored, ..shape(Some(&shared)) }, &list, &devices()).unwrap();
        assert_eq!(read.blocks(), &list);
        for (index, place) in read.places().iter().enumerate() {
            assert_eq!(place.is_ignored(), ignored.contains(&BlockIndex(index)));
        }
        assert_eq!(read.bitmap(BlockIndex(1)).unwrap().words().collect::<Vec<_>>(), [0]);
    }
    // Without x-ignore-shared every block travels.
    let refused = Layout::of(&Shape { ignored: &[BlockIndex(0)], ..shape(Some(&q35("10.0"))) }, &blocks());
    assert!(matches!(refused, Err(Usage::Value { .. })));
    let file = kept(&shape(Some(&q35("10.0"))), &blocks(), &devices()).unwrap();
    let header = file.places()[0].bitmap_offset - 16;
    file.file().write_all_at(&[0; 8], header).unwrap();
    assert!(MappedRamFile::open(file.file().try_clone().unwrap(), 0).is_err(), "a bitmap at 0");
}

#[test]
fn pages_of_16_and_64_kib_keep_their_size() {
    for page_size in [PageSize::KIB_16, PageSize::KIB_64] {
        let arm = Configuration { target_page_size: Some(page_size), ..q35("10.0") };
        let entry = BlockEntry::new(BlockName::new("mach-virt.ram").unwrap(), 1 << 20);
        let list = BlockList::new(vec![entry], page_size).unwrap();
        let mut out = Outgoing::new(Tape::default(), Options::new(arm.clone()).sync_mode(None)).unwrap();
        out.begin(0).unwrap();
        out.setup(list.clone(), None).unwrap();
        out.begin_end().unwrap();
        out.page(BlockIndex(0), PageIndex(2), &vec![5; page_size.bytes()]).unwrap();
        out.zero_page(BlockIndex(0), PageIndex(15)).unwrap();
        out.end_part(None).unwrap();
        out.devices(&devices()).unwrap();
        let mut memory = Memory::default();
        let loaded = Incoming::new(Tape::playing(&out.into_inner().output)).run(&mut memory).unwrap();
        assert_eq!(loaded.blocks, list);
        assert_eq!(loaded.configuration, Some(arm.clone()));
        assert_eq!(memory.pages[&(0, 2)], vec![5; page_size.bytes()]);

        let read = kept(&shape(Some(&arm)), &list, &devices()).unwrap();
        assert_eq!(read.blocks().page_size(), page_size);
        assert_eq!(read.places()[0].pages(), (1 << 20) / page_size.bytes() as u64);
        assert_eq!(read.bitmap(BlockIndex(0)).unwrap().words().len(), 1);
    }
}

#[test]
fn a_machine_without_anything_special_is_as_before() {
    let (source, destination) = pair();
    let sent = std::thread::spawn(move || {
        let mut out = Outgoing::new(source, Options::new(q35("10.0"))).unwrap();
        send(&mut out, true).unwrap();
        complete(&mut out, None).unwrap();
    });
    let mut incoming = Incoming::new(destination);
    assert_eq!(incoming.run(&mut Memory::default()).unwrap().devices, devices());
    incoming.finish(Outcome::Loaded).unwrap();
    sent.join().unwrap();
}
