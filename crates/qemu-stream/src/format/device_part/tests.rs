use proptest::prelude::*;

use super::*;
use crate::{
    error::{Malformed, Violation},
    format::testing::{dump, section_name},
};

/// A part with the sections given as dumps, closed with EOF and this JSON.
fn part(sections: &str, json: &str) -> Vec<u8> {
    let mut bytes = dump(sections);
    Section::Eof.encode(&mut bytes);
    Section::VmDescription(u32::try_from(json.len()).unwrap()).encode(&mut bytes);
    bytes.extend(json.as_bytes());
    bytes
}

fn found(bytes: &[u8]) -> Option<DevicePart> {
    EndFinder::new(true).find(&mut bytes.to_vec()).unwrap()
}

fn misfit(bytes: &[u8]) -> Misfit {
    let mut finder = EndFinder::new(true);
    assert_eq!(finder.find(&mut bytes.to_vec()).unwrap(), None);
    match finder.missing(bytes.len()) {
        Malformed::NoDescription { last: Some(misfit), .. } => misfit,
        other => panic!("no candidate was tried: {other}"),
    }
}

/// In the shape of QEMU 7.2.22's description: a device with fields, arrays, a struct and
/// subsections, one with an instance above 2^31, one of the old style.
const JSON: &str = r#"{"page_size": 4096, "devices": [
  {"name": "timer", "instance_id": 0, "vmsd_name": "timer", "version": 2, "fields": [
     {"name": "a", "type": "int64", "size": 8}, {"name": "b", "array_len": 2, "type": "uint16", "size": 2}],
   "subsections": [{"vmsd_name": "timer/x", "version": 1, "fields": [
     {"name": "s", "type": "struct", "struct": {"vmsd_name": "y", "fields": [{"name": "z", "size": 1}]}, "size": 1}],
     "subsections": [{"vmsd_name": "t", "version": 1, "fields": []}]}]},
  {"name": "ich", "instance_id": -2, "vmsd_name": "ich", "version": 1, "fields": [
     {"name": "i", "index": 0, "type": "u8", "size": 1}, {"name": "i", "index": 1, "type": "u8", "size": 1}]},
  {"name": "old", "instance_id": 1, "size": 3, "fields": [{"name": "data", "size": 3, "type": "buffer"}]}]}"#;

const SECTIONS: &str = "
    04 00 00 00 00 05 \"timer\" 00 00 00 00 00 00 00 02
       11 11 11 11 11 11 11 11 22 22 22 22 05 07 \"timer/x\" 00 00 00 01 33 05 01 \"t\" 00 00 00 01
    7e 00 00 00 00
    04 00 00 00 05 03 \"ich\" ff ff ff fe 00 00 00 01 44 44 7e 00 00 00 05
    04 00 00 00 06 03 \"old\" 00 00 00 01 00 00 00 09 55 55 55 7e 00 00 00 06";

#[test]
fn sections_are_split_as_described() {
    let part = found(&part(SECTIONS, JSON)).unwrap();
    let lengths: Vec<(String, u32, u32, usize)> = part
        .sections()
        .iter()
        .map(|s| (s.name.to_string(), s.instance, s.version, part.body(s).unwrap().len()))
        .collect();
    let expected = [("timer", 0, 2, 33), ("ich", u32::MAX - 1, 1, 2), ("old", 1, 9, 3)];
    assert_eq!(lengths, expected.map(|(name, instance, version, l)| (name.to_owned(), instance, version, l)));
    assert_eq!(part.description(), Some(JSON.as_bytes()));
    assert_eq!(part.blob(), dump(SECTIONS));
}

/// A description that could clear the screen or imitate a message.
#[test]
fn names_from_a_description_are_escaped_in_errors() {
    for json in [
        r#"{"devices": [{"name": "x\u001b]0;owned\u0007\u202e\nmultifd: received ok", "instance_id": 1}]}"#,
        "{\"devices\": [{\"name\": \"\u{9b}2J\", \"instance_id\": 1}]}",
        "{\"devices\": \"\u{9b}2J\u{202e}\"}",
    ] {
        let text = misfit(&part(SECTIONS, json)).to_string();
        assert!(!text.contains(multifd::error::is_executed), "{text:?}");
        assert!(text.contains("2J") || text.contains(r"\u{1b}]0;owned\u{7}"), "{text}");
    }
}

