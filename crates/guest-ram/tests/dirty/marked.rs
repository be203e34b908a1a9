//! Bitmaps that writers mark, alone and merged.

use std::sync::Arc;

use guest_ram::{BlockIndex, DirtyBitmaps, MergedLog, PageIndex, PageSize, RamBlocks};

use super::{Forgetful, MILLION, by_two_threads, follow, word};
use crate::kit;

fn blocks() -> Arc<RamBlocks> {
    kit::fresh(PageSize::KIB_4, &[("a", 4096 << 12), ("b", 100 << 12)])
}

fn write(blocks: &RamBlocks, block: BlockIndex, page: PageIndex, round: u64) {
    let mut bytes = [0; 4096];
    bytes[..8].copy_from_slice(&word(round));
    blocks.block(block).expect("there").slice(page, 1).expect("there").copy_from(&bytes);
}

#[test]
fn a_million_marked_writes_are_all_found() {
    let blocks = blocks();
    let log = DirtyBitmaps::new(&blocks);
    let found = follow(&mut log.reader().expect("alone"), &blocks, MILLION, |round| {
        by_two_threads(&blocks, |block, page| {
            write(&blocks, block, page, round);
            log.mark(block, page);
        });
    });
    found.assert_whole();
}

#[test]
fn one_lost_write_in_a_million_is_noticed() {
    let blocks = blocks();
    let log = DirtyBitmaps::new(&blocks);
    let mut forgetful = Forgetful { log: log.reader().expect("alone"), which: (MILLION / 2).into() };
    let found = follow(&mut forgetful, &blocks, MILLION, |round| {
        by_two_threads(&blocks, |block, page| {
            write(&blocks, block, page, round);
            log.mark(block, page);
        });
    });
    assert!(found.writes >= MILLION);
    assert_eq!(found.lost, 1, "{found:?}");
}

#[test]
fn a_million_writes_are_found_whichever_of_three_logs_has_them() {
    let blocks = blocks();
    let logs = [DirtyBitmaps::new(&blocks), DirtyBitmaps::new(&blocks), DirtyBitmaps::new(&blocks)];
    let [vcpus, disk, network] = logs.each_ref().map(|log| log.reader().expect("alone"));
    let mut merged = MergedLog::new().with("vcpus", vcpus).with("disk", disk).with("network", network);
    let found = follow(&mut merged, &blocks, MILLION, |round| {
        by_two_threads(&blocks, |block, page| {
            write(&blocks, block, page, round);
            logs[usize::try_from((page.0 + round) % 3).expect("small")].mark(block, page);
        });
    });
    found.assert_whole();
}
