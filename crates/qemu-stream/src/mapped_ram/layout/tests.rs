use std::os::unix::fs::{FileExt, MetadataExt};

use multifd::ram::{PageIndex, PageSize};

use super::*;
use crate::format::{
    BlockEntry, Device, MachineType, SectionName,
    testing::{block_name, dump},
};

fn q35() -> Configuration {
    Configuration::new(MachineType::new("pc-q35-10.0").unwrap())
}

fn blocks(blocks: &[(&str, u64)]) -> BlockList {
    let entries = blocks.iter().map(|(name, length)| BlockEntry::new(block_name(name), *length)).collect();
    BlockList::new(entries, PageSize::KIB_4).unwrap()
}

fn devices() -> DevicePart {
    DevicePart::build(&[], 4096, SectionId(2)).unwrap()
}

fn tail(devices: &DevicePart) -> Tail<'_> {
    Tail { switchover_start: true, devices, about: None, base: None }
}

/// The bitmap of a block without present pages.
fn none(_: BlockIndex, place: &BlockPlace) -> Vec<u64> {
    vec![0; usize::try_from(place.bitmap_words()).unwrap()]
}

/// With other blocks of the same lengths, the bits would be applied to the wrong pages.
#[test]
fn blocks_that_the_file_was_not_laid_out_for_are_refused() {
    let layout = |name| Layout::new(&q35(), &blocks(&[(name, 0x4_0000)]), SectionId(1), 0).unwrap();
    let file = Arc::new(tempfile::tempfile().unwrap());
    let own = layout("pc.ram").ram_blocks(&file, None).unwrap();
    assert!(layout("pc.ram").write_around(&file, &own, &tail(&devices())).is_ok());
    let refused = layout("pc.rom").write_around(&file, &own, &tail(&devices()));
    assert!(matches!(refused, Err(Error::Usage(Usage::Blocks(_)))), "{refused:?}");
}

/// Captured from QEMU 10.0.2 with a guest of 96 MiB, its block list shortened to the first two.
#[test]
fn the_head_is_what_qemu_writes() {
    let blocks = blocks(&[("pc.ram", 0x600_0000), ("/rom@etc/acpi/tables", 0x2_0000)]);
    let layout = Layout::new(&q35(), &blocks, SectionId(1), 0).unwrap();
    let file = tempfile::tempfile().unwrap();
    layout.write(&file, &tail(&devices()), none).unwrap();
    let golden = dump(
        "51 45 56 4d 00 00 00 03 07 00 00 00 0b \"pc-q35-10.0\"
         05 1a \"configuration/capabilities\" 00 00 00 01  00 00 00 01  0a \"mapped-ram\"
         01 00 00 00 01 03 \"ram\" 00 00 00 00 00 00 00 04
         00 00 00 00 06 02 00 04
         06 \"pc.ram\" 00 00 00 00 06 00 00 00
         00 00 00 01  00 00 00 00 00 00 10 00  00 00 00 00 00 00 00 8b  00 00 00 00 00 10 00 00",
    );
    let mut head = vec![0; golden.len()];
    file.read_exact_at(&mut head, 0).unwrap();
    assert_eq!(head, golden);
    let golden = dump(
        "14 \"/rom@etc/acpi/tables\" 00 00 00 00 00 02 00 00
         00 00 00 01  00 00 00 00 00 00 10 00  00 00 00 00 06 10 00 39  00 00 00 00 06 20 00 00",
    );
    let mut entry = vec![0; golden.len()];
    file.read_exact_at(&mut entry, 0x610_0000).unwrap();
    assert_eq!(entry, golden);
    assert_eq!(layout.places()[1].bitmap_offset, 0x610_0039);
    let golden = dump("00 00 00 00 00 00 00 10 7e 00 00 00 01");
    let mut eos = vec![0; golden.len()];
    file.read_exact_at(&mut eos, 0x622_0000).unwrap();
    assert_eq!(eos, golden);
    assert_eq!(layout.tail_offset(), 0x622_000d);
}

