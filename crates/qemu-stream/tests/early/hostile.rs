//! Sources that misbehave at the switch to post-copy and after it: how the destination ends, and who has the guest.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    thread,
    time::{Duration, Instant},
};

use multifd::{
    Error, ReceiveOptions,
    channel::{Listener, Stop},
    error::chain,
};
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions, EarlyOptions, Landing},
    format::{Command, Message, PageSizes, Reader, Section, encode_footer},
    incoming::{Event, Events, Expected},
    outgoing::EventWriter,
};

use crate::{
    LIMIT,
    machine::{BLOCKS, memory},
    machine_type, may_run,
    switch::{RAM, command, device, discard, name, package, packaged},
};

/// The row whose source closes its connection: others wait for the destination.
const CUT: &str = "a package that is cut";
/// How long the source may be silent, so that waits are short.
const SHORT: Duration = Duration::from_millis(500);

pub(crate) fn begin() -> Vec<u8> {
    crate::switch::begin(machine_type(), &BLOCKS)
}

/// Devices with this description of them, which says that it has so much `more` bytes than it has.
fn described(json: &str, more: u32, devices: &[u8]) -> Vec<u8> {
    let length = u32::try_from(json.len()).expect("small") + more;
    let body = [&length.to_be_bytes()[..], json.as_bytes()].concat();
    [device(u32::MAX, "multifd/description", &body), devices.to_vec()].concat()
}

pub(crate) fn clock() -> Vec<u8> {
    device(5, "clock", b"state")
}

/// A section with this record of RAM.
pub(crate) fn part(record: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    Section::Part(RAM).encode(&mut bytes);
    bytes.extend(record);
    bytes.extend(0x10_u64.to_be_bytes());
    encode_footer(RAM, &mut bytes);
    bytes
}

/// A zero page of a block.
pub(crate) fn zero(block: &str, offset: u64) -> Vec<u8> {
    let length = u8::try_from(block.len()).expect("short");
    [&(offset | 2).to_be_bytes()[..], &[length], block.as_bytes(), &[0]].concat()
}

/// How far the destination came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// It has not had the choice to run the guest.
    Load,
    /// The guest is its own.
    Running,
}

struct Row {
    what: &'static str,
    bytes: Vec<u8>,
    /// Sent when the guest runs at the destination.
    after: Vec<u8>,
    at: At,
    /// What its error contains.
    expected: &'static str,
}

