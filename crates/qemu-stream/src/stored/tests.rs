use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{Arc, atomic::AtomicU64},
};

use multifd::{
    channel::Stop,
    ram::{BlockIndex, BlockName, PageIndex, PageSize},
};

use super::*;
use crate::{
    Error,
    error::{Place, StreamKind},
    format::{
        BlockEntry, BlockList, Configuration, Delta, Device, DevicePart, Event, LibvirtStorage, MachineType,
        SectionId, SyncMark, SyncMode, testing::section_name,
    },
    mapped_ram::{ReadPath, StoredMachine},
    outgoing::EventWriter,
};

const PAGES: u64 = 4;

/// A stream with one block, in which page 1 was sent twice, page 2 became zero, and page 3 became nonzero.
fn stream(mode: SyncMode) -> Vec<u8> {
    let configuration = Configuration::new(MachineType::new("pc-q35-8.0").expect("a name"));
    let ram = BlockEntry::new(BlockName::new("pc.ram").expect("a name"), PAGES * 4096);
    let blocks = BlockList::new(vec![ram], PageSize::KIB_4).expect("a list");
    let timer = Device { name: section_name("timer"), instance: 0, version: 2, state: vec![7; 24] };
    let devices = DevicePart::build(&[timer], 4096, SectionId(2)).expect("devices");
    let page = |page, bytes| Event::Page { block: BlockIndex(0), page: PageIndex(page), bytes };
    let zero = |page| Event::ZeroPage { block: BlockIndex(0), page: PageIndex(page) };
    let mark = match mode {
        SyncMode::Legacy => SyncMark::Eos,
        SyncMode::Round => SyncMark::Flush,
    };
    let end = [Event::SyncPoint(mark), Event::Eos, Event::SectionEnd { footer: true }];
    let mut events = vec![
        Event::Configuration(Some(&configuration)),
        Event::Blocks { section: SectionId(1), blocks: &blocks },
        Event::SyncMode(mode),
    ];
    events.extend(end.clone());
    events.push(Event::Pass { last: false });
    events.extend([page(0, &[1; 4096]), page(1, &[2; 4096]), page(2, &[3; 4096]), zero(3)]);
    events.extend(end.clone());
    events.push(Event::Pass { last: true });
    events.extend([page(1, &[4; 4096]), zero(2), page(3, &[5; 4096])]);
    events.extend(end);
    events.extend([Event::EndOfRam, Event::End(Box::new(devices))]);
    let mut writer = EventWriter::new(Vec::new());
    events.iter().for_each(|event| writer.write(event).expect("written"));
    writer.into_inner()
}

fn unfold(stream: &[u8], pages: Pages) -> Result<StoredMachine, Error> {
    let scratch = Arc::new(tempfile::tempfile().expect("a scratch file"));
    let copied = Unfold::new(stream).pages(pages).run(&scratch, &AtomicU64::new(0), &Stop::new());
    let left = left_in_file(stream, pages);
    match (&copied, &left) {
        (Ok(copied), Ok(left)) => assert_same(copied, left),
        (Err(copied), Err(left)) => assert_eq!(copied.to_string(), left.to_string()),
        (copied, left) => panic!("one of the two ways refused it: {copied:?}, {left:?}"),
    }
    copied
}

/// The same, of a stream that stays in a file, behind something else.
fn left_in_file(stream: &[u8], pages: Pages) -> Result<StoredMachine, Error> {
    let (scratch, file) = [(); 2].map(|()| Arc::new(tempfile::tempfile().expect("a file"))).into();
    file.write_all_at(stream, BEFORE).expect("written");
    let read = AtomicU64::new(0);
    let left = Unfold::in_file(file, BEFORE).expect("a file").pages(pages).run(&scratch, &read, &Stop::new());
    if left.is_ok() {
        assert_eq!(read.into_inner(), stream.len() as u64);
    }
    left
}

/// Bytes before the stream in its file.
const BEFORE: u64 = 1001;

fn assert_same(copied: &StoredMachine, left: &StoredMachine) {
    assert_eq!(copied.blocks().entries(), left.blocks().entries());
    let bits = |machine: &StoredMachine| {
        machine.bitmap(BlockIndex(0)).expect("a bitmap").words().collect::<Vec<_>>()
    };
    assert_eq!(bits(copied), bits(left));
    assert_eq!((copied.is_one_file(), left.is_one_file()), (true, !left.has_pages()));
    if !copied.has_pages() {
        return;
    }
    let blocks = [copied, left].map(|machine| machine.ram_blocks(|_, _| ReadPath::Mapped).expect("blocks"));
    for page in (0..PAGES).map(PageIndex) {
        let [copied, left] = blocks.each_ref().map(|blocks| {
            let mut bytes = vec![9; 4096];
            blocks.get(BlockIndex(0)).expect("a block").load(page, &mut bytes).expect("read");
            bytes
        });
        assert!(copied == left, "page {page:?}");
    }
}

