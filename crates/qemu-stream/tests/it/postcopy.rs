//! A source that switches to post-copy: what is read, what is replied, what is refused.

use std::{
    io::{Read, Write},
    thread,
    time::Duration,
};

use multifd::{
    ChannelCount, ReceiveOptions, Receiver,
    channel::{Context, Stop, Stream, memory},
    ram::{BlockIndex, BlockName, PageIndex},
};
use qemu_stream::{
    error::{Error, Malformed, Unsupported, Violation},
    format::{Command, Message, PageSizes, Section, SectionId, limits},
    incoming::{Event, Events, Expected, Incoming, Loader, Outcome, SyncMark},
    outgoing::EventWriter,
};

use crate::kit::{Memory, Tape, blocks, devices, q35};

const ADVISE: Command = Command::PostcopyAdvise(Some(PageSizes { host: 0x1000, target: 0x1000 }));

pub(crate) fn encoded(command: Command) -> Vec<u8> {
    let mut bytes = Vec::new();
    Section::Command(command).encode(&mut bytes);
    bytes
}

fn discard(name: &str, ranges: &[(u64, u64)]) -> Command {
    Command::PostcopyRamDiscard { block: BlockName::new(name).unwrap(), ranges: ranges.to_vec() }
}

/// The pieces of a stream, in their order. A test changes one of them.
pub(crate) struct Pieces(Vec<(&'static str, Vec<u8>)>);

/// The pages that the source has not sent before the switch, or has sent and discards.
pub(crate) const LATE: std::ops::Range<u64> = 3..6;

impl Pieces {
    /// The order of commands and sections is that of QEMU 7.2.22 and 10.0.2.
    pub(crate) fn whole() -> Self {
        let package = |bytes: &[u8]| {
            let command = Command::Packaged(u32::try_from(bytes.len()).unwrap());
            [&encoded(command), bytes].concat()
        };
        let blocks = blocks();
        let mut out = EventWriter::new(Vec::new());
        let mut pieces = Vec::new();
        let mut piece = |name, out: &mut EventWriter<Vec<u8>>| {
            out.flush().unwrap();
            pieces.push((name, std::mem::take(out.get_mut())));
        };
        let write = |out: &mut EventWriter<Vec<u8>>, event: &Event<'_>| out.write(event).unwrap();
        let footer = Event::SectionEnd { footer: true };
        write(&mut out, &Event::Configuration(Some(&q35("10.0"))));
        piece("configuration", &mut out);
        write(&mut out, &Event::Command(&Command::OpenReturnPath));
        piece("return path", &mut out);
        write(&mut out, &Event::Command(&Command::Ping(1)));
        piece("ping 1", &mut out);
        write(&mut out, &Event::Command(&ADVISE));
        piece("advise", &mut out);
        write(&mut out, &Event::Blocks { section: SectionId(1), blocks: &blocks });
        for event in [Event::SyncPoint(SyncMark::Eos), Event::Eos, footer.clone()] {
            write(&mut out, &event);
        }
        piece("start", &mut out);
        write(&mut out, &Event::Pass { last: false });
        // The last page is not sent before the switch.
        for page in (0..256).filter(|page| *page + 1 != LATE.end) {
            write(&mut out, &Event::Page { block: BlockIndex(0), page: PageIndex(page), bytes: &[7; 4096] });
        }
        for page in 0..2 {
            write(&mut out, &Event::ZeroPage { block: BlockIndex(1), page: PageIndex(page) });
        }
        for event in [Event::SyncPoint(SyncMark::Eos), Event::Eos, footer.clone()] {
            write(&mut out, &event);
        }
        piece("part", &mut out);
        write(&mut out, &Event::Command(&Command::SwitchoverStart));
        piece("switchover", &mut out);
        let range = (LATE.start * 4096, (LATE.end - LATE.start) * 4096);
        write(&mut out, &Event::Command(&discard("pc.ram", &[range])));
        piece("discard", &mut out);
        write(&mut out, &Event::Command(&Command::Ping(2)));
        piece("ping 2", &mut out);
        write(&mut out, &Event::Command(&Command::Ping(4)));
        piece("ping 4", &mut out);
        write(&mut out, &Event::Pass { last: false });
        write(&mut out, &Event::Page { block: BlockIndex(0), page: PageIndex(3), bytes: &[9; 4096] });
        write(&mut out, &Event::ZeroPage { block: BlockIndex(0), page: PageIndex(4) });
        for event in [Event::Eos, footer.clone()] {
            write(&mut out, &event);
        }
        piece("late part", &mut out);
        write(&mut out, &Event::Pass { last: true });
        write(&mut out, &Event::Page { block: BlockIndex(0), page: PageIndex(5), bytes: &[10; 4096] });
        for event in [Event::Eos, footer] {
            write(&mut out, &event);
        }
        piece("end", &mut out);
        let mut contents = encoded(Command::PostcopyListen);
        contents.extend(devices().blob());
        contents.extend(encoded(Command::Ping(3)));
        contents.extend(encoded(Command::PostcopyRun));
        let at = pieces.iter().position(|(name, _)| *name == "ping 4").unwrap();
        pieces.insert(at, ("package", package(&contents)));
        pieces.push(("eof", vec![0]));
        Self(pieces)
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|(_, bytes)| bytes.clone()).collect()
    }

    fn at(&self, name: &str) -> usize {
        self.0.iter().position(|(found, _)| *found == name).unwrap()
    }

    fn without(mut self, name: &str) -> Self {
        self.0.remove(self.at(name));
        self
    }

    fn with(mut self, before: &str, bytes: Vec<u8>) -> Self {
        self.0.insert(self.at(before), ("surplus", bytes));
        self
    }

    fn replaced(mut self, name: &str, bytes: Vec<u8>) -> Self {
        let at = self.at(name);
        self.0[at].1 = bytes;
        self
    }

    /// What comes before a piece.
    pub(crate) fn up_to(mut self, name: &str) -> Vec<u8> {
        self.0.truncate(self.at(name));
        self.bytes()
    }
}

fn received(bytes: &[u8]) -> Result<(Memory, Incoming<Tape>), Error> {
    let mut memory = Memory::default();
    let mut incoming = Incoming::new(Tape::playing(bytes)).postcopy(true);
    incoming.run(&mut memory).map(|_| (memory, incoming))
}

fn refused(pieces: &Pieces) -> Error {
    received(&pieces.bytes()).err().unwrap()
}

#[test]
fn a_source_that_switches_is_served_to_its_end() {
    let whole = Pieces::whole().bytes();
    let mut memory = Memory::default();
    let mut incoming = Incoming::new(Tape::playing(&whole)).postcopy(true);
    let loaded = incoming.run(&mut memory).unwrap();
    assert!(loaded.postcopy && incoming.has_switched());
    assert_eq!(loaded.bytes, whole.len() as u64);
    assert_eq!(loaded.devices.blob(), devices().blob());
    assert!(loaded.devices.is_split_by_footers());
    assert_eq!(loaded.devices.sections(), devices().sections());
    assert_eq!(memory.discarded, [(0, 3, 3)]);
    assert_eq!(memory.pages[&(0, 3)], [9; 4096]);
    assert_eq!(memory.pages[&(0, 4)], [0; 4096]);
    assert_eq!(memory.pages[&(0, 5)], [10; 4096]);
    assert_eq!(memory.pages[&(0, 6)], [7; 4096]);
    let order: Vec<&str> =
        memory.calls.iter().copied().filter(|call| !call.contains("page") && *call != "sync").collect();
    let expected = ["configuration", "postcopy_advised", "blocks", "discard", "postcopy_run", "end_of_ram"];
    assert_eq!(order, expected);
    // The sections after the switch are no sync points: channels are silent.
    assert_eq!(memory.syncs(), 2);

    let mut replies = Vec::new();
    for pong in 1..=4 {
        Message::Pong(pong).encode(&mut replies);
    }
    Message::Shut(0).encode(&mut replies);
    assert_eq!(incoming.finish(Outcome::Loaded).unwrap().output, replies);
}

#[test]
fn it_is_written_as_the_same_bytes() {
    let whole = Pieces::whole().bytes();
    let mut events = Events::new(&whole[..]);
    let mut copy = EventWriter::new(Vec::new());
    let mut commands = Vec::new();
    loop {
        let event = events.next().unwrap();
        copy.write(&event).unwrap_or_else(|error| panic!("{event:?}: {error}"));
        match event {
            Event::Command(command) => commands.push(command.name()),
            Event::Devices(bytes) => assert_eq!(bytes, devices().blob()),
            Event::End(_) => break,
            _ => {}
        }
    }
    assert!(copy.into_inner() == whole);
    let package = ["PACKAGED", "POSTCOPY_LISTEN", "PING", "POSTCOPY_RUN"];
    assert!(commands.windows(4).any(|window| window == package), "{commands:?}");
}

#[test]
fn a_package_of_another_size_cannot_be_written() {
    for length in [10, 30] {
        let mut out = EventWriter::new(Vec::new());
        let whole = Pieces::whole().up_to("package");
        let mut events = Events::new(&whole[..]);
        while let Ok(event) = events.next() {
            out.write(&event).unwrap();
        }
        let written = out.write(&Event::Command(&Command::Packaged(length))).and_then(|()| {
            out.write(&Event::Command(&Command::PostcopyListen))?;
            out.write(&Event::Devices(&[0; 10]))?;
            out.write(&Event::Command(&Command::PostcopyRun))
        });
        let error = written.unwrap_err();
        assert!(error.to_string().contains("package"), "{error}");
    }
}

#[test]
fn a_source_that_does_not_switch_is_received_as_any_other() {
    let devices = devices();
    let whole = Pieces::whole();
    let (head, end) = (whole.up_to("switchover"), b"\x03\0\0\0\x01\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01");
    let stream = [&head[..], end, devices.as_bytes()].concat();
    for served in [false, true] {
        let mut memory = Memory::default();
        let mut incoming = Incoming::new(Tape::playing(&stream)).postcopy(served);
        let loaded = incoming.run(&mut memory).unwrap();
        assert!(!loaded.postcopy);
        assert_eq!(loaded.devices, devices);
        assert_eq!(memory.syncs(), 3);
    }
}

#[test]
fn the_switch_is_refused_by_name_where_it_is_not_served() {
    for pieces in [Pieces::whole(), Pieces::whole().without("discard")] {
        let mut memory = Memory::default();
        let mut incoming = Incoming::new(Tape::playing(&pieces.bytes()));
        let error = incoming.run(&mut memory).unwrap_err();
        let Error::Unsupported { what: Unsupported::Capability { capability, .. }, .. } = error else {
            panic!("{error}");
        };
        assert_eq!(capability, "postcopy-ram");
        assert!(!incoming.has_switched() && memory.discarded.is_empty());
        // Before RUN, so the source takes its guest back.
        assert!(incoming.finish(Outcome::Failed).unwrap().output.ends_with(&[0, 1, 0, 4, 0, 0, 0, 1]));
    }
}

#[test]
fn what_is_out_of_order_is_refused_by_name() {
    let again = |name: &str| Pieces::whole().0[Pieces::whole().at(name)].1.clone();
    for (pieces, expected) in [
        (Pieces::whole().without("return path").without("ping 1"), "POSTCOPY_ADVISE is not allowed without"),
        (Pieces::whole().with("start", encoded(ADVISE)), "POSTCOPY_ADVISE is not allowed twice"),
        (Pieces::whole().with("part", encoded(ADVISE)), "POSTCOPY_ADVISE is not allowed after the start"),
        (Pieces::whole().without("advise"), "command POSTCOPY_RAM_DISCARD is not supported"),
        (Pieces::whole().without("advise").without("discard"), "command PACKAGED is not supported"),
        (Pieces::whole().with("start", again("discard")), "command POSTCOPY_RAM_DISCARD is not supported"),
        (Pieces::whole().with("start", again("package")), "command PACKAGED is not supported"),
        (
            Pieces::whole().with("ping 4", again("discard")),
            "POSTCOPY_RAM_DISCARD is not allowed after PACKAGED",
        ),
        (Pieces::whole().with("ping 4", again("package")), "second PACKAGED is not allowed"),
        (
            Pieces::whole().with("package", encoded(Command::PostcopyListen)),
            "command POSTCOPY_LISTEN is not supported",
        ),
        (Pieces::whole().with("package", encoded(Command::PostcopyRun)), "POSTCOPY_RUN is not supported"),
        (Pieces::whole().with("ping 4", encoded(Command::PostcopyRun)), "POSTCOPY_RUN is not supported"),
        (Pieces::whole().with("end", encoded(Command::PostcopyResume)), "POSTCOPY_RESUME is not supported"),
        (Pieces::whole().with("eof", devices().blob().to_vec()), "FULL is not allowed after the end of ram"),
        (Pieces::whole().replaced("package", encoded(Command::Packaged(u32::MAX))), "length of a package"),
    ] {
        let error = refused(&pieces).to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn ranges_that_are_no_pages_of_a_block_are_refused() {
    let pages = |ranges: &[(u64, u64)]| {
        refused(&Pieces::whole().replaced("discard", encoded(discard("pc.ram", ranges))))
    };
    for range in [(0x800, 0x1000), (0, 0x800), (0x1000, 0)] {
        let error = pages(&[(0, 0x1000), range]);
        assert!(matches!(error, Error::Malformed { what: Malformed::Value { .. }, .. }), "{error}");
    }
    for range in [(0x10_0000, 0x1000), (0xf_f000, 0x2000), (!0xfff, 0x1000), (0, 1 << 63)] {
        let error = pages(&[(0, 0x1000), range]);
        assert!(matches!(error, Error::Violation { what: Violation::PageOutside { .. }, .. }), "{error}");
    }
    let unknown = Pieces::whole().replaced("discard", encoded(discard("moo", &[(0, 0x1000)])));
    assert!(matches!(refused(&unknown), Error::Violation { what: Violation::UnknownBlock(_), .. }));
    let whole_block = Pieces::whole().replaced("discard", encoded(discard("pc.ram", &[(0, 0x10_0000)])));
    assert_eq!(received(&whole_block.bytes()).unwrap().0.discarded, [(0, 0, 256)]);
}

#[test]
fn a_stream_that_is_cut_anywhere_after_the_switch_is_refused() {
    let whole = Pieces::whole().bytes();
    let from = Pieces::whole().up_to("discard").len();
    for length in from..whole.len() {
        let error = received(&whole[..length]).err().unwrap_or_else(|| panic!("cut at {length}"));
        assert!(matches!(error, Error::Cut { .. }), "cut at {length}: {error}");
    }
}

/// A receiver with a main connection, which plays these bytes, and one more connection. As every source does, it continues
/// when the destination has replied to the PING before the package; before that the other connection says nothing.
fn loaded(main: &[u8], preempt: impl FnOnce(&mut Stream) + Send + 'static) -> multifd::Result<Vec<u8>> {
    let stop = Stop::new();
    let receive = ReceiveOptions::new()
        .channels(ChannelCount::Exact(0))
        .greeting_timeout(Duration::from_millis(50))
        .stall_timeout(Some(Duration::from_secs(20)));
    let receiver = Receiver::new(receive, stop);
    let context = Context::new(&Stop::new());
    let (source, here) = memory::pair(1 << 22, &context, &receiver.context());
    let mut source = Stream::new(Box::new(source), &context);
    let (before, after) = main.split_at(Pieces::whole().up_to("package").len());
    source.write_all(before).unwrap();
    receiver.add(Box::new(here));
    let mut incoming = Incoming::new(receiver.wait_main()?).postcopy(true);
    let page = thread::scope(|threads| -> multifd::Result<Vec<u8>> {
        let receiver = &receiver;
        let mut loader = Loader::new(receiver, Expected::AnyMachine, |_, list| list.in_new_memory());
        let second = threads.spawn(move || {
            let mut pong = [0; 8];
            while pong != *b"\0\x02\0\x04\0\0\0\x02" {
                source.read_exact(&mut pong).unwrap();
            }
            let (other, here) = memory::pair(1 << 16, &context, &receiver.context());
            receiver.add(Box::new(here));
            source.write_all(after).unwrap();
            let mut other = Stream::new(Box::new(other), &context);
            preempt(&mut other);
            (source, other)
        });
        let loaded = incoming.run(&mut loader).map_err(|error| {
            let text = multifd::error::chain(&error).to_string();
            receiver.stop().error().unwrap_or_else(|| multifd::Error::other("main", text))
        })?;
        let blocks = loader.finish(&loaded)?;
        let mut page = vec![0; 4096];
        blocks.block(BlockIndex(0)).unwrap().load(PageIndex(5), &mut page).unwrap();
        let _ = incoming.finish(Outcome::Loaded);
        // The source closes it after SHUT.
        drop(second.join());
        Ok(page)
    })?;
    receiver.finish()?;
    Ok(page)
}

/// Page 5 is not on main: with postcopy-preempt it may come on the other connection.
fn main_without_the_last_page() -> Vec<u8> {
    let last = b"\x03\0\0\0\x01\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01";
    Pieces::whole().replaced("end", last.to_vec()).bytes()
}

fn record(fill: u8) -> Vec<u8> {
    [&0x5008_u64.to_be_bytes()[..], b"\x06pc.ram", &[fill; 4096]].concat()
}

const EOS: [u8; 8] = [0, 0, 0, 0, 0, 0, 0, 0x10];

#[test]
fn pages_of_the_preempt_connection_are_stored_however_late_they_come() {
    for wait in [0, 200] {
        let page = loaded(&main_without_the_last_page(), move |other| {
            let (first, rest) = (&record(11)[..5], &record(11)[5..]);
            other.write_all(first).unwrap();
            // Longer than a connection may be silent that is not expected.
            thread::sleep(Duration::from_millis(wait));
            other.write_all(rest).unwrap();
            other.write_all(&EOS).unwrap();
        });
        assert_eq!(page.unwrap(), [11; 4096]);
    }
}

#[test]
fn a_preempt_connection_without_pages_does_no_harm() {
    let whole = || Pieces::whole().bytes();
    // As from 7.2 and from 10.0.
    assert_eq!(loaded(&whole(), |other| other.write_all(&EOS).unwrap()).unwrap(), [10; 4096]);
    assert_eq!(loaded(&whole(), |other| other.close_write().unwrap()).unwrap(), [10; 4096]);
    let silent = |_: &mut Stream| thread::sleep(Duration::from_millis(200));
    assert_eq!(loaded(&whole(), silent).unwrap(), [10; 4096]);
}

#[test]
fn a_discarded_page_that_does_not_come_again_is_missed() {
    let error = loaded(&main_without_the_last_page(), |other| other.write_all(&EOS).unwrap()).unwrap_err();
    assert!(error.to_string().contains("1 page of RAM did not arrive"), "{error}");
}

#[test]
fn what_is_no_page_on_the_preempt_connection_is_refused() {
    for (bytes, expected) in [
        (0x200_u64.to_be_bytes().to_vec(), "MULTIFD_FLUSH is not allowed on this connection"),
        (0x5028_u64.to_be_bytes().to_vec(), "CONTINUE"),
        ([&0x5008_u64.to_be_bytes()[..], b"\x03moo"].concat(), "block \"moo\" is not in the block list"),
        ([&0x10_0008_u64.to_be_bytes()[..], b"\x06pc.ram"].concat(), "page at 0x100000 outside block"),
        (record(1)[..400].to_vec(), "stream ends where a page was expected"),
    ] {
        let error = loaded(&main_without_the_last_page(), move |other| {
            let _ = other.write_all(&bytes).and_then(|()| other.close_write());
            thread::sleep(Duration::from_millis(50));
        });
        let error = multifd::error::chain(&error.unwrap_err()).to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn the_bound_of_a_package_is_that_of_the_devices() {
    let length = u32::try_from(limits::DEVICE_PART).unwrap();
    let fits = [Pieces::whole().up_to("package"), encoded(Command::Packaged(length))].concat();
    assert!(matches!(received(&fits), Err(Error::Cut { .. })));
    let beyond = [Pieces::whole().up_to("package"), encoded(Command::Packaged(length + 1))].concat();
    let error = received(&beyond).err().unwrap();
    assert!(matches!(error, Error::Malformed { what: Malformed::TooLong { .. }, .. }), "{error}");
}
