use proptest::prelude::*;

use super::*;
use crate::format::testing::{assert_cut_is_refused, block_name, dump, reader};

fn decoded(bytes: &[u8], ignore_shared: bool) -> Result<BlockList, Error> {
    BlockList::decode(&mut reader(bytes), PageSize::KIB_4, ignore_shared, false)
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
    assert_cut_is_refused(&golden, &[], |r| BlockList::decode(r, PageSize::KIB_4, false, false));
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

/// The order of fields that QEMU 11.1.3 was seen to send; it sends host page sizes of 2 MiB blocks only.
const ADVISED: &str = "00 00 00 00 01 20 00 04
     02 \"m0\" 00 00 00 00 01 00 00 00  00 00 00 00 00 20 00 00
     03 \"rom\" 00 00 00 00 00 20 00 00";

fn advised(bytes: &[u8]) -> Result<(BlockList, Option<u8>), Error> {
    let mut r = reader(bytes);
    let list = BlockList::decode(&mut r, PageSize::KIB_4, false, true)?;
    Ok((list, r.peek()?))
}

#[test]
fn host_page_sizes_are_read_after_postcopy_advise() {
    let golden = dump(ADVISED);
    for rest in ["", "00 00 00 00 00 00 00 10", "00 00 00 00 00 00 02 00", "7e 00"] {
        let (list, next) = advised(&[golden.clone(), dump(rest)].concat()).unwrap();
        let sizes: Vec<Option<u64>> = list.entries().iter().map(|entry| entry.host_page_size).collect();
        assert_eq!(sizes, [Some(2 << 20), None]);
        assert_eq!(next, dump(rest).first().copied());
        let mut out = Vec::new();
        list.encode(false, &mut out);
        assert_eq!(out, golden);
    }
    assert!(decoded(&golden, false).is_err(), "without POSTCOPY_ADVISE it is no list");
}

/// Behind the last block only the value distinguishes a host page size from a record.
#[test]
fn a_host_page_size_of_the_last_block_is_read() {
    let golden = dump("00 00 00 00 01 00 00 04 02 \"m0\" 00 00 00 00 01 00 00 00 00 00 00 00 00 20 00 00");
    let (list, next) = advised(&[&golden[..], &[0, 0, 0, 0, 0, 0, 0, 0x10]].concat()).unwrap();
    assert_eq!(list.entries()[0].host_page_size, Some(2 << 20));
    assert_eq!(next, Some(0));
    let mut out = Vec::new();
    list.encode(false, &mut out);
    assert_eq!(out, golden);
}

#[test]
fn hostile_host_page_sizes_are_refused() {
    for (case, size) in [("no power of two", 0x30_0000), ("more than the bound", limits::HOST_PAGE * 2)] {
        let mut bytes = dump("00 00 00 00 00 00 10 04 01 \"a\" 00 00 00 00 00 00 10 00");
        bytes.put_u64(size);
        let error = advised(&bytes).unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{case}: {error}");
        let entry = BlockEntry { host_page_size: Some(size), ..BlockEntry::new(block_name("a"), 0x1000) };
        assert!(BlockList::new(vec![entry], PageSize::KIB_4).is_err(), "{case}");
    }
    // Between two blocks nothing else begins with 0.
    let small = "00 00 00 00 00 00 20 04 01 \"a\" 00 00 00 00 00 00 10 00 00 00 00 00 00 00 08 00";
    assert!(matches!(advised(&dump(small)), Err(Error::Malformed { .. })));
    let most =
        BlockEntry { host_page_size: Some(limits::HOST_PAGE), ..BlockEntry::new(block_name("a"), 0x1000) };
    assert!(BlockList::new(vec![most], PageSize::KIB_4).is_ok());
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
            host_page_size: None,
        });
        let list = BlockList::new(entries.collect(), PageSize::KIB_4).unwrap();
        let mut bytes = Vec::new();
        list.encode(ignore_shared, &mut bytes);
        prop_assert_eq!(decoded(&bytes, ignore_shared).unwrap(), list);
    }

    #[test]
    fn a_list_with_host_page_sizes_reads_back_as_written(
        blocks in proptest::collection::vec((1_u64..1 << 20, proptest::option::of(12_u32..40)), 1..50), flush: bool,
    ) {
        let entries = blocks.iter().enumerate().map(|(i, (pages, shift))| BlockEntry {
            host_page_size: shift.map(|shift| 1 << shift),
            ..BlockEntry::new(block_name(&i.to_string()), pages << 12)
        });
        let list = BlockList::new(entries.collect(), PageSize::KIB_4).unwrap();
        let mut bytes = Vec::new();
        list.encode(false, &mut bytes);
        bytes.put_u64(if flush { 0x200 } else { 0x10 });
        prop_assert_eq!(advised(&bytes).unwrap(), (list, Some(0)));
    }

    #[test]
    fn random_bytes_never_panic(noise in proptest::collection::vec(any::<u8>(), 0..600), ignore_shared: bool) {
        let bytes = [&[0, 0, 0, 0, 1, 0, 0, 4][..], &noise].concat();
        let _ = decoded(&bytes, ignore_shared);
        let _ = advised(&bytes);
    }
}
