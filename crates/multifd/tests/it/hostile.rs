//! A hostile source: every violation is refused with its position, and only bytes inside allowed pages have changed.

use std::{sync::Arc, time::Duration};

use multifd::{
    ChannelCount, Error, Method, ReceiveOptions, Receiver, Result,
    channel::{Connect, Link, Stop, memory},
    error::{Malformed, Unsupported, Violation},
    ram::{PageIndex, PageSize, RamBlocks},
    wire::{ChannelId, Flags, HeadBuffer, Initial, VmUuid},
};

use crate::kit::{TIMEOUT, context, fresh, name};

const RAM: &[(&str, u64)] = &[("pc.ram", 64 << 10)];

fn open(connector: &dyn Connect, uuid: VmUuid, id: u8) -> Box<dyn Link> {
    let mut link = connector.connect(&context()).expect("connected");
    put(&mut *link, &Initial { uuid, id: ChannelId(id) }.encode());
    link
}

fn put(link: &mut dyn Link, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let Ok(sent) = link.send(&[bytes.into()]) else { return };
        bytes = &bytes[sent..];
    }
}

fn destination(options: ReceiveOptions) -> (Receiver, memory::MemoryConnector, Arc<RamBlocks>) {
    let (connector, listener) = memory::network(1 << 20);
    let blocks = fresh(PageSize::KIB_4, RAM);
    let mut receiver = Receiver::new(options, Stop::new());
    receiver.listen(Box::new(listener)).expect("listening");
    receiver.set_blocks(blocks.clone()).expect("set");
    (receiver, connector, blocks)
}

fn untouched(blocks: &RamBlocks) -> bool {
    blocks.iter().all(|(_, block)| block.slice(PageIndex(0), block.pages()).expect("whole").is_zero())
}

/// The result of main when a channel sends these bytes after its initial packet.
fn answer_to(bytes: &[u8]) -> (Result<()>, Arc<RamBlocks>) {
    let (receiver, connector, blocks) = destination(ReceiveOptions::new().method(Some(Method::None)));
    let mut link = open(&connector, VmUuid::NIL, 0);
    put(&mut *link, bytes);
    link.close_send().expect("closed");
    (receiver.sync(), blocks)
}

fn head(normal: &[u64], zero: &[u64], payload: u32) -> Vec<u8> {
    let pages = |list: &[u64]| list.iter().copied().map(PageIndex).collect::<Vec<_>>();
    let mut buffer = HeadBuffer::new(PageSize::KIB_4);
    buffer.pages(Flags::default(), 7, &name("pc.ram"), &pages(normal), &pages(zero), payload).to_vec()
}

#[test]
fn every_bad_packet_is_refused_with_its_place_and_touches_nothing() {
    let patched = |at: usize, bytes: &[u8]| {
        let mut packet = head(&[1], &[], 4096);
        packet[at..at + bytes.len()].copy_from_slice(bytes);
        packet.extend([0xaa; 4096]);
        packet
    };
    type Expected = fn(&Error) -> bool;
    let cases: [(&str, Vec<u8>, Expected, &str); 8] = [
        (
            "magic",
            patched(0, b"QEVM"),
            |e| matches!(e, Error::Malformed(Malformed::Magic { .. })),
            "expected magic",
        ),
        (
            "version",
            patched(7, &[9]),
            |e| matches!(e, Error::Malformed(Malformed::Version { .. })),
            "expected version 1, found 9",
        ),
        (
            "alloc",
            patched(12, &[0, 0, 1, 0]),
            |e| matches!(e, Error::Malformed(Malformed::PagesAlloc { .. })),
            "pages_alloc 256",
        ),
        (
            "normal",
            patched(16, &[0, 0, 1, 0]),
            |e| matches!(e, Error::Malformed(Malformed::NormalPages { .. })),
            "256 normal pages",
        ),
        (
            "name",
            patched(64, b"vc.ram"),
            |e| matches!(e, Error::Violation(Violation::UnknownBlock { .. })),
            r#"unknown block "vc.ram""#,
        ),
        (
            "offset",
            patched(325, &[0x01, 0x00, 0x00]),
            |e| matches!(e, Error::Violation(Violation::OutsideBlock { .. })),
            "offset 0x10000 outside block",
        ),
        (
            "unaligned",
            patched(327, &[1]),
            |e| matches!(e, Error::Malformed(Malformed::Unaligned { .. })),
            "offset 0x1001 is not a multiple",
        ),
        (
            "method",
            patched(11, &[2]),
            |e| matches!(e, Error::Violation(Violation::Method { .. })),
            "expected method none",
        ),
    ];
    for (case, bytes, expected, text) in cases {
        let (answer, blocks) = answer_to(&bytes);
        let error = answer.expect_err(case);
        assert!(expected(error.kind()), "{case}: {error}");
        assert!(error.to_string().starts_with(&format!("channel 0: packet 0: {text}")), "{case}: {error}");
        assert!(untouched(&blocks), "{case}");
    }
}

