//! Destinations that misbehave, over real sockets, and how a source ends: with the first cause, in time, its guest running
//! and every page dirty again, no thread and no descriptor left.
//!
//! One test and a process of its own, since it counts the threads and descriptors of the process.

use std::{
    error::Error as _,
    fmt::Write as _,
    fs, io,
    net::SocketAddr,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use multifd::{
    Error, SendOptions, Sender,
    channel::{Address, Connect, Stop, Stream},
    live::{DeviceSection, Guest, MigrateOptions, Migration, Status, ZeroPageDetection},
    ram::{BlockIndex, BlockName, DirtyBitmaps, Mapping, Memory, PageBitmap, PageSize, RamBlock, RamBlocks},
};
use multifd_testkit::bad_destination::{BadDestination, Plan, Reads, SHUT_0, Then};
use qemu_stream::{
    format::{Configuration, MachineType},
    outgoing::{MainStream, Options, Outgoing},
};

const LIMIT: Duration = Duration::from_millis(600);
const SOON: Duration = Duration::from_secs(10);
/// More than the sockets between two ends take in.
const RAM: u64 = 64 << 20;

/// A guest that only notes what is done to it.
#[derive(Debug, Default)]
struct Noted {
    stopped: bool,
    resumed: bool,
}

impl Guest for Noted {
    fn stop(&mut self) -> io::Result<Vec<DeviceSection>> {
        self.stopped = true;
        Ok(vec![DeviceSection { name: "timer".into(), instance_id: 0, version: 2, data: vec![7; 24] }])
    }

    fn resume(&mut self) {
        self.resumed = true;
    }
}

struct Row {
    name: &'static str,
    plan: Plan,
    ram: u64,
    return_path: bool,
    channels: u8,
    /// How it ends: well, or with these words.
    ends: Option<&'static [&'static str]>,
}

struct Ended {
    result: Result<(), Error>,
    status: Status,
    guest: Noted,
    dirty: u64,
    took: Duration,
}

fn blocks(length: u64) -> Arc<RamBlocks> {
    let memory = Memory::Mapped(Mapping::anonymous(length).expect("memory"));
    let name = BlockName::new("pc.ram").expect("a name");
    let block = RamBlock::new(name, length, PageSize::KIB_4, memory).expect("a block");
    Arc::new(RamBlocks::new(vec![block]).expect("one"))
}

/// Connects, and sets a migration up.
fn send(row: &Row, address: SocketAddr, stop: &Stop) -> Ended {
    let (blocks, start) = (blocks(row.ram), Instant::now());
    let log = DirtyBitmaps::new(&blocks);
    let mut guest = Noted::default();
    let options = MigrateOptions::new().zero_page_detection(ZeroPageDetection::None);
    let migration = Migration::new(options, blocks.clone(), stop.clone());
    let progress = migration.progress();
    let result = (|| {
        let connector: Arc<dyn Connect> =
            Arc::new(format!("tcp:{address}").parse::<Address>().expect("an address"));
        let link =
            connector.connect(stop, LIMIT).map_err(|error| stop.fail(Error::io("connect main", error)))?;
        let main = Stream::new(link).attended(stop.attention(Some(LIMIT))).expect("limits");
        let _watch = stop.watch_failure(main.waker());
        let machine = MachineType::new("pc-q35-10.0").expect("a name");
        let stream = Options::new(Configuration::new(machine)).return_path(row.return_path);
        let outgoing = Outgoing::new(main, stream).expect("options");
        let mut main = MainStream::of_guest(outgoing).end_timeout(Some(LIMIT));
        let options =
            SendOptions::new().channels(row.channels).connect_timeout(LIMIT).stall_timeout(Some(LIMIT));
        let mut sender = Sender::new(options, blocks.clone(), stop.clone())?;
        sender.set_up(connector)?;
        migration.run(Some(sender), &mut main, &mut log.clone(), &mut guest).map(drop)
    })();
    let dirty = log.of(BlockIndex(0)).map_or(0, PageBitmap::count);
    Ended { result, status: progress.status(), guest, dirty, took: start.elapsed() }
}

fn told(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}

fn count(folder: &str) -> usize {
    fs::read_dir(folder).expect("the process's own").count()
}

/// The guest has not moved: it runs here, and all its pages are to be sent by whoever sends next.
fn assert_stays(row: &str, ended: &Ended, pages: u64) {
    assert_eq!(ended.guest.stopped, ended.guest.resumed, "{row}: the guest runs on");
    assert_eq!(ended.dirty, pages, "{row}: dirty pages");
}

