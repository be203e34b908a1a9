//! The bitmap that `vm-memory` keeps.

use guest_ram::{AtomicBitmapLog, PageSize, blocks_of};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, bitmap::AtomicBitmap};

use super::{MILLION, by_two_threads, follow, word};

#[test]
fn a_million_writes_through_vm_memory_are_all_found() {
    let bases = [0, 1 << 32];
    let ranges = [(GuestAddress(bases[0]), 4096 << 12), (GuestAddress(bases[1]), 101 << 12)];
    let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges).expect("memory");
    let blocks = blocks_of(&memory, PageSize::KIB_4).expect("blocks");
    let mut log = AtomicBitmapLog::new(&memory, &blocks).expect("a log");
    let found = follow(&mut log, &blocks, MILLION, |round| {
        by_two_threads(&blocks, |block, page| {
            let address = GuestAddress(bases[block.0] + (page.0 << 12));
            memory.write_slice(&word(round), address).expect("written");
        });
    });
    found.assert_whole();
}