#[test]
fn last_contents_of_each_page_are_at_its_place() {
    let machine = unfold(&stream(SyncMode::Legacy), Pages::Keep).expect("a machine");
    let blocks = machine.ram_blocks(|_, _| ReadPath::Cached).expect("blocks");
    let block = blocks.get(BlockIndex(0)).expect("a block");
    for (page, expected) in [(0, 1), (1, 4), (2, 0), (3, 5)] {
        let mut bytes = [9; 4096];
        block.load(PageIndex(page), &mut bytes).expect("read");
        assert_eq!(
            (bytes, block.is_present(PageIndex(page))),
            ([expected; 4096], expected != 0),
            "page {page}"
        );
    }
    assert_eq!(machine.devices().sections().len(), 1);
    assert_eq!(machine.sync_mode(), None, "a stream without channels shows none");
}

/// Changes of pages that are in the stream, of changed ones, and pages and zeros that replace changed ones.
#[test]
fn changes_of_pages_are_applied_to_what_was_sent_before() {
    let configuration = Configuration::new(MachineType::new("pc-q35-8.0").expect("a name"));
    let ram = BlockEntry::new(BlockName::new("pc.ram").expect("a name"), PAGES * 4096);
    let blocks = BlockList::new(vec![ram], PageSize::KIB_4).expect("a list");
    let devices = DevicePart::build(&[], 4096, SectionId(2)).expect("devices");
    let at = Place { stream: StreamKind::Stored, offset: 0 };
    let page = |page, bytes| Event::Page { block: BlockIndex(0), page: PageIndex(page), bytes };
    let zero = |page| Event::ZeroPage { block: BlockIndex(0), page: PageIndex(page) };
    // Each pair: the number of bytes that stay, then the number of those that change, and these.
    let change = |page, bytes| Event::Xbzrle {
        block: BlockIndex(0),
        page: PageIndex(page),
        delta: Delta::new(bytes, at),
    };
    let end = [Event::SyncPoint(SyncMark::Eos), Event::Eos, Event::SectionEnd { footer: true }];
    let mut events = vec![
        Event::Configuration(Some(&configuration)),
        Event::Blocks { section: SectionId(1), blocks: &blocks },
        Event::SyncMode(SyncMode::Legacy),
    ];
    events.extend(end.clone());
    events.push(Event::Pass { last: true });
    events.extend([page(0, &[1; 4096]), page(1, &[2; 4096]), page(2, &[3; 4096]), page(3, &[4; 4096])]);
    events.extend([
        change(0, &[1, 2, 7, 8]),
        change(1, &[1, 1, 7]),
        change(2, &[1, 1, 7]),
        change(3, &[1, 1, 7]),
    ]);
    events.extend([
        change(0, &[2, 1, 9]),
        page(1, &[5; 4096]),
        zero(2),
        page(3, &[6; 4096]),
        change(3, &[0, 1, 8]),
    ]);
    events.extend(end);
    events.extend([Event::EndOfRam, Event::End(Box::new(devices))]);
    let mut writer = EventWriter::new(Vec::new());
    events.iter().for_each(|event| writer.write(event).expect("written"));
    let stream = writer.into_inner();
    let machine = unfold(&stream, Pages::Keep).expect("a machine");
    let blocks = machine.ram_blocks(|_, _| ReadPath::Cached).expect("blocks");
    let starts = [0, 1, 2, 3].map(|page| {
        let mut bytes = [9; 4096];
        blocks.get(BlockIndex(0)).expect("a block").load(PageIndex(page), &mut bytes).expect("read");
        assert!(bytes.iter().skip(4).all(|byte| *byte == bytes[4095]));
        [bytes[0], bytes[1], bytes[2], bytes[3]]
    });
    assert_eq!(starts, [[1, 7, 9, 1], [5; 4], [0; 4], [8, 6, 6, 6]]);
}

