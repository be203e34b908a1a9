//! Each call, with real faults.

use std::thread;

use guest_ram::{
    Access, Armed, BlockOffset, FaultEvent, FaultKind, Features, Mapping, Modes, PageIndex, PlaceEnd, Placed,
    Protection,
};
use rustix::fs::MemfdFlags;

use crate::kit::{self, Access1, BLOCK, pattern};

fn fault(offset: u64, kind: FaultKind, write: bool) -> FaultEvent {
    FaultEvent::Fault { block: BLOCK, offset: BlockOffset(offset), kind, write, thread: None }
}

fn all(bytes: u64) -> Placed {
    Placed { bytes, end: PlaceEnd::All }
}

#[test]
fn missing_pages_of_each_kind_of_memory_are_placed_with_bytes_or_zeros() {
    for kind in kit::kinds(4) {
        let Some(userfault) = kit::open(Features::NONE) else { return };
        let (blocks, host_page) = (&kind.blocks, kind.host_page);
        let armed = Armed::arm_empty(userfault, blocks.clone()).expect("armed");
        let region = armed.region(BLOCK).expect("armed");
        assert_eq!(
            (region.host_page, region.shape().host_page),
            (host_page, host_page >> 12),
            "{}",
            kind.name
        );
        // The last page of the second host page.
        let page = ((2 * host_page) >> 12) - 1;
        let reader = kit::reader(blocks, page);
        assert_eq!(kit::events(&armed), [fault(host_page, FaultKind::Missing, false)], "{}", kind.name);
        assert!(reader.is_waiting());
        let bytes = vec![pattern(page); usize::try_from(host_page).expect("small")];
        let copy =
            |at: u64| armed.copy(BLOCK, BlockOffset(at), &bytes, Protection::Writable).expect("a result");
        assert_eq!(copy(host_page), all(host_page));
        assert_eq!(reader.result(), [pattern(page); 4096]);
        assert_eq!(copy(host_page), Placed { bytes: 0, end: PlaceEnd::Exists });

        let reader = kit::reader(blocks, 0);
        assert_eq!(kit::events(&armed), [fault(0, FaultKind::Missing, false)]);
        // The second page exists: the first is placed, and where it stopped is reported.
        let zero =
            |at: u64, pages: u64| armed.zero(BLOCK, BlockOffset(at), pages * host_page).expect("a result");
        assert_eq!(zero(0, 2), Placed { bytes: host_page, end: PlaceEnd::Exists }, "{}", kind.name);
        assert_eq!(reader.result(), [0; 4096]);
        assert_eq!(zero(2 * host_page, 2), all(2 * host_page), "{}", kind.name);
        assert_eq!(kit::read_page(blocks, (3 * host_page) >> 12), [0; 4096]);
        assert!(armed.copy(BLOCK, BlockOffset(1), &bytes, Protection::Writable).is_err());
        assert!(armed.copy(BLOCK, BlockOffset(4 * host_page), &bytes, Protection::Writable).is_err());
    }
}

#[test]
fn an_end_of_the_armament_releases_waiting_threads_and_another_can_begin() {
    let blocks = kit::anonymous(4);
    for _ in 0..2 {
        let Some(userfault) = kit::open(Features::NONE) else { return };
        let armed = Armed::arm_empty(userfault, blocks.clone()).expect("armed");
        // Untouched pages do not count as zero now, and are asked for.
        assert!(blocks.block(BLOCK).expect("there").touched().is_none());
        let reader = kit::reader(&blocks, 3);
        assert_eq!(kit::events(&armed).len(), 1);
        drop(armed);
        assert_eq!(reader.result(), [0; 4096]);
        let touched = blocks.block(BLOCK).expect("there").touched().expect("known");
        assert_eq!(touched.count(), 0, "the page of zeros does not count");
    }
}

