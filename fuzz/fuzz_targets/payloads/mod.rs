//! A channel whose packets are packed: what the input says, as it stands or as edits of a good stream.
//!
//! An untouched stream must arrive to the byte. Of any other, no byte beside the pages listed may change, no thread
//! may stay, and nothing may panic.

use std::sync::Arc;

use multifd_fuzz::shown;

use multifd::{
    ChannelCount, Method, ReceiveOptions, Receiver,
    channel::{Context, Link, Stop, memory},
    ram::{BlockIndex, BlockName, Mapping, Memory, PageIndex, PageSize, RamBlock, RamBlocks},
    wire::{ChannelId, Flags, HeadBuffer, Initial, VmUuid},
};

const PAGE: usize = 4096;
const PAGES: u64 = 16;
const MOST_PACKETS: usize = 12;

/// One packet: so many pages from the first on, and the payload.
type Packet = (u64, Vec<u8>);

/// Plays `input` to a destination. `pack` packs as a source does: one stream, flushed.
pub fn play(input: &[u8], method: Method, flags: Flags, pack: impl FnMut(&[u8]) -> Vec<u8>) {
    let Some((kind, input)) = input.split_first() else { return };
    let (packets, expected) = if kind % 2 == 0 { (raw(input), None) } else { edited(input, pack) };
    let blocks = blocks();
    let options = ReceiveOptions::new().channels(ChannelCount::Exact(1));
    let receiver = Receiver::new(options.method((kind % 4 < 2).then_some(method)), Stop::new());
    receiver.set_blocks(blocks.clone()).expect("the first time");
    let stream = stream(&packets, flags);
    let context = Context::new(&Stop::new());
    let (mut near, far) = memory::pair(stream.len(), &context, &context);
    near.send(&[stream[..].into()]).expect("there is room");
    near.close_send().expect("open");
    receiver.add(Box::new(far));
    let taken = shown(receiver.sync());
    drop(receiver);
    let (listed, guard) = (block(&blocks, 0), block(&blocks, 1));
    assert!(guard.slice(PageIndex(0), PAGES).expect("whole").is_zero());
    if let Some(expected) = expected {
        taken.expect("nothing is wrong with it");
        let mut found = vec![0; expected.len()];
        let pages = (found.len() / PAGE) as u64;
        listed.slice(PageIndex(0), pages).expect("there").copy_to(&mut found);
        assert!(found == expected, "it arrived otherwise");
    }
}

/// The payloads as the input has them: pages, length, bytes.
fn raw(mut input: &[u8]) -> Vec<Packet> {
    let mut packets = Vec::new();
    while let ([pages, high, low, rest @ ..], true) = (input, packets.len() < MOST_PACKETS) {
        let length = usize::from(u16::from_be_bytes([*high, *low])).min(rest.len());
        let (payload, rest) = rest.split_at(length);
        packets.push((1 + u64::from(*pages) % PAGES, payload.to_vec()));
        input = rest;
    }
    packets
}

/// A good stream with bytes changed, and what memory holds at the end if none was.
fn edited(mut input: &[u8], mut pack: impl FnMut(&[u8]) -> Vec<u8>) -> (Vec<Packet>, Option<Vec<u8>>) {
    let (mut packets, mut whole, mut memory) = (Vec::new(), true, Vec::new());
    while let ([pages, step, edits, rest @ ..], true) = (input, packets.len() < MOST_PACKETS) {
        input = rest;
        let pages = 1 + u64::from(*pages) % PAGES;
        let bytes: Vec<u8> = (0..pages as usize * PAGE).map(|at| content(at, *step)).collect();
        let mut payload = pack(&bytes);
        if memory.len() < bytes.len() {
            memory.resize(bytes.len(), 0);
        }
        memory[..bytes.len()].copy_from_slice(&bytes);
        for _ in 0..edits % 4 {
            let [high, low, change, rest @ ..] = input else { break };
            input = rest;
            let at = usize::from(u16::from_be_bytes([*high, *low])) % payload.len();
            payload[at] ^= change;
            whole &= *change == 0;
        }
        packets.push((pages, payload));
    }
    (packets, whole.then_some(memory))
}

/// A quarter of a page that is hard to pack, the rest easy.
fn content(at: usize, step: u8) -> u8 {
    if at % PAGE < PAGE / 4 { (at.wrapping_mul(0x9e37_79b1) >> 13) as u8 ^ step } else { step }
}

fn stream(packets: &[Packet], flags: Flags) -> Vec<u8> {
    let name = BlockName::new("pc.ram").expect("a name");
    let mut head = HeadBuffer::new(PageSize::KIB_4);
    let mut stream = Initial { uuid: VmUuid::NIL, id: ChannelId(0) }.encode().to_vec();
    for (pages, payload) in packets {
        let normal: Vec<_> = (0..*pages).map(PageIndex).collect();
        let length = u32::try_from(payload.len()).expect("small");
        stream.extend(head.pages(flags, 0, &name, &normal, &[], length));
        stream.extend(payload);
    }
    stream.extend(head.sync(0));
    stream
}

fn blocks() -> Arc<RamBlocks> {
    let block = |name: &str| {
        let length = PAGES * PAGE as u64;
        let memory = Memory::Mapped(Mapping::anonymous(length).expect("memory"));
        RamBlock::new(BlockName::new(name).expect("a name"), length, PageSize::KIB_4, memory)
            .expect("a block")
    };
    Arc::new(RamBlocks::new(vec![block("pc.ram"), block("guard")]).expect("two blocks"))
}

fn block(blocks: &RamBlocks, index: usize) -> &RamBlock {
    blocks.block(BlockIndex(index)).expect("one of two")
}