/// Its head is shorter than others, and less than another's length may follow it: no bytes are waited for in vain.
#[test]
fn a_device_state_packet_is_refused_by_name_while_its_channel_stays_open() {
    let mut packet = vec![0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1, 0, 0, 0, 0x40];
    packet.extend(b"0000:00:05.0/vfio");
    packet.resize(268, 0);
    packet.extend([0, 0, 0, 2, 0, 0, 0, 20]);
    packet.extend([0xaa; 20]);
    let (receiver, connector, blocks) = destination(ReceiveOptions::new());
    let mut link = open(&connector, VmUuid::NIL, 0);
    put(&mut *link, &packet);
    let (told, answer) = std::sync::mpsc::channel();
    let main = std::thread::spawn(move || told.send(receiver.sync()));
    let error = answer.recv_timeout(TIMEOUT).expect("in time").expect_err("refused");
    let expected =
        "channel 0: packet 0: device-state packet (flag 0x40) of device \"0000:00:05.0/vfio\" instance 2: ";
    assert!(error.to_string().starts_with(expected), "{error}");
    assert!(
        matches!(error.kind(), Error::Unsupported(Unsupported::DeviceState { instance: 2, .. })),
        "{error}"
    );
    assert!(untouched(&blocks));
    main.join().expect("no panic").expect("taken");
}

#[test]
fn a_device_state_packet_cut_or_malformed_is_refused() {
    let mut packet = vec![0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1, 0, 0, 0, 0x40];
    for (length, cut) in [(12, true), (13, true), (275, true), (276, false)] {
        packet.resize(length, 0);
        let (answer, _) = answer_to(&packet);
        let error = answer.expect_err("refused");
        assert_eq!(matches!(error.kind(), Error::Violation(Violation::Cut { .. })), cut, "{length}: {error}");
        assert_eq!(matches!(error.kind(), Error::Malformed(Malformed::DeviceId)), !cut, "{length}: {error}");
    }
    packet[11] = 0x41;
    let error = answer_to(&packet).0.expect_err("a sync as well");
    assert!(matches!(error.kind(), Error::Malformed(Malformed::DeviceStateFlags { .. })), "{error}");
}

/// Such a state belongs after RAM, where other errors of a channel only go to the log.
#[test]
fn a_device_state_packet_after_the_end_of_ram_fails_the_migration() {
    let mut packet = vec![0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1, 0, 0, 0, 0x40, b'd'];
    packet.resize(275, 0);
    packet.push(1);
    let (receiver, connector, _) = destination(ReceiveOptions::new());
    let mut link = open(&connector, VmUuid::NIL, 0);
    put(&mut *link, HeadBuffer::new(PageSize::KIB_4).sync(0));
    receiver.sync().expect("the first point");
    receiver.seal().expect("the end of ram");
    put(&mut *link, &packet);
    link.close_send().expect("closed");
    let error = receiver.finish().expect_err("refused");
    assert!(matches!(error.kind(), Error::Unsupported(Unsupported::DeviceState { .. })), "{error}");
}

#[test]
fn a_packet_cut_anywhere_is_refused() {
    let mut packet = head(&[1, 2, 5], &[], 3 * 4096);
    packet.extend([0xaa; 3 * 4096]);
    for length in [1, 63, 1343, 1344, 1345, 1344 + 4096, packet.len() - 1] {
        let (answer, blocks) = answer_to(&packet[..length]);
        let error = answer.expect_err("cut");
        let (expected, found) = if length < 1344 { (1344, length) } else { (3 * 4096, length - 1344) };
        let cut = matches!(error.kind(), Error::Violation(Violation::Cut { expected: e, found: m, .. })
            if (*e, *m) == (expected, found as u64));
        assert!(cut, "{length}: {error}");
        let block = blocks.block(multifd::ram::BlockIndex(0)).expect("there");
        assert!(block.slice(PageIndex(6), 10).expect("there").is_zero(), "only listed pages change");
    }
}

#[test]
fn stale_heads_pages_in_a_sync_packet_and_empty_packets_are_taken() {
    let mut bytes = head(&[1], &[], 4096);
    bytes[11] = 1; // SYNC and a page, as sources up to 8.2 send it
    bytes.extend([0xaa; 4096]);
    let mut empty = head(&[1], &[], 4096);
    empty[16..20].fill(0); // no page, but everything else as it was
    bytes.extend(&empty);
    let (answer, blocks) = answer_to(&bytes);
    answer.expect("taken");
    let block = blocks.block(multifd::ram::BlockIndex(0)).expect("there");
    assert!(!block.slice(PageIndex(1), 1).expect("there").is_zero());
}

