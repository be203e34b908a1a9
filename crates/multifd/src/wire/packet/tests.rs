use proptest::prelude::*;

use super::*;
use crate::wire::limits::MAX_PACKET_PAGES;

const FOUR: PageSize = PageSize::KIB_4;

fn name(text: &str) -> BlockName {
    BlockName::new(text).expect("a name")
}

/// Written by QEMU 7.2.22 with zlib: 128 pages, 360229 bytes of payload, packet 2.
fn golden_7_2_zlib() -> Vec<u8> {
    let mut bytes = vec![
        0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0,
        0x80, // magic, version, zlib, pages_alloc
        0, 0, 0, 0x80, 0, 0x05, 0x7f, 0x25, 0, 0, 0, 0, 0, 0, 0, 2, // 128 pages, payload, packet_num
    ];
    bytes.resize(64, 0);
    bytes.extend(b"pc.ram");
    bytes.resize(320, 0);
    bytes.extend(0x6000_u64.to_be_bytes());
    bytes.extend((1..128_u64).flat_map(|n| (0xf000 + n * 0x1000).to_be_bytes()));
    bytes
}

/// Written by QEMU 7.2.22 with zlib: a SYNC packet with remains of earlier packets.
fn golden_7_2_sync() -> Vec<u8> {
    let mut bytes = vec![
        0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0,
        0x80, // magic, version, SYNC, pages_alloc
        0, 0, 0, 0, 0, 0x01, 0x20, 0x1e, 0, 0, 0, 0, 0, 0, 0, 9, // stale next_packet_size, packet_num 9
    ];
    bytes.resize(64, 0);
    bytes.extend(b"pc.ram");
    bytes.resize(320, 0);
    bytes.resize(1344, 0xee);
    bytes
}

/// Written by QEMU 10.0.2 with a machine type of 10.0: 10 normal and 118 zero pages.
fn golden_10_0_mixed() -> Vec<u8> {
    let mut bytes = vec![
        0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0,
        0x80, // magic, version, no flags, pages_alloc
        0, 0, 0, 0x0a, 0, 0, 0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 2, // 10 normal, 40960 bytes, packet_num 2
        0, 0, 0, 0x76, // 118 zero
    ];
    bytes.resize(64, 0);
    bytes.extend(b"pc.ram");
    bytes.resize(320, 0);
    bytes.extend((0..128_u64).flat_map(|n| (n * 0x1000).to_be_bytes()));
    bytes
}

/// Written by QEMU 10.0.2: a SYNC packet, zero after the flags except for packet_num 1.
fn golden_10_0_sync() -> Vec<u8> {
    let mut bytes = vec![0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1, 0, 0, 0, 1];
    bytes.resize(31, 0);
    bytes.push(1);
    bytes.resize(1344, 0);
    bytes
}

#[test]
fn heads_of_qemu_7_2_are_read() {
    let bytes = golden_7_2_zlib();
    let packet = Packet::decode(&bytes, FOUR).expect("valid");
    assert_eq!((packet.flags, packet.packet_num, packet.payload_len), (Flags(2), 2, 360_229));
    assert_eq!(packet.block, b"pc.ram");
    assert_eq!(packet.normal().take(3).collect::<Vec<_>>(), [PageIndex(6), PageIndex(16), PageIndex(17)]);
    assert_eq!((packet.normal().len(), packet.zero().len()), (128, 0));
}

#[test]
fn stale_fields_of_a_packet_without_pages_are_ignored() {
    let bytes = golden_7_2_sync();
    let packet = Packet::decode(&bytes, FOUR).expect("valid");
    assert!(packet.is_sync() && !packet.lists_pages());
    assert_eq!((packet.payload_len, packet.packet_num, packet.block), (0, 9, &b""[..]));
}

#[test]
fn heads_of_qemu_10_0_are_read_and_written_to_the_byte() {
    let bytes = golden_10_0_mixed();
    let packet = Packet::decode(&bytes, FOUR).expect("valid");
    let (normal, zero): (Vec<_>, Vec<_>) = (packet.normal().collect(), packet.zero().collect());
    assert_eq!((normal.len(), zero.len(), packet.payload_len), (10, 118, 40_960));
    let mut buffer = HeadBuffer::new(FOUR);
    assert_eq!(buffer.pages(Flags::default(), 2, &name("pc.ram"), &normal, &zero, 40_960), bytes);
    assert_eq!(buffer.sync(1), golden_10_0_sync(), "nothing of the packet before remains");
}

#[test]
fn a_head_has_room_for_every_page_of_its_size() {
    let lengths = [FOUR, PageSize::KIB_16, PageSize::KIB_64].map(head_len);
    assert_eq!(lengths, [1344, 320 + 8 * 32, 320 + 8 * 8]);
}

