//! The table: the fault of a source, and the error of its destination.

use multifd::ChannelCount;
use multifd_testkit::bad_source::{Act, HEAD, On, PAGE, Script, Shape, packet, sync};

use super::{Row, lost};
use On::{Channel, Main, Stranger};

pub(super) fn whole() -> Script {
    Script::whole(Shape::default())
}

fn legacy() -> Script {
    Script::whole(Shape { round: false, ..Shape::default() })
}

/// Steps that make sure that the destination has got here before a later step.
fn arrived() -> [(On, Act); 2] {
    let ping = b"\x08\0\x02\0\x04\0\0\0\x63".to_vec();
    [(Main, Act::Send(ping)), (Main, Act::Hear(vec![0, 2, 0, 4, 0, 0, 0, 0x63]))]
}

fn deaf() -> Script {
    Script::whole(Shape { return_path: false, ..Shape::default() })
}

pub(super) fn rows() -> Vec<Row> {
    [harmless(), connections(), patched(), cut(), out_of_step(), lost::rows()].into_iter().flatten().collect()
}

/// Cases without a fault, or with a fault of the network.
fn harmless() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut row = |name, script| rows.push(Row { name, script, channels: ChannelCount::Auto, ends: None });
    for channels in [1, 2, 5] {
        for return_path in [false, true] {
            for round in [false, true] {
                row("whole", Script::whole(Shape { channels, return_path, round }));
            }
        }
    }
    row("channels before main", whole().first(|on| on != Main, "start"));
    row("main before the channels connect", whole().first(|on| on == Main, "commands"));
    row("byte by byte", whole().dribbled(Main).dribbled(Channel(0)).dribbled(Channel(1)));
    row("a surplus SYNC", whole().before(Main, "devices", 0, [(Channel(1), Act::Send(sync()))]));
    let with_page = whole().patch(Channel(0), "pages", 1, 11, &[1]).drop(Channel(0), "sync", 2);
    row("a SYNC that holds a page", with_page);
    row("a stale next_packet_size in a SYNC", whole().patch(Channel(1), "sync", 1, 20, &[0, 5, 0, 0]));
    row("an unknown block in a SYNC", whole().patch(Channel(1), "sync", 1, 64, b"stale"));
    row("a question about lost channels", whole().before(Main, "part", 0, lost::asks()));
    row("packet numbers that repeat", whole().patch(Channel(1), "pages", 0, 24, &[0; 8]));
    let open = |n| (Stranger(n), Act::Connect);
    row("half-open connections", whole().before(Main, "header", 0, (0..20).map(open)));
    let noise =
        (0..20).flat_map(|n| [open(n), (Stranger(n), Act::Send(b"GET / HTTP/1.0\r\n\r\n".repeat(4)))]);
    row("strangers that say something else", whole().before(Main, "header", 0, noise));
    let gone = (0..300).flat_map(|n| [open(n), (Stranger(n), Act::Reset)]);
    row("a flood of connections that are reset", whole().before(Main, "header", 0, gone));
    let second = arrived().into_iter().chain([open(0), (Stranger(0), Act::Send(b"QEVM".into()))]);
    row("a second main", whole().before(Main, "part", 0, second));
    row("a channel left open at the end", whole().drop(Channel(1), "close", 0));
    row("a channel reset at the end", whole().replace(Channel(1), "close", 0, Act::Reset));
    row("main reset at the end", whole().replace(Main, "close", 0, Act::Reset));
    rows
}

pub(super) fn faults(rows: Vec<(&'static str, Script, &'static str, &'static [&'static str])>) -> Vec<Row> {
    let row = |(name, script, kind, texts)| Row {
        name,
        script,
        channels: ChannelCount::Auto,
        ends: Some((kind, texts)),
    };
    rows.into_iter().map(row).collect()
}

