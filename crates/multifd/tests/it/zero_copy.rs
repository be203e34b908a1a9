//! Pages that the system sends directly from memory, over real TCP.

use std::{
    net::TcpListener,
    sync::Arc,
    thread::sleep,
    time::{Duration, Instant},
};

use multifd::{
    Method, SendOptions, Sender,
    channel::{Address, Connect, Listener, Stop, memory},
    error::{Error, Usage},
    live::{MigrateOptions, ZeroPageDetection},
    ram::{BlockIndex, DirtyBitmaps, NeverDirty, PageIndex, PageSize},
};

use crate::{
    kit::{Ends, StoppedGuest, TIMEOUT, difference, fresh, migrate_over, spawn, write},
    loopback::{BLOCKS, Writers, filled},
};

fn ends() -> Ends {
    ends_at("tcp:127.0.0.1:0")
}

fn ends_at(address: &str) -> Ends {
    let listener = Listener::bind(&address.parse().expect("an address")).expect("bound");
    let address: Address = listener.local_address().clone();
    (Arc::new(address), Box::new(listener))
}

fn in_place(channels: u8) -> SendOptions {
    SendOptions::new().channels(channels).zero_copy_send(true)
}

#[test]
fn a_stopped_machine_arrives_whole_and_copies_are_counted() {
    for channels in [1, 4] {
        for detection in [ZeroPageDetection::None, ZeroPageDetection::Multifd] {
            let (source, destination) = (filled(PageSize::KIB_4), fresh(PageSize::KIB_4, BLOCKS));
            let options = MigrateOptions::new().zero_page_detection(detection);
            let guest = &mut StoppedGuest::default();
            let send = Some(in_place(channels));
            let outcome = migrate_over(ends(), &source, &destination, send, options, &mut NeverDirty, guest);
            outcome.received.expect("received");
            assert_eq!(difference(&source, &destination), None, "{channels} channels, {detection:?}");
            let ram = outcome.sent.expect("sent").ram;
            // On one machine the system always copies. Not every channel carries a page before a sync.
            let missed = ram.dirty_sync_missed_zero_copy;
            assert!((1..=ram.dirty_sync_count * u64::from(channels)).contains(&missed), "{ram:?}");
        }
    }
}

/// There, notices are messages of a different protocol.
#[test]
fn a_stopped_machine_arrives_whole_over_ipv6() {
    if TcpListener::bind("[::1]:0").is_err() {
        return multifd_testkit::lacks("this machine has no IPv6");
    }
    let (source, destination) = (filled(PageSize::KIB_4), fresh(PageSize::KIB_4, BLOCKS));
    let (options, guest) = (MigrateOptions::new(), &mut StoppedGuest::default());
    let ends = ends_at("tcp:[::1]:0");
    let outcome =
        migrate_over(ends, &source, &destination, Some(in_place(2)), options, &mut NeverDirty, guest);
    outcome.received.expect("received");
    assert_eq!(difference(&source, &destination), None);
    assert!(outcome.sent.expect("sent").ram.dirty_sync_missed_zero_copy > 0);
}

#[test]
fn without_it_nothing_is_missed() {
    let (source, destination) = (filled(PageSize::KIB_4), fresh(PageSize::KIB_4, BLOCKS));
    let (options, guest) = (MigrateOptions::new(), &mut StoppedGuest::default());
    let send = Some(SendOptions::new().channels(2));
    let outcome = migrate_over(ends(), &source, &destination, send, options, &mut NeverDirty, guest);
    assert_eq!(outcome.sent.expect("sent").ram.dirty_sync_missed_zero_copy, 0);
}

/// A page that is read late may be newer than when it was queued, but never older.
#[test]
fn a_guest_that_rewrites_pages_under_way_arrives_as_it_was_when_it_stopped() {
    for channels in [1, 4] {
        let (source, destination) = (filled(PageSize::KIB_4), fresh(PageSize::KIB_4, BLOCKS));
        let bits = DirtyBitmaps::new(&source);
        let mut log = bits.reader().expect("alone");
        let mut writers = Writers::start(&source, &bits, 1500, Duration::from_micros(50));
        let options = MigrateOptions::new().downtime_limit(Duration::from_millis(2));
        let send = Some(in_place(channels));
        let outcome = migrate_over(ends(), &source, &destination, send, options, &mut log, &mut writers);
        let sent = outcome.sent.expect("sent");
        outcome.received.expect("received");
        assert_eq!(difference(&source, &destination), None, "{channels} channels");
        assert!(sent.ram.dirty_sync_count >= 3, "{sent:?}");
    }
}

