//! Models of both sides at once, with all their threads: [`Sender`] and [`Receiver`] over connections in memory.
//!
//! The main stream is a byte for each sync point, and one back at the end.

use std::sync::Arc;

use crate::{
    ChannelCount, ReceiveOptions, Receiver, SendOptions, Sender,
    channel::{Context, Link, Stop, memory},
    error::{Error, Result, Violation},
    ram::{BlockIndex, BlockName, Mapping, Memory, PageIndex, PageSize, RamBlock, RamBlocks},
    sync_types::model::{Thread, thread},
};

const PAGE: PageSize = PageSize::KIB_4;
const CHANNELS: u8 = 2;
const ROUNDS: u8 = 2;
/// Less than a packet, so that the sender must wait for the receiver.
const ROOM: usize = 1 << 11;

/// Two blocks, so that there are batches for both channels.
fn two_blocks() -> Arc<RamBlocks> {
    let block = |name| {
        let length = PAGE.bytes() as u64;
        let memory = Memory::Mapped(Mapping::anonymous(length).expect("memory"));
        RamBlock::new(BlockName::new(name).expect("a name"), length, PAGE, memory).expect("a block")
    };
    Arc::new(RamBlocks::new(["a", "b"].map(block).into()).expect("distinct"))
}

fn contents(blocks: &RamBlocks) -> [u8; 2] {
    [0, 1].map(|index| {
        let mut page = vec![0; PAGE.bytes()];
        let block = blocks.block(BlockIndex(index)).expect("there");
        block.slice(PageIndex(0), 1).expect("there").copy_to(&mut page);
        page[0]
    })
}

/// The source: each round changes every page, and sends it.
fn source(mut main: memory::MemoryLink, connector: memory::MemoryConnector, stop: Stop) -> Result<()> {
    let _watch = stop.watch_failure(main.waker());
    let blocks = two_blocks();
    let mut sender = Sender::new(SendOptions::new().channels(CHANNELS), blocks.clone(), stop)?;
    sender.set_up(Arc::new(connector))?;
    sender.wait_connected()?;
    for round in 1..=ROUNDS {
        for index in [0, 1].map(BlockIndex) {
            let stored = blocks.block(index)?.store(PageIndex(0), &[round; PAGE.bytes()]);
            stored.map_err(|error| Error::io("store", error))?;
            sender.queue(index, PageIndex(0))?;
        }
        sender.sync()?;
        main.send(&[[round][..].into()]).map_err(|error| Error::io("send", error))?;
    }
    hear(&mut main)?;
    sender.finish().map(drop)
}

/// The destination, which is given the number of channels or detects it.
fn destination(
    mut main: memory::MemoryLink,
    listener: memory::MemoryListener,
    stop: Stop,
    channels: ChannelCount,
) -> Result<()> {
    let _watch = stop.watch_failure(main.waker());
    let blocks = two_blocks();
    let mut receiver = Receiver::new(ReceiveOptions::new().channels(channels), stop);
    receiver.listen(Box::new(listener))?;
    receiver.set_blocks(blocks.clone())?;
    for round in 1..=ROUNDS {
        assert_eq!(hear(&mut main)?, round);
        receiver.sync()?;
        assert!(contents(&blocks).iter().all(|found| *found >= round));
    }
    receiver.seal()?;
    assert_eq!(contents(&blocks), [ROUNDS; 2]);
    main.send(&[[1][..].into()]).map_err(|error| Error::io("send", error))?;
    receiver.finish().map(drop)
}

fn hear(main: &mut memory::MemoryLink) -> Result<u8> {
    let mut byte = [0; 1];
    match main.recv(&mut [byte[..].as_mut().into()]) {
        Ok(1) => Ok(byte[0]),
        Ok(_) => Err(Violation::Cut { what: "the main stream", expected: 1, found: 0 }.into()),
        Err(error) => Err(Error::io("receive", error)),
    }
}

/// Both sides, with their stops.
struct Sides {
    source: Thread<Result<()>>,
    destination: Thread<Result<()>>,
    stops: [Stop; 2],
}

fn begin(channels: ChannelCount) -> Sides {
    let (connector, listener) = memory::network(ROOM);
    let stops = [Stop::new(), Stop::new()];
    let [near, far] = [0, 1].map(|side: usize| Context::new(&stops[side]));
    let (near, far) = memory::pair(ROOM, &near, &far);
    let [ours, theirs] = stops.clone();
    Sides {
        source: thread::spawn(move || source(near, connector, ours)),
        destination: thread::spawn(move || destination(far, listener, theirs, channels)),
        stops,
    }
}

fn both(channels: ChannelCount) {
    let sides = begin(channels);
    sides.source.join().expect("no panic").expect("a good end");
    sides.destination.join().expect("no panic").expect("a good end");
}

/// The number of channels is known.
pub fn what_the_source_has_synced_the_destination_has() {
    both(ChannelCount::Exact(CHANNELS));
}

/// The number of channels is not configured.
pub fn the_destination_learns_the_number_of_channels() {
    both(ChannelCount::Auto);
}

fn cancelled(side: usize) {
    let sides = begin(ChannelCount::Auto);
    sides.stops[side].cancel();
    let outcomes = [sides.source.join(), sides.destination.join()].map(|side| side.expect("no panic"));
    if let Some(error) = sides.stops[side].error() {
        assert!(error.is_cancelled());
        assert!(outcomes[side].is_err());
    }
}

/// At any time.
pub fn a_cancel_at_the_source_ends_both_sides() {
    cancelled(0);
}

/// At any time.
pub fn a_cancel_at_the_destination_ends_both_sides() {
    cancelled(1);
}
