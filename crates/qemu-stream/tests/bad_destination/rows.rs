//! The table: the behaviour of a destination, and how the source ends.

use std::time::Duration;

use multifd_testkit::bad_destination::{Accepts, Plan, Reads, SHUT_0, Then};

use crate::{Kind, LIMIT, RAM, Row, SOON};

type Ends = Option<(Kind, &'static [&'static str])>;

/// It fails with this kind of error, and these words.
fn is(kind: Kind, words: &'static [&'static str]) -> Ends {
    Some((kind, words))
}

pub(crate) fn rows() -> Vec<Row> {
    let row = |name, plan, ends: Ends| Row {
        name,
        plan,
        ram: RAM,
        return_path: true,
        channels: 2,
        may_break: false,
        end: LIMIT,
        ends,
    };
    let good = Plan::default;
    let says = |bytes: &[u8]| Plan { says: bytes.to_vec(), ..good() };
    let main = |reads, then| Plan { main: reads, says: Vec::new(), then, ..good() };
    let channels = |reads, then| Plan { channels: (reads, then), ..good() };
    let odd = |id, reads, then| Plan { odd_one: Some((id, reads, then)), ..good() };
    let full = |id, then| Plan {
        channels: (Reads::Late(LIMIT / 2), Then::Close),
        ..odd(id, Reads::Bytes(64), then)
    };
    let early = |bytes: &[u8], then| Plan { says_first: true, then, main: Reads::Bytes(4), ..says(bytes) };
    let small = |row: Row| Row { ram: 1 << 20, ..row };
    let deaf = |row: Row| Row { return_path: false, ..row };
    let patient = |row: Row| Row { end: SOON, ..small(row) };
    let four = |row: Row| Row { channels: 4, ..row };
    let asks = |row: Row| Row { may_break: true, ..row };
    let well = None;
    let (agrees, replies) = (*b"\0\x02\0\x04mfj\x02", *b"\0\x02\0\x04mfj\x01");
    let loses = |id: u8| [&b"\0\x02\0\x04mfk"[..], &[id]].concat();
    let pong = [0, 2, 0, 4, 0, 0, 0, 1];
    // Of a megabyte over two channels, main is about 300 bytes in all; the devices begin after 150.
    vec![
        row("all is well", good(), well),
        row("channels held open at the end", channels(Reads::All, Then::Hold), well),
        small(row("a slow reader of channels", channels(Reads::Slowly(60 << 10), Then::Hold), well)),
        small(row("a slow reader of main", Plan { main: Reads::Slowly(100), ..good() }, well)),
        patient(row(
            "main is read byte by byte, for longer than the limit",
            Plan { main: Reads::Dribbling(LIMIT / 200), ..good() },
            well,
        )),
        small(row(
            "channels are read byte by byte",
            Plan { receive_buffer: Some(4 << 10), ..channels(Reads::Dribbling(Duration::ZERO), Then::Close) },
            well,
        )),
        deaf(row("no return path", says(&[]), well)),
        row("PONG and SHUT", says(&[&pong[..], &SHUT_0].concat()), well),
        row(
            "PONG before the devices, and nothing after it",
            early(&pong, Then::Hold),
            is(Kind::NotReady, &[]),
        ),
        row(
            "SHUT 1",
            says(&[0, 1, 0, 4, 0, 0, 0, 1]),
            is(
                Kind::Failed(1),
                &["the destination reported failure (SHUT 1)", "its own log", "does not have the guest"],
            ),
        ),
        row(
            "SHUT of all ones",
            says(&[0, 1, 0, 4, 0xff, 0xff, 0xff, 0xff]),
            is(Kind::Failed(u32::MAX), &["the destination reported failure (SHUT 4294967295)"]),
        ),
        row(
            "SHUT 0 before the devices",
            early(&SHUT_0, Then::Hold),
            is(
                Kind::Early,
                &["return path: offset 0x0: ", "reported success (SHUT 0) before", "does not run there"],
            ),
        ),
        row(
            "PONG, then SHUT 0 before the devices",
            early(&[&pong[..], &SHUT_0].concat(), Then::Hold),
            is(Kind::Early, &["return path: offset 0x8: "]),
        ),
        row(
            "SHUT 1 before the devices",
            early(&[0, 1, 0, 4, 0, 0, 0, 1], Then::Hold),
            is(Kind::Failed(1), &["the destination reported failure (SHUT 1)"]),
        ),
        row(
            "a message that is none",
            says(&[0, 99, 0, 4, 0, 0, 0, 0]),
            is(Kind::Malformed, &["return path: offset 0x8: type of a message: expected 1 to 7, found 0x63"]),
        ),
        row(
            "SHUT of a wrong length",
            says(&[0, 1, 0, 5, 0, 0, 0, 0, 0]),
            is(Kind::Malformed, &["return path: offset 0x8: length of message 1: expected 4, found 0x5"]),
        ),
        row(
            "a message of all ones",
            says(&[0xff; 64]),
            is(
                Kind::Malformed,
                &["return path: offset 0xa: length of a message: expected at most 0x200, found 0xffff"],
            ),
        ),
        row(
            "a TLS alert",
            early(&[0x15, 3, 3, 0, 2, 2, 10], Then::Hold),
            is(Kind::Capability, &["the destination uses TLS: set tls-creds on this side too"]),
        ),
        row(
            "a postcopy message",
            says(&[0, 4, 0, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            is(Kind::Capability, &["switch capability postcopy-ram off at the destination"]),
        ),
        row(
            "half a SHUT, then nothing",
            says(&[0, 1, 0, 4, 0]),
            is(
                Kind::UnknownSilent,
                &["not known whether", "return path: offset 0x8: nothing arrived in time"],
            ),
        ),
        row(
            "half a SHUT before the devices, then nothing",
            early(&[0, 1, 0, 4, 0], Then::Hold),
            is(
                Kind::NotReady,
                &[
                    "was not ready within 3 s after the guest was stopped",
                    "the guest continues at the source",
                ],
            ),
        ),
        row(
            "no SHUT, main open",
            says(&[]),
            is(
                Kind::UnknownSilent,
                &[
                    "not known whether",
                    "return path: offset 0x8: nothing arrived in time",
                    "does not run there",
                ],
            ),
        ),
        row(
            "no SHUT, main closed",
            main(Reads::All, Then::Close),
            is(Kind::NoShut, &["without SHUT", "does not have the guest", "its own log"]),
        ),
        row(
            "no SHUT, main reset",
            main(Reads::All, Then::Reset),
            is(Kind::NoShut, &["without SHUT", "its own log"]),
        ),
        row(
            "half a SHUT, then closed",
            Plan { then: Then::Close, ..says(&[0, 1, 0, 4, 0]) },
            is(Kind::NoShut, &["without SHUT (return path: offset 0x8)"]),
        ),
        row("main closed at once", main(Reads::Bytes(4), Then::Close), is(Kind::NoShut, &[])),
        row("main reset at once", main(Reads::Bytes(4), Then::Reset), is(Kind::NoShut, &[])),
        row("main closed in the middle of RAM", main(Reads::Bytes(100), Then::Close), is(Kind::NoShut, &[])),
        row("main reset in the middle of RAM", main(Reads::Bytes(100), Then::Reset), is(Kind::NoShut, &[])),
        small(row(
            "main closed in the device part",
            main(Reads::Bytes(200), Then::Close),
            is(Kind::NoShut, &["without SHUT", "its own log"]),
        )),
        asks(row(
            "a lost channel that is none",
            early(&[&agrees[..], &loses(7), &replies].concat(), Then::Hold),
            is(
                Kind::Lost,
                &[
                    "cannot continue without channel 7: the destination reported it as broken, but there is no such",
                ],
            ),
        )),
        asks(row(
            "all channels are lost",
            early(&[&agrees[..], &loses(0), &loses(1), &replies].concat(), Then::Hold),
            is(Kind::Broken, &["channel 1: use the channels"]),
        )),
        asks(row(
            "SHUT 1 in place of the lost channels",
            early(&[&agrees[..], &[0, 1, 0, 4, 0, 0, 0, 1]].concat(), Then::Hold),
            is(Kind::Failed(1), &["the destination reported failure (SHUT 1)"]),
        )),
        asks(row(
            "SHUT 0 after the lost channels",
            early(&[&agrees[..], &loses(0), &replies, &SHUT_0].concat(), Then::Hold),
            is(Kind::Early, &["return path: offset 0x18: ", "reported success (SHUT 0) before"]),
        )),
        asks(row(
            "half a reply about lost channels, then closed",
            early(&[&agrees[..], &loses(0)[..5]].concat(), Then::Close),
            is(Kind::NoShut, &["without SHUT"]),
        )),
        row(
            "channels refused",
            Plan { accepts: Accepts::Main, says: Vec::new(), ..good() },
            is(
                Kind::Refused,
                &["channel ", "connect to tcp:127.0.0.1:", "the destination closed the connection"],
            ),
        ),
        row(
            "channels closed behind their initial packet",
            channels(Reads::Bytes(64), Then::Close),
            is(Kind::Broken, &["channel ", "its own log"]),
        ),
        row(
            "channels closed at once",
            channels(Reads::Bytes(4), Then::Close),
            is(Kind::Broken, &["channel ", "to 127.0.0.1:", "its own log"]),
        ),
        row(
            "channels closed within RAM",
            channels(Reads::Bytes(1 << 20), Then::Close),
            is(Kind::Broken, &["channel ", "to 127.0.0.1:", "its own log"]),
        ),
        row(
            "channels reset within RAM",
            channels(Reads::Bytes(1 << 20), Then::Reset),
            is(Kind::Broken, &["channel ", "packet ", "to 127.0.0.1:", "its own log"]),
        ),
        four(row(
            "one channel of four closed at once",
            odd(1, Reads::Bytes(4), Then::Close),
            is(Kind::Broken, &["channel 1: ", "to 127.0.0.1:", "its own log"]),
        )),
        four(row(
            "one channel of four closed within RAM",
            odd(3, Reads::Bytes(1 << 20), Then::Close),
            is(Kind::Broken, &["channel 3: ", "to 127.0.0.1:", "its own log"]),
        )),
        four(row(
            "one channel of four reset within RAM",
            odd(0, Reads::Bytes(1 << 20), Then::Reset),
            is(Kind::Broken, &["channel 0: send packet ", "to 127.0.0.1:", "its own log"]),
        )),
        // The others also read nothing until its sockets are full, then carry the rest; then all wait for its SYNC.
        four(row(
            "one channel of four that is not read",
            full(2, Then::Hold),
            is(
                Kind::TakesNothing,
                &["channel 2: send packet ", "to 127.0.0.1:", "accepted no data for 0.6 s"],
            ),
        )),
        four(row(
            "one channel of four reset while its SYNC is waited for",
            full(2, Then::ResetAfter(LIMIT + LIMIT / 3)),
            is(Kind::Broken, &["channel 2: send packet ", "to 127.0.0.1:", "its own log"]),
        )),
        // It is noticed at once, regardless of the channels.
        row(
            "main reset while the SYNC of a channel is waited for",
            Plan {
                main: Reads::Bytes(64),
                says: Vec::new(),
                then: Then::ResetAfter(LIMIT / 4),
                ..full(1, Then::Hold)
            },
            is(Kind::NoShut, &["without SHUT"]),
        ),
        row(
            "SHUT 1 while channels are not read",
            Plan {
                main: Reads::Bytes(64),
                says: vec![0, 1, 0, 4, 0, 0, 0, 1],
                ..channels(Reads::Bytes(64), Then::Hold)
            },
            is(Kind::Failed(1), &["the destination reported failure (SHUT 1)"]),
        ),
        row(
            "channels that are not read",
            channels(Reads::Bytes(64), Then::Hold),
            is(
                Kind::TakesNothing,
                &[
                    "channel ",
                    "packet ",
                    "to 127.0.0.1:",
                    "its program makes no progress",
                    "accepted no data for 0.6 s",
                ],
            ),
        ),
        row(
            "nothing is accepted",
            Plan { accepts: Accepts::None, ..good() },
            is(
                Kind::TakesNothing,
                &["channel ", "its program makes no progress", "accepted no data for 0.6 s"],
            ),
        ),
    ]
}
