//! A migration that continues over new connections: bitmaps and RESUME.

use multifd::ram::BlockName;
use qemu_stream::{format::Message, outgoing::postcopy::GuestAt};

use super::{
    destination::{Act, Plan, Point, said},
    machine::{content, machine},
    migrate, options,
};

const BLOCKS: &[(&str, u64)] = &[("pc.ram", 1000), ("vga", 129)];

fn bitmap(name: &str, bitmap: Vec<u8>) -> Vec<u8> {
    said(&[Message::RecvBitmap { block: BlockName::new(name).unwrap(), bitmap }])
}

#[test]
fn what_the_bitmaps_lack_is_sent_once() {
    let machine = machine(BLOCKS);
    for preempt in [false, true] {
        let outcome = migrate(&machine, options(), Plan { preempt, has: Some(7), ..Plan::good() });
        outcome.sent.as_ref().unwrap_or_else(|error| panic!("{error:?}"));
        let mut found: Vec<_> = outcome.arrived.iter().map(|(_, block, page, _)| (block.0, *page)).collect();
        found.sort_unstable();
        let all = BLOCKS
            .iter()
            .enumerate()
            .flat_map(|(index, (_, pages))| (0..*pages).map(move |page| (index, page)));
        assert_eq!(found, all.filter(|(_, page)| page % 7 != 0).collect::<Vec<_>>());
        for (_, block, page, bytes) in &outcome.arrived {
            assert_eq!(*bytes, content(*block, *page));
        }
    }
}

/// Regression: the bits of no pages were counted as pages, which ended the thread.
#[test]
fn bits_behind_the_last_page_mean_nothing() {
    let machine = machine(&[("pc.ram", 1000)]);
    let plan = Plan::at(Point::Asked, Act::Instead(bitmap("pc.ram", vec![0xff; 128])));
    for host_page in [None, Some(0x10000)] {
        let options = host_page
            .map_or(options(), |bytes| options().block_page_size(BlockName::new("pc.ram").unwrap(), bytes));
        let outcome = migrate(&machine, options, Plan { has: Some(1), ..plan.clone() });
        outcome.sent.as_ref().unwrap_or_else(|error| panic!("{error:?}"));
        assert!(outcome.arrived.is_empty(), "{}", outcome.arrived.len());
    }
}

#[test]
fn a_destination_that_does_not_resume_correctly_keeps_the_guest() {
    let machine = machine(BLOCKS);
    let good = || bitmap("pc.ram", vec![0; 128]);
    let mut end = good();
    *end.last_mut().unwrap() ^= 1;
    let twice = [good(), good()].concat();
    // A gigabyte, of which nothing follows.
    let mut huge = bitmap("pc.ram", Vec::new());
    huge.truncate(huge.len() - 16);
    huge.extend((1_u64 << 30).to_be_bytes());
    let rows: Vec<(&str, Plan, &str)> = vec![
        (
            "an unknown block",
            Plan::at(Point::Asked, Act::Instead(bitmap("rom", vec![0; 128]))),
            r#"return path: offset 0x0: block "rom" is not in the block list"#,
        ),
        (
            "too short",
            Plan::at(Point::Asked, Act::Instead(bitmap("pc.ram", vec![0; 120]))),
            "size of a bitmap: expected a bit for each page of its block, found 0x78",
        ),
        (
            "too long",
            Plan::at(Point::Asked, Act::Instead(bitmap("pc.ram", vec![0; 136]))),
            "bitmap: expected at most 0x80, found 0x88",
        ),
        (
            "longer than those of any block",
            Plan::at(Point::Asked, Act::Instead(huge)),
            "bitmap: expected at most 0x80, found 0x40000000",
        ),
        (
            "that of another block",
            Plan::at(Point::Asked, Act::Instead(bitmap("vga", vec![0; 128]))),
            "size of a bitmap: expected a bit for each page of its block, found 0x80",
        ),
        (
            "a wrong end",
            Plan::at(Point::Asked, Act::Instead(end)),
            "end of a bitmap: expected 0x123456789abcdef, found 0x123456789abcdee",
        ),
        (
            "twice",
            Plan::at(Point::Asked, Act::Instead(twice)),
            "a bitmap that was not asked for is not allowed on the return path",
        ),
        (
            "none",
            Plan::at(Point::Asked, Act::Deaf),
            "nothing arrived in time where the bitmaps of received pages was expected",
        ),
        ("closed", Plan::at(Point::Asked, Act::Close), "stream ends where SHUT was expected"),
        (
            "failed",
            Plan::at(Point::Asked, Act::Say(said(&[Message::Shut(1)]))),
            "the destination reported failure (SHUT 1); its own log has the reason; the guest may have run there",
        ),
        (
            "RESUME_ACK before RESUME",
            Plan::at(Point::Asked, Act::Say(said(&[Message::ResumeAck]))),
            "RESUME_ACK is not allowed before RESUME",
        ),
        (
            "no RESUME_ACK",
            Plan::at(Point::Resumed, Act::Deaf),
            "nothing arrived in time where RESUME_ACK was expected",
        ),
        ("closed at RESUME", Plan::at(Point::Resumed, Act::Close), "stream ends where SHUT was expected"),
        (
            "RESUME_ACK of another value",
            Plan::at(Point::Resumed, Act::Instead(vec![0, 6, 0, 4, 0, 0, 0, 2])),
            "value of RESUME_ACK: expected 1, found 0x2",
        ),
        (
            "SHUT 0 at once",
            Plan::at(Point::Asked, Act::Say(said(&[Message::Shut(0)]))),
            "SHUT 0 is not allowed before the end of RAM",
        ),
    ];
    for (name, plan, text) in rows {
        let outcome = migrate(&machine, options(), Plan { has: Some(2), ..plan });
        let (error, guest) = outcome.error();
        assert!(error.contains(text), "{name}: {error}");
        assert_eq!(guest, GuestAt::Destination, "{name}");
    }
}