fn refusal(connector: Arc<dyn Connect>) -> Error {
    let blocks = fresh(PageSize::KIB_4, &[("pc.ram", 4096)]);
    let mut sender = Sender::new(in_place(1), blocks, Stop::new()).expect("a sender");
    sender.set_up(connector).expect("set up");
    sender.wait_connected().expect_err("refused")
}

#[test]
fn it_is_refused_where_pages_are_copied_anyway() {
    let blocks = fresh(PageSize::KIB_4, &[("pc.ram", 4096)]);
    let packed = [Method::ALL.last().copied().expect("a method"), Method::None];
    for method in packed {
        let made = Sender::new(in_place(1).method(method), blocks.clone(), Stop::new());
        let refused =
            made.err().is_some_and(|error| matches!(error.kind(), Error::Usage(Usage::ZeroCopy(_))));
        assert_eq!(refused, method != Method::None, "{method}");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let unix = Address::Unix(folder.path().join("socket"));
    let _listener = Listener::bind(&unix).expect("bound");
    let (in_memory, _kept) = memory::network(1 << 16);
    let others: [Arc<dyn Connect>; 2] = [Arc::new(unix), Arc::new(in_memory)];
    for connector in others {
        let error = refusal(connector);
        assert!(matches!(error.kind(), Error::Usage(Usage::ZeroCopy(_))), "{error}");
    }
}

/// The destination reads nothing, so the system never completes the sends.
#[test]
fn a_stop_ends_the_wait_for_what_is_under_way() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let address =
        format!("tcp:{}", listener.local_addr().expect("an address")).parse::<Address>().expect("so");
    let blocks = fresh(PageSize::KIB_4, &[("pc.ram", 64 << 20)]);
    (0..64 << 8).for_each(|page| write(&blocks, 0, page, 1));
    let stop = Stop::new();
    let mut sender = Sender::new(in_place(2), blocks, stop.clone()).expect("a sender");
    sender.set_up(Arc::new(address)).expect("set up");
    let peers = [listener.accept(), listener.accept()];
    let cancelled = spawn("cancel", move || {
        sleep(Duration::from_millis(300));
        stop.cancel();
        Instant::now()
    });
    let queued = (0..64 << 8).try_for_each(|page| sender.queue(BlockIndex(0), PageIndex(page)));
    let ended = queued.and_then(|()| sender.sync()).expect_err("cancelled");
    assert!(ended.is_cancelled(), "{ended}");
    drop(sender);
    let late = cancelled.join().expect("no panic").elapsed();
    assert!(late < TIMEOUT / 10, "{late:?}");
    drop(peers);
}

/// A peer that ends with bytes in flight.
#[test]
fn a_connection_that_breaks_ends_the_wait_for_what_is_under_way() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let address =
        format!("tcp:{}", listener.local_addr().expect("an address")).parse::<Address>().expect("so");
    let blocks = fresh(PageSize::KIB_4, &[("pc.ram", 64 << 20)]);
    (0..64 << 8).for_each(|page| write(&blocks, 0, page, 1));
    let mut sender = Sender::new(in_place(1), blocks, Stop::new()).expect("a sender");
    sender.set_up(Arc::new(address)).expect("set up");
    let peer = listener.accept().expect("accepted");
    let died = spawn("die", move || {
        sleep(Duration::from_millis(200));
        // It ends with unread bytes in its socket, which causes a reset.
        drop(peer);
    });
    let queued = (0..64 << 8).try_for_each(|page| sender.queue(BlockIndex(0), PageIndex(page)));
    let ended = queued.and_then(|()| sender.sync()).expect_err("broken");
    assert!(matches!(ended.kind(), Error::Io { .. }), "{ended:?}");
    assert!(ended.to_string().starts_with("channel 0: "), "{ended}");
    died.join().expect("no panic");
}
