use proptest::prelude::*;

use super::*;
use crate::format::testing::{assert_cut_is_refused, dump, reader, section_name};

fn encoded(section: &Section) -> Vec<u8> {
    let mut out = Vec::new();
    section.encode(&mut out);
    out
}

fn ram(id: u32) -> SectionHead {
    SectionHead { id: SectionId(id), name: section_name("ram"), instance: 0, version: 4 }
}

/// Captured from QEMU 10.0.2.
#[test]
fn heads_are_what_qemu_writes() {
    for (golden, section) in [
        ("01 00 00 00 01 03 72 61 6d 00 00 00 00 00 00 00 04", Section::Start(ram(1))),
        ("02 00 00 00 01", Section::Part(SectionId(1))),
        ("03 00 00 00 01", Section::End(SectionId(1))),
        ("08 00 02 00 04 00 00 00 01", Section::Command(Command::Ping(1))),
        ("06 00 00 b2 af", Section::VmDescription(0xb2af)),
        ("00", Section::Eof),
    ] {
        let golden = dump(golden);
        assert_eq!(encoded(&section), golden);
        assert_eq!(Section::decode(&mut reader(&golden)).unwrap(), section);
        assert_cut_is_refused(&golden, &[], Section::decode);
    }
}

#[test]
fn types_that_have_no_place_between_sections_are_refused() {
    for kind in [0x05, 0x07, 0x7e] {
        let error = Section::decode(&mut reader(&[kind, 0, 0, 0, 0])).unwrap_err();
        assert!(matches!(error, Error::Violation { what: Violation::Misplaced { .. }, .. }), "{error}");
    }
    for kind in [0x09, 0x7d, 0x7f, 0xff] {
        let error = Section::decode(&mut reader(&[kind, 0, 0, 0, 0])).unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{error}");
    }
}

#[test]
fn a_footer_must_close_the_open_section() {
    let mut bytes = Vec::new();
    encode_footer(SectionId(2), &mut bytes);
    assert_eq!(bytes, dump("7e 00 00 00 02"));
    assert_cut_is_refused(&bytes, &[], |r| decode_footer(SectionId(2), r));
    assert_eq!(
        decode_footer(SectionId(1), &mut reader(&bytes)).unwrap_err().to_string(),
        "main stream: offset 0x1: footer: expected section 0x1, found 0x2"
    );
    assert_eq!(
        decode_footer(SectionId(1), &mut reader(&[2])).unwrap_err().to_string(),
        "main stream: offset 0x0: section 0x1: expected a footer (0x7e), found 0x2"
    );
}

proptest! {
    #[test]
    fn a_head_reads_back_as_written(
        id: u32, instance: u32, version: u32, name in proptest::collection::vec(1_u8.., 1..=255),
    ) {
        let name = SectionName::new(name).unwrap();
        let head = SectionHead { id: SectionId(id), name, instance, version };
        for section in [Section::Start(head.clone()), Section::Full(head)] {
            prop_assert_eq!(Section::decode(&mut reader(&encoded(&section))).unwrap(), section);
        }
    }

    #[test]
    fn random_bytes_never_panic(noise in proptest::collection::vec(any::<u8>(), 0..600)) {
        let _ = Section::decode(&mut reader(&noise));
    }
}
