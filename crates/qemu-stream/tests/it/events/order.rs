//! The order of events.

use std::io::{self, Read};

use proptest::prelude::*;
use qemu_stream::{
    error::{Error, Malformed, Unsupported, Usage},
    format::{BlockIndex, Command, PageSizes, Section, SectionId, SyncMode},
    incoming::{Event, Events},
    outgoing::Options,
};

use super::{name, names};
use crate::kit::{all_options, q35, stream};

#[test]
fn every_step_of_a_stream_is_an_event_in_its_place() {
    let (found, error) = names(&stream(Options::new(q35("10.0"))));
    assert!(error.is_none(), "{error:?}");
    let expected = [
        "pc-q35-10.0",
        "OPEN_RETURN_PATH",
        "PING",
        "PING",
        "PING",
        "2 blocks",
        "Round",
        "sync at flush",
        "eos",
        "footer",
        "pass",
        "zero 0:3",
        "sync at flush",
        "eos",
        "footer",
        "SWITCHOVER_START",
        "last pass",
        "zero 1:0",
        "sync at flush",
        "eos",
        "footer",
        "end of ram",
        "devices",
        "3 devices",
    ];
    assert_eq!(found, expected);
}

#[test]
fn an_old_source_has_its_sync_points_at_each_eos_and_no_footers() {
    let (found, error) = names(&stream(Options::without_configuration().sync_mode(None).unconfirmed()));
    assert!(error.is_none(), "{error:?}");
    let expected = [
        "no configuration",
        "2 blocks",
        "Legacy",
        "sync at eos",
        "eos",
        "no footer",
        "pass",
        "zero 0:3",
        "page 0:4 of 7",
        "page 1:1 of 8",
        "sync at eos",
        "eos",
        "no footer",
        "last pass",
        "zero 1:0",
        "sync at eos",
        "eos",
        "no footer",
        "end of ram",
        "devices",
        "1 devices",
    ];
    assert_eq!(found, expected);
}

#[test]
fn a_delta_is_an_event_that_makes_the_page_out_of_its_old_contents() {
    let mut whole = stream(Options::new(q35("10.0")).sync_mode(None));
    let mark = b"\0\0\0\0\0\0\x10\x08\x06pc.rom";
    let at = whole.windows(mark.len()).position(|window| window == mark).unwrap();
    whole.splice(at..at, *b"\0\0\0\0\0\0\x40\x60\x01\0\x04\x02\x02\x09\x09");
    let mut events = Events::new(&whole[..]);
    loop {
        if let Event::Xbzrle { block, delta, .. } = events.next().unwrap() {
            let mut page = [7; 4096];
            delta.apply(&mut page).unwrap();
            assert_eq!((block, &page[..6]), (BlockIndex(0), &[7, 7, 9, 9, 7, 7][..]));
            let place = delta.place();
            assert_eq!(place.offset, at as u64 + 11);
            let bad = delta.apply(&mut [7; 3]).unwrap_err();
            assert!(
                matches!(bad, Error::Malformed { at, what: Malformed::Delta(_) } if at == place),
                "{bad}"
            );
            return;
        }
    }
}

/// What it does not serve itself it shows; what it cannot read it refuses by name, behind the event.
#[test]
fn every_command_is_an_event_and_only_what_cannot_be_read_behind_it_is_refused() {
    let advise = Command::PostcopyAdvise(Some(PageSizes { host: 0x20_1000, target: 0x1000 }));
    for (command, refused) in [
        (advise, false),
        (Command::Packaged(3), true),
        (Command::PostcopyAdvise(None), false),
        (Command::EnableColo, false),
        (Command::PostcopyListen, false),
    ] {
        let mut whole = stream(Options::new(q35("10.0")));
        let start = b"\x01\0\0\0\x01\x03ram";
        let at = whole.windows(start.len()).position(|window| window == start).unwrap();
        let mut piece = Vec::new();
        Section::Command(command.clone()).encode(&mut piece);
        whole.splice(at..at, piece);
        let (found, error) = names(&whole);
        assert!(found.contains(&command.name().to_owned()), "{found:?}");
        assert_eq!(error.is_some(), refused, "{error:?}");
        if let Some(error) = error {
            assert!(
                matches!(&error, Error::Unsupported { at: place, what: Unsupported::Capability { capability: "postcopy-ram", .. } } if place.offset == at as u64),
                "{error}"
            );
        }
    }
}

#[test]
fn nothing_comes_behind_the_end_or_an_error() {
    let whole = stream(Options::new(q35("10.0")));
    let state = |error| match error {
        Error::Usage(Usage::OutOfOrder { call: "next", state }) => state,
        other => panic!("{other}"),
    };
    let mut events = Events::new(&whole[..]);
    while !matches!(events.next().unwrap(), Event::End(_)) {}
    assert_eq!(events.bytes(), whole.len() as u64);
    for _ in 0..2 {
        assert_eq!(state(events.next().unwrap_err()), "after the end of the stream");
    }
    assert!(matches!(events.end_at_silence(), Err(Error::Usage(Usage::OutOfOrder { .. }))));
    let mut events = Events::new(&whole[..whole.len() / 2]);
    while events.next().is_ok() {}
    for _ in 0..2 {
        assert_eq!(state(events.next().unwrap_err()), "after an error");
    }
}

/// Gives piece after piece, and nothing for a while before each.
struct Halting<'a> {
    pieces: Vec<&'a [u8]>,
    late: bool,
}

