//! A source that returns over new connections after its switch to post-copy: what it is told, what it may send.

use std::{
    io::{Read, Write},
    sync::mpsc,
    thread,
    time::Duration,
};

use multifd::{
    ChannelCount, ReceiveOptions, Receiver,
    channel::{Context, Stop, Stream, memory},
    ram::{BlockIndex, BlockName, PageIndex},
};
use qemu_stream::{
    error::Error,
    format::{Command, CurrentBlock, Message, Record, Section, SectionId},
    incoming::{Expected, Incoming, Loader, Outcome},
};

use crate::{
    kit::{Memory, Tape, blocks, devices},
    postcopy::{LATE, Pieces, encoded},
};

fn name(name: &str) -> BlockName {
    BlockName::new(name).unwrap()
}

/// A section of RAM with these pages of the first block, each filled with a byte.
fn part(last: bool, pages: &[(u64, u8)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    match last {
        true => Section::End(SectionId(1)).encode(&mut bytes),
        false => Section::Part(SectionId(1)).encode(&mut bytes),
    }
    let mut current = CurrentBlock::default();
    for (page, fill) in pages {
        let record = Record::Page(BlockIndex(0), PageIndex(*page));
        record.encode(&blocks(), &mut current, &mut bytes).unwrap();
        bytes.extend([*fill; 4096]);
    }
    Record::Eos.encode(&blocks(), &mut current, &mut bytes).unwrap();
    bytes.extend(b"\x7e\0\0\0\x01");
    bytes
}

fn asks() -> Vec<u8> {
    blocks().entries().iter().flat_map(|entry| encoded(Command::RecvBitmap(entry.name.clone()))).collect()
}

/// What a late page has from a source that has returned.
fn fill(page: u64) -> u8 {
    40 + u8::try_from(page).unwrap()
}

/// What a source sends that has returned: questions, RESUME, all pages that may be missing, and the end.
fn returned() -> Vec<u8> {
    let late: Vec<_> = LATE.map(|page| (page, fill(page))).collect();
    [asks(), encoded(Command::PostcopyResume), part(false, &late), part(true, &[]), vec![0]].concat()
}

/// How often the source has returned, what was read last, and how the migration ended.
fn received(first: &[u8], then: &[u8]) -> (u32, Memory, Result<Tape, Error>) {
    let (mut memory, mut returns) = (Memory::default(), 0);
    let mut incoming = Incoming::new(Tape::playing(first)).postcopy(true);
    let loaded = incoming.run_resumable(&mut memory, |error| {
        returns += 1;
        if returns > 1 { Err(error) } else { Ok(Tape::playing(then)) }
    });
    let ended = match loaded {
        Ok(loaded) => {
            assert!(loaded.postcopy);
            // Pieces that were cut do not count.
            let most = (first.len() + then.len()) as u64;
            assert!((then.len() as u64..=most).contains(&loaded.bytes), "{} of {most}", loaded.bytes);
            incoming.finish(Outcome::Loaded)
        }
        Err(error) => Err(error),
    };
    (returns, memory, ended)
}

#[test]
fn source_whose_stream_is_cut_anywhere_after_the_switch_can_return() {
    let whole = Pieces::whole().bytes();
    let late = Pieces::whole().up_to("late part").len();
    let end = Pieces::whole().up_to("end").len();
    // Each place outside of a page, and some within.
    let within =
        |cut: usize, page: usize| (page + 20..page + 4090).contains(&cut) && !cut.is_multiple_of(500);
    let cuts = Pieces::whole().up_to("ping 4").len()..whole.len();
    for cut in cuts.filter(|cut| !within(*cut, late + 20) && !within(*cut, end + 13)) {
        let (returns, memory, ended) = received(&whole[..cut], &returned());
        let output = ended.unwrap_or_else(|error| panic!("cut at {cut}: {error}")).output;
        assert_eq!(returns, 1, "cut at {cut}");
        for page in LATE {
            assert_eq!(memory.pages[&(0, page)], [fill(page); 4096], "cut at {cut}");
        }
        assert_eq!(memory.pages[&(0, 6)], [7; 4096]);
        // A page has arrived when all of it was read.
        let arrived = |page: u64| match page {
            3 => cut >= late + 5 + 8 + 7 + 4096,
            4 => cut >= late + 5 + 8 + 7 + 4096 + 9,
            // The block is that of the record before.
            5 => cut >= end + 5 + 8 + 4096,
            _ => true,
        };
        let mut words = [u64::MAX; 4];
        LATE.filter(|page| !arrived(*page)).for_each(|page| words[0] &= !(1 << page));
        let mut expected = Vec::new();
        let bitmap = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        Message::RecvBitmap { block: name("pc.ram"), bitmap }.encode(&mut expected);
        let bitmap = vec![3, 0, 0, 0, 0, 0, 0, 0];
        Message::RecvBitmap { block: blocks().entries()[1].name.clone(), bitmap }.encode(&mut expected);
        Message::ResumeAck.encode(&mut expected);
        Message::Shut(0).encode(&mut expected);
        assert!(output == expected, "cut at {cut}: {output:x?}");
        let calls = memory.calls.iter().filter(|call| **call == "postcopy_resumed").count();
        assert_eq!(calls, 1);
    }
}

#[test]
fn source_that_is_cut_before_the_switch_is_not_waited_for() {
    let whole = Pieces::whole().bytes();
    let switched = Pieces::whole().up_to("ping 4").len();
    for cut in (switched - 9..switched).chain([Pieces::whole().up_to("discard").len()]) {
        let (returns, _, ended) = received(&whole[..cut], &returned());
        assert_eq!(returns, 0, "cut at {cut}");
        assert!(matches!(ended, Err(Error::Cut { .. })), "cut at {cut}");
    }
}

#[test]
fn source_that_returns_again_and_again_has_an_end() {
    let cut = Pieces::whole().up_to("late part");
    let (returns, _, ended) = received(&cut, &asks());
    assert_eq!(returns, 2);
    assert!(matches!(ended, Err(Error::Cut { .. })));
}

#[test]
fn what_a_source_that_returns_may_not_send_is_refused_by_name() {
    let cut = Pieces::whole().up_to("late part");
    let resume = || encoded(Command::PostcopyResume);
    let package = [encoded(Command::Packaged(4)), vec![0; 4]].concat();
    for (then, expected) in [
        (part(false, &[(3, 1)]), "a section of ram is not allowed before POSTCOPY_RESUME"),
        (part(true, &[(3, 1)]), "a section of ram is not allowed before POSTCOPY_RESUME"),
        (encoded(Command::RecvBitmap(name("moo"))), "block \"moo\" is not in the block list"),
        ([resume(), resume()].concat(), "POSTCOPY_RESUME"),
        ([resume(), asks()].concat(), "RECV_BITMAP"),
        ([asks(), resume(), package].concat(), "second PACKAGED is not allowed in one stream"),
        (Pieces::whole().bytes(), "section type: expected"),
    ] {
        let (returns, _, ended) = received(&cut, &then);
        let error = ended.err().unwrap_or_else(|| panic!("{expected}"));
        assert!(returns == 1 && error.to_string().contains(expected), "{expected}: {error}");
    }
    // Nobody has returned.
    for early in [asks(), resume()] {
        let (returns, _, ended) = received(&[cut.clone(), early].concat(), &returned());
        let error = ended.err().unwrap();
        assert!(returns == 0 && error.to_string().contains("is not supported"), "{error}");
    }
}

/// A destination of the library, and a source that the test plays.
struct Meeting {
    receiver: Receiver,
    context: Context,
}

impl Meeting {
    fn new() -> Self {
        let receive = ReceiveOptions::new()
            .channels(ChannelCount::Exact(0))
            .greeting_timeout(Duration::from_millis(50))
            .stall_timeout(Some(Duration::from_secs(20)));
        Self { receiver: Receiver::new(receive, Stop::new()), context: Context::new(&Stop::new()) }
    }

    fn connect(&self) -> Stream {
        let (source, here) = memory::pair(1 << 22, &self.context, &self.receiver.context());
        self.receiver.add(Box::new(here));
        Stream::new(Box::new(source), &self.context)
    }

    /// Lets a source play, and receives it. Returns the late pages.
    fn run(&self, source: impl FnOnce(&Self) -> Vec<Stream> + Send) -> multifd::Result<Vec<u8>> {
        let (done, wait) = mpsc::channel::<()>();
        thread::scope(|threads| {
            let played = threads.spawn(move || {
                let streams = source(self);
                // The source closes its connections after SHUT.
                let _ = wait.recv_timeout(Duration::from_secs(20));
                drop(streams);
            });
            let pages = self.receive();
            drop(done);
            played.join().unwrap();
            pages
        })
    }

    fn receive(&self) -> multifd::Result<Vec<u8>> {
        let mut incoming = Incoming::new(self.receiver.wait_main()?).postcopy(true);
        let mut loader = Loader::new(&self.receiver, Expected::AnyMachine, |_, list| list.in_new_memory());
        let loaded = incoming.run_resumable(&mut loader, |error| {
            self.receiver.wait_resumed(Some(Duration::from_secs(10))).map_err(|_| error)
        });
        let loaded = loaded.map_err(|error| {
            let text = error.to_string();
            self.receiver.stop().error().unwrap_or_else(|| multifd::Error::other("main", text))
        })?;
        let found = loader.finish(&loaded)?;
        let mut pages = vec![0; 3 * 4096];
        for (page, into) in LATE.zip(pages.chunks_mut(4096)) {
            found.block(BlockIndex(0)).unwrap().load(PageIndex(page), into).unwrap();
        }
        let _ = incoming.finish(Outcome::Loaded);
        Ok(pages.chunks(4096).map(|page| page[0]).collect())
    }
}

/// Reads replies up to this one.
fn read_up_to(stream: &mut Stream, last: &Message) {
    let mut bytes = Vec::new();
    last.encode(&mut bytes);
    let mut read = Vec::new();
    let mut byte = [0];
    while !read.ends_with(&bytes) {
        stream.read_exact(&mut byte).unwrap();
        read.extend(byte);
    }
}

/// Page 5, on the connection of postcopy-preempt.
fn on_preempt(fill: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut current = CurrentBlock::default();
    Record::Page(BlockIndex(0), PageIndex(5)).encode(&blocks(), &mut current, &mut bytes).unwrap();
    bytes.extend([fill; 4096]);
    Record::Eos.encode(&blocks(), &mut current, &mut bytes).unwrap();
    bytes
}

/// The network is broken in a way that only the source has noticed: its first connections are open and silent.
#[test]
fn source_can_return_while_its_earlier_connections_seem_intact() {
    for silent in [0, 200] {
        let meeting = Meeting::new();
        let pages = meeting.run(|meeting| {
            let mut main = meeting.connect();
            main.write_all(&Pieces::whole().up_to("package")).unwrap();
            read_up_to(&mut main, &Message::Pong(2));
            let preempt = meeting.connect();
            let rest = Pieces::whole().up_to("late part");
            main.write_all(&rest[Pieces::whole().up_to("package").len()..]).unwrap();
            read_up_to(&mut main, &Message::Pong(4));
            // The connection of preempt is known as such after a time of silence.
            thread::sleep(Duration::from_millis(silent));
            let mut again = meeting.connect();
            again.write_all(&asks()).unwrap();
            again.write_all(&encoded(Command::PostcopyResume)).unwrap();
            read_up_to(&mut again, &Message::ResumeAck);
            let mut other = meeting.connect();
            again.write_all(&part(false, &[(3, 41)])).unwrap();
            again.write_all(&part(true, &[(4, 42)])).unwrap();
            again.write_all(&[0]).unwrap();
            other.write_all(&on_preempt(43)).unwrap();
            read_up_to(&mut again, &Message::Shut(0));
            vec![main, preempt, again, other]
        });
        assert_eq!(pages.unwrap(), [41, 42, 43], "silent for {silent} ms");
        meeting.receiver.finish().unwrap();
    }
}

/// A source that gives up one attempt to return and makes another one.
#[test]
fn newest_connection_of_a_source_that_returns_counts() {
    let meeting = Meeting::new();
    let pages = meeting.run(|meeting| {
        let mut main = meeting.connect();
        main.write_all(&Pieces::whole().up_to("late part")).unwrap();
        read_up_to(&mut main, &Message::Pong(4));
        let mut given_up = meeting.connect();
        given_up.write_all(&asks()).unwrap();
        let mut again = meeting.connect();
        again.write_all(&returned()).unwrap();
        read_up_to(&mut again, &Message::Shut(0));
        vec![main, given_up, again]
    });
    assert_eq!(pages.unwrap(), [43, 44, 45]);
    meeting.receiver.finish().unwrap();
}

/// What the source has sent before is in a buffer of this side.
#[test]
fn source_can_return_before_its_switch_was_read() {
    for also_closed in [false, true] {
        let meeting = Meeting::new();
        let pages = meeting.run(|meeting| {
            let mut main = meeting.connect();
            main.write_all(&Pieces::whole().up_to("package")).unwrap();
            read_up_to(&mut main, &Message::Pong(2));
            let mut again = meeting.connect();
            again.write_all(&returned()).unwrap();
            // So that it is known.
            thread::sleep(Duration::from_millis(50));
            let rest = Pieces::whole().up_to("late part");
            main.write_all(&rest[Pieces::whole().up_to("package").len()..]).unwrap();
            let mut streams = Vec::new();
            if also_closed {
                drop(main);
            } else {
                streams.push(main);
            }
            read_up_to(&mut again, &Message::Shut(0));
            streams.push(again);
            streams
        });
        assert_eq!(pages.unwrap(), [43, 44, 45], "closed: {also_closed}");
        meeting.receiver.finish().unwrap();
    }
}

/// Nobody who connects can break a migration that has not switched.
#[test]
fn connection_that_returns_before_the_switch_waits_for_it() {
    let meeting = Meeting::new();
    let pages = meeting.run(|meeting| {
        let mut main = meeting.connect();
        main.write_all(&Pieces::whole().up_to("switchover")).unwrap();
        read_up_to(&mut main, &Message::Pong(1));
        let mut early = meeting.connect();
        early.write_all(&asks()).unwrap();
        thread::sleep(Duration::from_millis(50));
        // It ends as in pre-copy, without a switch.
        let pages: Vec<_> = LATE.map(|page| (page, 60)).collect();
        main.write_all(&part(false, &pages)).unwrap();
        main.write_all(&part(true, &[])).unwrap();
        main.write_all(devices().as_bytes()).unwrap();
        read_up_to(&mut main, &Message::Shut(0));
        vec![main, early]
    });
    assert_eq!(pages.unwrap(), [60, 60, 60]);
    meeting.receiver.finish().unwrap();
}

#[test]
fn wait_for_a_source_that_does_not_return_has_an_end() {
    let meeting = Meeting::new();
    let early = meeting.receiver.wait_resumed(None).unwrap_err();
    assert!(early.to_string().contains("the switch to post-copy is not available yet"), "{early}");
    meeting.receiver.expect_resumed();
    let late = meeting.receiver.wait_resumed(Some(Duration::from_millis(20))).unwrap_err();
    assert!(late.to_string().contains("did not resume"), "{late}");
    thread::scope(|threads| {
        let waits = threads.spawn(|| meeting.receiver.wait_resumed(None));
        thread::sleep(Duration::from_millis(20));
        meeting.receiver.stop().cancel();
        assert!(waits.join().unwrap().unwrap_err().is_cancelled());
    });
}
