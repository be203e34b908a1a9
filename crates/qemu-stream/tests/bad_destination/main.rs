//! Destinations that misbehave, over real sockets, and how a source ends: with the first cause, in time, with its guest
//! running and every page dirty again, with no thread and no descriptor left.
//!
//! It is one test in a separate process, because it counts the threads and descriptors of the process.

mod rows;

use std::{
    io,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use multifd::{
    Error, SendOptions, Sender,
    channel::{Address, Connect, Context, Stop, Stream},
    error::chain,
    live::{
        DeviceInfo, DeviceName, DeviceSection, Guest, MigrateOptions, Migration, RunState, Status,
        ZeroPageDetection,
    },
    ram::{BlockIndex, BlockName, DirtyBitmaps, Mapping, Memory, PageSize, RamBlock, RamBlocks},
};
use multifd_testkit::{
    bad_destination::{Accepts, BadDestination, Plan, Reads, Then},
    in_use, in_use_after,
};
use qemu_stream::{
    format::{Configuration, MachineType},
    outgoing::{MainStream, Options, Outgoing},
};

const LIMIT: Duration = Duration::from_millis(600);
/// How long the guest may be stopped.
const SWITCHOVER: Duration = Duration::from_secs(3);
const SOON: Duration = Duration::from_secs(10);
/// More than the sockets between two ends can buffer.
const RAM: u64 = 64 << 20;

/// A guest that only records the calls.
#[derive(Debug, Default)]
struct Noted {
    stopped: bool,
    resumed: bool,
}

const TIMER: DeviceName = DeviceName::from_static("timer");

impl Guest for Noted {
    fn devices(&self) -> Vec<DeviceInfo> {
        vec![DeviceInfo::new(TIMER, 24)]
    }

    fn run_state(&mut self) -> RunState {
        RunState::Running
    }

    fn stop(&mut self) -> io::Result<()> {
        self.stopped = true;
        Ok(())
    }

    fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
        Ok(vec![DeviceSection { name: TIMER, instance_id: 0, version: 2, data: vec![7; 24] }])
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
    /// Whether the source continues without a channel that breaks, if the destination agrees.
    may_break: bool,
    /// How long the source waits for SHUT.
    end: Duration,
    /// How it ends: successfully, or with an error of this kind and these words.
    ends: Option<(Kind, &'static [&'static str])>,
}

/// The kind of an error, in addition to its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The main stream: what the destination has sent on the return path, or has not sent.
    Failed(u32),
    Malformed,
    Cut,
    NoShut,
    Silent,
    Capability,
    Early,
    /// The system reported an error of a connection: it is broken, accepts nothing, or cannot be established.
    Broken,
    TakesNothing,
    Refused,
    /// A lost channel that cannot be left out.
    Lost,
    /// The guest was stopped for too long.
    NotReady,
    /// The owner of the guest is unknown: it stays stopped.
    UnknownSilent,
    UnknownBroken,
}

impl Kind {
    fn of(error: &Error) -> Option<Self> {
        use qemu_stream::{Error as Main, error::Violation};
        let of_io = |error: &io::Error| match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected => {
                Some(Self::Broken)
            }
            io::ErrorKind::TimedOut => Some(Self::TakesNothing),
            io::ErrorKind::ConnectionRefused => Some(Self::Refused),
            _ => None,
        };
        match error.kind() {
            Error::Io { source, .. } => of_io(source),
            Error::Violation(multifd::error::Violation::LostChannel { .. }) => Some(Self::Lost),
            Error::Stalled { .. } => Some(Self::TakesNothing),
            Error::SwitchoverTimeout { .. } => Some(Self::NotReady),
            Error::OwnerUnknown(error) => match Self::of(error)? {
                Self::Silent => Some(Self::UnknownSilent),
                Self::Broken | Self::TakesNothing => Some(Self::UnknownBroken),
                other => panic!("{other:?} is no reason not to know"),
            },
            Error::Other { source, .. } => match source.downcast_ref::<Main>()? {
                Main::DestinationFailed { code, .. } => Some(Self::Failed(*code)),
                Main::Malformed { .. } => Some(Self::Malformed),
                Main::Cut { .. } => Some(Self::Cut),
                Main::NoShut { .. } => Some(Self::NoShut),
                Main::TimedOut { .. } => Some(Self::Silent),
                Main::Unsupported { .. } => Some(Self::Capability),
                Main::Violation { what: Violation::EarlyShut, .. } => Some(Self::Early),
                Main::Io { source, .. } => of_io(source),
                _ => None,
            },
            _ => None,
        }
    }
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
fn send(row: &Row, destination: &BadDestination, stop: &Stop) -> Ended {
    let (address, start) = (destination.address(), Instant::now());
    let blocks = blocks(row.ram);
    let log = DirtyBitmaps::new(&blocks);
    let mut guest = Noted::default();
    let options = MigrateOptions::new()
        .zero_page_detection(ZeroPageDetection::None)
        .switchover_timeout(Some(SWITCHOVER));
    let send = SendOptions::new().channels(row.channels).connect_timeout(LIMIT).stall_timeout(Some(LIMIT));
    let sender = Sender::new(send, blocks.clone(), stop.clone()).expect("a sender");
    let mut migration = Migration::new(options, sender).expect("options");
    let progress = migration.progress();
    let result = (|| {
        let connector: Arc<dyn Connect> =
            Arc::new(format!("tcp:{address}").parse::<Address>().expect("an address"));
        let context = Context::new(stop).connect_timeout(LIMIT).stall_timeout(Some(LIMIT));
        let link =
            connector.connect(&context).map_err(|error| stop.fail(Error::io("connect main", error)))?;
        if row.plan.accepts == Accepts::Main {
            destination.wait_refusing();
        }
        let main = Stream::new(link, &context);
        let machine = MachineType::new("pc-q35-10.0").expect("a name");
        let stream = Options::new(Configuration::new(machine));
        let stream = stream.channels_may_break(row.may_break);
        let stream = if row.return_path { stream } else { stream.unconfirmed() };
        let outgoing = Outgoing::new(main, stream).expect("options");
        let mut main = MainStream::of_guest(outgoing, stop).end_timeout(Some(row.end)).verdict_timeout(LIMIT);
        migration.set_up(connector)?;
        let mut reader = log.reader().expect("alone");
        migration.run(&mut main, &mut reader, &mut guest).map(drop)
    })();
    let dirty = log.count(BlockIndex(0));
    Ended { result, status: progress.status(), guest, dirty, took: start.elapsed() }
}