#[test]
fn a_cut_part_has_no_end_at_any_byte() {
    let bytes = part(SECTIONS, JSON);
    for length in 0..bytes.len() {
        let mut finder = EndFinder::new(true);
        assert_eq!(finder.find(&mut bytes[..length].to_vec()).unwrap(), None, "cut at {length}");
    }
}

#[test]
fn the_end_is_found_in_a_part_that_arrives_byte_by_byte() {
    let bytes = part(SECTIONS, JSON);
    let mut finder = EndFinder::new(true);
    let mut collected = Vec::new();
    for (i, byte) in bytes.iter().enumerate() {
        collected.push(*byte);
        assert_eq!(finder.find(&mut collected).unwrap().is_some(), i + 1 == bytes.len());
    }
}

#[test]
fn bytes_behind_the_description_make_it_no_end() {
    let mut bytes = part(SECTIONS, JSON);
    bytes.push(0);
    assert_eq!(found(&bytes), None);
}

/// Device data may contain, by chance or malice, bytes that look like the end.
#[test]
fn a_false_end_in_device_data_is_passed_over() {
    let decoy = part("7e 00 00 00 00", r#"{"devices": []}"#);
    let json = format!(
        r#"{{"devices": [{{"name": "d", "instance_id": 0, "size": 0, "fields": [{{"size": {}}}]}}]}}"#,
        decoy.len()
    );
    let mut sections = String::from("04 00 00 00 00 01 \"d\" 00 00 00 00 00 00 00 01");
    decoy.iter().for_each(|byte| sections.push_str(&format!("{byte:02x}")));
    sections.push_str("7e 00 00 00 00");
    let bytes = part(&sections, &json);
    let mut finder = EndFinder::new(true);
    let mut collected = Vec::new();
    for (i, byte) in bytes.iter().enumerate() {
        collected.push(*byte);
        assert_eq!(finder.find(&mut collected).unwrap().is_some(), i + 1 == bytes.len());
    }
}

#[test]
fn a_description_that_does_not_fit_says_where() {
    let json = |device: &str| format!(r#"{{"devices": [{device}]}}"#);
    let section = "04 00 00 00 00 01 \"d\" 00 00 00 00 00 00 00 01 aa aa 7e 00 00 00 00";
    let fields = |size: u64| format!(r#""fields": [{{"size": {size}}}]"#);
    let fits = json(&format!(r#"{{"name": "d", "instance_id": 0, {}}}"#, fields(2)));
    assert!(found(&part(section, &fits)).is_some());
    for (expected, device) in [
        ("expected section of device \"e\"", format!(r#"{{"name": "e", "instance_id": 0, {}}}"#, fields(2))),
        ("instance 1", format!(r#"{{"name": "d", "instance_id": 1, {}}}"#, fields(2))),
        ("expected the footer", format!(r#"{{"name": "d", "instance_id": 0, {}}}"#, fields(1))),
        ("reaches beyond", format!(r#"{{"name": "d", "instance_id": 0, {}}}"#, fields(200))),
        ("reaches beyond", format!(r#"{{"name": "d", "instance_id": 0, {}}}"#, fields(u64::MAX))),
        (
            "reaches beyond",
            r#"{"name": "d", "instance_id": 0, "fields": [{"size": 9223372036854775808, "array_len": 2}]}"#
                .to_owned(),
        ),
        (
            "reaches beyond",
            r#"{"name": "d", "fields": [{"size": 18446744073709551615}, {"size": 3}]}"#.to_owned(),
        ),
        ("description: ", r#"{"name": "d", "fields": [{"size": -1}]}"#.to_owned()),
        ("description: ", r#"{"name": 3}"#.to_owned()),
        ("description: ", "".to_owned() + &"[".repeat(200_000)),
        ("bytes after", String::new()),
    ] {
        let found = misfit(&part(section, &json(&device))).to_string();
        assert!(found.contains(expected), "{device:.80}: {found}");
    }
}

#[test]
fn deeply_nested_subsections_are_refused_not_followed() {
    let mut device = String::from(r#"{"name": "d", "instance_id": 0, "fields": []"#);
    for _ in 0..100_000 {
        device.push_str(r#", "subsections": [{"vmsd_name": "d""#);
    }
    device.push_str(&"}]".repeat(100_000));
    let json = format!(r#"{{"devices": [{device}}}]}}"#);
    let found = misfit(&part("7e 00 00 00 00", &json)).to_string();
    assert!(found.contains("recursion limit"), "{found}");
}

#[test]
fn more_devices_than_allowed_are_refused() {
    let devices = |count: usize| vec![r#"{"name":"d"}"#; count].join(",");
    let json = format!(r#"{{"devices": [{}]}}"#, devices(limits::DEVICES));
    assert!(Description::parse(json.as_bytes()).is_ok());
    let json = format!(r#"{{"devices": [{}]}}"#, devices(limits::DEVICES + 1));
    assert!(Description::parse(json.as_bytes()).is_err());
}

#[test]
fn a_description_longer_than_allowed_is_no_candidate() {
    for (length, candidates) in [(limits::DESCRIPTION, 1), (limits::DESCRIPTION + 1, 0)] {
        let mut bytes = dump("7e 00 00 00 00 00 06");
        bytes.extend(length.to_be_bytes());
        bytes.push(b'{');
        bytes.resize(11 + length as usize, b' ');
        let mut finder = EndFinder::new(true);
        assert_eq!(finder.find(&mut bytes).unwrap(), None);
        let missing = finder.missing(bytes.len());
        assert_eq!(matches!(missing, Malformed::NoDescription { last: Some(_), .. }), candidates == 1);
    }
}

#[test]
fn more_false_ends_than_allowed_are_refused() {
    let decoy = dump("7e 00 00 00 00 00 06 00 00 ff ff \"{\"");
    let mut finder = EndFinder::new(true);
    assert_eq!(finder.find(&mut decoy.repeat(limits::ENDS)), Ok(None));
    let mut finder = EndFinder::new(true);
    let refused = finder.find(&mut decoy.repeat(limits::ENDS + 1));
    assert!(matches!(refused, Err(Violation::TooManyEnds { .. })));
}

/// All candidates end at the same byte, so each must be parsed there; together they exceed the bound.
#[test]
fn parsing_in_search_of_the_end_is_bounded() {
    let length = 2_000_000;
    let mut bytes = Vec::new();
    for number in 0..100 {
        bytes.extend(dump("7e 00 00 00 00 00 06"));
        bytes.extend(u32::to_be_bytes(length - number * 12));
        bytes.push(b'{');
    }
    bytes.resize(11 + length as usize, b' ');
    let refused = EndFinder::new(true).find(&mut bytes);
    assert!(matches!(refused, Err(Violation::TooManyEnds { .. })));
}

#[test]
fn a_part_of_2_3_has_no_footers() {
    let sections = "04 00 00 00 00 01 \"d\" 00 00 00 00 00 00 00 01 aa aa";
    let json = r#"{"devices": [{"name": "d", "instance_id": 0, "fields": [{"size": 2}]}]}"#;
    let mut bytes = part(sections, json);
    assert_eq!(found(&bytes), None);
    let found = EndFinder::new(false).find(&mut bytes).unwrap().unwrap();
    assert_eq!(found.sections().len(), 1);
}

#[test]
fn an_embedders_devices_are_described_so_that_they_can_be_split() {
    let device = |name: &str, instance: u32, state: &[u8]| Device {
        name: section_name(name),
        instance,
        version: 3,
        state: state.to_vec(),
    };
    let devices =
        [device("vcpu", 0, &[7; 300]), device("vcpu", u32::MAX, &[]), device("uart", 0, b"\0\x06{")];
    let built = DevicePart::build(&devices, 4096, SectionId(2)).unwrap();
    assert_eq!(found(built.as_bytes()), Some(built.clone()));
    assert_eq!(built.sections()[2].id, SectionId(4));
    assert_eq!(built.body(&built.sections()[0]), Some(&[7; 300][..]));
    let none = DevicePart::build(&[], 4096, SectionId(2)).unwrap();
    assert_eq!(found(none.as_bytes()), Some(none.clone()));
    assert!(DevicePart::build(&[device("\u{e9}", 0, &[])], 4096, SectionId(2)).is_err());
}

/// Observed: QEMU 10.0 loads both, and the state of the second one stays. No QEMU sends such devices.
#[test]
fn two_sections_of_one_name_and_instance_are_refused() {
    let section = |id: u8, instance: u8| {
        format!("04 00 00 00 {id:02x} 01 \"d\" 00 00 00 {instance:02x} 00 00 00 01 aa 7e 00 00 00 {id:02x}")
    };
    let entry =
        |instance: u8| format!(r#"{{"name": "d", "instance_id": {instance}, "fields": [{{"size": 1}}]}}"#);
    let json = |one, two| format!(r#"{{"devices": [{}, {}]}}"#, entry(one), entry(two));
    let both = |id, instance| section(0, 0) + &section(id, instance);
    assert!(found(&part(&both(1, 1), &json(0, 1))).is_some(), "another instance");
    for id in [0, 1] {
        let refused = EndFinder::new(true).find(&mut part(&both(id, 0), &json(0, 0)));
        let twice = Violation::DeviceTwice { name: section_name("d"), instance: 0 };
        assert_eq!(refused, Err(twice), "section number {id}");
    }
    let device = Device { name: section_name("d"), instance: 0, version: 1, state: vec![1] };
    let refused = DevicePart::build(&[device.clone(), device], 4096, SectionId(2)).unwrap_err();
    assert!(refused.to_string().contains("device \"d\" instance 0 is sent twice"), "{refused}");
}

#[test]
fn an_end_inside_is_found_and_what_follows_is_removed() {
    let bytes = part(SECTIONS, JSON);
    for step in [1, 7, bytes.len() + 40] {
        let followed = [&bytes[..], &[0x7e; 40], &dump("7e 00 00 00 00 00 06 00 00 00 02 \"{}\"")].concat();
        let (mut finder, mut collected, mut found) = (EndFinder::new(true), Vec::new(), None);
        for piece in followed.chunks(step) {
            collected.extend(piece);
            found = finder.find_inside(&mut collected).unwrap();
            if found.is_some() {
                break;
            }
        }
        assert_eq!(found.expect("an end").as_bytes(), bytes, "in pieces of {step}");
    }
}

#[test]
fn without_a_description_the_end_is_the_last_footer_before_zeros() {
    for id in ["00 00 00 05", "00 00 01 00", "00 00 00 00"] {
        let bytes = dump(&format!("04 {id} 01 \"d\" 00 00 00 00 00 00 00 01 aa 7e {id} 00"));
        for zeros in [0, 1, 2, 5, 4096] {
            let followed = [&bytes[..], &vec![0; zeros]].concat();
            assert_eq!(
                EndFinder::new(true).end_before_zeros(&followed),
                Some(bytes.len()),
                "{id}, {zeros} zeros"
            );
        }
        assert_eq!(EndFinder::new(true).end_before_zeros(&[&bytes[..], &[1]].concat()), None);
    }
}

proptest! {
    #[test]
    fn built_parts_are_found_however_they_arrive(
        states in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..8),
        step in 1_usize..100,
    ) {
        let devices: Vec<Device> = states.into_iter().zip(0..).map(|(state, instance)| {
            Device { name: section_name("d"), instance, version: 1, state }
        }).collect();
        let built = DevicePart::build(&devices, 4096, SectionId(1)).unwrap();
        let mut finder = EndFinder::new(true);
        let mut collected = Vec::new();
        let mut found = None;
        for piece in built.as_bytes().chunks(step) {
            collected.extend(piece);
            found = finder.find(&mut collected).unwrap();
        }
        prop_assert_eq!(found, Some(built));
    }

    #[test]
    fn random_bytes_never_panic(noise in proptest::collection::vec(any::<u8>(), 0..600), json in "\\PC{0,100}") {
        let mut bytes = noise;
        bytes.extend(part("7e 00 00 00 00", &format!("{{{json}")));
        let _ = EndFinder::new(true).find(&mut bytes);
    }
}
