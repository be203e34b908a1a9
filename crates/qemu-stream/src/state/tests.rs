use super::*;
use crate::format::{Device, EarlyPart, EndFinder, SectionId, testing::section_name};

/// A device part with one device, whose description is this one.
fn part(state: &[u8], fields: &str) -> DevicePart {
    let device = Device { name: section_name("cpu"), instance: 1, version: 12, state: state.to_vec() };
    let built = DevicePart::build(&[device], 4096, SectionId(2)).expect("a part");
    let json =
        format!(r#"{{"page_size": 4096, "devices": [{{"name": "cpu", "instance_id": 1, {fields}}}]}}"#);
    let mut bytes = built.blob().to_vec();
    bytes.extend([0, 6]);
    bytes.extend(u32::try_from(json.len()).expect("short").to_be_bytes());
    bytes.extend(json.as_bytes());
    let mut finder = EndFinder::new(true).early(EarlyPart::default());
    finder.find(&mut bytes).expect("valid").expect("a part that fits")
}

fn shown(value: Value<'_>) -> String {
    match value {
        Value::Struct(fields) => {
            let fields: Vec<_> =
                fields.map(|field| format!("{}={}", field.name(), shown(field.value()))).collect();
            format!("{{{}}}", fields.join(" "))
        }
        Value::Array(array) => format!("[{}]", array.iter().map(shown).collect::<Vec<_>>().join(" ")),
        Value::Unsigned(number) => format!("{number}"),
        Value::Signed(number) => format!("{number:+}"),
        Value::Bool(value) => format!("{value}"),
        Value::Bytes(bytes) => format!("{bytes:02x?}"),
    }
}

#[test]
fn fields_structs_arrays_and_subsections_are_read() {
    let state = [
        &[0, 1, 0, 2][..],   // two numbers
        &[0xff],             // -1
        &[1],                // true
        &[9, 0, 7, 9, 0, 8], // two structs
        &[0xaa, 0xbb],       // bytes
        &[5, 3, b's', b'u', b'b', 0, 0, 0, 1],
        &[4],
    ]
    .concat();
    let part = part(
        &state,
        r#""vmsd_name": "cpu", "version": 12, "fields": [
            {"name": "two", "type": "uint16", "size": 2, "array_len": 2},
            {"name": "minus", "type": "int8 equal", "size": 1},
            {"name": "on", "type": "bool", "size": 1},
            {"name": "segs", "type": "struct", "size": 3, "array_len": 2, "struct": {"vmsd_name": "seg", "version": 1, "fields": [
                {"name": "a", "type": "uint8", "size": 1}, {"name": "b", "type": "uint16", "size": 2}]}},
            {"name": "raw", "type": "tmp", "size": 2, "index": 3},
            {"name": "none", "type": "uint8", "size": 0, "array_len": 4000000000}
        ], "subsections": [{"vmsd_name": "sub", "version": 1, "fields": [{"name": "x", "type": "uint8", "size": 1}]}]"#,
    );
    let devices = Devices::of(&part).expect("devices");
    let device = devices.find("cpu", 1).expect("a device");
    assert_eq!((device.version(), device.bytes().len(), devices.iter().count()), (12, state.len(), 1));
    let fields: Vec<String> =
        device.fields().map(|field| format!("{}: {}", field.name(), shown(field.value()))).collect();
    assert_eq!(
        fields,
        [
            "two: [1 2]",
            "minus: -1",
            "on: true",
            "segs: [{a=9 b=7} {a=9 b=8}]",
            "raw: [aa, bb]",
            "none: []",
            "sub: {x=4}",
        ]
    );
    assert_eq!(device.fields().nth(4).and_then(|field| field.index()), Some(3));
    assert!(matches!(device.value("two"), Some(Value::Array(two)) if two.number(1) == Some(2)));
    assert!(devices.find("cpu", 0).is_none() && device.value("x").is_none());
}

/// The sum of a device is right, and that of a struct in it is not: its fields would overlap their neighbour.
#[test]
fn struct_that_is_longer_than_its_field_is_refused() {
    let part = part(
        &[0; 4],
        r#""fields": [{"name": "s", "type": "struct", "size": 2, "struct": {"fields": [
            {"name": "a", "type": "uint32", "size": 4}]}}, {"name": "b", "type": "uint16", "size": 2}]"#,
    );
    let refused = Devices::of(&part).expect_err("refused");
    assert!(
        matches!(&refused, StateError::Sizes { device, field } if device == "cpu:1" && field == "s"),
        "{refused}"
    );
}

#[test]
fn devices_without_a_description_are_not_shown() {
    let built = part(&[7], r#""fields": [{"name": "a", "type": "uint8", "size": 1}]"#);
    let finder = EndFinder::new(true);
    let part = finder.without_description([built.blob(), &[0]].concat()).expect("a part");
    assert!(matches!(Devices::of(&part), Err(StateError::NotDescribed)));
}
