//! RAM into a file and out of it, with the channels of a sender that does not connect.

use std::{fs::File, sync::Arc};

use multifd::{
    SendOptions, Sender,
    channel::Stop,
    ram::{BlockIndex, BlockName, Memory, PageBitmap, PageIndex, Places, RamBlock, RamBlocks},
};

use crate::kit::{CHANNELS, PAGE_SIZE, PAGES};

/// The block of the kit in a file, with no page present.
pub(crate) fn in_file(file: &File) -> Arc<RamBlocks> {
    let length = PAGES * PAGE_SIZE.bytes() as u64;
    file.set_len(length).expect("sized");
    let file = Arc::new(file.try_clone().expect("a descriptor"));
    let memory = Memory::MappedRam(Places::new(file, 0, PageBitmap::new(PAGES)));
    let block = RamBlock::new(BlockName::new("ram").expect("a name"), length, PAGE_SIZE, memory);
    Arc::new(RamBlocks::new(vec![block.expect("a block")]).expect("one block"))
}

/// Copies all of one into the other.
pub(crate) fn copy(source: &Arc<RamBlocks>, target: &Arc<RamBlocks>) {
    let options = SendOptions::new().channels(CHANNELS);
    let mut sender = Sender::new(options, source.clone(), Stop::new()).expect("a sender");
    sender.set_up_into(target.clone()).expect("set up");
    sender.queue_run(BlockIndex(0), PageIndex(0), PAGES).expect("queued");
    sender.sync().expect("copied");
    sender.finish().expect("whole");
}