fn rows() -> Vec<Row> {
    let switch = |bytes: &[u8]| [begin(), bytes.to_vec()].concat();
    let after = |bytes: &[u8]| bytes.to_vec();
    let json = r#"{"page_size":4096,"devices":[{"name":"clock","instance_id":0,"vmsd_name":"clock","version":1,"fields":[{"name":"a","type":"buffer","size":4}]}]}"#;
    let mut rows = Vec::new();
    let mut row = |what, bytes: Vec<u8>, at, expected| {
        let (bytes, after) = match at {
            At::Load => (bytes, Vec::new()),
            At::Running => ([begin(), package(&clock())].concat(), bytes),
        };
        rows.push(Row { what, bytes, after, at, expected });
    };
    // Before the guest can move.
    row(
        "a page to discard outside its block",
        switch(&discard("low", &[(40 << 12, 1 << 12)])),
        At::Load,
        "outside block \"low\"",
    );
    row(
        "a half page to discard",
        switch(&discard("ram", &[(0, 0x800)])),
        At::Load,
        "range of POSTCOPY_RAM_DISCARD in block \"ram\": expected whole pages, found 0x800",
    );
    row(
        "nothing to discard",
        switch(&discard("ram", &[(0x1000, 0)])),
        At::Load,
        "expected whole pages, found 0x0",
    );
    row(
        "a range without an end",
        switch(&discard("ram", &[(u64::MAX - 0xfff, 0x1000)])),
        At::Load,
        "outside block \"ram\"",
    );
    row(
        "pages of no block",
        switch(&discard("high", &[(0, 0x1000)])),
        At::Load,
        "block \"high\" is not in the block list",
    );
    row(
        "LISTEN outside of a package",
        switch(&command(Command::PostcopyListen)),
        At::Load,
        "POSTCOPY_LISTEN",
    );
    row("RUN outside of a package", switch(&command(Command::PostcopyRun)), At::Load, "POSTCOPY_RUN");
    row(
        "a second ADVISE",
        switch(&command(Command::PostcopyAdvise(Some(PageSizes { host: 0x1000, target: 0x1000 })))),
        At::Load,
        "POSTCOPY_ADVISE is not allowed after the start of ram",
    );
    row("RESUME before the switch", switch(&command(Command::PostcopyResume)), At::Load, "POSTCOPY_RESUME");
    row(
        "a question for pages before the switch",
        switch(&command(Command::RecvBitmap(name("ram")))),
        At::Load,
        "RECV_BITMAP",
    );
    let (listen, run) = (command(Command::PostcopyListen), command(Command::PostcopyRun));
    row(
        "RUN without PING 3",
        switch(&packaged(&[&listen, &clock(), &run])),
        At::Load,
        "POSTCOPY_RUN is not allowed without a PING 3 before it",
    );
    row(
        "RUN with another PING",
        switch(&packaged(&[&listen, &clock(), &command(Command::Ping(4)), &run])),
        At::Load,
        "POSTCOPY_RUN is not allowed without a PING 3 before it",
    );
    row(
        "a package without LISTEN",
        switch(&packaged(&[&clock(), &command(Command::Ping(3)), &run])),
        At::Load,
        "is not allowed in a package before POSTCOPY_LISTEN",
    );
    row(
        "an endless package",
        switch(&command(Command::Packaged(u32::MAX))),
        At::Load,
        "length of a package: expected at most",
    );
    row(
        "a description that does not fit",
        switch(&package(&described(json, 0, &clock()))),
        At::Load,
        "the description of a package is not allowed before devices that it does not fit",
    );
    row(
        "a description that is none",
        switch(&package(&described("{", 0, &clock()))),
        At::Load,
        "description",
    );
    row(
        CUT,
        {
            let mut bytes = switch(&package(&clock()));
            bytes.truncate(bytes.len() - 3);
            bytes
        },
        At::Load,
        "",
    );
    // The guest runs here, and nothing that the source sends may change that.
    row(
        "a page of no block",
        after(&part(&zero("high", 0))),
        At::Running,
        "block \"high\" is not in the block list",
    );
    row(
        "a page outside its block",
        after(&part(&zero("low", 40 << 12))),
        At::Running,
        "outside block \"low\"",
    );
    row(
        "a second package",
        after(&package(&clock())),
        At::Running,
        "second PACKAGED is not allowed in one stream",
    );
    row(
        "pages to discard after the switch",
        after(&discard("ram", &[(0, 0x1000)])),
        At::Running,
        "POSTCOPY_RAM_DISCARD is not allowed after PACKAGED",
    );
    row("RESUME without a return", after(&command(Command::PostcopyResume)), At::Running, "POSTCOPY_RESUME");
    row(
        "a question for pages without a return",
        after(&command(Command::RecvBitmap(name("ram")))),
        At::Running,
        "RECV_BITMAP",
    );
    row("another machine", after(&begin()), At::Running, "");
    row("no record", after(&[0xff; 64]), At::Running, "");
    rows
}

/// What a destination of such a source did.
fn arrive(listener: Listener) -> (At, Result<(), Error>) {
    let receive = ReceiveOptions::new().accept_timeout(Some(LIMIT)).channels_timeout(SHORT);
    let options = ArrivalOptions::new(Expected::AnyMachine).receive(receive).run_early(true);
    let options = options.pause_timeout(Some(SHORT)).stall_timeout(Some(4 * SHORT));
    let load = || {
        let announced = Arrival::listen(listener, options, &Stop::new())?.accept()?.announced()?;
        announced.load_early(memory(), EarlyOptions::new())
    };
    match load() {
        Ok(Landing::Early(early)) => match early.confirm() {
            Ok(mut running) => {
                assert!(running.wait(Some(LIMIT)), "{running:?}");
                (At::Running, running.finish().map(drop))
            }
            Err(error) => (At::Load, Err(error)),
        },
        Ok(Landing::Complete(_)) => panic!("nothing has arrived"),
        Err(error) => (At::Load, Err(error)),
    }
}

