//! A cancel at each point, and a connection for requests that does not work.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use multifd::{
    Error,
    channel::{Connect, Context, Link, Stop},
};
use qemu_stream::outgoing::postcopy::{GuestAt, PostcopyOptions};

use super::{
    LIMIT, SOON, assert_whole,
    destination::{Act, Listening, Plan, Point, request},
    machine::machine,
    migrate_over, options,
};

const BLOCKS: &[(&str, u64)] = &[("pc.ram", 10240), ("vga", 100)];

/// Without any time limit, so that only the cancel can end a wait.
fn patient() -> PostcopyOptions {
    PostcopyOptions::new().stall_timeout(None).end_timeout(None)
}

#[test]
fn a_cancel_at_any_point_ends_all_threads_and_the_source_knows_where_the_guest_is() {
    let machine = machine(BLOCKS);
    for (point, guest) in [
        (Point::Opened, GuestAt::Source),
        (Point::Discarded, GuestAt::Source),
        // The package is sent, and nobody knows how far the destination comes.
        (Point::Ready, GuestAt::Destination),
        (Point::Packaged, GuestAt::Destination),
        (Point::Loaded, GuestAt::Destination),
        (Point::Half, GuestAt::Destination),
        (Point::Ended, GuestAt::Destination),
    ] {
        for preempt in [false, true] {
            for listening in [Listening::tcp(), Listening::unix()] {
                let stop = Stop::new();
                let plan = Plan::at(point, Act::Cancel(stop.clone(), Duration::from_millis(20)));
                let plan = Plan { preempt, ..plan.then(point, Act::Silence) };
                let outcome = migrate_over(&machine, patient(), plan, &listening, &stop);
                let error = outcome.sent.expect_err("cancelled");
                assert!(error.error.is_cancelled(), "{point:?}: {error:?}");
                assert_eq!(error.guest, guest, "{point:?}, preempt {preempt}");
            }
        }
    }
}

#[test]
fn a_cancel_before_the_connection_leaves_the_guest_here() {
    let machine = machine(&[("pc.ram", 10)]);
    let stop = Stop::new();
    stop.cancel();
    let outcome = migrate_over(&machine, patient(), Plan::good(), &Listening::tcp(), &stop);
    let error = outcome.sent.expect_err("cancelled");
    assert_eq!((error.error.is_cancelled(), error.guest), (true, GuestAt::Source));
}

#[test]
fn a_cancel_of_a_resumed_migration_leaves_the_guest_there() {
    let machine = machine(BLOCKS);
    for point in [Point::Asked, Point::Resumed, Point::Half, Point::Ended] {
        let stop = Stop::new();
        let plan = Plan::at(point, Act::Cancel(stop.clone(), Duration::from_millis(20)));
        let plan = Plan { has: Some(7), ..plan.then(point, Act::Silence) };
        let outcome = migrate_over(&machine, patient(), plan, &Listening::tcp(), &stop);
        let error = outcome.sent.expect_err("cancelled");
        assert_eq!((error.error.is_cancelled(), error.guest), (true, GuestAt::Destination), "{point:?}");
    }
}

/// A cancel ends a wait for a place in the queue of requests, too.
#[test]
fn a_cancel_ends_a_source_whose_queue_of_requests_is_full() {
    let machine = super::machine::empty(&[("pc.ram", 1 << 18)]);
    let pages = (0..1_u64 << 17).map(|page| request((page == 0).then_some("pc.ram"), page << 13, 0x1000));
    let requests: Vec<u8> = pages.flatten().collect();
    let stop = Stop::new();
    let plan = Plan::at(Point::Opened, Act::SayMeanwhile(requests));
    let plan = plan.then(Point::Opened, Act::Cancel(stop.clone(), Duration::from_millis(300)));
    let plan = plan.then(Point::Opened, Act::Silence);
    let outcome = migrate_over(&machine, patient(), plan, &Listening::tcp(), &stop);
    let error = outcome.sent.expect_err("cancelled");
    assert_eq!((error.error.is_cancelled(), error.guest), (true, GuestAt::Source));
}