/// Connections that are missing, too many, late, or foreign.
fn connections() -> Vec<Row> {
    let exactly = |count, name, script, kind, texts| Row {
        name,
        script,
        channels: ChannelCount::Exact(count),
        ends: Some((kind, texts)),
    };
    let three = || Script::whole(Shape { channels: 3, ..Shape::default() });
    let late = [(Channel(9), Act::Connect), (Channel(9), Act::Send(packet("pc.ram", &[0], 1)))];
    let id = |script: Script, id: u8| script.patch(Channel(1), "initial", 0, 24, &[id]);
    let late_id = {
        let initial = whole().steps[whole().find(Channel(1), "initial", 0)].act.clone();
        let Act::Send(mut initial) = initial else { unreachable!("it is sent") };
        initial[24] = 2;
        [(Channel(2), Act::Connect), (Channel(2), Act::Send(initial))]
    };
    // A wait that never succeeds: main is shut down as soon as the fault is detected.
    let hangs_up = (Main, Act::Hear(vec![0xff; 9]));
    let mut rows = vec![
        exactly(
            3,
            "one channel too few",
            whole(),
            "Violation(ChannelCount",
            &["expected 3 channels, 2 connected before the first sync: set multifd-channels to the"],
        ),
        exactly(
            2,
            "one channel too many",
            three(),
            "Violation(ChannelId",
            &[
                "connection from",
                "channel id 2 is not below the number of channels 2: set multifd-channels to the same",
            ],
        ),
        exactly(
            0,
            "channels where multifd is off",
            whole(),
            "Violation(ChannelId",
            &["connection from", "is not below the number of channels 0: set multifd-channels to the same"],
        ),
        exactly(
            2,
            "id is the number of channels",
            id(whole(), 2),
            "Violation(ChannelId",
            &[
                "connection from",
                "channel id 2 is not below the number of channels 2: set multifd-channels to the same",
            ],
        ),
        exactly(
            2,
            "id beyond the number of channels",
            id(whole(), 200),
            "Violation(ChannelId",
            &[
                "connection from",
                "channel id 200 is not below the number of channels 2: set multifd-channels to the same",
            ],
        ),
        exactly(
            2,
            "main alone",
            whole().without(Channel(0)).without(Channel(1)),
            "Violation(ChannelCount",
            &["expected 2 channels, 0 connected before the first sync: set multifd-channels to the"],
        ),
    ];
    rows.extend(faults(vec![
        (
            "a packet number ahead of all packets",
            whole().patch(Channel(1), "pages", 0, 24, &[0xff; 8]),
            "Violation(MissingPackets",
            &["sync point 2", "some packets were sent on a channel that did not connect"],
        ),
        ("no main", whole().without(Main), "Cancelled", &["cancelled"]),
        (
            "an id of 255",
            id(whole(), 255),
            "Violation(ChannelId",
            &[
                "connection from",
                "channel id 255 is not below the number of channels 255: set multifd-channels to the",
            ],
        ),
        (
            "the same id twice",
            id(whole(), 0),
            "Violation(DuplicateChannel",
            &["connection from", "channel id 0 is already taken"],
        ),
        (
            "a gap in the ids",
            id(whole(), 2),
            "Violation(ChannelMissing",
            &["channel 1 is missing: 2 channels are connected, and their ids have to be consecutive from 0 on; the"],
        ),
        (
            "a channel of another machine",
            whole().patch(Channel(1), "initial", 0, 8, &[1]),
            "Violation(ForeignUuid",
            &["connection from", "expected machine UUID"],
        ),
        (
            "a channel that comes late",
            whole().before(Main, "end", 0, arrived().into_iter().chain(late_id.clone()).chain([hangs_up])),
            "Violation(LateChannel",
            &["connection from", "channel 2 connected after sync point 2: its pages may be outdated"],
        ),
        (
            "a channel that sends no SYNC",
            whole().before(Main, "start", 0, late_id),
            "Stalled",
            &["channel 2: no SYNC packet has arrived for sync point 1", "the source or its network is stalled"],
        ),
        (
            "main that never says what it is",
            whole().patch(Main, "header", 0, 0, b"XXXX"),
            "Stalled",
            &["channels have connected, but no main connection", "start the source again"],
        ),
        (
            "a stranger with a page",
            // The others have arrived by then.
            whole().before(Main, "part", 0, arrived()).before(Main, "part", 0, late),
            "Violation(ForeignUuid",
            &["connection from", "expected machine UUID"],
        ),
        (
            "a channel that says nothing",
            whole().cut(Channel(1), "initial", 0, 0, None),
            "Violation(LostConnection",
            &[
                "connection from",
                "its first bytes were missing or invalid, so it was dropped, but it may have been a channel, whose pages",
            ],
        ),
        (
            "a channel that stops within its initial packet",
            whole().cut(Channel(1), "initial", 0, 63, None),
            "TimedOut",
            &["connection from", "did not identify itself within 1 s"],
        ),
        (
            "a channel that closes within its initial packet",
            whole().cut(Channel(1), "initial", 0, 63, Some(Act::Close)),
            "Violation(Cut",
            &["connection from", "the source closed the connection (cancelled", "ended) after 63 of 64 bytes of the initial packet"],
        ),
        (
            "initial magic",
            whole().patch(Channel(1), "initial", 0, 0, b"VMEQ"),
            "Violation(LostConnection",
            &["connection from 127.0.0.1", "may have been a channel", "multifd-channels"],
        ),
        (
            "initial version",
            whole().patch(Channel(1), "initial", 0, 7, &[2]),
            "Malformed(Version",
            &["connection from", "expected version 1, found 2"],
        ),
        (
            "TLS where there is none",
            whole().patch(Channel(1), "initial", 0, 0, &[0x16, 3, 1, 2]),
            "Violation(LostConnection",
            &[
                "connection from",
                "its first bytes were missing or invalid, so it was dropped, but it may have been a channel, whose pages",
            ],
        ),
    ]));
    rows
}

