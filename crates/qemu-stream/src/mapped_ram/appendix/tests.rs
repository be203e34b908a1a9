use std::sync::atomic::AtomicU64;

use multifd::{
    channel::Stop,
    ram::{BlockIndex, PageIndex, PageSize, RamBlocks},
};
use proptest::prelude::*;

use super::{record::MOST_ABOUT, *};
use crate::{
    format::{
        BlockEntry, BlockList, Configuration, Device, DevicePart, MachineType, SectionId,
        testing::{block_name, section_name},
    },
    mapped_ram::{Layout, MappedRamFile, ReadPath, Tail, Verification, Verify},
};

const PAGE: usize = 4096;

fn devices() -> DevicePart {
    let device = Device { name: section_name("timer"), instance: 0, version: 2, state: vec![1; 24] };
    DevicePart::build(&[device], 4096, SectionId(2)).unwrap()
}

/// A machine of two blocks, the first with pages 0, 1, 5 and 600 to 1199, the other with page 2, and a page that was written
/// and then made zero.
fn written(about: Option<&str>) -> (Arc<File>, Layout) {
    let entries = [("pc.ram", 0x80_0000), ("pc.rom", 0x4000)];
    let entries = entries.map(|(name, length)| BlockEntry::new(block_name(name), length)).to_vec();
    let blocks = BlockList::new(entries, PageSize::KIB_4).unwrap();
    let configuration = Configuration::new(MachineType::new("pc-q35-10.0").unwrap());
    let layout = Layout::new(&configuration, &blocks, SectionId(1), 0).unwrap();
    let file = Arc::new(tempfile::tempfile().unwrap());
    let ram = layout.ram_blocks_with_digests(&file, None).unwrap();
    store(&ram, 0, 0, &[1; 2 * PAGE]);
    store(&ram, 0, 5, &[3; PAGE]);
    store(&ram, 0, 5, &[2; PAGE]);
    let run: Vec<u8> = (600..1200_u32).flat_map(|page| [page.to_be_bytes(); PAGE / 4].concat()).collect();
    store(&ram, 0, 600, &run);
    store(&ram, 0, 9, &[4; PAGE]);
    ram.block(BlockIndex(0)).unwrap().clear(PageIndex(9));
    store(&ram, 1, 2, &[5; PAGE]);
    let tail = Tail { switchover_start: true, devices: &devices(), about, base: None };
    let end = layout.write_around(&file, &ram, &tail).unwrap();
    assert_eq!(end, file.metadata().unwrap().len());
    (file, layout)
}

fn store(ram: &RamBlocks, block: usize, page: u64, bytes: &[u8]) {
    ram.block(BlockIndex(block)).unwrap().store(PageIndex(page), bytes).unwrap();
}

fn open(file: &Arc<File>) -> Result<MappedRamFile, Error> {
    MappedRamFile::open(file.try_clone().unwrap(), 0)
}

fn verify(machine: &MappedRamFile) -> Verification {
    Verify::new(machine).run(&AtomicU64::new(0), &Stop::new()).unwrap()
}

fn flip(file: &File, at: u64) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

