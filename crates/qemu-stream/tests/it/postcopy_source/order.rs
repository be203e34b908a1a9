//! What a correct destination receives.

use std::{collections::HashSet, sync::Arc};

use multifd::{
    channel::Stop,
    ram::{BlockIndex, BlockName, PageBitmap, PageIndex},
};
use qemu_stream::{mapped_ram::ReadPath, outgoing::postcopy::PostcopySource};

use super::{
    Outcome, assert_whole,
    destination::{Act, Lane, Listening, Plan, Point, request},
    machine::{machine, with_shared},
    migrate, migrate_over, migrate_source, options,
};

const BLOCKS: &[(&str, u64)] = &[("pc.ram", 1000), ("pc.rom", 2), ("vga", 129)];

#[track_caller]
fn assert_good(outcome: &Outcome) {
    if let Err(error) = &outcome.sent {
        panic!("{}", multifd::error::chain(error));
    }
    assert!(outcome.served.is_ok(), "{:?}", outcome.served);
}

#[test]
fn every_page_arrives_once_over_each_kind_of_connection() {
    let machine = machine(BLOCKS);
    for preempt in [false, true] {
        for listening in [Listening::tcp(), Listening::unix()] {
            let plan = Plan { preempt, ..Plan::good() }
                .then(Point::Loaded, Act::Say(request(Some("vga"), 0x80000, 0x1000)))
                .then(Point::Half, Act::Say(request(None, 0, 0x2000)));
            let outcome = migrate_over(&machine, options(), plan, &listening, &Stop::new());
            assert_good(&outcome);
            assert_whole(&machine, &outcome.arrived);
            let whole = BLOCKS.iter().map(|(name, pages)| ((*name).to_owned(), 0, pages << 12));
            assert_eq!(outcome.discarded, whole.collect::<Vec<_>>());
            let info = outcome.source.progress().info();
            assert_eq!((info.requests, info.normal + info.zero), (2, machine.pages()));
            assert!(info.guest_running_after.is_some());
        }
    }
}

/// A walk of one page in a minute: what arrives was requested.
#[test]
fn requests_are_answered_first_and_in_their_order() {
    let machine = machine(&[("pc.ram", 600), ("vga", 64)]);
    for preempt in [false, true] {
        let backwards = (0..600_u64).rev().map(|page| request(Some("pc.ram"), page << 12, 0x1000));
        let then = (0..64_u64).map(|page| request((page == 0).then_some("vga"), page << 12, 0x1000));
        let requests: Vec<u8> = backwards.chain(then).flatten().collect();
        let plan = Plan { preempt, ..Plan::at(Point::Loaded, Act::Say(requests)) };
        let outcome = migrate(&machine, options().max_postcopy_bandwidth(Some(1)), plan);
        assert_good(&outcome);
        assert_whole(&machine, &outcome.arrived);
        let walked = outcome.arrived.iter().filter(|(lane, ..)| preempt && *lane == Lane::Main).count();
        assert!(walked <= 64, "{walked} pages of the walk");
        let order: Vec<_> = outcome
            .arrived
            .iter()
            .filter(|(lane, ..)| !preempt || *lane == Lane::Preempt)
            .map(|(_, block, page, _)| (block.0, *page))
            .collect();
        // Four threads answer, and the walk may have sent its first piece.
        let place = |at: &(usize, u64)| if at.0 == 0 { 599 - at.1 } else { 600 + at.1 };
        // But for those pages that the walk took before.
        let far = order.iter().enumerate().filter(|(index, at)| place(at).abs_diff(*index as u64) > 64 + 8);
        assert!(far.clone().count() <= 64, "{:?}", far.collect::<Vec<_>>());
    }
}

#[test]
fn host_pages_arrive_whole_and_without_a_gap() {
    const HUGE: u64 = 512;
    let machine = machine(&[("pc.ram", 100), ("m0", 3 * HUGE + 7), ("m1", 2 * HUGE)]);
    for preempt in [false, true] {
        let block = |name| BlockName::new(name).unwrap();
        let options =
            options().block_page_size(block("m0"), 0x20_0000).block_page_size(block("m1"), 0x20_0000);
        let plan = Plan { preempt, ..Plan::good() }
            .then(Point::Loaded, Act::Say(request(Some("m0"), 0x20_0000, 0x20_0000)))
            .then(Point::Loaded, Act::Say(request(Some("m0"), 0x60_0000, 0x7000)));
        let outcome = migrate(&machine, options, plan);
        assert_good(&outcome);
        assert_whole(&machine, &outcome.arrived);
        for lane in [Lane::Main, Lane::Preempt] {
            let pages = outcome.arrived.iter().filter(|(of, block, ..)| *of == lane && block.0 > 0);
            let pages: Vec<_> = pages.map(|(_, block, page, _)| (block.0, *page)).collect();
            let mut at = 0;
            while let Some(&(block, first)) = pages.get(at) {
                assert_eq!(first % HUGE, 0, "a host page begins");
                let count = if (block, first) == (1, 3 * HUGE) { 7 } else { HUGE };
                let expected: Vec<_> = (first..first + count).map(|page| (block, page)).collect();
                assert_eq!(pages.get(at..at + expected.len()), Some(&expected[..]));
                at += expected.len();
            }
        }
    }
}

#[test]
fn pages_that_are_sent_first_are_not_discarded_and_not_sent_again() {
    let machine = machine(BLOCKS);
    let mut source = machine.source(options());
    let first = PageBitmap::new(1000);
    first.set_run(PageIndex(100), 40);
    source.send_first(BlockIndex(0), &first);
    let outcome = migrate_source(&machine, source, Plan::good(), &Listening::tcp(), &Stop::new());
    assert_good(&outcome);
    assert_whole(&machine, &outcome.arrived);
    let pages: HashSet<_> =
        outcome.arrived[..40].iter().map(|(_, block, page, _)| (block.0, *page)).collect();
    assert_eq!(pages, (100..140).map(|page| (0, page)).collect());
    let of_ram: Vec<_> =
        outcome.discarded.iter().filter(|(name, ..)| name == "pc.ram").map(|(_, a, b)| (*a, *b)).collect();
    assert_eq!(of_ram, [(0, 100 << 12), (140 << 12, 860 << 12)]);
}

/// The capabilities exclude each other: the list of blocks would have an address where a host page size may be.
#[test]
fn a_machine_with_shared_blocks_is_refused() {
    let machine = with_shared(&[("pc.ram", 100), ("shared", 64)], BlockIndex(1));
    let blocks = Arc::new(machine.file.ram_blocks(|_, _| ReadPath::Cached).unwrap());
    let refused = PostcopySource::of_file(&machine.file, blocks, options()).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "devices: x-ignore-shared is on in the machine's configuration, which excludes post-copy"
    );
}