/// The guest has not moved: it runs here, or is stopped because nobody can know whether it runs there. All its pages
/// are dirty for the next migration.
fn assert_stays(row: &str, ended: &Ended, pages: u64) {
    let unknown = matches!(ended.result, Err(Error::OwnerUnknown(_)));
    assert_eq!(ended.guest.stopped, ended.guest.resumed || unknown, "{row}: the guest runs on");
    assert!(!(unknown && ended.guest.resumed), "{row}: it must not run on both sides");
    assert_eq!(ended.dirty, pages, "{row}: dirty pages");
}

#[test]
fn every_bad_destination_leaves_the_guest_running_and_nothing_else() {
    let before = in_use();
    let (mut faults, mut longest) = (0, (Duration::ZERO, ""));
    for row in rows::rows() {
        let destination = BadDestination::start(row.plan.clone()).expect("started");
        let ended = send(&row, &destination, &Stop::new());
        drop(destination);
        match (&ended.result, row.ends) {
            (Ok(()), None) => {
                assert_eq!(ended.status, Status::Completed, "{}", row.name);
                assert!(ended.guest.stopped && !ended.guest.resumed, "{}", row.name);
            }
            (Err(error), Some((kind, texts))) => {
                faults += 1;
                let text = chain(error).to_string();
                println!("{}: {text}", row.name);
                assert_eq!(Kind::of(error), Some(kind), "{}: {error:?}", row.name);
                for words in texts {
                    assert!(text.contains(words), "{}: expected {words:?} in {text:?}", row.name);
                }
                assert_eq!(ended.status, Status::Failed, "{}", row.name);
                assert_stays(row.name, &ended, row.ram / 4096);
            }
            (Ok(()), Some(_)) => panic!("{}: ended well", row.name),
            (Err(error), None) => panic!("{}: {}", row.name, chain(error)),
        }
        assert!(ended.took < SOON, "{}: took {:?}", row.name, ended.took);
        longest = longest.max((ended.took, row.name));
        let left = in_use_after(before);
        assert_eq!(left, before, "{}: threads and descriptors", row.name);
    }
    println!("{faults} faults, longest migration: {longest:?}");
    let (cancels, longest) = cancelled_at_any_time(before);
    println!("{cancels} cancels, longest until all was joined: {longest:?}");
}

/// A source that is cancelled at any moment ends soon, and then moves to the next destination with a different number
/// of channels. Returns how many cancels came in time, and how long the slowest took to end.
fn cancelled_at_any_time(before: (usize, usize)) -> (usize, Duration) {
    let stuck = Plan { channels: (Reads::Bytes(64), Then::Hold), ..Plan::default() };
    let (mut longest, mut cancels) = (Duration::ZERO, 0);
    for (step, millis) in [0, 1, 2, 4, 8, 16, 32, 64, 128].into_iter().enumerate() {
        for plan in [Plan::default(), stuck.clone(), Plan { says: Vec::new(), ..Plan::default() }] {
            let row = Row {
                name: "cancel",
                plan,
                ram: RAM,
                return_path: true,
                channels: 16,
                may_break: false,
                end: LIMIT,
                ends: None,
            };
            let destination = BadDestination::start(row.plan.clone()).expect("started");
            let stop = Stop::new();
            let ended = thread::scope(|threads| {
                let sending = threads.spawn(|| send(&row, &destination, &stop));
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
                assert!(error.is_cancelled() || matches!(error, Error::OwnerUnknown(_)), "{}", chain(error));
                // A migration that has not begun yet has taken no bits.
                let begun = ended.status == Status::Cancelled || ended.guest.stopped;
                assert_stays("cancel", &ended, if begun { RAM / 4096 } else { 0 });
            }
            let next = BadDestination::start(Plan::default()).expect("started");
            let channels = if step % 2 == 0 { 3 } else { 20 };
            let row = Row { ram: 1 << 20, channels, ..row };
            send(&row, &next, &Stop::new()).result.expect("the next one takes it");
            drop(next);
            let left = in_use_after(before);
            assert_eq!(left, before, "threads and descriptors after a cancel");
        }
    }
    assert!(cancels > 0 && longest < SOON, "{longest:?}");
    (cancels, longest)
}