#[test]
fn digests_and_text_read_back_as_written() {
    let (file, _) = written(Some(r#"{"label":"é"}"#));
    let machine = open(&file).unwrap();
    assert_eq!((machine.about(), machine.trailing_bytes()), (Some(r#"{"label":"é"}"#), 0));
    assert!(machine.has_digests());
    let read = AtomicU64::new(0);
    let found = Verify::new(&machine).run(&read, &Stop::new()).unwrap();
    assert_eq!(found, Verification { pages: 604, compared: true, ..Verification::default() });
    assert_eq!(read.into_inner(), 604 * PAGE as u64);
    let ram = machine.ram_blocks(|_, _| ReadPath::Mapped).unwrap();
    let block = ram.block(BlockIndex(0)).unwrap();
    assert!(block.slice(PageIndex(0), 1).is_none(), "what is compared is not mapped");
    let mut pages = vec![0; 7 * PAGE];
    block.load_direct(PageIndex(0), 7, &mut pages).unwrap();
    assert_eq!(pages[5 * PAGE..6 * PAGE], [2; PAGE]);
}

#[test]
fn changed_page_is_named_by_verify_and_cannot_be_read() {
    let (file, layout) = written(None);
    let places = layout.places();
    for (block, page) in [(0, 1), (0, 700), (0, 701), (1, 2)] {
        flip(&file, places[block].page_offset(PageIndex(page)).unwrap() + 4095);
    }
    // A page that is not present has no contents that could be damaged.
    flip(&file, places[0].page_offset(PageIndex(9)).unwrap());
    let machine = open(&file).unwrap();
    let found = verify(&machine);
    assert_eq!((found.pages, found.damaged_pages), (604, 4));
    let damage: Vec<_> =
        found.damage.iter().map(|run| (run.block.to_string(), run.offset.0, run.length)).collect();
    let expected = [("pc.ram", 0x1000, 0x1000), ("pc.ram", 700 << 12, 0x2000), ("pc.rom", 0x2000, 0x1000)];
    assert_eq!(damage, expected.map(|(name, offset, length)| (name.to_owned(), offset, length)));
    assert_eq!(found.damage[2].position, places[1].pages_offset + 0x2000);
    let ram = machine.ram_blocks(|_, _| ReadPath::Cached).unwrap();
    let (block, mut pages) = (ram.block(BlockIndex(0)).unwrap(), vec![0; 4 * PAGE]);
    block.load(PageIndex(0), &mut pages[..PAGE]).unwrap();
    let error = block.load_direct(PageIndex(0), 4, &mut pages).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(r#"block "pc.ram": the page at offset 0x1000 differs from its digest"#), "{text}");
    assert!(block.load(PageIndex(1), &mut pages[..PAGE]).is_err());
    // What can be read can be saved.
    let machine = MappedRamFile::open_damaged(file.try_clone().unwrap(), 0).unwrap();
    assert!(!machine.has_digests());
    let ram = machine.ram_blocks(|_, _| ReadPath::Cached).unwrap();
    ram.block(BlockIndex(0)).unwrap().load_direct(PageIndex(0), 4, &mut pages).unwrap();
}

/// Every bit outside of the pages and of what QEMU does not read is covered: head, bitmaps, devices, all of the appendix.
#[test]
fn change_of_any_other_part_is_found() {
    let (file, layout) = written(Some("{}"));
    let length = file.metadata().unwrap().len();
    let tail = layout.tail_offset();
    let of_bitmap = layout.places()[0].bitmap_offset;
    let at_start = (0..of_bitmap + 256).step_by(7);
    for at in at_start.chain((tail..length).step_by(101)) {
        flip(&file, at);
        // The end mark is only a hint.
        let is_mark = at >= length - MARK as u64;
        let found = open(&file).map(|machine| is_mark || verify(&machine).damaged_pages > 0);
        assert!(found.unwrap_or(true), "the change at {at:#x} of {length:#x} was not found");
        flip(&file, at);
    }
    assert_eq!(verify(&open(&file).unwrap()).damaged_pages, 0);
}

#[test]
fn damaged_digests_are_distinguished_from_damaged_pages() {
    let (file, _) = written(None);
    // The fourth group is that of "pc.rom", of which only page 2 is present.
    let groups = open(&file).unwrap().stream().end + (HEADER + RECORD) as u64;
    flip(&file, groups + 3 * digests::GROUP as u64 + 5);
    let found = verify(&open(&file).unwrap());
    assert_eq!(found.damaged_pages, 1);
    assert!(found.damage[0].why.contains("digests of pages: differs from its digest"), "{found:?}");
}

#[test]
fn digests_are_added_to_a_file_without_and_not_twice() {
    let (file, layout) = written(None);
    let machine = open(&file).unwrap();
    let end = machine.stream().end;
    file.set_len(end).unwrap();
    let machine = open(&file).unwrap();
    assert!(!machine.has_digests());
    let nothing = || (AtomicU64::new(0), Stop::new());
    let (read, stop) = nothing();
    assert!(Verify::new(&machine).run(&read, &stop).is_err());
    let found = Verify::new(&machine).read(&AtomicU64::new(0), &stop).unwrap();
    assert_eq!(found, Verification { pages: 604, ..Verification::default() }, "nothing is compared");
    Verify::new(&machine).add(&file, Some("{}"), &read, &stop).unwrap();
    let machine = open(&file).unwrap();
    assert_eq!((machine.about(), verify(&machine).damaged_pages), (Some("{}"), 0));
    let (read, stop) = nothing();
    assert!(Verify::new(&machine).add(&file, None, &read, &stop).is_err(), "there are some");
    flip(&file, layout.places()[0].page_offset(PageIndex(5)).unwrap());
    assert_eq!(verify(&machine).damaged_pages, 1);
    // Something else is there: it is not overwritten.
    file.set_len(end).unwrap();
    file.write_all_at(b"other", end).unwrap();
    let machine = open(&file).unwrap();
    let (read, stop) = nothing();
    assert!(Verify::new(&machine).add(&file, None, &read, &stop).is_err());
}

#[test]
fn end_of_a_machine_without_note_is_found_by_the_mark_and_a_filled_up_copy_has_digests() {
    let (file, layout) = written(Some("{}"));
    let end = open(&file).unwrap().stream().end;
    let length = file.metadata().unwrap().len();
    assert_eq!(marked_end(&file, length, 0), Some(end));
    assert_eq!(marked_end(&file, length - 1, 0), None);
    assert_eq!(marked_end(&file, 3, 0), None);
    file.set_len(length.next_multiple_of(1 << 16)).unwrap();
    let machine = open(&file).unwrap();
    assert!(machine.has_digests());
    assert_eq!(machine.trailing_bytes(), length.next_multiple_of(1 << 16) - length);
    // Without the note, what looks like a description in the devices would be the end.
    let note = layout.places()[0].pages_offset - 24;
    file.set_len(length).unwrap();
    file.write_all_at(&[0; 24], note).unwrap();
    let machine = MappedRamFile::open_damaged(file.try_clone().unwrap(), 0).unwrap();
    assert_eq!(machine.stream().end, end);
}

/// A machine of 1 TiB that is a hole, whose digests of groups are said to be as long as they may be, and are a hole, too.
#[test]
fn digests_that_are_a_hole_take_no_memory() {
    let file = tempfile::tempfile().unwrap();
    let place = BlockPlace {
        bitmap_offset: 1,
        pages_offset: 1 << 30,
        used_length: 1 << 40,
        page_size: PageSize::KIB_4,
    };
    file.set_len(1 << 42).unwrap();
    file.write_all_at(&[1; 4096], 0).unwrap();
    let length = 12 << 20;
    let body = Body { file: &file, start: 1 << 41, length, digest: Digest::of(&vec![0; 12 << 20]) };
    let refused = FileDigests::read(&body, (1 << 41, 0), &[place]).unwrap_err().to_string();
    assert!(refused.contains("digests of groups: expected at most"), "{refused}");
}

#[test]
fn text_of_more_than_a_mebibyte_is_refused() {
    let (file, layout) = written(None);
    let about = "x".repeat(MOST_ABOUT + 1);
    let tail = Tail { switchover_start: true, devices: &devices(), about: Some(&about), base: None };
    let ram = layout.ram_blocks(&file, None).unwrap();
    assert!(layout.write_around(&file, &ram, &tail).is_err());
}

#[test]
fn cancelled_verification_ends_with_the_reason() {
    let (file, _) = written(None);
    let machine = open(&file).unwrap();
    let stop = Stop::new();
    stop.cancel();
    assert!(Verify::new(&machine).run(&AtomicU64::new(0), &stop).unwrap_err().is_cancelled());
}

proptest! {
    /// A hostile appendix with right digests: it is read without a panic, and never needs more than the machine does.
    #[test]
    fn any_header_and_records_are_refused_or_read(
        fields in proptest::collection::vec(any::<u64>(), 4), at in 0_usize..4, small in 0_u64..200,
        bodies in proptest::collection::vec((0_u32..6, proptest::collection::vec(any::<u8>(), 0..100)), 0..5),
    ) {
        let (file, _) = written(None);
        let end = open(&file).unwrap().stream().end;
        let mut records = Vec::new();
        for (kind, body) in &bodies {
            let length = (body.len() as u64).to_be_bytes();
            let mut head = [&kind.to_be_bytes()[..], &[0; 4], &length, &Digest::of(body).to_bytes()].concat();
            head.extend(Digest::of(&head).to_bytes());
            records.extend(head);
            records.extend(body);
        }
        let length = (HEADER + records.len() + MARK) as u64;
        let mut numbers = [u64::from(VERSION) << 32 | bodies.len() as u64, length, end, 0];
        numbers[at] = if small < 100 { fields[at] } else { small };
        let mut header = MAGIC.to_vec();
        header.extend(numbers.iter().flat_map(|number| number.to_be_bytes()));
        header.extend([0; 8]);
        header.extend(Digest::of(&header).to_bytes());
        file.write_all_at(&header, end).unwrap();
        file.write_all_at(&records, end + HEADER as u64).unwrap();
        file.set_len(end + length).unwrap();
        if let Ok(machine) = open(&file) {
            prop_assert!(!machine.has_digests() || verify(&machine).damaged_pages > 0);
        }
    }
}
