use multifd::{ram::PageIndex, wire::VmUuid};
use proptest::prelude::*;

use super::*;
use crate::{
    format::{
        Device, MachineType, encode_footer,
        testing::{block_name, dump, section_name},
    },
    mapped_ram::{Layout, MappedRamFile, Tail, note::Note},
};

const MIB: u64 = 1 << 20;

fn q35() -> Configuration {
    Configuration::new(MachineType::new("pc-q35-10.0").unwrap())
}

fn list(blocks: &[(&str, u64)]) -> BlockList {
    let entries = blocks.iter().map(|(name, length)| BlockEntry::new(block_name(name), *length)).collect();
    BlockList::new(entries, PageSize::KIB_4).unwrap()
}

fn devices() -> DevicePart {
    let device = Device { name: section_name("timer"), instance: 0, version: 2, state: vec![1; 24] };
    DevicePart::build(&[device], 4096, SectionId(2)).unwrap()
}

/// A complete file of these blocks, whose bitmaps have every third bit set.
fn whole(configuration: &Configuration, blocks: &BlockList, offset: u64) -> (File, Layout) {
    let file = tempfile::tempfile().unwrap();
    let layout = Layout::new(configuration, blocks, SectionId(1), offset).unwrap();
    let tail = Tail { switchover_start: true, devices: &devices(), about: None, base: None };
    let written = layout.write(&file, &tail, |_, place| {
        vec![0x9249_2492_4924_9249; usize::try_from(place.bitmap_words()).unwrap()]
    });
    assert_eq!(written.unwrap(), file.metadata().unwrap().len());
    (file, layout)
}

fn words(file: &MappedRamFile, block: usize) -> Vec<u64> {
    file.bitmap(BlockIndex(block)).unwrap().words().collect()
}

/// A file of one block of 16 pages, with `change` written at `at`.
fn changed(at: u64, change: &[u8]) -> Result<MappedRamFile, Error> {
    let (file, _) = whole(&q35(), &list(&[("pc.ram", 0x1_0000)]), 0);
    file.write_all_at(change, at).unwrap();
    MappedRamFile::open(file, 0)
}

/// The position of the header of the only block in such a file.
const HEADER: u64 = 0x6f;

#[test]
fn a_file_reads_back_as_written() {
    let configuration = Configuration { uuid: Some(VmUuid([7; 16])), ..q35() };
    let blocks = list(&[("pc.ram", 4 * MIB), ("empty", 0), ("pc.rom", 0x1000)]);
    let (file, layout) = whole(&configuration, &blocks, 0x1000);
    let read = MappedRamFile::open(file, 0x1000).unwrap();
    assert_eq!(read.configuration(), Some(&Configuration { mapped_ram: true, ..configuration }));
    assert_eq!(read.blocks(), &blocks);
    assert_eq!(read.places(), layout.places());
    assert_eq!(read.devices(), &devices());
    assert_eq!(read.section(), SectionId(1));
    assert!(read.switchover_start());
    assert_eq!(words(&read, 0), [0x9249_2492_4924_9249; 16]);
    assert!(words(&read, 1).is_empty());
    // One page: the bits after the first have no meaning.
    assert_eq!(words(&read, 2), [1]);
    assert!(read.bitmap(BlockIndex(3)).is_err());
}

/// As written by QEMU 10.0.2: parts without pages before the last one.
#[test]
fn parts_with_nothing_but_their_end_are_passed_over() {
    let (file, layout) = whole(&q35(), &list(&[("pc.ram", 0x1_0000)]), 0);
    let length = file.metadata().unwrap().len() - layout.tail_offset();
    let mut tail = vec![0; usize::try_from(length).unwrap()];
    file.read_exact_at(&mut tail, layout.tail_offset()).unwrap();
    let part = dump("02 00 00 00 01 00 00 00 00 00 00 00 10 7e 00 00 00 01");
    file.write_all_at(&[&part[..], &part, &tail].concat(), layout.tail_offset()).unwrap();
    assert!(MappedRamFile::open(file, 0).is_ok());
}

#[test]
fn bits_are_least_significant_first_in_each_byte() {
    let (file, layout) = whole(&q35(), &list(&[("pc.ram", 0x4_0000)]), 0);
    let mut words = [0];
    for page in [0, 9, 63] {
        words[0] |= 1 << page;
    }
    let tail = Tail { switchover_start: true, devices: &devices(), about: None, base: None };
    layout.write(&file, &tail, |_, _| words.to_vec()).unwrap();
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, layout.places()[0].bitmap_offset).unwrap();
    assert_eq!(bytes, [1, 2, 0, 0, 0, 0, 0, 0x80]);
    assert_eq!(self::words(&MappedRamFile::open(file, 0).unwrap(), 0), words);
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let (file, layout) = whole(&q35(), &list(&[("pc.ram", 0x2000), ("pc.rom", 0x1000)]), 0);
    let length = file.metadata().unwrap().len();
    let places = layout.places();
    let cuts = (0..0x100)
        .chain([places[0].pages_offset + 1, places[0].pages_offset + 0x1fff])
        .chain(places[0].pages_offset + 0x2000..places[1].bitmap_offset + 9)
        .chain(layout.tail_offset() - 20..length);
    let mut cuts: Vec<u64> = cuts.collect();
    cuts.reverse();
    for cut in cuts {
        file.set_len(cut).unwrap();
        assert!(MappedRamFile::open(file.try_clone().unwrap(), 0).is_err(), "cut at {cut:#x}");
    }
}