#[test]
fn channels_that_do_not_belong_are_refused() {
    let exact = || ReceiveOptions::new().channels(ChannelCount::Exact(2));
    let uuid = |text: &str| text.parse::<VmUuid>().expect("a UUID");
    let (ours, theirs) =
        (uuid("00112233-4455-6677-8899-aabbccddeeff"), uuid("ff112233-4455-6677-8899-aabbccddeeff"));

    let (receiver, connector, _) = destination(exact());
    let _link = open(&connector, VmUuid::NIL, 2);
    let error = receiver.sync().expect_err("id 2 of 2");
    assert!(matches!(error.kind(), Error::Violation(Violation::ChannelId { channels: 2, .. })), "{error}");

    let (receiver, connector, _) = destination(exact());
    let _links = [open(&connector, VmUuid::NIL, 1), open(&connector, VmUuid::NIL, 1)];
    let error = receiver.sync().expect_err("twice");
    assert!(
        matches!(error.kind(), Error::Violation(Violation::DuplicateChannel { id: ChannelId(1) })),
        "{error}"
    );
    assert!(error.to_string().starts_with("connection from memory: channel id 1"), "{error}");

    let (receiver, connector, _) = destination(exact().uuid(Some(ours)));
    let _link = open(&connector, theirs, 0);
    let error = receiver.sync().expect_err("a foreign machine");
    assert!(matches!(error.kind(), Error::Violation(Violation::ForeignUuid { .. })), "{error}");

    let (receiver, connector, _) = destination(ReceiveOptions::new());
    let _links = [open(&connector, ours, 0), open(&connector, theirs, 1)];
    assert!(matches!(
        receiver.sync().expect_err("two machines").kind(),
        Error::Violation(Violation::ForeignUuid { .. })
    ));

    let (receiver, connector, _) =
        destination(ReceiveOptions::new().channels_timeout(Duration::from_millis(50)));
    let _links = [open(&connector, ours, 0), open(&connector, ours, 2)];
    let error = receiver.sync().expect_err("a gap");
    assert!(error.to_string().starts_with("channel 1 is missing: 2 channels are connected"), "{error}");
}

#[test]
fn a_channel_that_comes_when_ram_has_moved_is_refused() {
    let (receiver, connector, _) = destination(ReceiveOptions::new());
    let mut first = open(&connector, VmUuid::NIL, 0);
    let mut buffer = HeadBuffer::new(PageSize::KIB_4);
    for _ in 0..2 {
        put(&mut *first, buffer.sync(0));
        receiver.sync().expect("passed");
    }
    let _late = open(&connector, VmUuid::NIL, 1);
    put(&mut *first, buffer.sync(0));
    // Nothing waits for a new channel at this point; only its refusal can end the next sync point.
    let error = receiver.sync().and_then(|()| receiver.sync()).expect_err("late");
    assert!(matches!(error.kind(), Error::Violation(Violation::LateChannel { .. })), "{error}");
}

#[test]
fn no_page_is_written_after_the_end_of_ram() {
    let (receiver, connector, blocks) =
        destination(ReceiveOptions::new().drain_timeout(Duration::from_millis(200)));
    let mut link = open(&connector, VmUuid::NIL, 0);
    let mut buffer = HeadBuffer::new(PageSize::KIB_4);
    put(&mut *link, buffer.sync(0));
    receiver.sync().expect("passed");
    receiver.seal().expect("sealed");
    put(&mut *link, &head(&[1], &[], 4096));
    put(&mut *link, &[0xaa; 4096]);
    let error = receiver.finish().expect_err("pages that may be newer than those kept");
    assert!(matches!(error.kind(), Error::Violation(Violation::PagesAfterEnd { pages: 1 })), "{error}");
    assert!(untouched(&blocks));
}

/// Sources of 9.1 and 9.2 send one more SYNC on every channel at the end, without a record on main.
#[test]
fn a_surplus_sync_at_the_end_is_taken() {
    let (receiver, connector, _) = destination(ReceiveOptions::new());
    let mut link = open(&connector, VmUuid::NIL, 0);
    let mut buffer = HeadBuffer::new(PageSize::KIB_4);
    put(&mut *link, buffer.sync(0));
    put(&mut *link, buffer.sync(1));
    link.close_send().expect("open");
    receiver.sync().expect("passed");
    receiver.seal().expect("sealed");
    assert_eq!(receiver.finish().expect("a good end")[0].packets, 2);
}

/// Regression: a gap was checked at the first sync point only, so a channel that connected later was forgotten.
#[test]
fn a_gap_that_opens_after_the_first_sync_point_is_seen() {
    let (receiver, connector, _) =
        destination(ReceiveOptions::new().channels_timeout(Duration::from_millis(50)));
    let mut first = open(&connector, VmUuid::NIL, 0);
    let mut buffer = HeadBuffer::new(PageSize::KIB_4);
    put(&mut *first, buffer.sync(0));
    receiver.sync().expect("passed");
    let _third = open(&connector, VmUuid::NIL, 2);
    put(&mut *first, buffer.sync(0));
    let error = receiver.sync().expect_err("a gap").to_string();
    assert!(error.starts_with("channel 1 is missing: 2 channels are connected"), "{error}");
}
