//! A whole channel, from its initial packet to its end: no byte outside the one listed block changes, all threads end.
#![no_main]

use std::sync::Arc;

use multifd::{
    ReceiveOptions, Receiver,
    channel::{Context, Link, Stop, memory},
    ram::{BlockName, Mapping, Memory, PageIndex, PageSize, RamBlock, RamBlocks},
    wire::{ChannelId, Initial, VmUuid},
};
use multifd_fuzz::shown;

const RAM: u64 = 64 << 10;

multifd_fuzz::target!(|bytes: &[u8]| {
    let block = |name: &str| {
        let memory = Memory::Mapped(Mapping::anonymous(RAM).expect("memory"));
        RamBlock::new(BlockName::new(name).expect("a name"), RAM, PageSize::KIB_4, memory).expect("a block")
    };
    let blocks = Arc::new(RamBlocks::new(vec![block("ram"), block("guard")]).expect("two blocks"));
    let receiver = Receiver::new(ReceiveOptions::new(), Stop::new());
    receiver.set_blocks(blocks.clone()).expect("the first time");
    let context = Context::new(&Stop::new());
    let (mut near, far) = memory::pair(bytes.len() + 64, &context, &context);
    let initial = Initial { uuid: VmUuid::NIL, id: ChannelId(0) }.encode();
    near.send(&[initial[..].into(), bytes.into()]).expect("there is room");
    near.close_send().expect("open");
    receiver.add(Box::new(far));
    // Main goes on as long as the channel does.
    while shown(receiver.sync()).is_some() {}
    drop(receiver);
    if !bytes.windows(5).any(|name| name == b"guard") {
        let guard = blocks.iter().nth(1).expect("two").1;
        assert!(guard.slice(PageIndex(0), guard.pages()).expect("mapped").is_zero());
    }
});
