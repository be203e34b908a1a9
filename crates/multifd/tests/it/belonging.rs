//! Which channels belong to a migration: how many are expected, where they come from, and which ids are free.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{sleep, yield_now},
    time::{Duration, Instant},
};

use multifd::{
    ChannelCount, ChannelsFrom, ReceiveOptions, Receiver,
    channel::{Address, Connect, Context, Link, Listen, Listener, Stop, Stream, Wake, memory},
    error::{Error, Usage, Violation},
    ram::{BlockIndex, PageIndex, PageSize, RamBlocks},
    wire::{ChannelId, Flags, HeadBuffer, Initial, VmUuid},
};
use socket2::{Domain, Socket, Type};

use crate::kit::{TIMEOUT, context, fresh, name, spawn};

const SHORT: Duration = Duration::from_millis(100);

fn listening(options: ReceiveOptions) -> (Receiver, memory::MemoryConnector) {
    let (connector, listener) = memory::network(1 << 16);
    let mut receiver = Receiver::new(options, Stop::new());
    receiver.listen(Box::new(listener)).expect("listening");
    (receiver, connector)
}

/// A channel that has sent its first SYNC.
fn channel(connector: &dyn Connect, id: u8) -> Box<dyn Link> {
    let mut link = connector.connect(&context()).expect("connected");
    let initial = Initial { uuid: VmUuid::NIL, id: ChannelId(id) }.encode();
    link.send(&[initial[..].into()]).expect("sent");
    link.send(&[HeadBuffer::new(PageSize::KIB_4).sync(id.into()).into()]).expect("sent");
    link
}

#[test]
fn a_sync_point_waits_for_as_many_channels_as_were_announced() {
    let (receiver, connector) = listening(ReceiveOptions::new());
    receiver.set_page_size(PageSize::KIB_4).expect("set");
    receiver.expect_channels(3).expect("first time");
    receiver.expect_channels(3).expect("the same again");
    assert!(matches!(receiver.expect_channels(4), Err(Error::Usage(Usage::UsedTwice))));
    let _first = channel(&connector, 0);
    let late = spawn("late", move || {
        sleep(SHORT);
        [2, 1].map(|id| channel(&connector, id))
    });
    receiver.sync().expect("all come");
    assert_eq!(receiver.channels(), 3);
    drop(late.join().expect("no panic"));
}

#[test]
fn fewer_or_more_channels_than_were_announced_are_an_error_that_names_both_numbers() {
    let (receiver, connector) = listening(ReceiveOptions::new().channels_timeout(SHORT));
    receiver.expect_channels(3).expect("first time");
    let _first = channel(&connector, 1);
    let error = receiver.sync().expect_err("two are missing");
    let expected = Violation::TooFewChannels { announced: 3, found: 1 };
    assert!(matches!(error.kind(), Error::Violation(found) if *found == expected), "{error}");
    assert!(
        error.to_string().starts_with("the source announced 3 channels, but only 1 connected"),
        "{error}"
    );

    for known_before in [false, true] {
        let (receiver, connector) = listening(ReceiveOptions::new());
        receiver.set_page_size(PageSize::KIB_4).expect("set");
        if known_before {
            receiver.expect_channels(2).expect("first time");
        }
        let _links = [0, 1, 2].map(|id| channel(&connector, id));
        let error = if known_before {
            // It may send its identity when both are done.
            let _ = receiver.sync();
            loop {
                match receiver.stop().error() {
                    Some(error) => break error,
                    None => yield_now(),
                }
            }
        } else {
            while receiver.channels() < 3 {
                yield_now();
            }
            receiver.expect_channels(2).expect_err("one too many")
        };
        let expected = Violation::ChannelId { id: ChannelId(2), channels: 2 };
        assert!(matches!(error.kind(), Error::Violation(found) if *found == expected), "{error}");
    }
}

