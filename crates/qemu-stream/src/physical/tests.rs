use std::sync::{Arc, atomic::AtomicU64};

use multifd::{
    channel::Stop,
    ram::{BlockIndex, BlockName, BlockOffset, PageIndex, PageSize},
};

use super::*;
use crate::{
    format::{
        BlockEntry, BlockList, Configuration, DevicePart, Event, MachineType, SectionId, SyncMark, SyncMode,
    },
    mapped_ram::StoredMachine,
    outgoing::EventWriter,
    stored::Unfold,
};

fn name(name: &str) -> BlockName {
    BlockName::new(name).expect("a name")
}

/// A machine with these blocks; of the first one, pages 1, 2 and 70 have data: their number in every byte.
fn machine(machine: &str, blocks: &[(&str, u64)]) -> StoredMachine {
    let configuration = Configuration::new(MachineType::new(machine).expect("a name"));
    let entries = blocks.iter().map(|(block, length)| BlockEntry::new(name(block), *length)).collect();
    let list = BlockList::new(entries, PageSize::KIB_4).expect("a list");
    let page = |page: u64| [u8::try_from(page).expect("small"); 4096];
    let (one, two, far) = (page(1), page(2), page(70));
    let page = |page, bytes| Event::Page { block: BlockIndex(0), page: PageIndex(page), bytes };
    let end = [Event::SyncPoint(SyncMark::Eos), Event::Eos, Event::SectionEnd { footer: true }];
    let mut events = vec![
        Event::Configuration(Some(&configuration)),
        Event::Blocks { section: SectionId(1), blocks: &list },
        Event::SyncMode(SyncMode::Legacy),
    ];
    events.extend(end.clone());
    events.extend([Event::Pass { last: true }, page(1, &one), page(2, &two), page(70, &far)]);
    events.extend(end);
    let devices = DevicePart::build(&[], 4096, SectionId(2)).expect("devices");
    events.extend([Event::EndOfRam, Event::End(Box::new(devices))]);
    let mut writer = EventWriter::new(Vec::new());
    events.iter().for_each(|event| writer.write(event).expect("written"));
    let scratch = Arc::new(tempfile::tempfile().expect("a scratch file"));
    let unfold = Unfold::new(&*writer.into_inner()).run(&scratch, &AtomicU64::new(0), &Stop::new());
    unfold.expect("a machine")
}

/// The ranges as address, offset, length.
fn ranges(map: &PhysicalMap) -> Vec<(u64, u64, u64)> {
    map.ranges().iter().map(|range| (range.start.0, range.offset.0, range.length)).collect()
}

const MIB: u64 = 1 << 20;

#[test]
fn ram_is_split_by_machine_type_and_size() {
    let four = 1 << 32;
    for (of, block, mib, expected) in [
        ("pc-q35-10.0", "pc.ram", 512, vec![(0, 0, 512 * MIB)]),
        ("pc-q35-10.0", "pc.ram", 2815, vec![(0, 0, 2815 * MIB)]),
        ("pc-q35-10.0", "pc.ram", 2816, vec![(0, 0, 2048 * MIB), (four, 2048 * MIB, 768 * MIB)]),
        ("pc-q35-2.4", "mem", 4096, vec![(0, 0, 2048 * MIB), (four, 2048 * MIB, 2048 * MIB)]),
        ("pc-i440fx-7.2", "pc.ram", 3583, vec![(0, 0, 3583 * MIB)]),
        ("pc-i440fx-7.2", "pc.ram", 3584, vec![(0, 0, 3072 * MIB), (four, 3072 * MIB, 512 * MIB)]),
        ("pc-i440fx-2.0", "pc.ram", 4096, vec![(0, 0, 3072 * MIB), (four, 3072 * MIB, 1024 * MIB)]),
        ("pc-i440fx-1.7", "pc.ram", 3584, vec![(0, 0, 3584 * MIB)]),
        ("pc-i440fx-1.7", "pc.ram", 4096, vec![(0, 0, 3584 * MIB), (four, 3584 * MIB, 512 * MIB)]),
        ("microvm", "microvm.ram", 4096, vec![(0, 0, 3072 * MIB), (four, 3072 * MIB, 1024 * MIB)]),
        ("virt-10.0", "mach-virt.ram", 4096, vec![(0x4000_0000, 0, 4096 * MIB)]),
        ("virt", "riscv_virt_board.ram", 512, vec![(0x8000_0000, 0, 512 * MIB)]),
        ("s390-ccw-virtio-10.0", "s390.ram", 4096, vec![(0, 0, 4096 * MIB)]),
        ("pseries-10.0", "ppc_spapr.ram", 4096, vec![(0, 0, 4096 * MIB)]),
    ] {
        let machine = machine(of, &[(block, mib * MIB), ("pc.bios", 256 << 10)]);
        let map = PhysicalMap::of(&machine, &[]).expect(of);
        assert_eq!(ranges(&map), expected, "{of} {mib}");
        assert_eq!(map.total(), mib * MIB);
    }
}

