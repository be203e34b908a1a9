//! Models of the receiving side: main, the acceptor and the channels wait for each other.
//!
//! Each is run under many schedules by the package `multifd-models`; see `docs/develop/concurrency.md`. The receiver is the
//! real one, with all its threads, and so are the packets; the connections are in memory. Unless the model says otherwise,
//! a source's bytes have arrived before the receiver reads, as many as a source can send ahead.

use std::{
    io::Read,
    sync::{Arc, atomic::Ordering},
};

use super::{Receiver, decode::Listed, worker::Filling};
use crate::{
    channel::{Connect, Context, Link, Stop, Stream, Wake, memory},
    compress::Method,
    error::{Error, Result, Violation},
    options::{ChannelCount, ReceiveOptions},
    ram::{BlockIndex, BlockName, Mapping, Memory, PageIndex, PageSize, RamBlock, RamBlocks},
    sync_types::{
        AtomicU64, Condvar, Mutex,
        model::{let_time_run, thread},
    },
    wire::{ChannelId, HeadBuffer, Initial, VmUuid},
};

const PAGE: PageSize = PageSize::KIB_4;
/// Any bytes that a model's source sends.
const ROOM: usize = 1 << 16;

/// The source's end of a channel.
struct Channel(Box<dyn Link>);

impl Channel {
    /// Creates it with the end for the receiver.
    fn new(id: u8) -> (Self, Box<dyn Link>) {
        let context = Context::new(&Stop::new());
        let (near, far) = memory::pair(ROOM, &context, &context);
        let mut channel = Self(Box::new(near));
        channel.begin(id);
        (channel, Box::new(far))
    }

    fn begin(&mut self, id: u8) {
        self.send(&Initial { uuid: VmUuid::default(), id: ChannelId(id) }.encode());
    }

    fn sync(&mut self) {
        let bytes = HeadBuffer::new(PAGE).sync(0).to_vec();
        self.send(&bytes);
    }

    /// The block's first page, filled with `content`.
    fn page(&mut self, content: u8) {
        let mut head = HeadBuffer::new(PAGE);
        let length = u32::try_from(PAGE.bytes()).expect("small");
        let bytes = head.pages(Method::None.flags(), 0, &name(), &[PageIndex(0)], &[], length).to_vec();
        self.send(&bytes);
        self.send(&[content; PAGE.bytes()]);
    }

    /// After a stop nothing accepts it any more.
    fn send(&mut self, mut bytes: &[u8]) {
        while let (false, Ok(sent)) = (bytes.is_empty(), self.0.send(&[bytes.into()])) {
            bytes = &bytes[sent..];
        }
    }
}

fn name() -> BlockName {
    BlockName::new("ram").expect("a name")
}

fn one_block() -> Arc<RamBlocks> {
    let length = PAGE.bytes() as u64;
    let memory = Memory::Mapped(Mapping::anonymous(length).expect("memory"));
    let block = RamBlock::new(name(), length, PAGE, memory).expect("a block");
    Arc::new(RamBlocks::new(vec![block]).expect("distinct"))
}

/// The byte that the page is filled with.
fn content(blocks: &RamBlocks) -> u8 {
    let mut page = vec![0; PAGE.bytes()];
    let block = blocks.block(BlockIndex(0)).expect("there");
    block.slice(PageIndex(0), 1).expect("there").copy_to(&mut page);
    assert!(page.iter().all(|byte| *byte == page[0]), "a page is in place as a whole");
    page[0]
}

fn receiver(channels: ChannelCount) -> Receiver {
    Receiver::new(ReceiveOptions::new().channels(channels), Stop::new())
}

/// Both channels are as far ahead as possible, so only the sync points keep the page's versions in order.
pub fn an_older_page_is_never_placed_over_a_newer_one() {
    let blocks = one_block();
    let receiver = receiver(ChannelCount::Exact(2));
    let [(mut first, a), (mut second, b)] = [0, 1].map(Channel::new);
    first.page(1);
    first.sync();
    first.sync();
    first.page(3);
    first.sync();
    second.sync();
    second.page(2);
    second.sync();
    second.sync();
    receiver.add(a);
    receiver.add(b);
    // Channels wait for them.
    receiver.set_blocks(blocks.clone()).expect("first time");
    for point in 1..=3 {
        receiver.sync().expect("all channels come");
        assert!(content(&blocks) >= point);
    }
    receiver.seal().expect("nothing is sent any more");
    drop((first, second));
    receiver.finish().expect("a good end");
    assert_eq!(content(&blocks), 3);
}