#[test]
fn stream_that_shrinks_while_its_machine_is_used_is_an_error() {
    let whole = stream(SyncMode::Legacy);
    let (scratch, file) = [(); 2].map(|()| Arc::new(tempfile::tempfile().expect("a file"))).into();
    file.write_all_at(&whole, 0).expect("written");
    let machine = Unfold::in_file(file.clone(), 0).expect("a file");
    let machine = machine.run(&scratch, &AtomicU64::new(0), &Stop::new()).expect("a machine");
    file.set_len(4096).expect("cut");
    let blocks = machine.ram_blocks(|_, _| ReadPath::Cached).expect("blocks");
    let error =
        blocks.get(BlockIndex(0)).expect("a block").load_direct(PageIndex(0), PAGES, &mut [0; 4 * 4096]);
    assert_eq!(error.expect_err("cut").kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn machine_whose_pages_were_counted_has_bitmaps_and_no_pages() {
    let machine = unfold(&stream(SyncMode::Legacy), Pages::Count).expect("a machine");
    let present = machine.bitmap(BlockIndex(0)).expect("a bitmap");
    assert_eq!(
        (0..PAGES).map(|page| present.contains(PageIndex(page))).collect::<Vec<_>>(),
        [true, true, false, true]
    );
    let refused = machine.ram_blocks(|_, _| ReadPath::Cached).expect_err("no pages");
    assert!(
        multifd::error::chain(&refused).any(|cause| cause.to_string().contains("only counted")),
        "{refused:?}"
    );
}

#[test]
fn stream_that_is_cut_anywhere_is_no_machine() {
    let whole = stream(SyncMode::Legacy);
    // A stream may have no description: at its end, it has all of the machine without one.
    let described = whole.iter().rposition(|byte| *byte == 6).expect("a description");
    for length in (0..whole.len()).step_by(7).chain([whole.len() - 1]).filter(|length| *length != described) {
        let refused = unfold(&whole[..length], Pages::Keep).expect_err("cut");
        assert!(!refused.to_string().contains("source closed"), "a file has no running source: {refused}");
    }
}

#[test]
fn stream_whose_pages_went_elsewhere_is_refused() {
    let refused = unfold(&stream(SyncMode::Round), Pages::Keep).expect_err("multifd");
    assert!(refused.to_string().contains("switch capability multifd off"), "{refused}");
}

/// The source of an old machine type with multifd shows it by nothing but pages that are not there.
#[test]
fn stream_without_any_page_with_data_is_refused() {
    let mut whole = stream(SyncMode::Legacy);
    while let Some(at) = whole.windows(8).position(|record| record == [0, 0, 0, 0, 0, 0, 0, 8]) {
        // The first PAGE has the name of its block, and is made a ZERO of the same page.
        whole[at + 7] = 2;
        let bytes = at + 8 + 7;
        whole.drain(bytes + 1..bytes + 4096);
        whole[bytes] = 0;
    }
    for flags in [0x28_u16, 0x1028, 0x2028, 0x3028] {
        let record: Vec<u8> = [&[0; 6][..], &flags.to_be_bytes()].concat();
        while let Some(at) = whole.windows(8).position(|found| found == record) {
            whole[at + 7] = 0x22;
            whole.drain(at + 9..at + 8 + 4096);
            whole[at + 8] = 0;
        }
    }
    let refused = unfold(&whole, Pages::Keep).expect_err("no pages");
    assert!(refused.to_string().contains("went over other connections"), "{refused}");
}

#[test]
fn cancel_ends_it() {
    let scratch = Arc::new(tempfile::tempfile().expect("a scratch file"));
    let stop = Stop::new();
    stop.cancel();
    let ended = Unfold::new(&*stream(SyncMode::Legacy)).run(&scratch, &AtomicU64::new(0), &stop);
    assert!(matches!(ended, Err(Error::Io { .. })), "{ended:?}");
}

fn image(xml: &[u8], announced: u32) -> io::Result<Option<LibvirtImage>> {
    let file: File = tempfile::tempfile().expect("a file");
    let mut head = vec![0; 92];
    head[..16].copy_from_slice(b"LibvirtQemudSave");
    head[16] = 2;
    head[20..24]
        .copy_from_slice(&announced.to_be_bytes().map(u8::to_be).into_iter().rev().collect::<Vec<_>>());
    head[24] = 1;
    head[28] = 5;
    file.write_all_at(&[&head, xml].concat(), 0).expect("written");
    LibvirtImage::read(&file, 0)
}

#[test]
fn head_and_xml_of_a_libvirt_image_are_read() {
    let found = image(b"<domain/>\0cookie\0\0", 18).expect("read").expect("an image");
    assert_eq!((&*found.xml, found.stream_at, found.was_running), ("<domain/>", 110, true));
    assert!(matches!(found.storage, LibvirtStorage::Compressed(_)), "{found:?}");
}

#[test]
fn xml_that_is_longer_than_its_bound_or_its_file_is_refused() {
    let most = u32::try_from(LibvirtImage::MOST_XML).expect("small");
    let refused = |announced| image(b"<domain/>\0", announced).expect_err("refused").to_string();
    assert!(refused(most + 1).contains("expected at most"), "{}", refused(most + 1));
    assert!(refused(most).contains("ends inside its XML"), "{}", refused(most));
    assert!(refused(u32::MAX).contains("expected at most"));
}
