//! A running guest moves from host to host over an unreliable line: pages are sent repeatedly, and the newest version
//! of each arrives.

use std::{sync::Arc, time::Duration};

use multifd::{
    SendOptions,
    channel::{Address, Listener},
    live::MigrateOptions,
    ram::{DirtyBitmaps, PageSize},
};
use multifd_testkit::rough_network::{Carried, Line, Network};

use crate::{
    kit::{Ends, difference, fresh, migrate_over},
    loopback::{BLOCKS, Writers, filled},
};

/// The line has affected both directions.
fn arrives_over(line: &Line, channels: u8, did: fn(&Carried) -> u64) {
    let Some(network) = Network::new(line) else { return };
    let listen: Address = format!("tcp:{}:0", network.far().address()).parse().expect("an address");
    let listener = network.far().run(|| Listener::bind(&listen)).expect("bound");
    let ends: Ends = (Arc::new(listener.local_address().clone()), Box::new(listener));
    let (source, destination) = (filled(PageSize::KIB_4), fresh(PageSize::KIB_4, BLOCKS));
    let bits = DirtyBitmaps::new(&source);
    let mut log = bits.reader().expect("alone");
    let mut writers = Writers::start(&source, &bits, 100, Duration::from_millis(1));
    // Sending everything that the writers write takes longer over most of these lines.
    let options = MigrateOptions::new().downtime_limit(Duration::from_millis(100));
    let send = Some(SendOptions::new().channels(channels));
    let outcome = network
        .near()
        .run(|| migrate_over(ends, &source, &destination, send, options, &mut log, &mut writers));
    let sent = outcome.sent.expect("sent");
    outcome.received.expect("received");
    assert_eq!(difference(&source, &destination), None, "{channels} channels");
    assert!(sent.ram.dirty_sync_count >= 2, "{sent:?}");
    let carried = network.carried();
    assert!(carried.iter().all(|way| did(way) > 0), "the line was rough: {carried:?}");
}

#[test]
fn a_running_guest_arrives_over_a_line_that_loses_packets() {
    arrives_over(&Line { loss: 0.03, ..Line::default() }, 4, |way| way.lost);
}

#[test]
fn a_running_guest_arrives_over_a_line_that_reorders_packets() {
    let line = Line { delay: Duration::from_millis(3), reordered: 0.3, ..Line::default() };
    arrives_over(&line, 4, |way| way.reordered);
}

#[test]
fn a_running_guest_arrives_over_a_slow_line_with_a_long_way() {
    let line = Line { delay: Duration::from_millis(20), rate: Some(100_000_000), ..Line::default() };
    arrives_over(&line, 2, |way| way.packets);
}