/// Regression: a page that was only read is the page of zeros, which does not count as touched, and caused no fault.
#[test]
fn pages_of_zeros_that_exist_are_missing_when_the_memory_is_armed() {
    for kind in kit::kinds(2) {
        // Shared memory in pages of the usual size counts as touched.
        if kind.name == "shared" {
            continue;
        }
        assert_eq!(kit::read_page(&kind.blocks, 0), [0; 4096]);
        let Some(userfault) = kit::open(Features::NONE) else { return };
        let armed = Armed::arm_empty(userfault, kind.blocks.clone()).expect("armed");
        let reader = kit::reader(&kind.blocks, 0);
        assert_eq!(kit::events(&armed), [fault(0, FaultKind::Missing, false)], "{}", kind.name);
        drop(armed);
        reader.result();
    }
}

#[test]
fn a_poisoned_page_fails_the_access_that_waits_and_later_ones() {
    for kind in kit::kinds(2) {
        let Some(userfault) = kit::open(Features::POISON) else { return };
        let armed = Armed::arm_empty(userfault, kind.blocks.clone()).expect("armed");
        let blocks = kind.blocks.clone();
        let reader = thread::spawn(move || kit::peek(&blocks, 0).is_err());
        assert_eq!(kit::events(&armed).len(), 1);
        assert_eq!(
            armed.poison(BLOCK, BlockOffset(0), kind.host_page).expect("poisoned"),
            all(kind.host_page)
        );
        assert!(reader.join().expect("no panic"), "{}", kind.name);
        drop(armed);
        assert!(kit::peek(&kind.blocks, 0).is_err(), "{}: poison stays", kind.name);
        assert_eq!(kit::peek(&kind.blocks, kind.host_page >> 12).expect("zero"), [0; 64]);
    }
}

#[test]
fn writes_to_protected_pages_wait_whether_the_pages_exist_or_not() {
    for kind in kit::kinds(2) {
        let Some(userfault) = kit::open(Features::PROTECT | Features::PROTECT_UNPOPULATED) else { return };
        let (blocks, host_page) = (&kind.blocks, kind.host_page);
        kit::page_of(blocks, 0).copy_from(&[7; 4096]);
        let armed = Armed::arm(userfault, blocks.clone(), Modes::WRITES).expect("armed");
        let protect = |at: u64, len, how| armed.protect(BLOCK, BlockOffset(at), len, how).expect("a result");
        assert_eq!(protect(0, 2 * host_page, Protection::Protected), all(2 * host_page));
        assert_eq!(kit::read_page(blocks, 0), [7; 4096]);
        for (offset, before) in [(0, 7), (host_page, 0)] {
            let page = offset >> 12;
            let writes = blocks.clone();
            let writer = Access1::start(move || {
                kit::page_of(&writes, page).copy_from(&[9; 4096]);
                [9; 4096]
            });
            let found = kit::events(&armed);
            assert_eq!(found, [fault(offset, FaultKind::Protected, true)], "{}", kind.name);
            assert!(writer.is_waiting());
            assert_eq!(kit::read_page(blocks, page), [before; 4096]);
            assert_eq!(protect(offset, host_page, Protection::Writable), all(host_page));
            assert_eq!(writer.result(), [9; 4096]);
            assert_eq!(kit::read_page(blocks, page), [9; 4096]);
        }
    }
}

/// Regression: the kernel itself wakes only threads that wait for missing pages, so a writer waited without end.
#[test]
fn an_end_of_the_armament_releases_writers() {
    for kind in kit::kinds(1) {
        let Some(userfault) = kit::open(Features::PROTECT | Features::PROTECT_UNPOPULATED) else { return };
        let armed = Armed::arm(userfault, kind.blocks.clone(), Modes::WRITES).expect("armed");
        armed.protect(BLOCK, BlockOffset(0), kind.host_page, Protection::Protected).expect("protected");
        let writes = kind.blocks.clone();
        let writer = Access1::start(move || {
            kit::page_of(&writes, 0).copy_from(&[9; 4096]);
            [9; 4096]
        });
        kit::readable(&armed);
        assert!(writer.is_waiting());
        drop(armed);
        assert_eq!(writer.result(), [9; 4096], "{}", kind.name);
    }
}

