use std::{
    io::Read,
    sync::{Arc, atomic::AtomicU64},
    thread,
    time::{Duration, SystemTime},
};

use multifd::channel::{Context, Link, Listen, Stop};
use multifd::ram::PartMut;

use super::*;
use crate::error::Error;

fn head(kind: RecordKind, side: Side, length: u32, at: u64) -> RecordHead {
    let connection = ConnectionNumber::new(0).expect("small");
    RecordHead {
        kind,
        side,
        connection,
        length,
        at: Duration::from_millis(at),
        sending: Duration::from_millis(2),
        held: Duration::ZERO,
    }
}

/// A connection that sends `hello` in two pieces, and gets `yes`.
fn file() -> Vec<u8> {
    let mut file = FileHead { started: SystemTime::UNIX_EPOCH + Duration::from_secs(7) }.encode().to_vec();
    let mut add = |head: RecordHead, body: &[u8]| {
        file.extend_from_slice(&head.encode());
        file.extend_from_slice(body);
    };
    add(head(RecordKind::Opened, Side::Source, 0, 1), b"");
    add(head(RecordKind::Data, Side::Source, 2, 10), b"he");
    add(head(RecordKind::Data, Side::Destination, 3, 11), b"yes");
    add(head(RecordKind::Data, Side::Source, 3, 20), b"llo");
    add(head(RecordKind::Closed, Side::Source, 0, 30), b"");
    add(head(RecordKind::Ended, Side::Source, 0, 31), b"");
    file
}

#[test]
fn each_direction_is_read_with_its_times() {
    let file = file();
    let recording = Recording::open(&*file).expect("a recording");
    assert_eq!(recording.started(), SystemTime::UNIX_EPOCH + Duration::from_secs(7));
    let number = ConnectionNumber::new(0).expect("small");
    let mut way = OneWay::new(&recording, number, Side::Source);
    let mut text = String::new();
    way.read_to_string(&mut text).expect("read");
    assert_eq!(text, "hello");
    assert_eq!([way.arrived(1), way.arrived(2)], [Duration::from_millis(10), Duration::from_millis(20)]);
    let mut text = String::new();
    OneWay::new(&recording, number, Side::Destination).read_to_string(&mut text).expect("read");
    assert_eq!(text, "yes");
}

#[test]
fn the_time_line_says_who_waited_for_whom() {
    let file = file();
    let found = Timeline::of(&Recording::open(&*file).expect("a recording")).expect("a time line");
    let [connection] = &*found.connections else { panic!("{found:?}") };
    assert_eq!((found.ending, connection.source.bytes), (Ending::Complete, 5));
    assert_eq!(connection.source.waited_for_sender, Duration::from_millis(8));
    assert_eq!(connection.source.waited_for_receiver, Duration::from_millis(4));
    assert_eq!(connection.source.closed, Some(Duration::from_millis(30)));
}

/// A recorder can be killed at any byte.
#[test]
fn a_file_that_was_cut_anywhere_is_complete_up_to_its_last_whole_record() {
    let file = file();
    for length in FileHead::LEN..file.len() {
        let cut = &file[..length];
        let found = Timeline::of(&Recording::open(cut).expect("a recording")).expect("a time line");
        let Ending::Cut(rest) = found.ending else { panic!("{length}: {found:?}") };
        assert!(rest < 24 + 3, "{length}: {rest}");
    }
    let Err(Error::Cut { .. }) = Recording::open(&file[..FileHead::LEN - 1]) else { panic!("too short") };
}

#[test]
fn every_bound_of_a_head_is_checked() {
    let good = head(RecordKind::Data, Side::Source, RecordHead::MOST, 1);
    assert_eq!(RecordHead::decode(&good.encode(), 0).expect("good"), good);
    for (at, bytes) in [(0, &[0][..]), (0, &[6]), (1, &[2]), (2, &[0x10, 0]), (4, &[0, 0x10, 0, 1])] {
        let mut bad = good.encode();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        RecordHead::decode(&bad, 0).expect_err("a bound");
    }
    let mut wrong = FileHead { started: SystemTime::UNIX_EPOCH }.encode();
    wrong[11] = 2;
    FileHead::decode(&wrong).expect_err("a later version");
}