/// One channel waits at the second point; the other has closed before it.
pub fn a_channel_that_has_ended_fails_the_sync_that_waits_for_it() {
    let receiver = receiver(ChannelCount::Exact(2));
    let [(mut first, a), (mut second, b)] = [0, 1].map(Channel::new);
    first.sync();
    first.sync();
    second.sync();
    receiver.add(a);
    receiver.add(b);
    let closing = thread::spawn(move || drop(second));
    receiver.set_page_size(PAGE).expect("first time");
    receiver.sync().expect("both channels come");
    let error = receiver.sync().expect_err("one has ended");
    assert!(matches!(error.kind(), Error::Violation(Violation::EndedEarly { expected: 2, found: 1 })));
    closing.join().expect("no panic");
    drop(receiver);
    drop(first);
}

/// A channel breaks with an older page and without its SYNC, after the source has asked for the first time. Nothing of it is placed
/// after the sync point.
pub fn a_channel_that_breaks_is_lost_and_its_pages_come_before_the_sync_point() {
    loses(|_, second| {
        let closing = thread::spawn(move || drop(second));
        move || {
            closing.join().expect("no panic");
            None
        }
    });
}

/// The same, but only the source knows that the channel is broken.
pub fn a_channel_that_the_source_has_lost_is_shut_down_before_the_sync_point() {
    loses(|receiver, second| {
        receiver.lose(ChannelId(1)).expect("it is not the last one");
        move || Some(second)
    });
}

fn loses<E: FnOnce() -> Option<Channel>>(how: impl FnOnce(&Receiver, Channel) -> E) {
    let blocks = one_block();
    let receiver = receiver(ChannelCount::Exact(2));
    let [(mut first, a), (mut second, b)] = [0, 1].map(Channel::new);
    first.sync();
    second.sync();
    receiver.add(a);
    receiver.add(b);
    receiver.set_blocks(blocks.clone()).expect("first time");
    receiver.sync().expect("both channels come");
    assert_eq!(receiver.round(), []);
    second.page(1);
    first.sync();
    first.page(2);
    first.sync();
    let end = how(&receiver, second);
    receiver.sync().expect("it does not wait for the lost one");
    assert_eq!(receiver.round(), [ChannelId(1)]);
    receiver.sync().expect("the other one comes");
    assert_eq!(content(&blocks), 2, "an old page was placed over a newer one");
    assert_eq!(receiver.round(), [ChannelId(1)]);
    receiver.seal().expect("nothing is sent any more");
    drop(first);
    receiver.finish().expect("a good end");
    drop(end());
}

/// A source whose number of channels is unknown: main's first record arrives after the connections.
fn connecting_source(connector: memory::MemoryConnector) -> thread::JoinHandle<Option<Vec<Channel>>> {
    thread::spawn(move || {
        // Refused, or cut: the receiver has been stopped.
        let context = Context::new(&Stop::new());
        let connect = || Some(Channel(connector.connect(&context).ok()?));
        let mut main = connect()?;
        main.send(b"QEVM");
        let mut channels = vec![connect()?, connect()?];
        main.send(&[1]);
        for (channel, id) in channels.iter_mut().zip(0..) {
            channel.begin(id);
            channel.sync();
        }
        channels.push(main);
        Some(channels)
    })
}

fn first_record(receiver: &Receiver) -> Result<()> {
    let mut main: Stream = receiver.wait_main()?;
    let mut seen = [0; 5];
    main.read_exact(&mut seen).map_err(|error| Error::io("receive", error))?;
    assert_eq!(&seen, b"QEVM\x01");
    receiver.set_page_size(PAGE)
}

/// The listener, the identification of connections and main at the same time.
pub fn main_counts_every_channel_that_was_connected_before_its_first_record() {
    let mut receiver = receiver(ChannelCount::Auto);
    let (connector, listener) = memory::network(ROOM);
    receiver.listen(Box::new(listener)).expect("first time");
    let source = connecting_source(connector);
    first_record(&receiver).expect("main comes");
    receiver.sync().expect("channels come");
    assert_eq!(receiver.channels(), 2);
    receiver.seal().expect("no pages");
    drop(source.join().expect("no panic"));
    receiver.finish().expect("a good end");
}

