//! Rows about channels that the source names as lost.

use multifd_testkit::bad_source::{Act, On, Script};

use super::{
    Row,
    rows::{faults, whole},
};
use On::Main;

/// The source asks about lost channels, and reads the reply.
pub(super) fn asks() -> [(On, Act); 2] {
    let reply = b"\0\x02\0\x04mfj\x02\0\x02\0\x04mfj\x01".to_vec();
    [(Main, Act::Send(b"\x08\0\x02\0\x04mfj\x01".to_vec())), (Main, Act::Hear(reply))]
}

/// The source names this channel as lost.
fn names(id: u8) -> (On, Act) {
    (Main, Act::Send([&b"\x08\0\x02\0\x04mfk"[..], &[id]].concat()))
}

/// Channels that are named as lost.
pub(super) fn rows() -> Vec<Row> {
    let named = |script: Script, place, ids: &[u8]| {
        script.before(Main, place, 0, ids.iter().map(|id| names(*id)).collect::<Vec<_>>())
    };
    let asked = |ids: &[u8]| {
        let steps = asks().into_iter().chain(ids.iter().map(|id| names(*id)));
        whole().before(Main, "part", 0, steps.collect::<Vec<_>>())
    };
    faults(vec![
        (
            "a question about lost channels before ram",
            whole().before(Main, "start", 0, asks()),
            "Violation",
            &[
                "main stream: offset 0x26: a question about lost channels is not allowed before the start of ram",
            ],
        ),
        (
            "a lost channel before ram",
            named(whole(), "start", &[0]),
            "Violation",
            &[
                "main stream: offset 0x26: a question about lost channels is not allowed before the start of ram",
            ],
        ),
        (
            "a lost channel that nobody has asked about",
            named(whole(), "part", &[1]),
            "Violation",
            &["cannot continue without channel 1: the source reported it as broken before it asked"],
        ),
        (
            "a lost channel that is none",
            asked(&[200]),
            "Violation",
            &[
                "cannot continue without channel 200: the source reported it as broken, but there is no such channel",
            ],
        ),
        (
            "a channel that is lost twice",
            asked(&[1, 1]),
            "Violation",
            &["cannot continue without channel 1: the source reported it as broken twice"],
        ),
        (
            "all channels are lost",
            asked(&[1, 0]),
            "Violation",
            &["cannot continue without channel 0: the source reported it as broken, and it is the last one"],
        ),
        (
            "a lost channel whose pages are not sent again",
            asked(&[1]),
            "Violation",
            &["cannot continue without channel 1: pages followed after its connection broke"],
        ),
    ])
}
