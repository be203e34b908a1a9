use proptest::prelude::*;

use super::*;
use crate::format::testing::{assert_cut_is_refused, block_name, dump, reader};

fn encoded(message: &Message) -> Vec<u8> {
    let mut out = Vec::new();
    message.encode(&mut out);
    out
}

fn decoded(bytes: &[u8]) -> Result<Option<Message>, Error> {
    Message::decode(&mut reader(bytes))
}

/// According to the format's description; SHUT and PONG were captured from QEMU 7.2.22 and 10.0.2. The last one is ours.
#[test]
fn messages_are_what_qemu_writes() {
    for (golden, message) in [
        ("00 01 00 04 00 00 00 00", Message::Shut(0)),
        ("00 02 00 04 00 00 00 01", Message::Pong(1)),
        (
            "00 03 00 13 00 00 00 00 00 10 00 00 00 00 10 00 06 \"pc.ram\"",
            Message::ReqPages { block: Some(block_name("pc.ram")), start: 0x10_0000, length: 0x1000 },
        ),
        (
            "00 04 00 0c 00 00 00 00 00 10 00 00 00 00 10 00",
            Message::ReqPages { block: None, start: 0x10_0000, length: 0x1000 },
        ),
        (
            "00 05 00 07 06 \"pc.ram\" 00 00 00 00 00 00 00 08 ff 01 00 00 00 00 00 00 01 23 45 67 89 ab cd ef",
            Message::RecvBitmap { block: block_name("pc.ram"), bitmap: vec![0xff, 1, 0, 0, 0, 0, 0, 0] },
        ),
        ("00 06 00 04 00 00 00 01", Message::ResumeAck),
        ("00 07 00 00", Message::SwitchoverAck),
        ("6d 66 00 07 \"no disk\"", Message::Reason("no disk".into())),
    ] {
        let golden = dump(golden);
        assert_eq!(encoded(&message), golden);
        assert_eq!(decoded(&golden).unwrap(), Some(message));
        // At 0, the destination has closed between two messages.
        assert_eq!(decoded(&[]).unwrap(), None);
        assert_cut_is_refused(&golden, &[0], Message::decode);
    }
}

#[test]
fn unknown_types_wrong_lengths_and_values_are_refused() {
    for bytes in [
        "00 00 00 00",
        "00 08 00 00",
        "00 01 00 05 00 00 00 00 00",
        "00 02 00 00",
        "00 02 02 01",
        "00 03 00 0d 00 00 00 00 00 10 00 00 00 00 10 00 00",
        "00 03 00 14 00 00 00 00 00 10 00 00 00 00 10 00 06 \"pc.ram\"",
        "00 04 00 0b 00 00 00 00 00 10 00 00 00 00 10",
        "00 05 00 08 06 \"pc.ram\" 00",
        "00 05 00 07 06 \"pc.ram\" 00 00 00 00 00 00 00 07",
        "00 05 00 07 06 \"pc.ram\" 00 00 00 01 00 00 00 00",
        "00 05 00 07 06 \"pc.ram\" 00 00 00 00 00 00 00 00 01 23 45 67 89 ab cd ee",
        "00 06 00 04 00 00 00 02",
        "00 07 00 01 00",
        "6d 66 02 01 00",
    ] {
        let error = decoded(&dump(bytes)).unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{bytes}: {error}");
    }
}

#[test]
fn a_long_reason_is_sent_up_to_the_bound_and_cut_between_characters() {
    let sent = |text: String| match decoded(&encoded(&Message::Reason(text.into()))).unwrap().unwrap() {
        Message::Reason(text) => text.as_raw().to_owned(),
        other => panic!("{other:?}"),
    };
    assert_eq!(sent("x".repeat(512)), "x".repeat(512));
    assert_eq!(sent("x".repeat(513)), "x".repeat(512));
    assert_eq!(sent(format!("x{}", "ö".repeat(1 << 20))), format!("x{}", "ö".repeat(255)));
    let hostile = decoded(&dump("6d 66 00 02 ff 1b")).unwrap();
    assert_eq!(hostile, Some(Message::Reason("\\xff\u{1b}".into())));
}

proptest! {
    #[test]
    fn random_bytes_never_panic(kind in 0_u16..9, ours: bool, noise in proptest::collection::vec(any::<u8>(), 0..600)) {
        let kind = if ours { REASON } else { kind };
        let _ = decoded(&[&kind.to_be_bytes()[..], &noise].concat());
    }
}