/// The same with a cancel at any time.
pub fn a_cancel_ends_acceptor_greetings_main_and_channels() {
    let mut receiver = receiver(ChannelCount::Auto);
    let (connector, listener) = memory::network(ROOM);
    receiver.listen(Box::new(listener)).expect("first time");
    let source = connecting_source(connector);
    let cancelling = thread::spawn({
        let stop = receiver.stop().clone();
        move || stop.cancel()
    });
    let outcome = first_record(&receiver).and_then(|()| receiver.sync()).and_then(|()| receiver.sync());
    assert!(outcome.is_err(), "the second SYNC never comes");
    assert!(receiver.stop().error().is_some_and(|error| error.is_cancelled()));
    drop(receiver);
    cancelling.join().expect("no panic");
    drop(source.join().expect("no panic"));
}

/// A source that ends before main has sent anything, at any time, and then another source.
pub fn a_source_that_dies_before_main_leaves_its_places_free() {
    let receiver = receiver(ChannelCount::Auto);
    let [(first, a), (second, b)] = [0, 1].map(Channel::new);
    receiver.add(a);
    receiver.add(b);
    let dying = thread::spawn(move || drop((first, second)));
    let shared = receiver.shared.clone();
    let mut state = shared.lock();
    while state.roster.connected() > 0 || !state.roster.unidentified.is_empty() {
        state = shared.wait(state);
    }
    drop(state);
    dying.join().expect("no panic");
    let context = Context::new(&Stop::new());
    let (near, far) = memory::pair(ROOM, &context, &context);
    let mut main = Channel(Box::new(near));
    main.send(b"QEVM\x01");
    receiver.add(Box::new(far));
    let links = [0, 1].map(|id| {
        let (mut channel, far) = Channel::new(id);
        channel.sync();
        receiver.add(far);
        channel
    });
    first_record(&receiver).expect("main comes");
    receiver.sync().expect("both channels come");
    assert_eq!(receiver.channels(), 2);
    receiver.seal().expect("no pages");
    drop((main, links));
    receiver.finish().expect("a good end");
}

/// Channel 1 sends an old version of the page, channel 0 a new one after the second point.
pub fn a_channel_that_comes_late_is_counted_or_fails_the_migration() {
    let blocks = one_block();
    let receiver = Arc::new(receiver(ChannelCount::Auto));
    let [(mut first, a), (mut second, b)] = [0, 1].map(Channel::new);
    first.sync();
    first.sync();
    first.page(2);
    first.sync();
    second.sync();
    second.page(1);
    second.sync();
    second.sync();
    receiver.add(a);
    receiver.set_blocks(blocks.clone()).expect("first time");
    let coming = thread::spawn({
        let receiver = receiver.clone();
        move || receiver.add(b)
    });
    let passed = (0..3).try_for_each(|_| receiver.sync());
    coming.join().expect("no panic");
    let sealed = passed.and_then(|()| receiver.seal());
    drop((first, second));
    let receiver = Arc::into_inner(receiver).expect("the other one is gone");
    match sealed.and_then(|()| receiver.finish()) {
        Ok(_) => assert_eq!(content(&blocks), 2),
        Err(error) => {
            assert!(matches!(error.kind(), Error::Violation(Violation::LateChannel { .. })), "{error}");
        }
    }
}

/// A packet arrives after the end, at any time.
pub fn no_page_is_written_behind_the_seal() {
    let blocks = one_block();
    let receiver = receiver(ChannelCount::Exact(1));
    let (mut channel, far) = Channel::new(0);
    channel.page(1);
    channel.sync();
    channel.page(2);
    receiver.add(far);
    receiver.set_blocks(blocks.clone()).expect("first time");
    receiver.sync().expect("the channel comes");
    let sealed = receiver.seal().map(|()| content(&blocks));
    drop(channel);
    let finished = receiver.finish();
    match sealed {
        Ok(found) => assert_eq!(content(&blocks), found),
        Err(error) => assert!(is_late(&error)),
    }
    if let Err(error) = finished {
        assert!(is_late(&error));
    }
}

fn is_late(error: &Error) -> bool {
    matches!(error.kind(), Error::Violation(Violation::PagesAfterEnd { .. }))
}