/// Wrong bytes in a packet's head, in main's header, in its records.
fn patched() -> Vec<Row> {
    let head = |at, bytes: &[u8]| whole().patch(Channel(1), "pages", 0, at, bytes);
    let main = |name, at, bytes: &[u8]| whole().patch(Main, name, 0, at, bytes);
    faults(vec![
        (
            "packet magic",
            head(0, b"QEVM"),
            "Malformed(Magic",
            &["channel 1: packet 1: expected magic 0x11223344, found 0x5145564d"],
        ),
        (
            "packet version",
            head(7, &[2]),
            "Malformed(Version",
            &["channel 1: packet 1: expected version 1, found 2"],
        ),
        (
            "unknown flag",
            head(11, &[0x80]),
            "Unsupported(Flags",
            &["channel 1: packet 1: packet flags 0x80 include 0x80, which this version does not support"],
        ),
        (
            "a flag in another byte",
            head(8, &[1]),
            "Unsupported(Flags",
            &["channel 1: packet 1: packet flags 0x1000000 include 0x1000000, which this version does not"],
        ),
        (
            "zlib where none came before",
            whole().patch(Channel(0), "pages", 1, 11, &[2]),
            "Violation(Method",
            &["channel 0: packet 3: expected method none, found flags 0x2: set multifd-compression to"],
        ),
        (
            "a method that nobody speaks",
            head(11, &[0x20]),
            "",
            &["channel 1: packet 1", "0x20", "set multifd-compression to none"],
        ),
        (
            "SYNC of device state",
            head(11, &[0x41]),
            "Malformed(DeviceStateFlags",
            &["channel 1: packet 1: device-state packet: expected flags 0x40 alone, found 0x41"],
        ),
        (
            "pages_alloc above a packet",
            head(12, &[0, 0, 0, 129]),
            "Malformed(PagesAlloc",
            &["channel 1: packet 1: pages_alloc 129 is above the 128 pages of a packet: is the page"],
        ),
        (
            "pages_alloc of all ones",
            head(12, &[0xff; 4]),
            "Malformed(PagesAlloc",
            &["channel 1: packet 1: pages_alloc 4294967295 is above the 128 pages of a packet: is the"],
        ),
        (
            "more pages than pages_alloc",
            head(12, &[0, 0, 0, 7]),
            "Malformed(NormalPages",
            &["channel 1: packet 1: 8 normal pages are more than pages_alloc 7"],
        ),
        (
            "pages of all ones",
            head(16, &[0xff; 4]),
            "Malformed(NormalPages",
            &["channel 1: packet 1: 4294967295 normal pages are more than pages_alloc 128"],
        ),
        (
            "more zero pages than are left",
            head(32, &[0, 0, 0, 121]),
            "Malformed(ZeroPages",
            &["channel 1: packet 1: 8 normal and 121 zero pages are more than pages_alloc 128"],
        ),
        (
            "zero pages of all ones",
            head(32, &[0xff; 4]),
            "Malformed(ZeroPages",
            &["channel 1: packet 1: 8 normal and 4294967295 zero pages are more than"],
        ),
        (
            "payload too short",
            head(20, &[0, 0, 0x70, 0]),
            "Malformed(PayloadSize",
            &["channel 1: packet 1: next_packet_size 28672 does not fit 8 pages of 4 KiB: expected 32768"],
        ),
        (
            "payload of all ones",
            head(20, &[0xff; 4]),
            "Malformed(PayloadSize",
            &["channel 1: packet 1: next_packet_size 4294967295 does not fit 8 pages of 4 KiB:"],
        ),
        (
            "unknown block",
            head(64, b"vc.ram"),
            "Violation(UnknownBlock",
            &["channel 1: packet 1: unknown block \"vc.ram\": the source has not announced it"],
        ),
        (
            "no block",
            head(64, &[0; 6]),
            "Malformed(NoBlockName",
            &["channel 1: packet 1: the packet lists pages, but names no block"],
        ),
        (
            "a name without end",
            head(64, &[b'x'; 256]),
            "Violation(UnknownBlock",
            &["channel 1: packet 1: unknown block"],
        ),
        (
            "a page behind the block",
            head(320, &[0, 0, 0, 0, 0, 1, 0, 0]),
            "Violation(OutsideBlock",
            &["channel 1: packet 1: offset 0x10000 outside block \"pc.ram\" (0x10000)"],
        ),
        (
            "a page at the end of everything",
            head(320, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xf0, 0]),
            "Violation(OutsideBlock",
            &["channel 1: packet 1: offset 0xfffffffffffff000 outside block \"pc.ram\" (0x10000)"],
        ),
        (
            "an offset within a page",
            head(320, &[0, 0, 0, 0, 0, 0, 0x10, 1]),
            "Malformed(Unaligned",
            &["channel 1: packet 1: offset 0x1001 is not a multiple of the page size 4 KiB"],
        ),
        (
            "main version",
            main("header", 7, &[2]),
            "Unsupported",
            &["main stream: offset 0x4: stream version 2: expected 3"],
        ),
        (
            "no configuration",
            main("header", 8, &[9]),
            "Malformed",
            &["main stream: offset 0x8: section type: expected 0x0 to 0x8, found 0x9"],
        ),
        (
            "a machine's name of all ones",
            main("header", 9, &[0xff; 4]),
            "Malformed",
            &["main stream: offset 0xd: machine type: expected at most 0xff, found 0xffffffff"],
        ),
        (
            "an unknown command",
            main("commands", 2, &[99]),
            "Malformed",
            &["main stream: offset 0x19: number of a command: expected 1 to 11, found 0x63"],
        ),
        (
            "a command's wrong length",
            main("commands", 4, &[1]),
            "Malformed",
            &["main stream: offset 0x19: length of command 1: expected 0, found 0x1"],
        ),
        (
            "ping without return path",
            deaf().before(Main, "start", 0, [(Main, Act::Send(b"\x08\0\x02\0\x04\0\0\0\x01".into()))]),
            "Violation",
            &["main stream: offset 0x18: command PING without a return path"],
        ),
        (
            "another section than ram",
            main("start", 6, b"bam"),
            "Unsupported",
            &["main stream: offset 0x26: section \"bam\" cannot be skipped"],
        ),
        (
            "another version of ram",
            main("start", 16, &[5]),
            "Malformed",
            &["main stream: offset 0x26: version of section \"ram\": expected 4, found 0x5"],
        ),
        (
            "a total that is none",
            main("start", 17, &[0xff; 7]),
            "Malformed",
            &["main stream: offset 0x37: flags of the first ram record: expected MEM_SIZE (0x4), found"],
        ),
        (
            "a block of all ones",
            main("start", 32, &[0xff; 8]),
            "Violation",
            &["main stream: offset 0x3f: block \"pc.ram\": expected a used length in whole pages of"],
        ),
        (
            "a footer of another section",
            main("start", 75, &[9]),
            "Violation",
            &["main stream: offset 0x6e: footer: expected section 0x1, found 0x9"],
        ),
        (
            "an unknown record",
            main("part", 11, &[1]),
            "Unsupported",
            &["main stream: offset 0x77: ram record COMPRESS_PAGE (0x100) is not supported: switch"],
        ),
        (
            "an unknown section",
            main("part", 0, &[0x7d]),
            "Malformed",
            &["main stream: offset 0x72: section type: expected 0x0 to 0x8, found 0x7d"],
        ),
        (
            "a part of another section",
            main("part", 4, &[9]),
            "Violation",
            &["main stream: offset 0x72: section 0x9 was never started; the ram section is 0x1"],
        ),
        (
            "a description that fits nothing",
            main("devices", 30, &[0x55; 16]),
            "TimedOut",
            &["main stream: offset 0x199: nothing arrived in time where more was expected"],
        ),
    ])
}

