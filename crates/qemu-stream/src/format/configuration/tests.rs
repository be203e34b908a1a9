use proptest::prelude::*;

use super::*;
use crate::format::testing::{assert_cut_is_refused, dump, reader};

fn q35(version: &str) -> Configuration {
    Configuration::new(MachineType::new(format!("pc-q35-{version}")).unwrap())
}

fn uuid() -> VmUuid {
    "00112233-4455-6677-8899-aabbccddeeff".parse().unwrap()
}

fn encoded(configuration: Option<&Configuration>) -> Vec<u8> {
    let mut out = Vec::new();
    encode_header(configuration, &mut out);
    out
}

fn decoded(bytes: &[u8]) -> Result<Option<Configuration>, Error> {
    decode_header(&mut reader(bytes))
}

/// Captured from QEMU 10.0.2 with validate-uuid on and a UUID given.
#[test]
fn header_with_uuid_is_what_qemu_writes() {
    let golden = dump(
        "51 45 56 4d 00 00 00 03  07  00 00 00 0b \"pc-q35-10.0\"
         05 12 \"configuration/uuid\" 00 00 00 01  00 11 22 33 44 55 66 77 88 99 aa bb cc dd ee ff",
    );
    let configuration = Configuration { uuid: Some(uuid()), ..q35("10.0") };
    assert_eq!(encoded(Some(&configuration)), golden);
    assert_eq!(decoded(&golden).unwrap(), Some(configuration));
}

/// Captured from QEMU 7.2.22 and 10.0.2 with x-ignore-shared on.
#[test]
fn capabilities_are_what_qemu_writes() {
    let golden = dump(
        "51 45 56 4d 00 00 00 03  07  00 00 00 0a \"pc-q35-7.2\"
         05 1a \"configuration/capabilities\" 00 00 00 01  00 00 00 01  0f \"x-ignore-shared\"",
    );
    let configuration = Configuration { ignore_shared: true, ..q35("7.2") };
    assert_eq!(encoded(Some(&configuration)), golden);
    assert_eq!(decoded(&golden).unwrap(), Some(configuration));
}

#[test]
fn a_header_without_configuration_is_whole() {
    let bytes = encoded(None);
    assert_eq!(bytes.len(), 8);
    assert_eq!(decoded(&bytes).unwrap(), None);
}

#[test]
fn the_byte_behind_the_last_subsection_stays() {
    let mut bytes = encoded(Some(&q35("7.2")));
    bytes.push(0x08);
    let mut r = reader(&bytes);
    decode_header(&mut r).unwrap();
    assert_eq!(r.peek().unwrap(), Some(0x08));
}

#[test]
fn a_cut_header_is_refused_at_every_byte() {
    let full = Configuration {
        target_page_size: Some(PageSize::KIB_64),
        ignore_shared: true,
        mapped_ram: true,
        uuid: Some(uuid()),
        ..q35("10.0")
    };
    // Between two subsections, a shorter configuration is complete.
    let ends: Vec<usize> = [
        q35("10.0"),
        Configuration { target_page_size: full.target_page_size, ..q35("10.0") },
        Configuration { uuid: None, ..full.clone() },
    ]
    .iter()
    .map(|shorter| encoded(Some(shorter)).len())
    .chain([8])
    .collect();
    assert_cut_is_refused(&encoded(Some(&full)), &ends, decode_header);
}

#[test]
fn other_magics_and_versions_are_refused() {
    let error = decoded(&dump("7f 45 4c 47 00 00 00 03")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "main stream: offset 0x0: magic: expected 0x5145564d (\"QEVM\"), found 0x7f454c47"
    );
    for version in [0, 2, 4] {
        let error = decoded(&[&b"QEVM\0\0\0"[..], &[version]].concat()).unwrap_err();
        assert!(matches!(error, Error::Unsupported { what: Unsupported::Version(_), .. }));
    }
}

#[test]
fn an_unknown_subsection_is_refused_by_name() {
    let mut bytes = encoded(Some(&q35("10.0")));
    bytes.extend(dump("05 11 \"configuration/moo\" 00 00 00 01"));
    let error = decoded(&bytes).unwrap_err().to_string();
    assert!(error.contains("configuration subsection \"configuration/moo\""), "{error}");
}

#[test]
fn a_subsection_that_comes_twice_is_refused() {
    let mut bytes = encoded(Some(&Configuration { uuid: Some(uuid()), ..q35("10.0") }));
    let from = encoded(Some(&q35("10.0"))).len();
    bytes.extend_from_within(from..);
    assert!(matches!(decoded(&bytes), Err(Error::Violation { .. })));
}

#[test]
fn lengths_counts_and_values_beyond_their_bounds_are_refused() {
    let header = "51 45 56 4d 00 00 00 03 07";
    let machine = "00 00 00 01 \"m\"";
    for (case, bytes) in [
        ("machine type of 256 bytes", dump(&format!("{header} 00 00 01 00"))),
        ("machine type of 0 bytes", dump(&format!("{header} 00 00 00 00 08"))),
        ("machine type with a NUL", dump(&format!("{header} 00 00 00 01 00"))),
        (
            "65 capabilities",
            dump(&format!("{header} {machine} 05 1a \"configuration/capabilities\" 00 00 00 01 00 00 00 41")),
        ),
        (
            "unknown capability",
            dump(&format!(
                "{header} {machine} 05 1a \"configuration/capabilities\" 00 00 00 01 00 00 00 01 01 \"x\""
            )),
        ),
        (
            "version 2 of a subsection",
            dump(&format!("{header} {machine} 05 12 \"configuration/uuid\" 00 00 00 02")),
        ),
        (
            "pages of 128 KiB",
            dump(&format!(
                "{header} {machine} 05 1e \"configuration/target-page-bits\" 00 00 00 01 00 00 00 11"
            )),
        ),
    ] {
        let error = decoded(&bytes).unwrap_err();
        assert!(!matches!(error, Error::Cut { .. }), "{case}: {error}");
    }
}

proptest! {
    #[test]
    fn a_configuration_reads_back_as_written(
        machine in "[!-~]{1,255}",
        bits in proptest::option::of(12_u32..=16),
        ignore_shared: bool,
        mapped_ram: bool,
        uuid in proptest::option::of(any::<[u8; 16]>()),
    ) {
        let configuration = Configuration {
            machine: MachineType::new(machine).unwrap(),
            target_page_size: bits.and_then(PageSize::from_bits),
            ignore_shared,
            mapped_ram,
            uuid: uuid.map(VmUuid),
        };
        prop_assert_eq!(decoded(&encoded(Some(&configuration))).unwrap(), Some(configuration));
    }

    #[test]
    fn random_bytes_behind_a_header_never_panic(noise in proptest::collection::vec(any::<u8>(), 0..600)) {
        let _ = decoded(&[b"QEVM\0\0\0\x03\x07".as_slice(), &noise].concat());
    }
}