/// Regression: a program that forwards the events of a stream failed at its end, if the devices of its package were described.
#[test]
fn a_described_package_is_written_as_it_was_read() {
    let json = r#"{"page_size":4096,"devices":[{"name":"clock","instance_id":0,"vmsd_name":"clock","version":1,"fields":[{"name":"a","type":"buffer","size":5}]}]}"#;
    let mut end = Vec::new();
    Section::End(RAM).encode(&mut end);
    end.extend(0x10_u64.to_be_bytes());
    encode_footer(RAM, &mut end);
    end.push(0);
    let stream = [begin(), package(&described(json, 0, &clock())), end].concat();
    let (mut events, mut copy) = (Events::new(&stream[..]), EventWriter::new(Vec::new()));
    loop {
        let event = events.next().expect("a whole stream");
        copy.write(&event).expect("what was read");
        if let Event::End(part) = event {
            assert_eq!(part.sections().len(), 1);
            break;
        }
    }
    copy.flush().expect("into memory");
    assert_eq!(copy.into_inner(), stream);
}

/// Plays the source, which sends `after` when the guest runs there; what the destination replies until it closes.
fn play(address: &str, switch: &[u8], after: &[u8], closes: bool) -> Vec<Message> {
    let mut socket = TcpStream::connect(address).expect("connected");
    let _ = socket.write_all(switch);
    let mut replies = Vec::new();
    if !after.is_empty() {
        let mut byte = [0];
        let begun = Instant::now();
        while !replies.ends_with(&[0, 2, 0, 4, 0, 0, 0, 3]) && begun.elapsed() < LIMIT {
            match socket.read(&mut byte) {
                Ok(1) => replies.push(byte[0]),
                _ => break,
            }
        }
        let _ = socket.write_all(after);
    }
    if closes {
        let _ = socket.shutdown(Shutdown::Write);
    }
    socket.set_read_timeout(Some(LIMIT)).expect("set");
    let mut buffer = [0; 1024];
    loop {
        let messages = decoded(&replies);
        // The destination waits until its source has closed the connection.
        let is_over = messages.iter().any(|message| matches!(message, Message::Shut(_)));
        if is_over {
            return messages;
        }
        match socket.read(&mut buffer) {
            Ok(got @ 1..) => replies.extend(&buffer[..got]),
            _ => return messages,
        }
    }
}

fn decoded(bytes: &[u8]) -> Vec<Message> {
    let mut reader = Reader::new(bytes, qemu_stream::error::StreamKind::ReturnPath);
    std::iter::from_fn(|| Message::decode(&mut reader).ok().flatten()).collect()
}

#[test]
fn a_source_that_misbehaves_at_the_switch_or_after_it_is_refused_and_one_side_has_the_guest() {
    if !may_run() {
        return;
    }
    for Row { what, bytes, after, at, expected } in rows() {
        let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().expect("an address")).expect("bound");
        let address = listener.local_address().to_string().trim_start_matches("tcp:").to_owned();
        let arrives = thread::spawn(move || arrive(listener));
        let begun = Instant::now();
        let messages = play(&address, &bytes, &after, what == CUT);
        let (found, ended) = arrives.join().expect("no panic");
        let error = chain(&ended.expect_err(what)).to_string();
        assert!(!error.contains("the guest may stay stopped at the source"), "{what}: {error}");
        println!("{what}: {error}");
        assert!(error.contains(expected), "{what}: {error}");
        assert_eq!(found, at, "{what}: {error}");
        assert!(begun.elapsed() < LIMIT, "{what}");
        // PONG 3 gives the guest to the destination, SHUT leaves it at the source.
        let moved = messages.contains(&Message::Pong(3));
        assert_eq!(moved, at == At::Running, "{what}: {messages:?}");
        let refused = messages.iter().any(|message| matches!(message, Message::Shut(code) if *code != 0));
        assert!(!messages.contains(&Message::Shut(0)), "{what}: {messages:?}");
        assert!(moved || refused || what == CUT, "{what}: {messages:?}");
    }
}
