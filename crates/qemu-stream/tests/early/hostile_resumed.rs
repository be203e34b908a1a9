//! Destinations that misbehave when a live source returns to them, and after it: how the source ends, and who has the guest.

use std::{
    io::{self, BufReader, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use multifd::{
    channel::{Address, Stop},
    error::chain,
    live::{MigrateOptions, PostcopyWhen},
};
use qemu_stream::{
    format::{Command, Configuration, Message},
    outgoing::postcopy::{Moved, PostcopyOptions},
    source::{Source, SourceOptions},
};

use crate::{
    LIMIT,
    machine::{BLOCKS, Machine, Shadow, memory},
    machine_type,
    switch::{command, name},
};

/// What carries the pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Over {
    Main,
    Preempt,
    Channels,
}

/// When the destination misbehaves, after the source has returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// In place of the bitmaps.
    Bitmaps,
    /// In place of RESUME_ACK.
    Ack,
    /// Behind RESUME_ACK.
    Pages,
    /// In place of SHUT.
    End,
    /// Behind SHUT 0.
    Shut,
    /// On every connection but main, while pages come.
    Elsewhere,
}

struct Row {
    what: &'static str,
    at: At,
    /// What it sends there; it closes main afterwards if that is nothing.
    says: Vec<u8>,
    /// What the error of the source contains; nothing if the migration is completed.
    expected: Option<&'static str>,
}

fn said(messages: &[Message]) -> Vec<u8> {
    let mut bytes = Vec::new();
    messages.iter().for_each(|message| message.encode(&mut bytes));
    bytes
}

fn bitmap(block: &str, bytes: u64) -> Message {
    let bitmap = vec![0; usize::try_from(bytes).expect("small")];
    Message::RecvBitmap { block: name(block), bitmap }
}

/// As they are asked for: nothing has arrived.
fn bitmaps() -> Vec<u8> {
    said(&BLOCKS.map(|(block, pages)| bitmap(block, pages.div_ceil(64) * 8)))
}

fn request(block: Option<&str>, start: u64, length: u32) -> Vec<u8> {
    said(&[Message::ReqPages { block: block.map(name), start, length }])
}

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut row = |what, at, says: Vec<u8>, expected| rows.push(Row { what, at, says, expected });
    let (shut, nonsense) = (|code| said(&[Message::Shut(code)]), vec![0, 99, 0, 4, 0, 0, 0, 0]);
    // Where every message has its place, and these have none.
    for at in [At::Bitmaps, At::Ack, At::Pages] {
        row("nothing more", at, Vec::new(), Some("SHUT was expected"));
        row("SHUT 0", at, shut(0), Some("SHUT 0 is not allowed before the end of RAM"));
        row("SHUT 1", at, shut(1), Some("the destination reported failure (SHUT 1)"));
        row("no message", at, nonsense.clone(), Some("type of a message: expected 1 to 7, found 0x63"));
        row(
            "all ones",
            at,
            vec![0xff; 4096],
            Some("length of a message: expected at most 0x200, found 0xffff"),
        );
        row(
            "a bitmap of no block",
            at,
            said(&[bitmap("high", 256)]),
            Some("block \"high\" is not in the block list"),
        );
        row(
            "a request for no block",
            at,
            request(Some("high"), 0, 4096),
            Some("block \"high\" is not in the block list"),
        );
    }
    let size = "size of a bitmap: expected a bit for each page of its block, found";
    row("a bitmap that is too short", At::Bitmaps, said(&[bitmap("ram", 248)]), Some(size));
    row("an empty bitmap", At::Bitmaps, said(&[bitmap("ram", 0)]), Some(size));
    row("a bitmap of another block", At::Bitmaps, said(&[bitmap("low", 256)]), Some(size));
    row(
        "a bitmap that is too long",
        At::Bitmaps,
        said(&[bitmap("ram", 264)]),
        Some("bitmap: expected at most 0x100, found 0x108"),
    );
    row(
        "a bitmap without end",
        At::Bitmaps,
        [&b"\0\x05\0\x04\x03ram"[..], &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xf8]].concat(),
        Some("bitmap: expected at most 0x100, found 0xfffffffffffffff8"),
    );
    let unasked = "a bitmap that was not asked for";
    row("a bitmap twice", At::Bitmaps, said(&[bitmap("ram", 256), bitmap("ram", 256)]), Some(unasked));
    row(
        "RESUME_ACK before RESUME",
        At::Bitmaps,
        said(&[Message::ResumeAck]),
        Some("RESUME_ACK is not allowed before RESUME"),
    );
    row(
        "a request before the bitmaps",
        At::Bitmaps,
        request(Some("ram"), 0, 4096),
        Some("a request for pages is not allowed before the switch"),
    );
    for at in [At::Ack, At::Pages] {
        row("a bitmap again", at, said(&[bitmap("ram", 256)]), Some(unasked));
        row("a request outside of its block", at, request(Some("low"), 40 << 12, 4096), Some("\"low\""));
        row("a request across the end", at, request(Some("low"), 39 << 12, 8192), Some("\"low\""));
        row("a request without an end", at, request(Some("ram"), u64::MAX - 0xfff, 4096), Some("\"ram\""));
        row("a request for half a page", at, request(Some("ram"), 0x800, 0x800), Some("\"ram\""));
        row("a request for nothing", at, request(Some("ram"), 0, 0), Some("\"ram\""));
        row("a request of no block", at, request(None, 0, 4096), Some("without a block"));
    }
    // What is harmless.
    row("RESUME_ACK twice", At::Pages, said(&[Message::ResumeAck]), None);
    row("one page very often", At::Pages, request(Some("ram"), 4096, 4096).repeat(20_000), None);
    row("PONG 3 again", At::Pages, said(&[Message::Pong(3), Message::Pong(3)]), None);
    row("SHUT 1 at the end", At::End, shut(1), Some("the destination reported failure (SHUT 1)"));
    row("nothing at the end", At::End, Vec::new(), Some("SHUT was expected"));
    row("a request at the end", At::End, request(Some("ram"), 0, 4096), Some("SHUT was expected"));
    row("a request after SHUT", At::Shut, request(Some("high"), 0, 1), None);
    row("another SHUT after SHUT", At::Shut, shut(1), None);
    row("messages on another connection", At::Elsewhere, [bitmaps(), shut(1)].concat(), None);
    rows
}