#[test]
fn pages_that_are_placed_protected_are_written_after_a_second_fault() {
    let Some(userfault) = kit::open(Features::PROTECT) else { return };
    let blocks = kit::anonymous(1);
    let armed = Armed::arm(userfault, blocks.clone(), Modes::MISSING | Modes::WRITES).expect("armed");
    let writes = blocks.clone();
    let writer = Access1::start(move || {
        kit::page_of(&writes, 0).copy_from(&[9; 4096]);
        [9; 4096]
    });
    assert_eq!(kit::events(&armed), [fault(0, FaultKind::Missing, true)]);
    armed.copy(BLOCK, BlockOffset(0), &[5; 4096], Protection::Protected).expect("placed");
    assert_eq!(kit::events(&armed), [fault(0, FaultKind::Protected, true)]);
    assert_eq!(kit::read_page(&blocks, 0), [5; 4096]);
    armed.protect(BLOCK, BlockOffset(0), 4096, Protection::Writable).expect("released");
    assert_eq!(writer.result(), [9; 4096]);
}

#[test]
fn pages_that_are_filled_through_a_second_mapping_are_resumed() {
    let len = 2 << 12;
    let file = kit::memfd(len, MemfdFlags::empty()).expect("a memfd");
    let Some(userfault) = kit::open(Features::MINOR_SHMEM) else { return };
    let map = || Mapping::of_file(&file, 0, len, Access::ReadWrite).expect("mapped");
    let (blocks, second) = (kit::blocks(len, map()), map());
    let armed = Armed::arm(userfault, blocks.clone(), Modes::MISSING | Modes::MINOR).expect("armed");
    second.slice(4096, 4096).expect("inside").copy_from(&[3; 4096]);
    let reader = kit::reader(&blocks, 1);
    assert_eq!(kit::events(&armed), [fault(4096, FaultKind::Minor, false)]);
    assert_eq!(armed.resume(BLOCK, BlockOffset(4096), 4096).expect("mapped"), all(4096));
    assert_eq!(reader.result(), [3; 4096]);
    let missing = armed.resume(BLOCK, BlockOffset(0), 4096).expect("a result");
    assert_eq!(missing, Placed { bytes: 0, end: PlaceEnd::Gone });
}

#[test]
fn memory_that_is_discarded_is_reported_and_nothing_is_placed_before_that_was_read() {
    let Some(userfault) = kit::open(Features::REMOVED) else { return };
    let blocks = kit::anonymous(8);
    let armed = Armed::arm_empty(userfault, blocks.clone()).expect("armed");
    let place = |page: u64| {
        armed.copy(BLOCK, BlockOffset(page << 12), &[1; 4096], Protection::Writable).expect("a result")
    };
    assert_eq!(place(2), all(4096));
    let discards = blocks.clone();
    let balloon = thread::spawn(move || kit::discard(&discards, 1, 3, libc::MADV_DONTNEED));
    kit::readable(&armed);
    assert_eq!(place(4), Placed { bytes: 0, end: PlaceEnd::Changing });
    let expected = FaultEvent::Removed { block: BLOCK, offset: BlockOffset(4096), len: 3 << 12 };
    assert_eq!(kit::events(&armed), [expected]);
    balloon.join().expect("no panic");
    assert_eq!(place(4), all(4096));
    let reader = kit::reader(&blocks, 2);
    assert_eq!(kit::events(&armed), [fault(2 << 12, FaultKind::Missing, false)]);
    armed.zero(BLOCK, BlockOffset(2 << 12), 4096).expect("placed");
    assert_eq!(reader.result(), [0; 4096]);
}

#[test]
fn memory_that_was_replaced_is_gone() {
    let Some(userfault) = kit::open(Features::NONE) else { return };
    let blocks = kit::anonymous(3);
    let armed = Armed::arm_empty(userfault, blocks.clone()).expect("armed");
    kit::map_over(&blocks, 1);
    let bytes = [1; 3 << 12];
    let placed = armed.copy(BLOCK, BlockOffset(0), &bytes, Protection::Writable).expect("a result");
    assert_eq!(placed.end, PlaceEnd::Gone);
    let whole = armed.copy(BLOCK, BlockOffset(2 << 12), &bytes[..4096], Protection::Writable);
    assert_eq!(whole.expect("a result"), all(4096));
    assert_eq!(kit::read_page(&blocks, 1), [0; 4096]);
    assert!(blocks.block(BLOCK).expect("there").slice(PageIndex(0), 3).is_some());
}