#[test]
fn a_file_cut_behind_its_devices_is_refused() {
    let (file, _) = whole(&q35(), &list(&[("pc.ram", 0x1_0000)]), 0);
    file.set_len(file.metadata().unwrap().len() - devices().description().unwrap().len() as u64 - 5).unwrap();
    let error = MappedRamFile::open(file, 0).unwrap_err();
    assert!(error.to_string().contains("incomplete"), "{error}");
}

/// A file without its note, as QEMU writes it.
fn without_note(offset: u64) -> (File, u64) {
    let (file, layout) = whole(&q35(), &list(&[("pc.ram", 0x1_0000)]), offset);
    let note = Note::offset(layout.places()).unwrap();
    file.write_all_at(&[0; 24], note).unwrap();
    let length = file.metadata().unwrap().len();
    (file, length)
}

/// QEMU 10.0 loads a file with any bytes after the machine: one zero, noise, another description.
#[test]
fn bytes_behind_the_machine_are_ignored_and_counted() {
    for has_note in [true, false] {
        for trailing in [&b""[..], b"\0", b"\xff", b"}", b"\x06\0\0\0\x02{}", &[0x5a; 100_000]] {
            let (file, length) = if has_note {
                let (file, _) = whole(&q35(), &list(&[("pc.ram", 0x1_0000)]), 0x1000);
                let length = file.metadata().unwrap().len();
                (file, length)
            } else {
                without_note(0x1000)
            };
            file.write_all_at(trailing, length).unwrap();
            let read = MappedRamFile::open(file, 0x1000).unwrap();
            assert_eq!(read.trailing_bytes(), trailing.len() as u64, "note: {has_note}");
            assert_eq!(read.devices(), &devices());
        }
    }
}

/// 8 TiB are only a hole.
#[test]
fn a_hole_behind_the_machine_takes_neither_time_nor_memory() {
    let (file, length) = without_note(0);
    file.set_len(8 << 40).unwrap();
    assert_eq!(MappedRamFile::open(file, 0).unwrap().trailing_bytes(), (8 << 40) - length);
}

/// The description of a guest's own making, in the state of its device, fits a part of its devices.
#[test]
fn an_end_that_a_guest_has_planted_is_not_taken_for_the_end_of_the_file() {
    let decoy = DevicePart::build(&[], 4096, SectionId(2)).unwrap();
    let state = [dump("7e 00 00 00 02").as_slice(), decoy.as_bytes()].concat();
    let timer = Device { name: section_name("timer"), instance: 0, version: 2, state };
    let devices = DevicePart::build(&[timer], 4096, SectionId(2)).unwrap();
    let layout = Layout::new(&q35(), &list(&[("pc.ram", 0x1_0000)]), SectionId(1), 0).unwrap();
    let file = tempfile::tempfile().unwrap();
    layout
        .write(&file, &Tail { switchover_start: true, devices: &devices, about: None, base: None }, |_, _| {
            [1]
        })
        .unwrap();
    file.write_all_at(&[0; 24], Note::offset(layout.places()).unwrap()).unwrap();
    let read = MappedRamFile::open(file, 0).unwrap();
    assert_eq!((read.devices(), read.trailing_bytes()), (&devices, 0));
}

/// What a file has as a hole has cost its writer nothing.
#[test]
fn devices_that_are_mostly_a_hole_are_refused_before_they_take_much_memory() {
    let (file, length) = without_note(0);
    let tail = length - devices().as_bytes().len() as u64;
    file.set_len(tail).unwrap();
    file.set_len(tail + (200 << 20)).unwrap();
    let error = MappedRamFile::open(file, 0).unwrap_err().to_string();
    assert!(error.contains("mostly holes") && error.contains("cp --sparse=never"), "{error}");
}