/// Reads until this has come.
fn read_up_to(main: &mut impl Read, last: &[u8]) -> io::Result<()> {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(last) {
        main.read_exact(&mut byte)?;
        bytes.push(byte[0]);
    }
    Ok(())
}

/// Reads until the end of RAM and of the stream: EOS, a footer, EOF.
fn read_to_eof(main: &mut impl Read) -> io::Result<()> {
    let (mut last, mut byte) = ([0xff; 14], [0]);
    while !(last[..9] == *b"\0\0\0\0\0\0\0\x10\x7e" && last[13] == 0) {
        main.read_exact(&mut byte)?;
        last.rotate_left(1);
        last[13] = byte[0];
    }
    Ok(())
}

/// Accepts the connections of a source. All but the first are read to their end.
struct Connections {
    main: TcpStream,
    others: Arc<Mutex<Vec<TcpStream>>>,
    ended: Arc<AtomicBool>,
    accepts: Option<thread::JoinHandle<()>>,
}

impl Connections {
    fn accept(listener: &TcpListener) -> Self {
        let main = listener.accept().expect("main").0;
        main.set_read_timeout(Some(LIMIT)).expect("set");
        let others: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
        let ended: Arc<AtomicBool> = Arc::default();
        let (listener, kept, over) =
            (listener.try_clone().expect("a descriptor"), others.clone(), ended.clone());
        listener.set_nonblocking(true).expect("set");
        let accepts = thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                let Ok((mut other, _)) = listener.accept() else {
                    thread::sleep(Duration::from_millis(1));
                    continue;
                };
                other.set_nonblocking(false).expect("set");
                kept.lock().expect("whole").push(other.try_clone().expect("a descriptor"));
                thread::spawn(move || io::copy(&mut other, &mut io::sink()));
            }
            // For the next set of connections.
            listener.set_nonblocking(false).expect("set");
        });
        Self { main, others, ended, accepts: Some(accepts) }
    }

    fn say_elsewhere(&self, bytes: &[u8]) {
        self.others.lock().expect("whole").iter().for_each(|mut other| other.write_all(bytes).expect("sent"));
    }

    /// Accepts no more, when this many others are there.
    fn complete(&mut self, others: usize) {
        let begun = Instant::now();
        while self.others.lock().expect("whole").len() < others {
            assert!(begun.elapsed() < LIMIT, "{others} connections");
            thread::sleep(Duration::from_millis(1));
        }
        self.ended.store(true, Ordering::Relaxed);
        if let Some(accepts) = self.accepts.take() {
            accepts.join().expect("no panic");
        }
    }

    /// Closes all of them.
    fn close(mut self) {
        self.complete(0);
        for other in self.others.lock().expect("whole").iter().chain([&self.main]) {
            let _ = other.shutdown(Shutdown::Both);
        }
    }
}

/// Takes the guest, and breaks its connections.
fn take(listener: &TcpListener, over: Over) -> io::Result<()> {
    let mut source = Connections::accept(listener);
    if over == Over::Channels {
        read_up_to(&mut source.main, &command(Command::Ping(0x6d66_6801)))?;
        source.main.write_all(&said(&[Message::Pong(0x6d66_6801), Message::Pong(0x6d66_6802)]))?;
    }
    read_up_to(&mut source.main, &command(Command::Ping(2)))?;
    source.main.write_all(&said(&[Message::Pong(2)]))?;
    read_up_to(&mut source.main, &command(Command::Ping(4)))?;
    source.main.write_all(&said(&[Message::Pong(4), Message::Pong(3)]))?;
    // The source returns as soon as it finds the end.
    source.complete(match over {
        Over::Main => 0,
        Over::Preempt => 1,
        Over::Channels => 2,
    });
    let _ = source.main.shutdown(Shutdown::Write);
    let _ = io::copy(&mut source.main, &mut io::sink());
    source.close();
    Ok(())
}

