use proptest::prelude::*;

use super::*;
use crate::format::testing::{assert_cut_is_refused, block_name, dump, reader};

fn decoded(bytes: &[u8], ignore_shared: bool) -> Result<BlockList, Error> {
    BlockList::decode(&mut reader(bytes), PageSize::KIB_4, ignore_shared)
}

fn list(blocks: &[(&str, u64)]) -> Result<BlockList, Usage> {
    let entries = blocks.iter().map(|(name, length)| BlockEntry::new(block_name(name), *length)).collect();
    BlockList::new(entries, PageSize::KIB_4)
}

/// The entry of pc.ram captured from QEMU 10.0.2, with a total for this block only.
#[test]
fn the_list_is_what_qemu_writes() {
    let golden = dump("00 00 00 00 06 00 00 04 06 \"pc.ram\" 00 00 00 00 06 00 00 00");
    let list = list(&[("pc.ram", 96 << 20)]).unwrap();
    let mut out = Vec::new();
    list.encode(false, &mut out);
    assert_eq!(out, golden);
    assert_eq!(decoded(&golden, false).unwrap(), list);
    assert_cut_is_refused(&golden, &[], |r| BlockList::decode(r, PageSize::KIB_4, false));
}

/// The entries captured from QEMU 7.2.22 and 10.0.2 with x-ignore-shared on.
#[test]
fn addresses_are_there_with_x_ignore_shared() {
    let golden = dump(
        "00 00 00 00 06 04 00 04
         06 \"pc.ram\" 00 00 00 00 06 00 00 00  00 00 00 00 00 00 00 00
         07 \"pc.bios\" 00 00 00 00 00 04 00 00  00 00 00 00 ff fc 00 00",
    );
    let list = decoded(&golden, true).unwrap();
    let addresses: Vec<Option<u64>> = list.entries().iter().map(|entry| entry.address).collect();
    assert_eq!(addresses, [Some(0), Some(0xfffc_0000)]);
    assert_eq!(list.total(), (96 << 20) + (256 << 10));
    let mut out = Vec::new();
    list.encode(true, &mut out);
    assert_eq!(out, golden);
}

#[test]
fn hostile_lists_are_refused() {
    for (case, bytes) in [
        ("no MEM_SIZE", "00 00 00 00 00 00 10 08"),
        ("flags beside MEM_SIZE", "00 00 00 00 00 00 10 0c"),
        ("total above the bound", "00 00 40 00 00 00 10 04"),
        ("block longer than the total", "00 00 00 00 00 00 10 04 01 \"a\" 00 00 00 00 00 00 20 00"),
        ("half a page", "00 00 00 00 00 00 10 04 01 \"a\" 00 00 00 00 00 00 08 00"),
        ("no name", "00 00 00 00 00 00 10 04 00 00 00 00 00 00 00 10 00"),
        (
            "one name twice",
            "00 00 00 00 00 00 20 04 01 \"a\" 00 00 00 00 00 00 10 00 01 \"a\" 00 00 00 00 00 00 10 00",
        ),
    ] {
        let error = decoded(&dump(bytes), false).unwrap_err();
        assert!(matches!(error, Error::Malformed { .. } | Error::Violation { .. }), "{case}: {error}");
    }
}

/// Empty blocks do not count towards the total, so only the bound ends the list.
#[test]
fn endless_empty_blocks_are_refused_at_the_bound() {
    let mut bytes = dump("00 00 00 00 00 00 10 04");
    for number in 0..=limits::BLOCKS {
        BlockEntry::new(block_name(&number.to_string()), 0).encode(false, &mut bytes);
    }
    let error = decoded(&bytes, false).unwrap_err();
    assert!(matches!(error, Error::Malformed { what: Malformed::TooLong { .. }, .. }), "{error}");
}

#[test]
fn as_many_blocks_as_allowed_are_read() {
    let entries = (0..limits::BLOCKS).map(|i| BlockEntry::new(block_name(&i.to_string()), 0x1000)).collect();
    let list = BlockList::new(entries, PageSize::KIB_4).unwrap();
    let mut bytes = Vec::new();
    list.encode(false, &mut bytes);
    assert_eq!(decoded(&bytes, false).unwrap(), list);
}

#[test]
fn a_list_that_no_reader_could_read_cannot_be_made() {
    assert!(list(&[("a", 0x1000), ("a", 0x1000)]).is_err());
    assert!(list(&[("a", 0x1800)]).is_err());
    assert!(list(&[("a", limits::RAM_TOTAL)]).is_ok());
    assert!(list(&[("a", limits::RAM_TOTAL), ("b", 0x1000)]).is_err());
    assert!(list(&[("a", 0), ("b", 0x1000)]).is_ok());
    assert!(list(&[("b", 0x1000), ("a", 0)]).is_err());
    assert!(list(&[]).is_ok());
    let many = (0..=limits::BLOCKS).map(|i| BlockEntry::new(block_name(&i.to_string()), 0x1000)).collect();
    assert!(BlockList::new(many, PageSize::KIB_4).is_err());
}

#[test]
fn pages_end_with_their_block() {
    let list = list(&[("a", 0x2000)]).unwrap();
    assert_eq!(list.offset_of(BlockIndex(0), PageIndex(1)), Some(BlockOffset(0x1000)));
    assert_eq!(list.offset_of(BlockIndex(0), PageIndex(2)), None);
    assert_eq!(list.offset_of(BlockIndex(1), PageIndex(0)), None);
}

proptest! {
    #[test]
    fn a_list_reads_back_as_written(
        lengths in proptest::collection::vec(1_u64..1 << 20, 0..50), ignore_shared: bool,
    ) {
        let entries = lengths.iter().enumerate().map(|(i, pages)| BlockEntry {
            name: block_name(&i.to_string()),
            used_length: pages << 12,
            address: ignore_shared.then_some(*pages),
        });
        let list = BlockList::new(entries.collect(), PageSize::KIB_4).unwrap();
        let mut bytes = Vec::new();
        list.encode(ignore_shared, &mut bytes);
        prop_assert_eq!(decoded(&bytes, ignore_shared).unwrap(), list);
    }

    #[test]
    fn random_bytes_never_panic(noise in proptest::collection::vec(any::<u8>(), 0..600), ignore_shared: bool) {
        let _ = decoded(&[&[0, 0, 0, 0, 1, 0, 0, 4][..], &noise].concat(), ignore_shared);
    }
}