#[test]
fn what_is_not_known_is_refused_and_can_be_placed() {
    let two = machine("pc-q35-10.0", &[("a", 384 * MIB), ("b", 128 * MIB)]);
    assert_eq!(PhysicalMap::of(&two, &[]), Err(BadPlace::Order("a, b".into())));
    let other = machine("my-vmm-1", &[("ram0", 2 * MIB)]);
    assert_eq!(PhysicalMap::of(&other, &[]), Err(BadPlace::Machine("my-vmm-1".into())));
    let huge = machine("pc-q35-10.0", &[("pc.ram", 2 << 40)]);
    assert_eq!(PhysicalMap::of(&huge, &[]), Err(BadPlace::Huge(2 << 40)));

    let at = |start, block: &str, offset, length| Place {
        start: PhysicalAddress(start),
        block: name(block),
        offset: BlockOffset(offset),
        length,
    };
    let map = PhysicalMap::of(&two, &[at(0, "b", 0, None), at(128 * MIB, "a", 0, None)]).expect("a map");
    assert_eq!(ranges(&map), [(0, 0, 128 * MIB), (128 * MIB, 0, 384 * MIB)]);
    // What is not placed is where the machine type has it.
    let dimm = machine("pc-q35-10.0", &[("pc.ram", 512 * MIB), ("dimm", 128 * MIB)]);
    let map = PhysicalMap::of(&dimm, &[at(1 << 32, "dimm", MIB, Some(MIB))]).expect("a map");
    assert_eq!(ranges(&map), [(0, 0, 512 * MIB), (1 << 32, MIB, MIB)]);

    for (place, expected) in [
        (at(0, "dimm", 0, None), "two blocks are at this address"),
        (at(511 * MIB, "dimm", 0, None), "two blocks are at this address"),
        (at(1 << 32, "dim", 0, None), "no block is called"),
        (at(1 << 32, "dimm", 0, Some(129 * MIB)), "is not in block"),
        (at(1 << 32, "dimm", 128 * MIB, None), "is not in block"),
        (at(1 << 32, "dimm", u64::MAX, None), "is not in block"),
        (at(!0xfff, "dimm", 0, None), "is not in block"),
        (at((1 << 32) + 1, "dimm", 0, None), "does not begin or end with a page"),
    ] {
        let refused = PhysicalMap::of(&dimm, &[place]).expect_err(expected);
        assert!(refused.to_string().contains(expected), "{refused}");
    }
}

#[test]
fn addresses_are_found_and_ranges_are_cut() {
    let machine = machine("pc-q35-10.0", &[("pc.ram", 3072 * MIB)]);
    let map = PhysicalMap::of(&machine, &[]).expect("a map");
    let found = |address| map.find(PhysicalAddress(address)).map(|range| range.start.0);
    assert_eq!((found(0), found(0x7fff_ffff), found(0x8000_0000)), (Some(0), Some(0), None));
    assert_eq!(
        (found(1 << 32), found(0x1_3fff_ffff), found(0x1_4000_0000)),
        (Some(1 << 32), Some(1 << 32), None)
    );
    let cut = |start, length| -> Vec<_> {
        let pieces = map.pieces(PhysicalAddress(start), length);
        pieces.map(|piece| (piece.start.0, piece.offset.0, piece.length)).collect()
    };
    assert_eq!(cut(0x7fff_fff0, 0x20), [(0x7fff_fff0, 0x7fff_fff0, 0x10)]);
    assert_eq!(
        cut(0x7fff_fff0, 1 << 33),
        [(0x7fff_fff0, 0x7fff_fff0, 0x10), (1 << 32, 0x8000_0000, 1 << 30)]
    );
    assert_eq!(cut(0x8000_0000, 0x1000), []);
    assert_eq!(cut(0, 0), []);
    assert_eq!(cut(u64::MAX, u64::MAX), []);
}

#[test]
fn memory_is_read_at_any_address_and_absent_pages_are_zero() {
    let machine = machine("pc-q35-10.0", &[("pc.ram", 3072 * MIB)]);
    let map = PhysicalMap::of(&machine, &[]).expect("a map");
    let memory = PhysicalMemory::new(&machine, map).expect("memory");
    let mut bytes = vec![9; 3 * 4096 + 2];
    memory.read(PhysicalAddress(4095), &mut bytes).expect("RAM");
    let expected = [vec![0; 1], vec![1; 4096], vec![2; 4096], vec![0; 4096], vec![0; 1]].concat();
    assert!(bytes == expected);
    memory.read(PhysicalAddress(0x1_3fff_ffff), &mut [0]).expect("the last byte");
    for (start, length, missing) in [
        (0x7fff_ffff, 2, "0x80000000"),
        (0x8000_0000, 1, "0x80000000"),
        (0x1_3fff_ffff, 2, "0x140000000"),
        (u64::MAX, 1, "0xffffffffffffffff"),
    ] {
        let refused = memory.read(PhysicalAddress(start), &mut vec![0; length]).expect_err("no RAM");
        assert_eq!(refused.kind(), std::io::ErrorKind::AddrNotAvailable);
        assert!(refused.to_string().ends_with(missing), "{refused}");
    }
}

#[test]
fn present_pieces_are_runs_of_pages_with_data() {
    let machine = machine("pc-q35-10.0", &[("pc.ram", 3072 * MIB)]);
    let map = PhysicalMap::of(&machine, &[]).expect("a map");
    let memory = PhysicalMemory::new(&machine, map.clone()).expect("memory");
    let present = |range: &PhysicalRange, most| -> Vec<_> {
        memory.present(range, most).map(|piece| (piece.start.0 / 4096, piece.length / 4096)).collect()
    };
    let [low, high] = map.ranges() else { panic!("{map:?}") };
    assert_eq!(present(low, 1 << 20), [(1, 2), (70, 1)]);
    assert_eq!(present(low, 1), [(1, 1), (2, 1), (70, 1)]);
    assert_eq!(present(high, 1 << 20), []);
    let cut = map.pieces(PhysicalAddress(2 * 4096), 68 * 4096).next().expect("RAM");
    assert_eq!(present(&cut, 1 << 20), [(2, 1)]);
}