#[test]
fn an_announced_number_that_is_not_the_one_given_is_an_error_at_once() {
    for (given, announced) in [(2, 4), (0, 2), (2, 0)] {
        let receiver = Receiver::new(ReceiveOptions::new().channels(ChannelCount::Exact(given)), Stop::new());
        let error = receiver.expect_channels(announced).expect_err("another number");
        let text = format!(
            "the source announced {announced} channels, but multifd-channels is {given} on this side"
        );
        assert!(error.to_string().starts_with(&text), "{error}");
        assert!(receiver.sync().is_err(), "it has stopped the migration");
    }
    let receiver = Receiver::new(ReceiveOptions::new().channels(ChannelCount::Exact(2)), Stop::new());
    receiver.expect_channels(2).expect("the number given");
}

const HERE: Ipv4Addr = Ipv4Addr::LOCALHOST;
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

fn over_tcp(options: ReceiveOptions) -> (Receiver, SocketAddr) {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().expect("an address")).expect("listening");
    let Address::Tcp { port, .. } = listener.local_address().clone() else { unreachable!("bound above") };
    let mut receiver = Receiver::new(options, Stop::new());
    receiver.listen(Box::new(listener)).expect("listening");
    (receiver, (HERE, port).into())
}

fn connect(from: Ipv4Addr, to: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.bind(&SocketAddr::from((from, 0)).into()).expect("bound");
    socket.connect(&to.into()).expect("connected");
    socket.into()
}

/// A connection that identifies itself as channel `id`.
fn begin(from: Ipv4Addr, to: SocketAddr, id: u8) -> TcpStream {
    let mut link = connect(from, to);
    link.write_all(&Initial { uuid: VmUuid::NIL, id: ChannelId(id) }.encode()).expect("sent");
    link
}

/// Sends page `page` of the block, filled with `content`.
fn send_page(mut link: &TcpStream, page: u64, content: u8) {
    let mut head = HeadBuffer::new(PageSize::KIB_4);
    let flags = Flags::default();
    link.write_all(head.pages(flags, 0, &name("pc.ram"), &[PageIndex(page)], &[], 4096)).expect("sent");
    link.write_all(&[content; 4096]).expect("sent");
}

fn send_sync(mut link: &TcpStream) {
    link.write_all(HeadBuffer::new(PageSize::KIB_4).sync(0)).expect("sent");
}

fn first_byte(blocks: &RamBlocks, page: u64) -> u8 {
    let mut bytes = [0; 4096];
    let block = blocks.block(BlockIndex(0)).expect("there");
    block.slice(PageIndex(page), 1).expect("there").copy_to(&mut bytes);
    bytes[0]
}

fn wait_channels(receiver: &Receiver, channels: u16) {
    let begun = Instant::now();
    while receiver.channels() != channels {
        assert!(begun.elapsed() < TIMEOUT, "{} channels, not {channels}", receiver.channels());
        sleep(Duration::from_millis(1));
    }
}

/// A correct source of two channels, with a page on each; ends the migration normally.
fn migrate(receiver: Receiver, to: SocketAddr) {
    let mut main = connect(HERE, to);
    main.write_all(b"QEVM").expect("sent");
    let links = [0, 1].map(|id| begin(HERE, to, id));
    for (link, page) in links.iter().zip(0..) {
        send_page(link, page, 0xaa);
        send_sync(link);
    }
    let mut stream: Stream = receiver.wait_main().expect("main comes");
    stream.read_exact(&mut [0; 4]).expect("read");
    let blocks = fresh(PageSize::KIB_4, &[("pc.ram", 1 << 20)]);
    receiver.set_blocks(blocks.clone()).expect("first time");
    receiver.sync().expect("both channels come");
    receiver.seal().expect("the end of ram");
    drop(links);
    assert_eq!(receiver.finish().expect("a good end").len(), 2);
    assert_eq!([0, 1, 2].map(|page| first_byte(&blocks, page)), [0xaa, 0xaa, 0]);
}