/// Ends and silences in the middle of an item.
fn cut() -> Vec<Row> {
    let pages = |keep, act| whole().cut(Channel(1), "pages", 0, keep, act);
    // Bytes that are reset before they were read are lost, as if they were never sent.
    let reset =
        |on, name, n, keep| whole().before(on, name, n, arrived()).cut(on, name, n, keep, Some(Act::Reset));
    let main = |name, keep, act| whole().cut(Main, name, 0, keep, act);
    faults(vec![
        (
            "a head cut by a close",
            pages(HEAD - 1, Some(Act::Close)),
            "Violation(Cut",
            &[
                "channel 1: packet 1: the source closed the connection (cancelled",
                "ended) after 1343 of 1344 bytes of a packet head",
            ],
        ),
        ("a head cut by a reset", reset(Channel(1), "pages", 0, HEAD - 1), "", &["from 127.0.0.1"]),
        (
            "a head that stalls",
            pages(700, None),
            "Stalled",
            &[
                "channel 1: no SYNC packet has arrived for sync point 2",
                "the source or its network is stalled",
            ],
        ),
        (
            "a payload cut by a close",
            pages(HEAD + 3 * PAGE + 5, Some(Act::Close)),
            "Violation(Cut",
            &[
                "channel 1: packet 1: the source closed the connection (cancelled",
                "ended) after 12293 of 32768 bytes of a packet's pages",
            ],
        ),
        (
            "a payload cut by a reset",
            reset(Channel(1), "pages", 0, HEAD + 3 * PAGE + 5),
            "",
            &["from 127.0.0.1"],
        ),
        (
            "a payload that stalls",
            pages(HEAD + 3 * PAGE + 5, None),
            "Stalled",
            &[
                "channel 1: no SYNC packet has arrived for sync point 2",
                "the source or its network is stalled",
            ],
        ),
        (
            "a channel that closes early",
            pages(0, Some(Act::Close)),
            "Violation(EndedEarly",
            &[
                "channel 1: the source closed the channel (cancelled",
                "ended) before sync point 2, after sync point 1",
            ],
        ),
        ("a channel that is reset early", reset(Channel(1), "pages", 0, 0), "", &["from 127.0.0.1"]),
        (
            "a header cut by a close",
            main("header", 7, Some(Act::Close)),
            "Cut",
            &["main stream: offset 0x7: stream ends where version was expected"],
        ),
        ("a header cut by a reset", main("header", 7, Some(Act::Reset)), "", &[]),
        (
            "a header that stalls",
            main("header", 7, None),
            "TimedOut",
            &["main stream: offset 0x4: nothing arrived in time where more was expected"],
        ),
        (
            "a configuration that stalls",
            main("header", 20, None),
            "TimedOut",
            &["main stream: offset 0x14: nothing arrived in time where machine type was expected"],
        ),
        (
            "a block list that stalls",
            main("start", 40, None),
            "",
            &["nothing was transferred on any connection"],
        ),
        (
            "a block list cut by a close",
            main("start", 40, Some(Act::Close)),
            "Cut",
            &["main stream: offset 0x4e: stream ends where name of a block was expected"],
        ),
        (
            "a guest that stands, and no end of RAM",
            {
                let asks = [(Main, Act::Send(b"\x08\0\x02\0\x04mff\x01".to_vec()))];
                let alone = whole().drop(Channel(0), "sync", 2).drop(Channel(1), "sync", 2);
                alone.before(Main, "end", 0, asks).cut(Main, "end", 0, 0, None)
            },
            "TimedOut",
            &["nothing arrived in time where more was expected", "the source or its network is stalled"],
        ),
        (
            "main closes between sections",
            main("part", 0, Some(Act::Close)),
            "Cut",
            &["main stream: offset 0x72: stream ends where a section was expected"],
        ),
        (
            "main closes in a section",
            main("part", 8, Some(Act::Close)),
            "Cut",
            &["main stream: offset 0x7a: stream ends where a ram record was expected"],
        ),
        ("main is reset in a section", reset(Main, "part", 0, 8), "", &[]),
        ("main stalls in a section", main("part", 8, None), "", &["nothing"]),
        (
            "main closes in a device",
            main("devices", 20, Some(Act::Close)),
            "Malformed",
            &["main stream: offset 0xd3: device part: ends after 0x14 bytes without a description that"],
        ),
        (
            "main closes in a device, no return path",
            deaf().cut(Main, "devices", 0, 20, Some(Act::Close)),
            "Malformed",
            &["main stream: offset 0xc5: device part: ends after 0x14 bytes without a description that"],
        ),
        (
            "main stalls in a device",
            main("devices", 20, None),
            "TimedOut",
            &["main stream: offset 0xd3: nothing arrived in time where more was expected"],
        ),
        (
            "main stalls in the description",
            main("devices", 80, None),
            "TimedOut",
            &["main stream: offset 0x10f: nothing arrived in time where more was expected"],
        ),
        (
            "main stalls behind the end of ram",
            main("devices", 0, None),
            "TimedOut",
            &["main stream: offset 0xbf: nothing arrived in time where more was expected"],
        ),
    ])
}