/// The refusal of a valid head after `field` was written at `offset`.
fn refusal(offset: usize, field: &[u8]) -> String {
    let mut bytes = golden_10_0_mixed();
    bytes[offset..offset + field.len()].copy_from_slice(field);
    Packet::decode(&bytes, FOUR).expect_err("refused").to_string()
}

#[test]
fn every_wrong_field_is_refused_with_its_reason() {
    let cases: [(usize, &[u8], &str); 11] = [
        (0, &[0x51], "expected magic 0x11223344, found 0x51223344"),
        (7, &[2], "expected version 1, found 2"),
        (
            12,
            &[0, 0, 0, 129],
            "pages_alloc 129 is above the 128 pages of a packet: is the page size the same on both sides?",
        ),
        (12, &[0, 0, 0, 9], "10 normal pages are more than pages_alloc 9"),
        (16, &[0, 0, 0, 129], "129 normal pages are more than pages_alloc 128"),
        (16, &[0, 0, 0, 11], "11 normal and 118 zero pages are more than pages_alloc 128"),
        (32, &[0xff; 4], "10 normal and 4294967295 zero pages are more than pages_alloc 128"),
        (64, &[0], "the packet lists pages, but names no block"),
        (326, &[0x02, 0x00], "offset 0x200 is not a multiple of the page size 4 KiB"),
        (11, &[0x80], "packet flags 0x80 include 0x80, which this version does not support"),
        (11, &[0x40], "device-state packet: expected a device id of 1 to 255 bytes, ended by NUL"),
    ];
    for (offset, field, text) in cases {
        assert_eq!(refusal(offset, field), text);
    }
}

#[test]
fn a_name_without_nul_ends_at_byte_255() {
    let mut bytes = golden_10_0_mixed();
    bytes[64..320].fill(b'n');
    assert_eq!(Packet::decode(&bytes, FOUR).expect("valid").block, [b'n'; 255]);
}

#[test]
fn a_head_of_another_length_is_refused() {
    for length in [0, 319, 320, 1343, 1345, 1352] {
        let bytes = vec![0x11; length];
        let refused = Packet::decode(&bytes, FOUR).expect_err("refused");
        assert_eq!(refused.to_string(), format!("expected 1344 bytes, found {length}"));
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(
        bits in prop::sample::select(vec![12_u32, 14, 16]),
        pages in prop::collection::vec(0_u64..1 << 47, 1..=MAX_PACKET_PAGES),
        split: prop::sample::Index,
        name_bytes in prop::collection::vec(1_u8.., 1..=255),
        packet_num: u64,
        method in prop::sample::select(vec![0_u32, 2, 4, 0x20]),
    ) {
        let page_size = PageSize::from_bits(bits).expect("a page size");
        let pages: Vec<PageIndex> = pages.into_iter().take(packet_pages(page_size)).map(PageIndex).collect();
        let (normal, zero) = pages.split_at(split.index(pages.len() + 1));
        let name = BlockName::new(name_bytes).expect("a name");
        let mut buffer = HeadBuffer::new(page_size);
        buffer.bytes.fill(0xaa);
        buffer.used = packet_pages(page_size);
        let bytes = buffer.pages(Flags(method), packet_num, &name, normal, zero, 77).to_vec();
        let packet = Packet::decode(&bytes, page_size).expect("valid");
        prop_assert_eq!(packet.flags, Flags(method));
        prop_assert_eq!(packet.packet_num, packet_num);
        prop_assert_eq!(packet.block, name.as_bytes());
        prop_assert_eq!(packet.normal().collect::<Vec<_>>(), normal);
        prop_assert_eq!(packet.zero().collect::<Vec<_>>(), zero);
        prop_assert_eq!(packet.payload_len, if normal.is_empty() { 0 } else { 77 });
        prop_assert!(bytes[36..64].iter().all(|byte| *byte == 0), "reserved bytes are zero");
        prop_assert!(bytes[64 + name.as_bytes().len()..320].iter().all(|byte| *byte == 0));
        prop_assert!(bytes[320 + 8 * pages.len()..].iter().all(|byte| *byte == 0), "no old offsets");
    }

    #[test]
    fn random_bytes_are_a_packet_or_an_error(mut bytes in prop::collection::vec(any::<u8>(), 1344), fix: bool) {
        if fix {
            bytes[..8].copy_from_slice(&[0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1]);
            bytes[8..12].fill(0);
        }
        if let Ok(packet) = Packet::decode(&bytes, FOUR) {
            prop_assert!(packet.normal().len() + packet.zero().len() <= MAX_PACKET_PAGES);
        }
    }
}