/// QEMU 10.0.2 with `offset=4096`: bitmap of pc.ram at 0x108b, its pages still at 0x100000.
#[test]
fn places_are_absolute_and_aligned_absolutely_when_the_file_has_an_offset() {
    let layout = Layout::new(&q35(), &blocks(&[("pc.ram", 0x600_0000)]), SectionId(1), 0x1000).unwrap();
    let place = layout.places()[0];
    assert_eq!((place.bitmap_offset, place.pages_offset), (0x108b, 0x10_0000));
    assert_eq!(place.page_offset(PageIndex(2)), Some(0x10_2000));
    assert_eq!(place.page_offset(PageIndex(0x6000)), None);
}

#[test]
fn an_offset_that_leaves_no_room_is_refused() {
    let blocks = blocks(&[("pc.ram", 0x600_0000)]);
    for offset in [u64::MAX, u64::MAX - 0x600_0000, 1 << 62] {
        assert!(Layout::new(&q35(), &blocks, SectionId(1), offset).is_err(), "{offset:#x}");
    }
}

#[test]
fn a_page_size_that_differs_from_the_configuration_is_refused() {
    let arm = Configuration { target_page_size: Some(PageSize::KIB_64), ..q35() };
    assert!(Layout::new(&arm, &blocks(&[("mach-virt.ram", 0x10_0000)]), SectionId(1), 0).is_err());
}

#[test]
fn a_machine_without_configuration_is_refused() {
    let old = Configuration::new(MachineType::new("pc-i440fx-2.3").unwrap());
    let refused = Layout::new(&old, &blocks(&[("pc.ram", 0x10_0000)]), SectionId(1), 0);
    assert!(matches!(refused, Err(Usage::Machine { .. })));
}

#[test]
fn a_bitmap_of_another_length_is_refused() {
    let layout = Layout::new(&q35(), &blocks(&[("pc.ram", 0x4_1000)]), SectionId(1), 0).unwrap();
    let file = tempfile::tempfile().unwrap();
    for (words, taken) in [(2, true), (1, false), (3, false)] {
        assert_eq!(layout.write(&file, &tail(&devices()), |_, _| vec![0; words]).is_ok(), taken, "{words}");
    }
}

/// A reader finds the section of a piece by its number.
#[test]
fn device_with_the_number_of_the_ram_section_is_refused() {
    let device = Device { name: SectionName::new("timer").unwrap(), instance: 0, version: 1, state: vec![1] };
    let devices = DevicePart::build(&[device], 4096, SectionId(7)).unwrap();
    for (ram, refused) in [(SectionId(7), true), (SectionId(6), false)] {
        let layout = Layout::new(&q35(), &blocks(&[("pc.ram", 0x1000)]), ram, 0).unwrap();
        let file = tempfile::tempfile().unwrap();
        let found = layout.write(&file, &tail(&devices), none);
        assert_eq!(matches!(found, Err(Error::Usage(Usage::SectionTaken { .. }))), refused, "{found:?}");
        assert_eq!(file.metadata().unwrap().len() == 0, refused);
    }
}

/// A bitmap of 4 MiB in a file that was full of ones: the bits of two pages need two pieces, the rest becomes a hole.
#[test]
fn a_bitmap_is_a_hole_where_no_bit_is_set_and_reads_as_zeros_there() {
    let layout = Layout::new(&q35(), &blocks(&[("pc.ram", 1 << 37)]), SectionId(1), 0).unwrap();
    let place = layout.places()[0];
    let file = tempfile::tempfile().unwrap();
    let older = vec![0xff; usize::try_from(place.bitmap_length()).unwrap()];
    file.write_all_at(&older, place.bitmap_offset).unwrap();
    let words = usize::try_from(place.bitmap_words()).unwrap();
    let marked = |word: usize| if word == 12_345 || word == words - 1 { 1 << 7 } else { 0 };
    layout.write(&file, &tail(&devices()), |_, _| (0..words).map(marked)).unwrap();
    let mut bytes = vec![0; words * WORD];
    file.read_exact_at(&mut bytes, place.bitmap_offset).unwrap();
    let found: Vec<usize> = (0..words).filter(|word| bytes[word * WORD..][..WORD] != [0; WORD]).collect();
    assert_eq!(found, [12_345, words - 1]);
    // The head, two pieces of the bitmap, the note and the tail.
    let blocks = file.metadata().unwrap().blocks();
    assert!(blocks * 512 <= 1 << 20, "{blocks} sectors of 512 bytes are in use");
}
