//! Hostile streams: cut everywhere, changed everywhere, with items in the wrong place.

use std::{error::Error as _, sync::OnceLock};

use proptest::prelude::*;
use qemu_stream::{
    error::{Error, Unsupported, Violation},
    format::{Command, Section, SectionHead, SectionId, SectionName, SyncMode},
    incoming::{Incoming, Outcome},
    outgoing::Options,
};

use crate::kit::{Memory, Tape, all_options, q35, stream};

fn run(bytes: &[u8]) -> Result<Memory, Error> {
    let mut memory = Memory::default();
    Incoming::new(Tape::playing(bytes)).run(&mut memory).map(|_| memory)
}

/// A whole stream with `piece` inserted before the first occurrence of `mark`.
fn with(piece: &[u8], mark: &[u8]) -> Vec<u8> {
    let whole = stream(Options::new(q35("10.0")));
    let at = whole.windows(mark.len()).position(|window| window == mark).unwrap();
    [&whole[..at], piece, &whole[at..]].concat()
}

const RAM_START: &[u8] = b"\x01\0\0\0\x01\x03ram";
const PART: &[u8] = b"\x02\0\0\0\x01";
const END: &[u8] = b"\x03\0\0\0\x01";

fn encoded(section: &Section) -> Vec<u8> {
    let mut bytes = Vec::new();
    section.encode(&mut bytes);
    bytes
}

fn head(id: u32, name: &str) -> SectionHead {
    SectionHead { id: SectionId(id), name: SectionName::new(name).unwrap(), instance: 0, version: 4 }
}

#[test]
fn a_stream_cut_at_any_byte_is_refused() {
    for options in all_options() {
        let whole = stream(options);
        let eof = whole.windows(3).rposition(|window| window == b"\0\x06\0").unwrap();
        // A stream with footers that ends after its EOF is one whose source omits the description.
        let closes = !whole.windows(5).any(|window| window == b"\x08\0\x01\0\0");
        let lacks_nothing = |length| closes && length == eof + 1 && whole[eof - 5] == 0x7e;
        for length in (0..whole.len()).filter(|length| !lacks_nothing(*length)) {
            let mut incoming = Incoming::new(Tape::playing(&whole[..length]));
            let error = incoming.run(&mut Memory::default()).unwrap_err();
            assert!(matches!(error, Error::Cut { .. } | Error::Malformed { .. }), "cut at {length}: {error}");
            let had_return_path = incoming.has_return_path();
            let said = incoming.finish(Outcome::Failed).unwrap().output;
            assert_eq!(said.ends_with(&[0, 1, 0, 4, 0, 0, 0, 1]), had_return_path);
        }
    }
}

#[test]
fn commands_beyond_precopy_are_refused_with_the_capability_to_switch_off() {
    for (command, capability) in [
        (Command::PostcopyAdvise(None), "dirty-bitmaps"),
        (Command::PostcopyListen, "postcopy-ram"),
        (Command::PostcopyRun, "postcopy-ram"),
        (Command::Packaged(0), "postcopy-ram"),
        (Command::PostcopyResume, "postcopy-ram"),
        (Command::EnableColo, "x-colo"),
    ] {
        let name = command.name();
        let piece = encoded(&Section::Command(command));
        for mark in [RAM_START, PART, END] {
            let error = run(&with(&piece, mark)).err().unwrap();
            let Error::Unsupported { what: Unsupported::Capability { what, capability: found }, .. } = error
            else {
                panic!("{error}");
            };
            assert_eq!(found, capability);
            assert!(what.contains(name), "{what}");
        }
    }
}

#[test]
fn sections_that_cannot_be_skipped_are_refused_by_name() {
    for (name, remedy) in [
        ("dirty-bitmap", "dirty-bitmaps"),
        ("block", "capability block"),
        ("0000:00:05.0/vfio", "unplug the vfio device"),
        ("spapr/htab", "spapr/htab"),
        ("moo", "section \"moo\" cannot be skipped"),
    ] {
        let piece = encoded(&Section::Start(head(9, name)));
        for mark in [RAM_START, PART] {
            let error = run(&with(&piece, mark)).err().unwrap().to_string();
            assert!(error.contains(name) && error.contains(remedy), "{error}");
        }
    }
}

#[test]
fn what_breaks_the_order_is_refused() {
    let start = encoded(&Section::Start(head(9, "ram")));
    let switchover = encoded(&Section::Command(Command::SwitchoverStart));
    for (case, bytes) in [
        ("a second start of ram", with(&start, PART)),
        ("eof before the end of ram", with(&[0], PART)),
        ("eof before ram", with(&[0], RAM_START)),
        ("a part before ram", with(PART, RAM_START)),
        ("a part of another section", with(b"\x02\0\0\0\x07", PART)),
        ("switchover before ram", with(&switchover, RAM_START)),
        ("a description before the end", with(b"\x06\0\0\0\0", PART)),
    ] {
        let error = run(&bytes).err().unwrap();
        assert!(matches!(error, Error::Violation { .. }), "{case}: {error}");
    }
}