#[test]
fn every_bad_destination_leaves_the_guest_running_and_nothing_else() {
    let before = (count("/proc/self/task"), count("/proc/self/fd"));
    let (mut faults, mut longest) = (0, (Duration::ZERO, ""));
    for row in rows() {
        let destination = BadDestination::start(row.plan.clone()).expect("started");
        let ended = send(&row, destination.address(), &Stop::new());
        drop(destination);
        match (&ended.result, row.ends) {
            (Ok(()), None) => {
                assert_eq!(ended.status, Status::Completed, "{}", row.name);
                assert!(ended.guest.stopped && !ended.guest.resumed, "{}", row.name);
            }
            (Err(error), Some(texts)) => {
                faults += 1;
                let text = told(error);
                println!("{}: {text}", row.name);
                for words in texts {
                    assert!(text.contains(words), "{}: expected {words:?} in {text:?}", row.name);
                }
                assert_eq!(ended.status, Status::Failed, "{}", row.name);
                assert_stays(row.name, &ended, row.ram / 4096);
            }
            (Ok(()), Some(_)) => panic!("{}: ended well", row.name),
            (Err(error), None) => panic!("{}: {}", row.name, told(error)),
        }
        assert!(ended.took < SOON, "{}: took {:?}", row.name, ended.took);
        longest = longest.max((ended.took, row.name));
        let left = (count("/proc/self/task"), count("/proc/self/fd"));
        assert_eq!(left, before, "{}: threads and descriptors", row.name);
    }
    println!("{faults} faults, longest migration: {longest:?}");
    let (cancels, longest) = cancelled_at_any_time(before);
    println!("{cancels} cancels, longest until all was joined: {longest:?}");
}

/// Whatever the source is at when it is cancelled, it ends soon, and moves to the next destination with another number of
/// channels. Says how many cancels came in time, and how long the slowest took to end.
fn cancelled_at_any_time(before: (usize, usize)) -> (usize, Duration) {
    let stuck = Plan { channels: (Reads::Bytes(64), Then::Hold), ..Plan::default() };
    let (mut longest, mut cancels) = (Duration::ZERO, 0);
    for (step, millis) in [0, 1, 2, 4, 8, 16, 32, 64, 128].into_iter().enumerate() {
        for plan in [Plan::default(), stuck.clone(), Plan { says: Vec::new(), ..Plan::default() }] {
            let row = Row { name: "cancel", plan, ram: RAM, return_path: true, channels: 16, ends: None };
            let destination = BadDestination::start(row.plan.clone()).expect("started");
            let (stop, address) = (Stop::new(), destination.address());
            let ended = thread::scope(|threads| {
                let sending = threads.spawn(|| send(&row, address, &stop));
                thread::sleep(Duration::from_millis(millis));
                stop.cancel();
                let cancelled = Instant::now();
                let ended = sending.join().expect("no panic");
                longest = longest.max(cancelled.elapsed());
                ended
            });
            drop(destination);
            if let Err(error) = &ended.result {
                cancels += 1;
                assert!(error.is_cancelled(), "{}", told(error));
                // One that had not begun yet has taken no bits.
                let begun = ended.status == Status::Cancelled;
                assert_stays("cancel", &ended, if begun { RAM / 4096 } else { 0 });
            }
            let next = BadDestination::start(Plan::default()).expect("started");
            let channels = if step % 2 == 0 { 3 } else { 20 };
            let row = Row { ram: 1 << 20, channels, ..row };
            send(&row, next.address(), &Stop::new()).result.expect("the next one takes it");
            drop(next);
            let left = (count("/proc/self/task"), count("/proc/self/fd"));
            assert_eq!(left, before, "threads and descriptors after a cancel");
        }
    }
    assert!(cancels > 0 && longest < SOON, "{longest:?}");
    (cancels, longest)
}