/// A recording of connections, each of which has sent these bytes in two pieces.
fn of_connections(all: &[&'static [u8]]) -> Recording<&'static [u8]> {
    let mut file = FileHead { started: SystemTime::UNIX_EPOCH }.encode().to_vec();
    for (number, bytes) in (0..).zip(all) {
        let connection = ConnectionNumber::new(number).expect("small");
        let (one, two) = bytes.split_at(bytes.len() / 2);
        let opened = head(RecordKind::Opened, Side::Source, 0, 1);
        file.extend_from_slice(&RecordHead { connection, ..opened }.encode());
        for piece in [one, two] {
            let length = u32::try_from(piece.len()).expect("short");
            let data = head(RecordKind::Data, Side::Source, length, 1);
            file.extend_from_slice(&RecordHead { connection, ..data }.encode());
            file.extend_from_slice(piece);
        }
    }
    Recording::open(&*file.leak()).expect("a recording")
}

fn played(all: &[&'static [u8]]) -> Result<Played<&'static [u8]>, Error> {
    Played::new(Arc::new(of_connections(all)), Arc::new(AtomicU64::new(0)))
}

fn all_of(link: &mut dyn Link) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let mut bytes = [0; 7];
        let (one, two) = bytes.split_at_mut(2);
        match link.recv(&mut [PartMut::from(one), PartMut::from(two)]).expect("bytes") {
            0 => return all,
            count => all.extend_from_slice(&bytes[..count]),
        }
    }
}

#[test]
fn connections_are_accepted_in_their_order_and_carry_what_the_source_has_sent() {
    let context = Context::new(&Stop::new());
    let mut played = played(&[b"other", b"QEVM and so on", b"", b"third"]).expect("a listener");
    for expected in ["other", "QEVM and so on", "third"] {
        let mut link = played.accept(&context).expect("no error").expect("a connection");
        assert_eq!(all_of(&mut *link), expected.as_bytes());
        assert_eq!(link.recv(&mut [PartMut::from(&mut [0; 4][..])]).expect("the end"), 0);
    }
    assert!(played.accept_waiting(&context).expect("no error").is_none());
}

#[test]
fn listener_waits_after_its_last_connection_until_it_is_woken() {
    let context = Context::new(&Stop::new());
    let mut played = played(&[b"QEVM"]).expect("a listener");
    drop(played.accept(&context).expect("no error").expect("a connection"));
    let waker = played.waker();
    let waiting =
        thread::spawn(move || played.accept(&Context::new(&Stop::new())).map(|link| link.is_none()));
    waker.wake();
    assert!(waiting.join().expect("no panic").expect("no error"), "the wait has ended");
}

#[test]
fn link_that_is_shut_down_is_at_its_end() {
    let context = Context::new(&Stop::new());
    let mut played = played(&[b"QEVM and so on"]).expect("a listener");
    let mut link = played.accept(&context).expect("no error").expect("a connection");
    link.waker().wake();
    assert_eq!(all_of(&mut *link), b"");
}

#[test]
fn recording_that_has_no_machine_is_refused_by_name() {
    for (connections, why) in [
        (&[&b"QEVM"[..], b"\x16\x03\x01 and so on"][..], "TLS"),
        (&[b"other"], "without a main connection"),
        (&[], "without a main connection"),
        (&[b"QEVM", b"QEVM"], "of several migrations"),
    ] {
        let refused = played(connections).expect_err(why).to_string();
        assert!(refused.contains(why) && refused.contains("multifd inspect shows what passed"), "{refused}");
    }
}