/// Only the seal and a channel's mark, in every possible order.
pub fn the_seal_meets_the_mark() {
    let receiver = receiver(ChannelCount::Exact(1));
    let shared = receiver.shared.clone();
    let page = Arc::new(AtomicU64::new(0));
    let filling = thread::spawn({
        let (shared, page) = (shared.clone(), page.clone());
        move || {
            Filling::begin(ChannelId(0), &shared, &Listed::new(PAGE))
                .map(|_mark| page.store(1, Ordering::SeqCst))
                .is_ok()
        }
    });
    let sealed = shared.seal().map(|()| page.load(Ordering::SeqCst));
    let filled = filling.join().expect("no panic");
    match sealed {
        Ok(found) => assert_eq!(page.load(Ordering::SeqCst), found),
        // Otherwise the model would test nothing.
        Err(_) => assert!(filled || shared.is_sealed()),
    }
}

/// The source closes its channels some time after the last sync point, one of them after an additional SYNC. No time
/// passes, so each close must be noticed.
/// so each close must be noticed.
pub fn the_end_waits_for_every_channel_to_close() {
    let receiver = receiver(ChannelCount::Exact(2));
    let [(mut first, a), (mut second, b)] = [0, 1].map(Channel::new);
    first.sync();
    first.sync();
    second.sync();
    receiver.add(a);
    receiver.add(b);
    receiver.set_page_size(PAGE).expect("first time");
    receiver.sync().expect("both channels come");
    let leaving = [first, second].map(|channel| thread::spawn(move || drop(channel)));
    receiver.finish().expect("a good end");
    for thread in leaving {
        thread.join().expect("no panic");
    }
}

/// With a running clock the migration ends as well.
pub fn channels_that_a_source_leaves_open_are_closed_from_here() {
    let_time_run();
    let receiver = receiver(ChannelCount::Exact(1));
    let (mut channel, far) = Channel::new(0);
    channel.sync();
    receiver.add(far);
    receiver.set_page_size(PAGE).expect("first time");
    if let Err(error) = receiver.sync().and_then(|()| receiver.finish()) {
        assert!(has_run_out(&error), "{error}");
    }
    drop(channel);
}

/// A thread that waits for the stop, without limit.
#[derive(Default)]
struct Stopped {
    stopped: Mutex<bool>,
    changed: Condvar,
}

impl Wake for Stopped {
    fn wake(&self) {
        *self.stopped.lock().expect("whole") = true;
        self.changed.notify_all();
    }
}

/// With a running clock, a wait for a peer that does not act fails, and all other waits are woken.
pub fn a_channel_that_main_never_joins_at_a_sync_point_gives_up() {
    let_time_run();
    let receiver = receiver(ChannelCount::Exact(1));
    let stopped = Arc::new(Stopped::default());
    let _watch = receiver.stop().watch(stopped.clone());
    let (mut channel, far) = Channel::new(0);
    channel.sync();
    receiver.add(far);
    receiver.set_page_size(PAGE).expect("first time");
    let mut is_stopped = stopped.stopped.lock().expect("whole");
    while !*is_stopped {
        is_stopped = stopped.changed.wait(is_stopped).expect("whole");
    }
    drop(is_stopped);
    let error = receiver.stop().error().expect("the channel has given up");
    assert!(matches!(error.kind(), Error::Stalled { .. }));
}

/// The wait that expired first: main's for all channels, one at a sync point, or that for a connection's first bytes.
fn has_run_out(error: &Error) -> bool {
    matches!(
        error.kind(),
        Error::Violation(Violation::ChannelCount { .. }) | Error::Stalled { .. } | Error::TimedOut { .. }
    )
}

/// Two channels are expected, one connects, and it waits at its SYNC.
pub fn a_sync_without_all_its_channels_gives_up() {
    let_time_run();
    let receiver = receiver(ChannelCount::Exact(2));
    let (mut channel, far) = Channel::new(0);
    channel.sync();
    receiver.add(far);
    receiver.set_page_size(PAGE).expect("first time");
    let error = receiver.sync().expect_err("one is missing");
    assert!(has_run_out(&error), "{error}");
    drop(receiver);
    drop(channel);
}

/// The channel is connected, and sends nothing.
pub fn a_sync_whose_channel_sends_nothing_gives_up() {
    let_time_run();
    let receiver = receiver(ChannelCount::Exact(1));
    let (channel, far) = Channel::new(0);
    receiver.add(far);
    receiver.set_page_size(PAGE).expect("first time");
    let error = receiver.sync().expect_err("no SYNC comes");
    assert!(has_run_out(&error), "{error}");
    drop(receiver);
    drop(channel);
}