fn rows() -> Vec<Row> {
    let row = |name, plan, ends| Row { name, plan, ram: RAM, return_path: true, channels: 2, ends };
    let good = Plan::default;
    let says = |bytes: &[u8]| Plan { says: bytes.to_vec(), ..good() };
    let main = |reads, then| Plan { main: reads, says: Vec::new(), then, ..good() };
    let channels = |reads, then| Plan { channels: (reads, then), ..good() };
    let small = |row: Row| Row { ram: 1 << 20, ..row };
    let deaf = |row: Row| Row { return_path: false, ..row };
    // Of a megabyte in two channels main is 300 bytes or so in all; the devices come behind 150.
    vec![
        row("all is well", good(), None),
        row("channels held open at the end", channels(Reads::All, Then::Hold), None),
        small(row("a slow reader of channels", channels(Reads::Slowly(60 << 10), Then::Hold), None)),
        small(row("a slow reader of main", Plan { main: Reads::Slowly(100), ..good() }, None)),
        deaf(row("no return path", says(&[]), None)),
        row("PONG and SHUT", says(&[&[0, 2, 0, 4, 0, 0, 0, 1][..], &SHUT_0].concat()), None),
        row(
            "SHUT 1",
            says(&[0, 1, 0, 4, 0, 0, 0, 1]),
            Some(&["destination failed with SHUT 1", "its own log", "can go on at the source"]),
        ),
        row(
            "SHUT of all ones",
            says(&[0, 1, 0, 4, 0xff, 0xff, 0xff, 0xff]),
            Some(&["destination failed with SHUT 4294967295"]),
        ),
        row(
            "a message that is none",
            says(&[0, 99, 0, 4, 0, 0, 0, 0]),
            Some(&["return path: offset 0x0: type of a message: expected 1 to 7, met 0x63"]),
        ),
        row(
            "SHUT of a wrong length",
            says(&[0, 1, 0, 5, 0, 0, 0, 0, 0]),
            Some(&["return path: offset 0x0: length of message 1: expected 4, met 0x5"]),
        ),
        row(
            "a message of all ones",
            says(&[0xff; 64]),
            Some(&["return path: offset 0x2: length of a message: expected at most 0x200, met 0xffff"]),
        ),
        row(
            "a postcopy message",
            says(&[0, 4, 0, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            Some(&["switch capability postcopy-ram off at the source"]),
        ),
        row(
            "half a SHUT, then nothing",
            says(&[0, 1, 0, 4, 0]),
            Some(&["return path: offset 0x4: nothing came in time", "multifd-channels"]),
        ),
        row(
            "no SHUT, main open",
            says(&[]),
            Some(&[
                "return path: offset 0x0: nothing came in time",
                "multifd-channels",
                "does not run there",
            ]),
        ),
        row(
            "no SHUT, main closed",
            main(Reads::All, Then::Close),
            Some(&["without SHUT", "can go on at the source", "its own log"]),
        ),
        row("no SHUT, main reset", main(Reads::All, Then::Reset), Some(&["without SHUT", "its own log"])),
        row(
            "half a SHUT, then closed",
            Plan { then: Then::Close, ..says(&[0, 1, 0, 4, 0]) },
            Some(&["return path: offset 0x5: stream ends where value of SHUT was expected"]),
        ),
        row("main closed at once", main(Reads::Bytes(4), Then::Close), Some(&[])),
        row("main reset at once", main(Reads::Bytes(4), Then::Reset), Some(&[])),
        row("main closed in the middle of RAM", main(Reads::Bytes(100), Then::Close), Some(&[])),
        row("main reset in the middle of RAM", main(Reads::Bytes(100), Then::Reset), Some(&[])),
        small(row(
            "main closed in the device part",
            main(Reads::Bytes(200), Then::Close),
            Some(&["without SHUT", "its own log"]),
        )),
        row(
            "channels closed behind their initial packet",
            channels(Reads::Bytes(64), Then::Close),
            Some(&["channel ", "its own log"]),
        ),
        row(
            "channels closed at once",
            channels(Reads::Bytes(4), Then::Close),
            Some(&["channel ", "to 127.0.0.1:", "its own log"]),
        ),
        row(
            "channels closed within RAM",
            channels(Reads::Bytes(1 << 20), Then::Close),
            Some(&["channel ", "to 127.0.0.1:", "its own log"]),
        ),
        row(
            "channels reset within RAM",
            channels(Reads::Bytes(1 << 20), Then::Reset),
            Some(&["channel ", "packet ", "to 127.0.0.1:", "its own log"]),
        ),
        row(
            "channels that are not read",
            channels(Reads::Bytes(64), Then::Hold),
            Some(&[
                "channel ",
                "packet ",
                "to 127.0.0.1:",
                "its program stands still",
                "taken nothing for 0.6 s",
            ]),
        ),
        row(
            "nothing is accepted",
            Plan { accepts: false, ..good() },
            Some(&["channel ", "its program stands still", "taken nothing for 0.6 s"]),
        ),
    ]
}