#[test]
fn ping_without_a_return_path_is_refused() {
    let mut whole = stream(Options::new(q35("10.0")).unconfirmed());
    let at = whole.windows(RAM_START.len()).position(|window| window == RAM_START).unwrap();
    whole.splice(at..at, encoded(&Section::Command(Command::Ping(1))));
    let error = run(&whole).err().unwrap();
    assert!(matches!(error, Error::Violation { what: Violation::PingWithoutReturnPath, .. }), "{error}");
}

#[test]
fn footers_are_there_everywhere_or_nowhere() {
    let footer = b"\x7e\0\0\0\x01";
    let whole = stream(Options::new(q35("10.0")));
    let footers: Vec<usize> = (0..whole.len() - 5).filter(|at| whole[*at..].starts_with(footer)).collect();
    assert_eq!(footers.len(), 3);
    for (number, at) in footers.into_iter().enumerate() {
        let mut bytes = whole.clone();
        bytes.drain(at..at + 5);
        let error = run(&bytes).err().unwrap();
        let Error::Violation { what, .. } = error else { panic!("{error}") };
        // Without the first one there are none, and the second has no place.
        assert!(if number == 0 {
            matches!(what, Violation::Misplaced { record: "FOOTER", .. })
        } else {
            matches!(what, Violation::NoFooter { .. })
        });
    }
}

#[test]
fn a_mapped_ram_stream_over_a_connection_is_refused() {
    let whole = stream(Options::new(q35("10.0")));
    let subsection = b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0amapped-ram";
    let bytes = [&whole[..24], subsection, &whole[24..]].concat();
    let error = run(&bytes).err().unwrap().to_string();
    assert!(error.contains("switch capability mapped-ram off"), "{error}");
}

#[test]
fn pages_in_the_first_section_of_ram_are_refused() {
    let bytes = with(b"\0\0\0\0\0\0\0\x02\x06pc.ram\0", b"\0\0\0\0\0\0\x02\0");
    let error = run(&bytes).err().unwrap();
    assert!(matches!(error, Error::Violation { what: Violation::Misplaced { .. }, .. }), "{error}");
}

/// A FLUSH is a sync point in legacy mode too.
#[test]
fn a_flush_in_legacy_mode_is_one_more_sync_point() {
    let mut whole = stream(Options::new(q35("10.0")).sync_mode(Some(SyncMode::Legacy)));
    let at = whole.windows(5).position(|window| window == PART).unwrap() + 5;
    whole.splice(at..at, *b"\0\0\0\0\0\0\x02\0");
    assert_eq!(run(&whole).unwrap().syncs(), 4);
}

#[test]
fn an_xbzrle_delta_changes_the_page_that_came_before() {
    let delta = b"\0\0\0\0\0\0\x40\x60\x01\0\x04\x02\x02\x09\x09";
    let mut whole = stream(Options::new(q35("10.0")).sync_mode(None));
    let mark = b"\0\0\0\0\0\0\x10\x08\x06pc.rom";
    let at = whole.windows(mark.len()).position(|window| window == mark).unwrap();
    whole.splice(at..at, delta.iter().copied());
    let memory = run(&whole).unwrap();
    assert_eq!(memory.pages[&(0, 4)][..6], [7, 7, 9, 9, 7, 7]);
    // One byte less than the length of the delta.
    whole[at + 12] = 0x03;
    assert!(matches!(run(&whole), Err(Error::Malformed { .. })));
}

#[test]
fn an_error_of_the_destination_is_kept_with_its_cause() {
    let calls = ["configuration", "blocks", "sync", "zero_page", "page", "end_of_ram"];
    for call in calls {
        let mut memory = Memory { fails_at: Some(call), ..Memory::default() };
        let bytes = stream(Options::new(q35("10.0")).sync_mode(None));
        let error = Incoming::new(Tape::playing(&bytes)).run(&mut memory).unwrap_err();
        assert!(matches!(error, Error::Destination { .. }), "{error}");
        assert_eq!(error.source().unwrap().to_string(), format!("no {call}"));
        assert_eq!(memory.calls.last(), Some(&call));
    }
}

proptest! {
    #[test]
    fn a_changed_stream_never_panics(at in 0.0_f64..1.0, to: u8, cut in 0.0_f64..2.0) {
        static WHOLE: OnceLock<Vec<u8>> = OnceLock::new();
        let mut bytes = WHOLE.get_or_init(|| stream(Options::new(q35("10.0")).sync_mode(None))).clone();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a length")]
        let place = |share: f64| (bytes.len() as f64 * share) as usize;
        let (at, cut) = (place(at), place(cut).min(bytes.len()));
        bytes[at] = to;
        let _ = run(&bytes[..cut]);
    }
}
