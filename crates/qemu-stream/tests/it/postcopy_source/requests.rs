//! Requests that no correct destination sends, and very many.

use multifd::ram::BlockName;
use qemu_stream::outgoing::postcopy::GuestAt;

use super::{
    assert_whole,
    destination::{Act, Plan, Point, request},
    machine::{empty, machine},
    migrate, options,
};

const BLOCKS: &[(&str, u64)] = &[("pc.ram", 700), ("m0", 1024)];

#[test]
fn a_request_for_no_pages_ends_the_migration_with_the_request() {
    let machine = machine(BLOCKS);
    let rows: &[(&str, Vec<u8>, &str)] = &[
        (
            "of an unknown block",
            request(Some("vga"), 0, 0x1000),
            r#"return path: offset 0x18: block "vga" is not in the block list"#,
        ),
        (
            "without a block",
            request(None, 0, 0x1000),
            "return path: offset 0x18: a request for pages without a block is not allowed before a request that names one",
        ),
        (
            "outside",
            request(Some("pc.ram"), 700 << 12, 0x1000),
            r#"request for 0x1000 bytes at 0x2bc000 of block "pc.ram": pages 0x2bc to 0x2bd are not in the block, which has 0x2bc"#,
        ),
        (
            "that ends outside",
            request(Some("pc.ram"), 699 << 12, 0x2000),
            r#"request for 0x2000 bytes at 0x2bb000 of block "pc.ram": pages 0x2bb to 0x2bd are not in the block, which has 0x2bc"#,
        ),
        (
            "at the end of all numbers",
            request(Some("pc.ram"), u64::MAX - 0xfff, 0xffff_f000),
            r#"request for 0xfffff000 bytes at 0xfffffffffffff000 of block "pc.ram": pages 0xfffffffffffff to 0x100000000ffffe are not in the block"#,
        ),
        (
            "of no length",
            request(Some("pc.ram"), 0, 0),
            r#"request for 0x0 bytes at 0x0 of block "pc.ram": "#,
        ),
        (
            "that begins within a page",
            request(Some("pc.ram"), 0x800, 0x1000),
            r#"request for 0x1000 bytes at 0x800 of block "pc.ram": "#,
        ),
        (
            "that ends within a page",
            request(Some("pc.ram"), 0x1000, 0xfff),
            r#"request for 0xfff bytes at 0x1000 of block "pc.ram": "#,
        ),
        (
            "that begins within a host page",
            request(Some("m0"), 0x1000, 0x20_0000),
            r#"request for 0x200000 bytes at 0x1000 of block "m0": 0x200 pages from page 0x1 on are not whole host pages of 0x200 pages"#,
        ),
        (
            "of a part of a host page",
            request(Some("m0"), 0x20_0000, 0x1000),
            r#"request for 0x1000 bytes at 0x200000 of block "m0": 0x1 pages from page 0x200 on are not whole host pages of 0x200 pages"#,
        ),
    ];
    for (name, bytes, text) in rows {
        for preempt in [false, true] {
            let options = options().block_page_size(BlockName::new("m0").unwrap(), 0x20_0000);
            let plan = Plan { preempt, ..Plan::at(Point::Loaded, Act::Say(bytes.clone())) };
            let outcome = migrate(&machine, options, plan);
            let (error, guest) = outcome.error();
            assert!(error.contains(text), "a request {name}: {error}");
            assert_eq!(guest, GuestAt::Destination, "a request {name}");
        }
    }
}

/// The devices are loaded while the package is under way, and touch memory.
#[test]
fn a_request_before_the_package_is_answered_after_it() {
    let machine = machine(&[("pc.ram", 200), ("vga", 64)]);
    for point in [Point::Opened, Point::Discarded, Point::Ready, Point::Packaged] {
        for preempt in [false, true] {
            let plan =
                Plan { preempt, ..Plan::at(point, Act::Say(request(Some("pc.ram"), 198 << 12, 0x1000))) };
            let outcome = migrate(&machine, options().max_postcopy_bandwidth(Some(1 << 20)), plan);
            outcome.sent.as_ref().unwrap_or_else(|error| panic!("{point:?}: {error:?}"));
            assert_whole(&machine, &outcome.arrived);
            assert_eq!(outcome.source.progress().info().requests, 1);
            let at = outcome.arrived.iter().position(|(_, block, page, _)| (block.0, *page) == (0, 198));
            assert!(at.unwrap() <= 128, "{point:?}: {at:?}");
        }
    }
}

#[test]
fn requests_after_the_end_change_nothing() {
    let machine = machine(BLOCKS);
    for point in [Point::Ended, Point::Shut] {
        for preempt in [false, true] {
            let plan = Plan { preempt, ..Plan::at(point, Act::Say(request(Some("pc.ram"), 0, 0x1000))) };
            let outcome = migrate(&machine, options(), plan);
            outcome.sent.as_ref().unwrap_or_else(|error| panic!("{point:?}: {error:?}"));
            assert_whole(&machine, &outcome.arrived);
        }
    }
}

#[test]
fn a_million_requests_for_one_page_send_it_once() {
    let machine = machine(BLOCKS);
    let many = [request(Some("pc.ram"), 0x1000, 0x1000), request(None, 0x1000, 0x1000).repeat(1_000_000)];
    let outcome = migrate(&machine, options(), Plan::at(Point::Loaded, Act::Say(many.concat())));
    outcome.sent.as_ref().unwrap();
    assert_whole(&machine, &outcome.arrived);
}

/// More than the schedule keeps: the return path is read as fast as they are answered.
#[test]
fn a_million_requests_for_other_pages_are_all_answered() {
    const PAGES: u64 = 1 << 20;
    let machine = empty(&[("pc.ram", PAGES)]);
    let before = peak();
    // Every second page, then the others, so that none can be joined with the one before.
    let pages = (0..PAGES).step_by(2).chain((1..PAGES).step_by(2));
    let requests = pages.flat_map(|page| request((page == 0).then_some("pc.ram"), page << 12, 0x1000));
    let requests: Vec<u8> = requests.collect();
    let length = requests.len() as u64;
    let plan = Plan::at(Point::Loaded, Act::SayMeanwhile(requests));
    let outcome = migrate(&machine, options().max_postcopy_bandwidth(Some(1)), plan);
    outcome.sent.as_ref().unwrap_or_else(|error| panic!("{error:?}"));
    let info = outcome.source.progress().info();
    assert_eq!((info.requests, info.zero), (PAGES, PAGES));
    assert_eq!(outcome.arrived.len() as u64, PAGES);
    // What the test itself keeps: the requests, twice, and 64 bytes a page.
    let test = 3 * length + (PAGES * 160);
    let grown = peak().saturating_sub(before);
    assert!(grown < test + (64 << 20), "{grown:#x} bytes, of which the test needs {test:#x}");
}

/// Regression: the thread that reads the return path waited for a place in a queue that nobody emptied, and nobody woke it.
#[test]
fn more_requests_than_are_kept_before_the_package_end_at_the_limit() {
    const PAGES: u64 = 1 << 18;
    let machine = empty(&[("pc.ram", PAGES)]);
    let requests: Vec<u8> = (0..PAGES / 2)
        .flat_map(|page| request((page == 0).then_some("pc.ram"), page << 13, 0x1000))
        .collect();
    let outcome = migrate(&machine, options(), Plan::at(Point::Opened, Act::SayMeanwhile(requests)));
    let (error, guest) = outcome.error();
    assert!(error.contains("PONG 2"), "{error}");
    assert_eq!(guest, GuestAt::Source);
}

/// The most memory that this process has had.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}