/// Regression: the next source failed with `channel id 1 is already taken`.
#[test]
fn a_source_that_dies_before_its_first_byte_leaves_its_places_free() {
    for (channels, reset, synced) in [
        (ChannelCount::Auto, false, false),
        (ChannelCount::Exact(2), false, false),
        (ChannelCount::Auto, true, false),
        (ChannelCount::Auto, false, true),
    ] {
        let (receiver, to) = over_tcp(ReceiveOptions::new().channels(channels));
        let main = connect(HERE, to);
        // A channel of another machine; its UUID is forgotten with it.
        let uuid = "00112233-4455-6677-8899-aabbccddeeff".parse().expect("a UUID");
        let links = [0, 1].map(|id| {
            let mut link = connect(HERE, to);
            link.write_all(&Initial { uuid, id: ChannelId(id) }.encode()).expect("sent");
            if synced {
                link.write_all(&HeadBuffer::new(PageSize::KIB_4).sync(0)[..11]).expect("sent");
            }
            link
        });
        wait_channels(&receiver, 2);
        for link in links {
            let socket = Socket::from(link);
            if reset {
                socket.set_linger(Some(Duration::ZERO)).expect("set");
            }
        }
        drop(main);
        wait_channels(&receiver, 0);
        migrate(receiver, to);
    }
}

/// Regression: it was accepted as a channel of the migration, and its page overwrote the guest's.
#[test]
fn a_channel_from_another_host_than_main_is_dropped_and_its_id_stays_free() {
    for early in [true, false] {
        let (receiver, to) = over_tcp(ReceiveOptions::new());
        let strange = || {
            let stranger = begin(ELSEWHERE, to, 1);
            for page in [1, 2] {
                send_page(&stranger, page, 0x55);
            }
            send_sync(&stranger);
            stranger
        };
        let mut stranger = if early {
            let stranger = strange();
            wait_channels(&receiver, 1);
            stranger
        } else {
            // Main, and nothing else from this source.
            strange()
        };
        migrate(receiver, to);
        assert!(matches!(stranger.read(&mut [0]), Ok(0) | Err(_)), "it is dropped");
    }
}

#[test]
fn where_channels_may_come_from_can_be_chosen() {
    let hosts = |text: &str| text.parse::<ChannelsFrom>().expect("valid");
    for (from, admitted) in [
        (ChannelsFrom::MainHost, false),
        (ChannelsFrom::Any, true),
        (hosts("127.0.0.2"), true),
        (hosts("::1,::ffff:127.0.0.2"), true),
        (hosts("127.0.0.1"), false),
    ] {
        let options = ReceiveOptions::new()
            .channels(ChannelCount::Exact(1))
            .channels_timeout(SHORT)
            .channels_from(from.clone());
        let (receiver, to) = over_tcp(options);
        connect(HERE, to).write_all(b"QEVM").expect("sent");
        let _main = receiver.wait_main().expect("main comes");
        receiver.set_page_size(PageSize::KIB_4).expect("set");
        let link = begin(ELSEWHERE, to, 0);
        send_sync(&link);
        match receiver.sync() {
            Ok(()) => assert!(admitted, "{from}"),
            Err(error) => {
                assert!(!admitted, "{from}: {error}");
                let text = error.to_string();
                assert!(text.starts_with("1 connections of channels from other hosts"), "{text}");
                assert!(text.contains("expected 1 channels, 0 connected"), "{text}");
            }
        }
    }
    let nowhere = ReceiveOptions::new().channels_from(ChannelsFrom::Hosts(Vec::new()));
    let (_connector, listener) = memory::network(1 << 16);
    let refused = Receiver::new(nowhere, Stop::new()).listen(Box::new(listener)).expect_err("nowhere");
    assert!(matches!(refused, Error::Usage(Usage::ChannelsFrom { .. })), "{refused}");
    for text in ["", "host", "127.0.0.1,", "main,127.0.0.1"] {
        let refused = text.parse::<ChannelsFrom>();
        assert!(matches!(refused, Err(Usage::ChannelsFrom { .. })), "{text:?}");
    }
    for text in ["main", "any", "10.0.0.1,fe80::1"] {
        assert_eq!(hosts(text).to_string(), text);
    }
}