#[test]
fn places_outside_the_file_or_on_each_other_are_refused() {
    assert!(changed(HEADER, &1_u32.to_be_bytes()).is_ok());
    for (field, at, value) in [
        ("page size", HEADER + 4, 0x2000),
        ("page size", HEADER + 4, 0),
        ("bitmap on the header", HEADER + 12, HEADER + 27),
        ("bitmap at the end of the world", HEADER + 12, u64::MAX),
        ("bitmap in the pages", HEADER + 12, MIB - 7),
        ("pages on the bitmap", HEADER + 20, 0),
        ("pages not aligned", HEADER + 20, MIB + 0x800),
        ("pages beyond the file", HEADER + 20, 2 * MIB),
        ("pages at the end of the world", HEADER + 20, u64::MAX << 12),
    ] {
        let error = changed(at, &value.to_be_bytes()).unwrap_err();
        assert!(matches!(error, Error::Malformed { .. } | Error::Violation { .. }), "{field}: {error}");
        assert!(error.to_string().contains("block \"pc.ram\""), "{field}: {error}");
    }
}

#[test]
fn later_and_no_header_versions_are_refused() {
    let error = changed(HEADER, &2_u32.to_be_bytes()).unwrap_err();
    assert!(matches!(error, Error::Unsupported { what: Unsupported::MappedRamVersion { .. }, .. }));
    assert!(matches!(changed(HEADER, &0_u32.to_be_bytes()), Err(Error::Malformed { .. })));
}

#[test]
fn pages_that_lie_further_back_than_ours_are_found() {
    let (file, layout) = whole(&q35(), &list(&[("pc.ram", 0x1_0000)]), 0);
    let from = MIB + 0x1_0000;
    let mut rest = vec![0; usize::try_from(file.metadata().unwrap().len() - from).unwrap()];
    file.read_exact_at(&mut rest, from).unwrap();
    file.write_all_at(&rest, from + 0x1000).unwrap();
    file.write_all_at(&(MIB + 0x1000).to_be_bytes(), HEADER + 20).unwrap();
    let read = MappedRamFile::open(file, 0).unwrap();
    assert_eq!(read.places()[0].page_offset(PageIndex(0)), Some(layout.places()[0].pages_offset + 0x1000));
}

#[test]
fn records_other_than_eos_are_refused() {
    for (name, record) in [
        ("MULTIFD_FLUSH", "00 00 00 00 00 00 02 00"),
        ("ZERO", "00 00 00 00 00 00 00 02 06 \"pc.ram\" 00"),
        ("PAGE", "00 00 00 00 00 00 00 08 06 \"pc.ram\""),
        ("XBZRLE", "00 00 00 00 00 00 00 40 06 \"pc.ram\" 01 00 00"),
    ] {
        let error = changed(MIB + 0x1_0000, &dump(record)).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[test]
fn sections_where_they_have_no_place_are_refused() {
    let tail = MIB + 0x1_0000 + 13;
    for (case, bytes) in [
        ("another section's end", "03 00 00 00 02"),
        ("a second start", "01 00 00 00 02 05 \"block\" 00 00 00 00 00 00 00 01"),
        ("eof before the end of ram", "00"),
        ("postcopy", "08 00 04 00 00"),
    ] {
        assert!(!matches!(changed(tail, &dump(bytes)), Ok(_) | Err(Error::Cut { .. })), "{case}");
    }
}

#[test]
fn a_stream_without_mapped_ram_is_refused() {
    let file = tempfile::tempfile().unwrap();
    let mut bytes = Vec::new();
    crate::format::encode_header(Some(&q35()), &mut bytes);
    encode_footer(SectionId(0), &mut bytes);
    file.write_all_at(&bytes, 0).unwrap();
    let error = MappedRamFile::open(file, 0).unwrap_err();
    assert!(error.to_string().contains("capability mapped-ram was off"), "{error}");
}

#[test]
fn a_larger_old_file_is_cut_behind_the_tail() {
    let blocks = list(&[("pc.ram", 0x1000)]);
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 * MIB).unwrap();
    let layout = Layout::new(&q35(), &blocks, SectionId(1), 0).unwrap();
    let tail = Tail { switchover_start: false, devices: &devices(), about: None, base: None };
    layout.write(&file, &tail, |_, _| vec![1]).unwrap();
    let read = MappedRamFile::open(file, 0).unwrap();
    assert!(!read.switchover_start());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn files_read_back_as_written(
        pages in proptest::collection::vec(1_u64..300, 1..8), ignore_shared: bool, offset in 0_u64..1 << 40,
    ) {
        let entries = pages.iter().enumerate().map(|(i, pages)| BlockEntry {
            name: block_name(&i.to_string()),
            used_length: pages << 12,
            address: ignore_shared.then_some(pages << 20),
            host_page_size: None,
        }).collect();
        let blocks = BlockList::new(entries, PageSize::KIB_4).unwrap();
        let (file, layout) = whole(&Configuration { ignore_shared, ..q35() }, &blocks, offset);
        let read = MappedRamFile::open(file, offset).unwrap();
        prop_assert_eq!(read.blocks(), &blocks);
        prop_assert_eq!(read.places(), layout.places());
    }

    #[test]
    fn a_changed_byte_never_panics(at in 0_u64..0x98, to: u8) {
        if let Ok(file) = changed(at, &[to]) {
            let _ = file.bitmap(BlockIndex(0));
        }
    }
}