/// SYNCs and sync points that do not match, pages in the wrong place.
fn out_of_step() -> Vec<Row> {
    // In one piece: nobody reads what arrives later.
    let more = {
        let mut script = deaf();
        let at = script.find(Main, "devices", 0);
        if let Act::Send(bytes) = &mut script.steps[at].act {
            bytes.extend([0x55; 9]);
        }
        script
    };
    let page = |on| (on, Act::Send(packet("pc.ram", &[5], 1)));
    faults(vec![
        (
            "a SYNC missing on a channel",
            whole().drop(Channel(1), "sync", 1),
            "Stalled",
            &[
                "channel 1: no SYNC packet has arrived for sync point 3",
                "the source or its network is stalled",
            ],
        ),
        ("a SYNC missing at the set-up", whole().drop(Channel(0), "sync", 0), "", &["channel "]),
        ("no SYNC at all", whole_without_syncs(), "", &["channel "]),
        (
            "legacy, a SYNC missing",
            legacy().drop(Channel(1), "sync", 2),
            "Stalled",
            &[
                "channel 1: no SYNC packet has arrived for sync point 3",
                "the source or its network is stalled",
            ],
        ),
        (
            "a SYNC doubled, and main stands",
            whole().before(Main, "part", 0, [(Channel(1), Act::Send(sync()))]).cut(Main, "end", 0, 3, None),
            "Stalled",
            &["main has not reached sync point 3", "the source or its network is stalled"],
        ),
        (
            "pages before the blocks",
            whole().before(Main, "start", 0, [page(Channel(1))]).drop(Channel(1), "sync", 0),
            "",
            &["channel "],
        ),
        (
            "switchover before ram",
            whole().before(Main, "start", 0, [(Main, Act::Send(b"\x08\0\x0b\0\0".into()))]),
            "Violation",
            &["main stream: offset 0x26: SWITCHOVER_START is not allowed before the start of ram"],
        ),
        (
            "a page over main of a block that is none",
            whole().before(
                Main,
                "end",
                0,
                [(Main, Act::Send(b"\x02\0\0\0\x01\0\0\0\0\0\0\0\x02\x03moo\0".into()))],
            ),
            "Violation",
            &["main stream: offset 0x91: block \"moo\" is not in the block list"],
        ),
        (
            "a page over main outside its block",
            whole().before(
                Main,
                "end",
                0,
                [(Main, Act::Send(b"\x02\0\0\0\x01\0\0\0\0\0\x01\0\x02\x06pc.ram\0".into()))],
            ),
            "Violation",
            &["main stream: offset 0x91: page at 0x10000 outside block \"pc.ram\" (0x10000)"],
        ),
        (
            "a fill byte that is not zero",
            whole().before(
                Main,
                "end",
                0,
                [(Main, Act::Send(b"\x02\0\0\0\x01\0\0\0\0\0\0\0\x02\x06pc.ram\x01".into()))],
            ),
            "Malformed",
            &["main stream: offset 0xa0: fill byte of a ZERO record: expected 0, found 0x1"],
        ),
        (
            "CONTINUE without a block",
            whole().before(Main, "end", 0, [(Main, Act::Send(b"\x02\0\0\0\x01\0\0\0\0\0\0\0\x22\0".into()))]),
            "Violation",
            &["main stream: offset 0x91: ram record: flag CONTINUE (0x20), but no record named a block"],
        ),
        (
            "more behind the description",
            more,
            "Malformed",
            &["main stream: offset 0x194: device part: ends after 0xe3 bytes without a description"],
        ),
    ])
}

fn whole_without_syncs() -> Script {
    let mut script = whole();
    script.steps.retain(|step| step.name != "sync");
    script
}