#[test]
fn a_channel_that_was_admitted_before_main_came_from_another_host_fails_the_migration() {
    let (receiver, to) = over_tcp(ReceiveOptions::new());
    receiver.set_page_size(PageSize::KIB_4).expect("set");
    let _stranger = begin(ELSEWHERE, to, 0);
    wait_channels(&receiver, 1);
    connect(HERE, to).write_all(b"QEVM").expect("sent");
    let error = receiver.wait_main().and_then(|_main| receiver.sync()).expect_err("a stranger");
    assert!(
        matches!(error.kind(), Error::Violation(Violation::ForeignChannel { id: ChannelId(0) })),
        "{error}"
    );
}

/// Regression: with `stall_timeout` off nothing ended this wait.
#[test]
fn channels_without_main_have_a_limit_always() {
    let options = ReceiveOptions::new().stall_timeout(None).greeting_timeout(SHORT).channels_timeout(SHORT);
    let (receiver, to) = over_tcp(options);
    let _links = [0, 1].map(|id| begin(HERE, to, id));
    let error = receiver.wait_main().expect_err("main never comes");
    assert!(matches!(error.kind(), Error::Stalled { .. }), "{error}");
    let expected = "2 channels have connected, but no main connection, and nothing was transferred on any connection for 200 ms: ";
    assert!(error.to_string().starts_with(expected), "{error}");
}

#[test]
fn a_channel_may_take_the_place_of_one_that_has_ended_without_a_packet() {
    let (receiver, to) = over_tcp(ReceiveOptions::new());
    connect(HERE, to).write_all(b"QEVM").expect("sent");
    let _main = receiver.wait_main().expect("main comes");
    receiver.set_page_size(PageSize::KIB_4).expect("set");
    receiver.expect_channels(1).expect("first time");
    let first = begin(HERE, to, 0);
    wait_channels(&receiver, 1);
    drop(first);
    wait_channels(&receiver, 0);
    let again = begin(HERE, to, 0);
    send_sync(&again);
    wait_channels(&receiver, 1);
    receiver.sync().expect("it is here");
}

/// A listener that loses a wake while nobody waits.
struct Forgetful {
    listener: memory::MemoryListener,
    waits: Arc<AtomicBool>,
}

struct IfWaiting(Arc<dyn Wake>, Arc<AtomicBool>);

impl Wake for IfWaiting {
    fn wake(&self) {
        if self.1.load(Ordering::SeqCst) {
            self.0.wake();
        }
    }
}

impl Listen for Forgetful {
    fn accept(&mut self, context: &Context) -> std::io::Result<Option<Box<dyn Link>>> {
        self.listener.accept(context)
    }
    fn accept_waiting(&mut self, context: &Context) -> std::io::Result<Option<Box<dyn Link>>> {
        self.listener.accept_waiting(context)
    }
    fn waker(&self) -> Arc<dyn Wake> {
        Arc::new(IfWaiting(self.listener.waker(), self.waits.clone()))
    }
    fn address(&self) -> String {
        "forgetful".into()
    }
}

/// Regression: main waited for such a listener without limit.
#[test]
fn a_listener_that_loses_a_wake_fails_the_first_sync_point() {
    let (_connector, listener) = memory::network(1 << 16);
    let waits = Arc::new(AtomicBool::new(false));
    let mut receiver = Receiver::new(ReceiveOptions::new().channels_timeout(4 * SHORT), Stop::new());
    receiver.listen(Box::new(Forgetful { listener, waits: waits.clone() })).expect("listening");
    // Reacts to the stop, so that the acceptor ends.
    let hears = spawn("hears", {
        let stop = receiver.stop().clone();
        move || {
            while !stop.is_stopped() {
                sleep(SHORT / 2);
                waits.store(true, Ordering::SeqCst);
            }
        }
    });
    let error = receiver.sync().expect_err("the acceptor does not come back");
    assert!(matches!(error.kind(), Error::TimedOut { .. }), "{error}");
    assert!(error.to_string().starts_with("the listener did not end its wait"), "{error}");
    hears.join().expect("no panic");
}