#[test]
fn a_connection_for_requests_that_is_closed_early_interrupts_the_migration() {
    let machine = machine(BLOCKS);
    for point in [Point::Opened, Point::Ready, Point::Loaded, Point::Half] {
        for listening in [Listening::tcp(), Listening::unix()] {
            // More than one write, because the first one after a close succeeds.
            let requests: Vec<u8> = (0..200_u64)
                .rev()
                .flat_map(|page| request((page == 199).then_some("pc.ram"), page << 12, 0x1000))
                .collect();
            let plan = Plan { preempt: true, ..Plan::at(point, Act::ClosePreempt) };
            let plan = plan.then(point.max(Point::Loaded), Act::Say(requests));
            let slow = options().max_postcopy_bandwidth(Some(8 << 20));
            let outcome = migrate_over(&machine, slow, plan, &listening, &Stop::new());
            let (error, guest) = outcome.error();
            let texts = ["cannot write: Broken pipe", "cannot write: Connection reset by peer"];
            assert!(texts.iter().any(|text| error.contains(text)), "{point:?}: {error}");
            assert_eq!(guest, GuestAt::Destination, "{point:?}");
            assert!(outcome.took < Duration::from_secs(5), "{:?}", outcome.took);
        }
    }
}

/// The connection waits in the queue of the system: its few requests are never read, and all other pages arrive.
#[test]
fn a_connection_for_requests_that_nobody_accepts_ends_at_the_limit() {
    let machine = machine(BLOCKS);
    let listening = Listening::tcp();
    let source = machine.source(options().preempt(true).end_timeout(Some(Duration::from_millis(200))));
    // Its source has both connections, and it has accepted only main.
    let plan = Plan::at(Point::Loaded, Act::Say(request(Some("vga"), 0, 0x1000)));
    let outcome =
        super::migrate_source(&machine, source, plan.then(Point::Ended, Act::Deaf), &listening, &Stop::new());
    let (error, guest) = outcome.error();
    assert!(error.contains("nothing arrived in time where SHUT was expected"), "{error}");
    assert_eq!(guest, GuestAt::Destination);
    let (requested, rest) = (machine.pages(), outcome.arrived.len() as u64);
    assert!((requested - 64..requested).contains(&rest), "{rest} of {requested} over main");
}

/// A destination whose second connection cannot be made.
struct OnlyOne(Box<dyn Connect>, std::sync::atomic::AtomicBool);

impl Connect for OnlyOne {
    fn connect(&self, context: &Context) -> std::io::Result<Box<dyn Link>> {
        if self.1.swap(true, std::sync::atomic::Ordering::Relaxed) {
            return Err(std::io::ErrorKind::ConnectionRefused.into());
        }
        self.0.connect(context)
    }

    fn target(&self) -> String {
        self.0.target()
    }
}

#[test]
fn a_connection_for_requests_that_is_refused_leaves_the_guest_here() {
    let machine = machine(BLOCKS);
    let listening = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", listening.local_addr().unwrap());
    let address = address.parse::<multifd::channel::Address>().unwrap();
    let connector = Arc::new(OnlyOne(Box::new(address), false.into()));
    let begun = Instant::now();
    let error = machine.source(options().preempt(true)).start(&*connector, &Stop::new()).unwrap_err();
    assert!(matches!(error.error.kind(), Error::Io { .. }), "{error:?}");
    assert_eq!(error.guest, GuestAt::Source);
    assert!(begun.elapsed() < SOON.min(2 * LIMIT));
    // The next attempt succeeds.
    let next = super::migrate(&machine, options(), Plan { preempt: true, ..Plan::good() });
    assert!(next.sent.is_ok());
    assert_whole(&machine, &next.arrived);
}
