use proptest::prelude::*;

use super::*;
use crate::format::testing::{assert_cut_is_refused, block_name, dump, reader};

fn encoded(command: &Command) -> Vec<u8> {
    let mut out = Vec::new();
    command.encode(&mut out);
    out
}

/// The first two and the last were captured from QEMU 10.0.2; the others follow the format's description.
#[test]
fn commands_are_what_qemu_writes() {
    let discard = Command::PostcopyRamDiscard { block: block_name("pc.ram"), ranges: vec![(0x1000, 0x2000)] };
    for (golden, command) in [
        ("00 01 00 00", Command::OpenReturnPath),
        ("00 02 00 04 00 00 00 01", Command::Ping(1)),
        ("00 03 00 00", Command::PostcopyAdvise(None)),
        (
            "00 03 00 10 00 00 00 00 00 20 10 00 00 00 00 00 00 00 10 00",
            Command::PostcopyAdvise(Some(PageSizes { host: 0x20_1000, target: 0x1000 })),
        ),
        ("00 04 00 00", Command::PostcopyListen),
        ("00 05 00 00", Command::PostcopyRun),
        ("00 06 00 19 00 06 \"pc.ram\" 00 00 00 00 00 00 00 10 00 00 00 00 00 00 00 20 00", discard),
        ("00 07 00 04 00 00 12 34", Command::Packaged(0x1234)),
        ("00 08 00 00", Command::EnableColo),
        ("00 09 00 00", Command::PostcopyResume),
        ("00 0a 00 07 06 \"pc.ram\"", Command::RecvBitmap(block_name("pc.ram"))),
        ("00 0b 00 00", Command::SwitchoverStart),
    ] {
        let golden = dump(golden);
        assert_eq!(encoded(&command), golden, "{}", command.name());
        assert_eq!(Command::decode(&mut reader(&golden)).unwrap(), command);
        assert_cut_is_refused(&golden, &[], Command::decode);
    }
}

#[test]
fn unknown_numbers_and_wrong_lengths_are_refused() {
    for bytes in [
        "00 00 00 00",
        "00 0c 00 00",
        "00 01 00 01 00",
        "00 02 00 03 00 00 00",
        "00 02 00 05 00 00 00 00 00",
        "00 03 00 08 00 00 00 00 00 00 00 00",
        "00 0a 00 06 06 \"pc.ram\"",
        "00 0a 00 08 06 \"pc.ram\" 00",
        "00 06 00 18 00 06 \"pc.ram\" 00 00 00 00 00 00 00 10 00 00 00 00 00 00 00 20 00",
        "00 06 00 02 00 06 \"pc.ram\" 00 00 00 00 00 00 00 10 00 00 00 00 00 00 00 20 00",
        "00 06 00 09 01 06 \"pc.ram\" 00",
        "00 06 00 09 00 06 \"pc.ram\" 01",
        "00 0b 00 01 00",
    ] {
        let error = Command::decode(&mut reader(&dump(bytes))).unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{bytes}: {error}");
    }
}

#[test]
fn the_longest_list_of_ranges_fits_one_command() {
    let block = BlockName::new([b'x'; 255]).unwrap();
    let command = Command::PostcopyRamDiscard { block, ranges: vec![(1, 2); Command::RANGES_MAX] };
    assert_eq!(Command::decode(&mut reader(&encoded(&command))).unwrap(), command);
}

proptest! {
    #[test]
    fn discarded_ranges_read_back_as_written(
        ranges in proptest::collection::vec((any::<u64>(), any::<u64>()), 0..100),
        name in proptest::collection::vec(1_u8.., 1..=255),
    ) {
        let command = Command::PostcopyRamDiscard { block: BlockName::new(name).unwrap(), ranges };
        prop_assert_eq!(Command::decode(&mut reader(&encoded(&command))).unwrap(), command);
    }

    #[test]
    fn random_bytes_never_panic(number in 0_u8..13, noise in proptest::collection::vec(any::<u8>(), 0..600)) {
        let _ = Command::decode(&mut reader(&[&[0, number][..], &noise].concat()));
    }
}