#[test]
fn a_source_with_multifd_on_whose_channels_do_not_come_is_refused_unless_none_are_expected() {
    let options = || ReceiveOptions::new().channels_timeout(SHORT);
    for channels in [ChannelCount::Auto, ChannelCount::Exact(0)] {
        let (receiver, _connector) = listening(options().channels(channels));
        receiver.expect_any_channels();
        match receiver.sync() {
            Ok(()) => assert_eq!(channels, ChannelCount::Exact(0)),
            Err(error) => {
                assert_eq!(channels, ChannelCount::Auto);
                assert!(matches!(error.kind(), Error::Violation(Violation::NoChannels)), "{error}");
            }
        }
    }
    let (receiver, connector) = listening(options().channels_timeout(TIMEOUT));
    receiver.set_page_size(PageSize::KIB_4).expect("set");
    receiver.expect_any_channels();
    let late = spawn("late", move || {
        sleep(SHORT);
        channel(&connector, 0)
    });
    receiver.sync().expect("it is waited for");
    late.join().expect("no panic");
}

/// A SYNC of this number.
fn number(link: &mut Box<dyn Link>, packet_num: u64) {
    link.send(&[HeadBuffer::new(PageSize::KIB_4).sync(packet_num).into()]).expect("sent");
}

#[test]
fn a_packet_that_no_channel_has_brought_fails_the_sync_point_where_numbers_are_exact() {
    for (exact, comes) in [(true, true), (true, false), (false, false)] {
        let (receiver, connector) = listening(ReceiveOptions::new().channels_timeout(3 * SHORT));
        receiver.set_page_size(PageSize::KIB_4).expect("set");
        if exact {
            receiver.expect_exact_packet_nums();
        }
        // The other channel got number 1.
        let mut first = channel(&connector, 0);
        receiver.sync().expect("nothing is missing");
        number(&mut first, 2);
        let late = spawn("late", move || {
            sleep(SHORT);
            comes.then(|| {
                let mut second = channel(&connector, 1);
                number(&mut second, 3);
                second
            })
        });
        match receiver.sync() {
            Ok(()) => assert!(!exact || comes),
            Err(error) => {
                assert!(exact && !comes, "{error}");
                let expected = Violation::MissingPackets { point: 2, greatest: 2, found: 2 };
                assert!(matches!(error.kind(), Error::Violation(found) if *found == expected), "{error}");
            }
        }
        late.join().expect("no panic");
    }
}

/// A destination waits for days if nobody limits it, and refused connections do not extend the limit.
#[test]
fn the_wait_for_a_source_ends_at_its_limits_and_says_which() {
    let (receiver, connector) = listening(ReceiveOptions::new().accept_timeout(Some(SHORT)));
    let mut stranger = connector.connect(&context()).expect("connected");
    stranger.send(&[[b'x'; 64][..].into()]).expect("sent");
    let error = receiver.wait_main().expect_err("nobody connects");
    assert!(matches!(error.kind(), Error::NoSource { limit, refused: 0 | 1 } if *limit == SHORT), "{error}");
    assert!(error.to_string().starts_with("no source has connected within 100 ms"), "{error}");

    let (receiver, connector) =
        listening(ReceiveOptions::new().accept_timeout(Some(TIMEOUT)).max_refused(Some(2)));
    let links = [0, 1].map(|_| {
        let mut link = connector.connect(&context()).expect("connected");
        link.send(&[[b'x'; 64][..].into()]).expect("sent");
        link
    });
    let error = receiver.wait_main().expect_err("both were refused");
    assert!(matches!(error.kind(), Error::TooManyRefused { refused: 2, .. }), "{error}");
    assert_eq!((receiver.counters().refused(), receiver.counters().has_main()), (2, false));
    drop(links);

    // With main, the limits are over.
    let limits = ReceiveOptions::new().accept_timeout(Some(SHORT)).max_refused(Some(1));
    let (receiver, connector) = listening(limits);
    let mut main = connector.connect(&context()).expect("connected");
    main.send(&[b"QEVM"[..].into()]).expect("sent");
    let _main = receiver.wait_main().expect("a source");
    let mut stranger = connector.connect(&context()).expect("connected");
    stranger.send(&[[b'x'; 64][..].into()]).expect("sent");
    assert_eq!(stranger.recv(&mut [(&mut [0; 1][..]).into()]).expect("closed"), 0);
    assert!(receiver.counters().has_main() && !receiver.stop().is_stopped());
}