impl Read for Halting<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.late = !self.late;
        match self.pieces.first_mut() {
            None => Ok(0),
            Some(_) if self.late => Err(io::ErrorKind::WouldBlock.into()),
            Some(piece) => {
                let count = piece.read(into)?;
                self.pieces.remove(0);
                Ok(count)
            }
        }
    }
}

/// A program that looks at its watch now and then loses nothing by it.
#[test]
fn a_time_limit_loses_nothing_where_the_source_may_pause_nor_among_the_devices() {
    for options in all_options() {
        let whole = stream(options);
        // Where the source may pause, and a few bytes of devices at a time.
        let mut pauses = Vec::new();
        let mut events = Events::new(&whole[..]);
        while !matches!(events.next().unwrap(), Event::EndOfRam) {
            if events.may_pause() {
                pauses.push(usize::try_from(events.bytes()).unwrap());
            }
        }
        // Without footers one place is both before and behind the end of a section.
        pauses.dedup();
        let devices_from = usize::try_from(events.bytes()).unwrap();
        pauses.extend((devices_from + 1..whole.len()).step_by(11));
        let ends = pauses.iter().copied().chain([whole.len()]);
        let pieces: Vec<&[u8]> =
            [0].iter().chain(&pauses).zip(ends).map(|(from, to)| &whole[*from..to]).collect();
        let (expected, _) = names(&whole);
        let mut events = Events::new(Halting { pieces, late: true });
        let (mut found, mut late) = (Vec::new(), 0);
        while found.last() != expected.last() {
            match events.next() {
                Ok(event) => found.push(name(&event)),
                Err(Error::TimedOut { .. }) => late += 1,
                Err(error) => panic!("{error}"),
            }
        }
        found.dedup_by(|one, other| one == "devices" && other == "devices");
        assert_eq!((found, late), (expected, pauses.len()));
    }
}

#[test]
fn a_silent_source_without_a_description_ends_where_its_reader_says() {
    for (suppress, footers, taken) in
        [(true, true, true), (false, true, false), (true, false, false), (false, false, false)]
    {
        let options =
            if footers { Options::new(q35("10.0")) } else { Options::without_configuration().unconfirmed() };
        let mut whole = stream(options);
        let json = whole.windows(3).rposition(|window| window == b"\0\x06\0").unwrap();
        whole.truncate(json + 1);
        let mut events = Events::new(&whole[..]).suppress_vmdesc(suppress);
        while !events.may_have_ended() {
            events.next().unwrap();
        }
        assert_eq!(events.bytes(), whole.len() as u64, "not before its last byte");
        let ended = events.end_at_silence();
        assert_eq!(ended.is_ok(), taken, "{suppress} {footers}: {ended:?}");
        if let Err(error) = ended {
            let expected =
                matches!(error, Error::Unsupported { what: Unsupported::NoDescription { .. }, .. });
            assert!(expected, "{error}");
            continue;
        }
        let Event::End(part) = events.next().unwrap() else { panic!("it ends") };
        assert!(part.description().is_none() && whole.ends_with(part.as_bytes()));
    }
}

#[test]
fn places_are_those_of_the_events() {
    let whole = stream(Options::new(q35("10.0")).sync_mode(Some(SyncMode::Legacy)));
    let mut events = Events::new(&whole[..]);
    loop {
        let event = events.next().unwrap();
        let (is_pass, is_end) = (matches!(event, Event::Pass { .. }), matches!(event, Event::End(_)));
        let (from, to) = (events.place().offset, events.here().offset);
        assert!(from <= to);
        if is_pass {
            assert_eq!(to - from, 5);
            assert!(matches!(whole[usize::try_from(from).unwrap()..], [2 | 3, 0, 0, 0, 1, ..]));
        }
        if is_end {
            assert_eq!((from, to), (whole.len() as u64, whole.len() as u64));
            return;
        }
    }
}

#[test]
fn a_stream_cut_at_any_byte_ends_in_an_error_and_the_same_events_before() {
    for options in all_options() {
        let whole = stream(options);
        let (all, _) = names(&whole);
        for length in (0..whole.len()).step_by(3) {
            let (mut found, error) = names(&whole[..length]);
            // A cut right before a footer looks like a section without one, up to the next read.
            found.pop_if(|last| *last == "no footer");
            if error.is_some() {
                let count = found.len();
                assert!(all.starts_with(&found), "cut at {length}: {count} events");
            }
        }
    }
}

/// Without a return path a source that closes at a footer and an EOF has sent no description.
#[test]
fn bytes_of_the_devices_are_events_as_they_come() {
    let whole = stream(Options::new(q35("10.0")).unconfirmed());
    let mut events = Events::new(&whole[..]);
    let mut bytes: Vec<u8> = Vec::new();
    let part = loop {
        match events.next().unwrap() {
            Event::Devices(some) => bytes.extend(some),
            Event::End(part) => break part,
            _ => assert!(bytes.is_empty(), "nothing comes between"),
        }
    };
    assert_eq!(part.as_bytes(), bytes);
    assert_eq!(part.sections()[1].id, SectionId(3));
}

proptest! {
    #[test]
    fn any_bytes_never_panic(noise in proptest::collection::vec(any::<u8>(), 0..600), head in 0_usize..300) {
        let whole = stream(Options::new(q35("10.0")).sync_mode(None));
        for bytes in [&noise[..], &[&whole[..head.min(whole.len())], &noise].concat()] {
            let mut events = Events::new(bytes);
            // Each event takes a byte, or is one of the few that have none.
            for _ in 0..4 * (bytes.len() + 4) {
                match events.next() {
                    Ok(event) => drop(name(&event)),
                    Err(_) => break,
                }
            }
            prop_assert!(events.next().is_err());
        }
    }
}