/// Serves the source that has returned, as the row has it.
fn serve(listener: &TcpListener, row: &Row) -> io::Result<()> {
    let source = Connections::accept(listener);
    let (mut main, mut sent) = (source.main.try_clone()?, BufReader::new(source.main.try_clone()?));
    let mut says = |at: At, usual: &[u8]| -> io::Result<bool> {
        if row.at != at {
            return main.write_all(usual).map(|()| true);
        }
        if row.says.is_empty() {
            main.shutdown(Shutdown::Write)?;
        } else if matches!(at, At::Pages | At::Shut) {
            main.write_all(usual)?;
        }
        main.write_all(&row.says)?;
        // Whether it continues.
        Ok(matches!(at, At::Pages | At::Shut) && row.expected.is_none())
    };
    read_up_to(&mut sent, &command(Command::RecvBitmap(name(BLOCKS[1].0))))?;
    if says(At::Bitmaps, &bitmaps())? {
        read_up_to(&mut sent, &command(Command::PostcopyResume))?;
        if says(At::Ack, &said(&[Message::ResumeAck]))? && says(At::Pages, &[])? {
            if row.at == At::Elsewhere {
                source.say_elsewhere(&row.says);
            }
            read_to_eof(&mut sent)?;
            if says(At::End, &[])? {
                says(At::Shut, &said(&[Message::Shut(0)]))?;
            }
        }
    }
    // Until the source has closed.
    let _ = io::copy(&mut sent, &mut io::sink());
    source.close();
    Ok(())
}

fn returns(over: Over, row: &Row) {
    let what = format!("{over:?}, {:?}: {}", row.at, row.what);
    let shadow = Shadow::new();
    let mut machine = Machine::new(Arc::new(memory()), shadow.clone());
    machine.run(1);
    shadow.wait_written(500);
    let mut log = machine.writes.clone().reader().expect("the only one");
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let address: Address =
        format!("tcp:{}", listener.local_addr().expect("an address")).parse().expect("valid");
    let channels = if over == Over::Channels { 2 } else { 0 };
    let options = SourceOptions::new(Configuration::new(machine_type())).channels(channels);
    let options = options.migrate(MigrateOptions::new().postcopy(PostcopyWhen::Start));
    let options = options.postcopy(PostcopyOptions::new().preempt(over == Over::Preempt));
    let options = options.stall_timeout(Some(SHORT)).end_timeout(Some(SHORT));
    let source = Source::new(machine.blocks.clone(), options, &Stop::new()).expect("options");
    let begun = Instant::now();
    let moved = thread::scope(|scope| {
        let served = scope.spawn(|| take(&listener, over).and_then(|()| serve(&listener, row)));
        let moved = source.run(address.clone(), &mut log, &mut machine);
        let moved = moved.unwrap_or_else(|error| panic!("{what}: {}", chain(&error)));
        let Moved::Interrupted(interrupted) = moved else { panic!("{what}: {moved:?}") };
        assert!(interrupted.is_confirmed(), "{what}");
        let moved = interrupted.resume(address, &Stop::new(), &mut log, &mut machine);
        // The source may have ended earlier than what is sent to it.
        let _ = served.join().expect("no panic");
        moved
    });
    assert!(begun.elapsed() < LIMIT, "{what}: {:?}", begun.elapsed());
    // The guest is the destination's, whatever that says.
    assert_eq!((machine.stops, machine.resumes, machine.is_running()), (1, 0, false), "{what}");
    let moved = moved.unwrap_or_else(|error| panic!("{what}: {}", chain(&error)));
    match (moved, row.expected) {
        (Moved::Completed { .. }, None) => {}
        (Moved::Interrupted(interrupted), Some(expected)) => {
            let error = chain(interrupted.error()).to_string();
            println!("{what}: {error}");
            assert!(interrupted.is_confirmed(), "{what}");
            assert!(error.contains(expected), "{what}: {error}");
        }
        (moved, expected) => panic!("{what}: expected {expected:?}, found {moved:?}"),
    }
}

#[test]
fn a_destination_that_misbehaves_to_a_live_source_that_returns_interrupts_it_again() {
    for over in [Over::Main, Over::Preempt, Over::Channels] {
        rows().iter().for_each(|row| returns(over, row));
    }
}

/// How long a side waits for the other.
const SHORT: Duration = Duration::from_millis(500);
