//! The table: what a destination does wrong, and how the source ends.

use std::{thread, time::Duration};

use multifd::{channel::Stop, error::chain, ram::BlockName};
use qemu_stream::{
    format::Message,
    outgoing::postcopy::GuestAt::{self, Destination, Source},
};

use super::{
    LIMIT, assert_whole,
    destination::{Act, Listening, Plan, Point, said},
    machine::{Machine, machine},
    migrate_over, options,
};

/// What a row expects: one of these texts, and the side that has the guest.
type Ends = Option<(&'static [&'static str], GuestAt)>;

const CLOSED: &str = "the destination closed the connection without SHUT (return path: offset ";
const CUT: &str =
    "the destination closed the connection (it failed, or its process ended); return path: offset ";
const NO_GUEST: &str = "so it does not have the guest";
/// A reset: the system reports it to one thread, and to the others that the connection has ended.
const RESET: &[&str] = &[
    CLOSED,
    "stream ends where SHUT was expected",
    "cannot read: Connection reset by peer",
    "cannot write: Connection reset by peer",
    "cannot write: Broken pipe",
];

fn rows() -> Vec<(String, Plan, Ends)> {
    let shut = |code| said(&[Message::Shut(code)]);
    let mut rows: Vec<(String, Plan, Ends)> = Vec::new();
    let mut row = |name: String, plan: Plan, ends: Ends| rows.push((name, plan, ends));
    for point in [
        Point::Opened,
        Point::Discarded,
        Point::Ready,
        Point::Packaged,
        Point::Loaded,
        Point::Half,
        Point::Ended,
    ] {
        let before_run = point <= Point::Packaged;
        let before_package = point <= Point::Discarded;
        // Of a source that has sent the package: the last moment at which it is known that the guest did not start.
        let known = if before_run { Source } else { Destination };
        let unknown = if before_package { Source } else { Destination };
        let closed: &[&str] = if before_package {
            &[CLOSED]
        } else if point == Point::Ready {
            &[CLOSED, CUT]
        } else {
            &[CUT]
        };
        row(format!("{point:?}: close"), Plan::at(point, Act::Close), Some((closed, known)));
        row(format!("{point:?}: reset"), Plan::at(point, Act::Reset), Some((RESET, unknown)));
        let failed: &[&str] = match before_run {
            true => &["the destination reported failure (SHUT 1), so it does not have the guest"],
            false => &[
                "the destination reported failure (SHUT 1); its own log has the reason; the guest may have run there",
            ],
        };
        for act in [Act::SayAndClose(shut(1)), Act::Say(shut(1))] {
            row(format!("{point:?}: SHUT 1 by {act:?}"), Plan::at(point, act), Some((failed, known)));
        }
        let silent: &[&str] = match point {
            _ if before_package => {
                &["return path: offset 0x0: nothing arrived in time where PONG 2 was expected"]
            }
            Point::Ended => &["return path: offset 0x0: nothing arrived in time where SHUT was expected"],
            // The sockets may keep the rest.
            Point::Half => &[
                "cannot write: the other side has accepted no data for 2 s",
                "return path: offset 0x0: nothing arrived in time where SHUT was expected",
            ],
            // What the sockets keep is written, then nothing.
            _ => &["cannot write: the other side has accepted no data for 2 s"],
        };
        row(format!("{point:?}: silence"), Plan::at(point, Act::Silence), Some((silent, unknown)));
        let deaf: &[&str] = match before_package {
            true => &["return path: offset 0x0: nothing arrived in time where PONG 2 was expected"],
            false => &["return path: offset 0x0: nothing arrived in time where SHUT was expected"],
        };
        row(format!("{point:?}: no replies"), Plan::at(point, Act::Deaf), Some((deaf, unknown)));
        let nonsense: &[&str] = &[": type of a message: expected 1 to 7, found 0x63"];
        row(
            format!("{point:?}: a message that is none"),
            Plan::at(point, Act::Say(vec![0, 99, 0, 4, 0, 0, 0, 0])),
            Some((nonsense, unknown)),
        );
        let ones: &[&str] = &[": length of a message: expected at most 0x200, found 0xffff"];
        row(
            format!("{point:?}: all ones"),
            Plan::at(point, Act::Say(vec![0xff; 4096])),
            Some((ones, unknown)),
        );
        if point != Point::Ended {
            let early: &[&str] = match before_package {
                true => &["SHUT 0 is not allowed before the package"],
                // The reply to PONG 2 may be under way.
                _ if point == Point::Ready => &["SHUT 0 is not allowed before the "],
                false => &["SHUT 0 is not allowed before the end of RAM"],
            };
            for preempt in [false, true] {
                let plan = Plan { preempt, no_shut: true, ..Plan::at(point, Act::Say(shut(0))) };
                row(format!("{point:?}: SHUT 0, {preempt}"), plan, Some((early, unknown)));
            }
        }
        let bitmap = Message::RecvBitmap { block: BlockName::new("pc.ram").unwrap(), bitmap: vec![0; 1280] };
        let unasked: &[&str] = &["a bitmap that was not asked for"];
        row(
            format!("{point:?}: a bitmap"),
            Plan::at(point, Act::Say(said(&[bitmap]))),
            Some((unasked, unknown)),
        );
        let resumed: &[&str] = &["RESUME_ACK is not allowed before RESUME"];
        row(
            format!("{point:?}: RESUME_ACK"),
            Plan::at(point, Act::Say(said(&[Message::ResumeAck]))),
            Some((resumed, unknown)),
        );
        let harmless = [Message::Pong(0x42), Message::SwitchoverAck, Message::Reason("why".into())];
        row(format!("{point:?}: harmless messages"), Plan::at(point, Act::Say(said(&harmless))), None);
    }
    row("PONG 2 twice".into(), Plan::at(Point::Ready, Act::Say(said(&[Message::Pong(2)]))), None);
    row("PONG 3 twice".into(), Plan::at(Point::Loaded, Act::Say(said(&[Message::Pong(3)]))), None);
    let mute: &[&str] = &["return path: offset 0x0: nothing arrived in time where SHUT was expected"];
    row(
        "no SHUT".into(),
        Plan { no_shut: true, ..Plan::at(Point::Shut, Act::Silence) },
        Some((mute, Destination)),
    );
    let cut: &[&str] = &[
        "the destination closed the connection (it failed, or its process ended); return path: offset 0x23: ",
    ];
    let plan = Plan { no_shut: true, ..Plan::at(Point::Ended, Act::SayAndClose(vec![0, 1, 0])) };
    row("a part of SHUT".into(), plan, Some((cut, Destination)));
    rows
}

