//! Calls with values that a caller can make and that nothing fits: an error or an empty result, never a panic. Calls whose
//! documentation lists panics are not here.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use multifd::{
    ReceiveOptions, Receiver, SendOptions, Sender,
    channel::{Stop, memory},
    ram::{Access, BlockIndex, BlockOffset, DirtyBitmaps, Mapping, PageBitmap, PageIndex, PageSize, Places},
};

use crate::kit::fresh;

/// The name of the call, if it panics.
fn panics<T>(name: &'static str, call: impl FnOnce() -> T) -> Option<&'static str> {
    catch_unwind(AssertUnwindSafe(|| drop(call()))).is_err().then_some(name)
}

const FAR: PageIndex = PageIndex(u64::MAX);
const NONE: BlockIndex = BlockIndex(usize::MAX);

#[test]
fn memory_and_bitmaps_take_any_value() {
    let blocks = fresh(PageSize::KIB_4, &[("ram", 1 << 16)]);
    let block = blocks.block(BlockIndex(0)).expect("there");
    let (bits, dirty) = (PageBitmap::new(100), DirtyBitmaps::new(&blocks));
    let file = tempfile::tempfile().expect("a file");
    let mapping = Mapping::anonymous(1 << 16).expect("memory");
    let size = PageSize::KIB_64;
    let found: Vec<_> = [
        panics("RamBlocks::block", || blocks.block(NONE).is_err()),
        panics("RamBlock::offset_of", || block.offset_of(FAR)),
        panics("RamBlock::slice", || assert!(block.slice(FAR, u64::MAX).is_none())),
        panics("RamBlock::slice", || assert!(block.slice(PageIndex(1), u64::MAX).is_none())),
        panics("RamBlock::present_word", || assert_eq!(block.present_word(usize::MAX), 0)),
        panics("RamBlock::is_present", || block.is_present(FAR)),
        panics("RamBlock::is_zero", || block.is_zero(FAR)),
        panics("RamBlock::note_written", || block.note_written(FAR, u64::MAX)),
        panics("RamBlock::inaccessible", || block.inaccessible(FAR, u64::MAX)),
        panics("PageBitmap::word_at", || assert_eq!(bits.word_at(usize::MAX), 0)),
        panics("PageBitmap::merge_at", || bits.merge_at(usize::MAX, [u64::MAX])),
        panics("DirtyBitmaps::is_marked", || dirty.is_marked(NONE, FAR)),
        panics("DirtyBitmaps::count", || dirty.count(NONE)),
        panics("Mapping::anonymous", || assert!(Mapping::anonymous(u64::MAX).is_err())),
        panics("Mapping::of_file", || assert!(Mapping::of_file(&file, u64::MAX, 1, Access::Read).is_err())),
        panics("Mapping::of_file", || {
            assert!(Mapping::of_file(&file, 0, u64::MAX, Access::Read).is_err());
        }),
        panics("Mapping::slice", || assert!(mapping.slice(u64::MAX, usize::MAX).is_none())),
        panics("Places::map", || {
            let file = Arc::new(file.try_clone().expect("one more"));
            Places::new(file, u64::MAX, PageBitmap::new(1)).map(u64::MAX).is_err()
        }),
        panics("PageSize::offset_of", || assert!(size.offset_of(FAR).is_none())),
        panics("PageSize::page_at", || size.page_at(BlockOffset(u64::MAX))),
        panics("PageSize::pages_in", || size.pages_in(u64::MAX)),
    ]
    .into_iter()
    .flatten()
    .collect();
    assert!(found.is_empty(), "{found:?}");
}

#[test]
fn both_ends_refuse_blocks_and_pages_that_do_not_exist() {
    let blocks = fresh(PageSize::KIB_4, &[("ram", 1 << 16)]);
    let (connector, listener) = memory::network(1 << 16);
    let mut receiver = Receiver::new(ReceiveOptions::new(), Stop::new());
    receiver.listen(Box::new(listener)).expect("listening");
    receiver.set_blocks(blocks.clone()).expect("set");
    let mut sender = Sender::new(SendOptions::new(), blocks.clone(), Stop::new()).expect("made");
    sender.set_up(Arc::new(connector)).expect("set up");
    let arrived = receiver.arrived().expect("set");
    let mut page = [0; 4096];
    let mut found = Vec::new();
    for (block, first, count) in [
        (NONE, PageIndex(0), 1),
        (BlockIndex(0), FAR, 1),
        (BlockIndex(0), FAR, u64::MAX),
        (BlockIndex(0), PageIndex(1), u64::MAX),
    ] {
        found.push(panics("queue_run", || sender.queue_run(block, first, count).expect_err("none")));
        found
            .push(panics("queue_zero_run", || sender.queue_zero_run(block, first, count).expect_err("none")));
        found.push(panics("queue_unknown_run", || {
            sender.queue_unknown_run(block, first, count).expect_err("none")
        }));
        if first != PageIndex(1) {
            found.push(panics("queue", || sender.queue(block, first).expect_err("none")));
            found.push(panics("clear", || arrived.clear(block, first).expect_err("none")));
            found.push(panics("store", || arrived.store(block, first, &page).expect_err("none")));
            found.push(panics("load", || arrived.load(block, first, &mut page).expect_err("none")));
        }
    }
    found.push(panics("store", || arrived.store(BlockIndex(0), PageIndex(0), &[]).is_err()));
    found.push(panics("load", || arrived.load(BlockIndex(0), PageIndex(0), &mut []).is_err()));
    found.push(panics("count", || arrived.count(NONE)));
    found.push(panics("is_untouched", || arrived.is_untouched(NONE)));
    let found: Vec<_> = found.into_iter().flatten().collect();
    assert!(found.is_empty(), "{found:?}");
}