/// What is wrong with how the source has ended.
fn wrong(machine: &Machine, name: &str, plan: &Plan, ends: &Ends) -> Option<String> {
    let outcome = migrate_over(machine, options(), plan.clone(), &Listening::tcp(), &Stop::new());
    if outcome.took > LIMIT + Duration::from_secs(5) {
        return Some(format!("took {:?}", outcome.took));
    }
    match (&outcome.sent, ends) {
        (Ok(()), None) => {
            assert_whole(machine, &outcome.arrived);
            None
        }
        (Err(_), Some((texts, guest))) => {
            let (error, found) = outcome.error();
            println!("{name}: {error} ({found:?}, {:?})", outcome.took);
            if !texts.iter().any(|text| error.contains(text)) || found != *guest {
                return Some(format!("expected {texts:?} and {guest:?}, found {error:?} and {found:?}"));
            }
            let misleads = *guest == Destination && error.contains(NO_GUEST);
            misleads.then(|| format!("it says where the guest is not: {error}"))
        }
        (Ok(()), Some(_)) => Some("it succeeded".to_owned()),
        (Err(error), None) => Some(chain(&error.error).to_string()),
    }
}

#[test]
fn every_bad_destination_ends_the_source_in_time_and_it_knows_where_the_guest_is() {
    // More than the sockets keep, so that a write waits for a destination that does not read.
    let machine = machine(&[("pc.ram", 10240), ("vga", 100)]);
    let waits = |plan: &Plan| plan.acts.iter().any(|(_, act)| matches!(act, Act::Silence | Act::Deaf));
    let (silent, others): (Vec<_>, Vec<_>) = rows().into_iter().partition(|(_, plan, _)| waits(plan));
    let complaint = |(name, plan, ends): &(String, Plan, Ends)| {
        wrong(&machine, name, plan, ends).map(|wrong| format!("{name}: {wrong}"))
    };
    // Those that wait for a limit do so together.
    let found = thread::scope(|scope| {
        let complaint = &complaint;
        let silent: Vec<_> = silent.iter().map(|row| scope.spawn(move || complaint(row))).collect();
        silent.into_iter().filter_map(|row| row.join().expect("no panic")).collect::<Vec<_>>()
    });
    let found: Vec<_> = found.into_iter().chain(others.iter().filter_map(complaint)).collect();
    assert!(found.is_empty(), "{} rows:\n{}", found.len(), found.join("\n"));
}
