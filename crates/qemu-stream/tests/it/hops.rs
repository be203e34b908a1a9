//! A machine's whole life: it arrives, runs, leaves again, goes into a file and comes out of it, by the manual's own code.

use std::{
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use multifd::{
    Error, SendOptions,
    channel::{Address, Connect, Listener, Stop},
    error::{Usage, Violation},
    live::{DeviceInfo, DeviceSection, Guest, MigrateOptions, MigrationInfo, RunState, ZeroPageDetection},
    ram::{
        BlockIndex, BlockName, DirtyBitmaps, DirtyLog, DirtyPages, Mapping, Memory, NeverDirty, PageBitmap,
        PageIndex, PageSize, RamBlock, RamBlocks,
    },
};
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions, Confirmed, Pending},
    departure::{Departure, DepartureOptions},
    format::{BlockList, Configuration, MachineType},
    incoming::Expected,
};

use crate::{arrive::arrive, leave::leave, machine::Machine, snapshot};

fn block(name: &str, pages: u64) -> RamBlock {
    let memory = Memory::Mapped(Mapping::anonymous(pages * 4096).expect("memory"));
    let name = BlockName::new(name).expect("a name");
    RamBlock::new(name, pages * 4096, PageSize::KIB_4, memory).expect("a block")
}

fn blocks(list: &[(&str, u64)]) -> Arc<RamBlocks> {
    Arc::new(
        RamBlocks::new(list.iter().map(|(name, pages)| block(name, *pages)).collect()).expect("distinct"),
    )
}

fn listening() -> (Listener, Address) {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().expect("an address")).expect("bound");
    let address = listener.local_address().clone();
    (listener, address)
}

/// The second hop sent pages as zero that were zero when the machine arrived, whatever its guest had written since: the
/// bookkeeping of an arrival lasted as long as the blocks.
#[test]
fn the_manuals_machine_hops_ten_times_over_the_network_and_through_files_in_turns() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("machine");
    let mut machine = Machine::new(blocks(&[("ram", 2048)]), 0);
    machine.run();
    for hop in 0..10 {
        // Long enough to come to pages that were zero so far.
        thread::sleep(Duration::from_millis(5));
        let before = if hop % 2 == 0 {
            let (listener, address) = listening();
            let arriving =
                thread::spawn(move || arrive(listener, &Stop::new(), 1).map_err(|error| error.to_string()));
            leave(&mut machine, &address, &Stop::new()).expect("moved");
            let count = machine.count;
            machine = arriving.join().expect("no panic").expect("arrived");
            count
        } else {
            snapshot::save(&mut machine, &path, &Stop::new()).expect("kept");
            let count = machine.count;
            machine = snapshot::load(&path, &Stop::new()).expect("loaded");
            machine.run();
            count
        };
        machine.halt();
        assert!(machine.is_whole() && machine.count >= before, "hop {hop}");
        machine.run();
    }
}

/// A guest of one page's worth of state, which does what it is told.
#[derive(Default)]
struct Told {
    paused: bool,
    stops: u32,
    resumes: u32,
    panics_in: &'static str,
    fails_in: &'static str,
}

impl Told {
    fn at(&self, call: &'static str) -> std::io::Result<()> {
        assert_ne!(self.panics_in, call, "as told");
        if self.fails_in == call { Err(std::io::Error::other("as told")) } else { Ok(()) }
    }
}

impl Guest for Told {
    fn devices(&self) -> Vec<DeviceInfo> {
        vec![DeviceInfo::new("told", 4)]
    }
    fn stop(&mut self) -> std::io::Result<RunState> {
        self.at("Guest::stop")?;
        self.stops += 1;
        Ok(if self.paused { RunState::Paused } else { RunState::Running })
    }
    fn save(&mut self) -> std::io::Result<Vec<DeviceSection>> {
        self.at("Guest::save")?;
        Ok(vec![DeviceSection { name: "told".into(), instance_id: 0, version: 1, data: vec![1; 4] }])
    }
    fn resume(&mut self) {
        self.resumes += 1;
    }
}

fn departure(blocks: &Arc<RamBlocks>, channels: u8, migrate: MigrateOptions, stop: &Stop) -> Departure {
    let send = (channels > 0).then(|| SendOptions::new().channels(channels));
    let machine = MachineType::new("told-1").expect("a name");
    let options = DepartureOptions::new(Configuration::new(machine)).send(send).migrate(migrate);
    Departure::new(blocks.clone(), options, stop).expect("options")
}

type Made = Result<RamBlocks, Error>;

/// A hop of `source`, whose destination makes its blocks by `make` and does with them what `then` says.
fn hop<T: Send + 'static>(
    source: &Arc<RamBlocks>,
    channels: u8,
    migrate: MigrateOptions,
    log: &mut dyn DirtyLog,
    guest: &mut Told,
    make: impl FnMut(Option<&Configuration>, &BlockList) -> Made + Send + 'static,
    then: impl FnOnce(Pending) -> Result<T, Error> + Send + 'static,
) -> (Result<MigrationInfo, Error>, Result<T, Error>) {
    let (listener, address) = listening();
    let arriving = thread::spawn(move || {
        let expected = Expected::Type(MachineType::new("told-1").expect("a name"));
        let arrival = Arrival::accept(Box::new(listener), ArrivalOptions::new(expected), &Stop::new())?;
        arrival.load(make).and_then(then)
    });
    let connector: Arc<dyn Connect> = Arc::new(address);
    let left = departure(source, channels, migrate, &Stop::new()).run(&connector, log, guest);
    (left, arriving.join().expect("no panic"))
}

fn taken(pending: Pending) -> Result<(Arc<RamBlocks>, RunState), Error> {
    let confirmed: Confirmed = pending.confirm()?;
    let arrived = (confirmed.blocks().clone(), confirmed.run_state());
    confirmed.finish();
    Ok(arrived)
}

fn fill(blocks: &RamBlocks) {
    for (index, block) in blocks.iter() {
        for page in (0..block.pages()).filter(|page| page % 3 != 2) {
            let word = (index.0 as u64 + 1) << 32 | page;
            block.store(PageIndex(page), &word.to_be_bytes().repeat(512)).expect("stored");
        }
    }
}

/// The first block of `here` that differs from the one of its name in `there`.
fn difference(here: &RamBlocks, there: &RamBlocks) -> Option<String> {
    let bytes = |block: &RamBlock| {
        let slice = block.slice(PageIndex(0), block.pages()).expect("mapped");
        let mut bytes = vec![0; slice.len()];
        slice.copy_to(&mut bytes);
        bytes
    };
    let differs = |(_, block): &(BlockIndex, &RamBlock)| {
        let other = there.find(block.name().as_bytes()).and_then(|at| there.get(at));
        other.is_none_or(|other| bytes(other) != bytes(block))
    };
    here.iter().find(differs).map(|(_, block)| block.name().to_string())
}

const RAM: [(&str, u64); 3] = [("low", 64), ("high", 64), ("rom", 8)];

/// Pages of main were placed by the position of their block: in another order half of them were wrong, and both sides said
/// that all was well.
#[test]
fn blocks_are_matched_by_name_in_any_order_over_channels_and_over_main() {
    for channels in [0, 1, 4] {
        for detection in [ZeroPageDetection::None, ZeroPageDetection::Legacy, ZeroPageDetection::Multifd] {
            let source = blocks(&RAM);
            fill(&source);
            let options = MigrateOptions::new().zero_page_detection(detection);
            let reversed = |_: Option<&Configuration>, list: &BlockList| {
                let reversed = list.entries().iter().rev();
                RamBlocks::new(
                    reversed
                        .map(|entry| {
                            // Memory that another machine has used.
                            let block = block(&entry.name.to_string(), entry.used_length / 4096);
                            (0..block.pages()).for_each(|page| {
                                block.store(PageIndex(page), &[0xee; 4096]).expect("stored");
                            });
                            block
                        })
                        .collect(),
                )
            };
            let mut guest = Told::default();
            let (left, arrived) =
                hop(&source, channels, options, &mut NeverDirty, &mut guest, reversed, taken);
            left.expect("left");
            let (arrived, _) = arrived.expect("arrived");
            assert_eq!(difference(&source, &arrived), None, "{channels} channels, {detection:?}");
            assert_eq!((guest.stops, guest.resumes), (1, 0));
        }
    }
}

#[test]
fn blocks_that_are_not_those_announced_are_refused_by_name_and_the_guest_goes_on() {
    let wrong: [(&[(&str, u64)], Usage); 4] = [
        (&RAM[..2], Usage::BlockMissing(BlockName::new("rom").expect("a name"))),
        (
            &[("low", 64), ("high", 32), ("rom", 8)],
            Usage::BlockLength {
                name: BlockName::new("high").expect("a name"),
                announced: 64 << 12,
                found: 32 << 12,
            },
        ),
        (
            &[("low", 64), ("high", 64), ("rom", 8), ("more", 1)],
            Usage::BlockSurplus(BlockName::new("more").expect("a name")),
        ),
        (
            &[("first", 1), ("low", 64), ("high", 64)],
            Usage::BlockMissing(BlockName::new("rom").expect("a name")),
        ),
    ];
    for (list, expected) in wrong {
        for channels in [0, 2] {
            let source = blocks(&RAM);
            fill(&source);
            let mut guest = Told::default();
            let make = move |_: Option<&Configuration>, _: &BlockList| {
                RamBlocks::new(list.iter().map(|(name, pages)| block(name, *pages)).collect())
            };
            let options = MigrateOptions::new();
            let (left, arrived) = hop(&source, channels, options, &mut NeverDirty, &mut guest, make, taken);
            let error = arrived.expect_err("refused");
            let told = std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source());
            assert!(told.map(ToString::to_string).any(|text| text == expected.to_string()), "{error:?}");
            left.expect_err("refused");
            assert_eq!(guest.stops, guest.resumes);
        }
    }
}

fn as_announced(_: Option<&Configuration>, list: &BlockList) -> Made {
    let entries = list.entries().iter();
    RamBlocks::new(entries.map(|entry| block(&entry.name.to_string(), entry.used_length / 4096)).collect())
}

#[test]
fn a_paused_guest_stays_paused_on_whichever_side_it_ends_up() {
    let source = blocks(&RAM);
    for paused in [false, true] {
        let mut guest = Told { paused, ..Told::default() };
        let refuse = |pending: Pending| Err::<(), _>(pending.refuse(Error::other("refuse", "as told")));
        let options = MigrateOptions::new;
        let (left, _) = hop(&source, 2, options(), &mut NeverDirty, &mut guest, as_announced, refuse);
        left.expect_err("refused");
        assert_eq!((guest.stops, guest.resumes), (1, u32::from(!paused)), "paused {paused}");
        let (left, arrived) = hop(&source, 2, options(), &mut NeverDirty, &mut guest, as_announced, taken);
        let was = if paused { RunState::Paused } else { RunState::Running };
        assert_eq!(left.expect("left").guest_was, Some(was));
        assert_eq!(arrived.expect("arrived").1, was);
    }
}

/// A log that panics or fails at one of its calls.
struct Odd {
    calls: u32,
    odd: u32,
    panics: bool,
}

impl DirtyLog for Odd {
    fn begin(&mut self, _: &RamBlocks) -> std::io::Result<()> {
        Ok(())
    }
    fn take(&mut self, _: BlockIndex, _: &mut DirtyPages<'_>) -> std::io::Result<()> {
        self.calls += 1;
        if self.calls != self.odd {
            return Ok(());
        }
        assert!(!self.panics, "as told");
        Err(std::io::Error::other("as told"))
    }
    fn put_back(&mut self, _: BlockIndex, _: &PageBitmap) {}
}

/// The guest stood for ever, no bits were put back, and the status stayed `device`.
#[test]
fn a_callback_that_panics_or_fails_ends_the_migration_with_the_guest_running() {
    for call in ["Guest::stop", "Guest::save"] {
        for panics in [true, false] {
            let source = blocks(&RAM);
            let bits = DirtyBitmaps::new(&source);
            let mut guest = Told::default();
            if panics {
                guest.panics_in = call;
            } else {
                guest.fails_in = call;
            }
            let mut log = bits.reader().expect("alone");
            let options = MigrateOptions::new();
            let (left, arrived) = hop(&source, 2, options, &mut log, &mut guest, as_announced, taken);
            arrived.expect_err("nothing whole has come");
            let error = left.expect_err("as told");
            if panics {
                assert!(
                    matches!(error.kind(), Error::Panicked { call: met, .. } if *met == call),
                    "{error:?}"
                );
            }
            // One that fails to stop has not been stopped.
            let resumes = u32::from(panics || call == "Guest::save");
            assert_eq!(guest.resumes, resumes, "{call}, panics {panics}");
            let dirty: u64 = (0..3).map(|block| bits.count(BlockIndex(block))).sum();
            assert_eq!(dirty, 136, "{call}: all pages are dirty again");
        }
    }
    // Of three blocks: before the first pass, behind it, behind the stop, behind the last pass.
    for odd in 1..=12 {
        for panics in [true, false] {
            let source = blocks(&RAM);
            let (mut guest, mut log) = (Told::default(), Odd { calls: 0, odd, panics });
            let options = MigrateOptions::new();
            let (left, arrived) = hop(&source, 2, options, &mut log, &mut guest, as_announced, taken);
            arrived.expect_err("nothing whole has come");
            let error = left.expect_err("as told");
            assert_eq!(
                matches!(error.kind(), Error::Panicked { call: "DirtyLog::take", .. }),
                panics,
                "{error:?}"
            );
            assert_eq!(guest.stops, guest.resumes, "take {odd}");
        }
    }
}

/// Something between the two that passes bytes on until it is cut.
struct Between(Arc<Mutex<Vec<TcpStream>>>);

impl Between {
    fn start(target: SocketAddr) -> (Self, Address) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let address = format!("tcp:{}", listener.local_addr().expect("bound")).parse().expect("an address");
        let sockets = Arc::new(Mutex::new(Vec::new()));
        let kept = sockets.clone();
        thread::spawn(move || {
            for here in listener.incoming().flatten() {
                let Ok(there) = TcpStream::connect(target) else { return };
                for (from, into) in [(&here, &there), (&there, &here)] {
                    let (mut from, mut into) =
                        (from.try_clone().expect("one more"), into.try_clone().expect("one more"));
                    thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut into);
                        let _ = into.shutdown(Shutdown::Write);
                    });
                }
                kept.lock().expect("whole").extend([here, there]);
            }
        });
        (Self(sockets), address)
    }

    fn cut(&self) {
        for socket in self.0.lock().expect("whole").drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

/// The network is cut when everything has been sent and the destination has said nothing yet: the source cannot know, and the
/// guest stays stopped unless the embedder has chosen otherwise.
#[test]
fn where_nobody_can_know_the_guest_stays_stopped_until_the_embedder_decides() {
    for resumes in [false, true] {
        let source = blocks(&RAM);
        let (listener, address) = listening();
        let target = address.to_string().strip_prefix("tcp:").expect("tcp").parse().expect("an address");
        let (between, address) = Between::start(target);
        let arriving = thread::spawn(move || {
            let expected = Expected::Type(MachineType::new("told-1").expect("a name"));
            let arrival = Arrival::accept(Box::new(listener), ArrivalOptions::new(expected), &Stop::new())?;
            let pending = arrival.load(as_announced)?;
            between.cut();
            // Its end is there in a moment.
            thread::sleep(Duration::from_millis(100));
            taken(pending)
        });
        let connector: Arc<dyn Connect> = Arc::new(address);
        let (mut guest, options) = (Told::default(), MigrateOptions::new().resume_if_unknown(resumes));
        let left = departure(&source, 2, options, &Stop::new()).run(&connector, &mut NeverDirty, &mut guest);
        let error = left.expect_err("cut");
        assert!(matches!(error, Error::OwnerUnknown(_)), "{error:?}");
        assert_eq!((guest.stops, guest.resumes), (1, u32::from(resumes)));
        arriving.join().expect("no panic").expect_err("the source has gone");
    }
}

/// The source is cancelled while the destination restores: the guest goes on at the source, and the destination does not get
/// it.
#[test]
fn a_cancel_while_the_destination_restores_takes_the_guest_back() {
    for channels in [0, 3] {
        let source = blocks(&RAM);
        let (listener, address) = listening();
        let stop = Stop::new();
        let cancelled = stop.clone();
        let arriving = thread::spawn(move || {
            let expected = Expected::Type(MachineType::new("told-1").expect("a name"));
            let arrival = Arrival::accept(Box::new(listener), ArrivalOptions::new(expected), &Stop::new())?;
            let pending = arrival.load(as_announced)?;
            cancelled.cancel();
            thread::sleep(Duration::from_millis(50));
            taken(pending)
        });
        let (connector, mut guest): (Arc<dyn Connect>, _) = (Arc::new(address), Told::default());
        let departure = departure(&source, channels, MigrateOptions::new(), &stop);
        let error = departure.run(&connector, &mut NeverDirty, &mut guest).expect_err("cancelled");
        assert!(error.is_cancelled(), "{error:?}");
        assert_eq!((guest.stops, guest.resumes), (1, 1));
        arriving.join().expect("no panic").expect_err("taken back");
    }
}

/// What is written after the stop is in no pass.
#[test]
fn memory_that_is_written_behind_the_last_pass_fails_the_migration() {
    let source = blocks(&RAM);
    struct Late(u32);
    impl DirtyLog for Late {
        fn begin(&mut self, _: &RamBlocks) -> std::io::Result<()> {
            Ok(())
        }
        fn take(&mut self, block: BlockIndex, into: &mut DirtyPages<'_>) -> std::io::Result<()> {
            self.0 += 1;
            // Of three blocks: the first of those behind the last pass.
            if (block, self.0) == (BlockIndex(0), 10) {
                into.add(PageIndex(5));
            }
            Ok(())
        }
        fn put_back(&mut self, _: BlockIndex, _: &PageBitmap) {}
    }
    let (mut guest, mut log) = (Told::default(), Late(0));
    let options = MigrateOptions::new();
    let (left, arrived) = hop(&source, 2, options, &mut log, &mut guest, as_announced, taken);
    arrived.expect_err("nothing whole has come");
    let error = left.expect_err("written");
    assert!(matches!(error.kind(), Error::Usage(Usage::WrittenAfterStop { pages: 1, .. })), "{error:?}");
    assert_eq!((guest.stops, guest.resumes), (1, 1));
}

/// A destination that loads nothing more when the guest has stopped: the guest stood for as long as 600 s.
#[test]
fn the_blackout_has_a_bound() {
    let (listener, address) = listening();
    // It takes connections and bytes, and says nothing.
    let silent = thread::spawn(move || {
        let mut receiver = multifd::Receiver::new(multifd::ReceiveOptions::new(), Stop::new());
        receiver.listen(Box::new(listener)).expect("listening");
        let main = receiver.wait_main().expect("main");
        thread::sleep(Duration::from_secs(3));
        drop(main);
    });
    let source = blocks(&RAM);
    let options = MigrateOptions::new()
        .downtime_limit(Duration::from_millis(50))
        .switchover_timeout(Some(Duration::from_millis(500)));
    let mut guest = Told::default();
    let connector: Arc<dyn Connect> = Arc::new(address);
    let begun = std::time::Instant::now();
    let error = departure(&source, 0, options, &Stop::new())
        .run(&connector, &mut NeverDirty, &mut guest)
        .expect_err("given up");
    assert!(matches!(error.kind(), Error::SwitchoverTimeout { .. }), "{error:?}");
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    assert_eq!((guest.stops, guest.resumes), (1, 1));
    silent.join().expect("no panic");
}

/// What a destination would refuse is refused while the guest runs, before anything is connected.
#[test]
fn devices_that_cannot_be_sent_are_refused_before_anything_is_connected() {
    struct Devices(Vec<DeviceInfo>);
    impl Guest for Devices {
        fn devices(&self) -> Vec<DeviceInfo> {
            self.0.clone()
        }
        fn stop(&mut self) -> std::io::Result<RunState> {
            unreachable!("it runs")
        }
        fn save(&mut self) -> std::io::Result<Vec<DeviceSection>> {
            unreachable!("it runs")
        }
        fn resume(&mut self) {
            unreachable!("it runs")
        }
    }
    let nowhere: Arc<dyn Connect> = Arc::new("tcp:127.0.0.1:1".parse::<Address>().expect("an address"));
    let cpu = |bytes| DeviceInfo::new("cpu", bytes);
    for (devices, why) in [
        (vec![cpu(1), cpu(1)], "device \"cpu\" instance 0 is there twice"),
        (vec![DeviceInfo::new("", 1)], "1 to 255 bytes"),
        (vec![DeviceInfo::new("x".repeat(256), 1)], "1 to 255 bytes"),
        (vec![DeviceInfo::new("globalstate", 1)], "run state"),
        (vec![cpu(200 << 20)], "a destination takes 0x8000000"),
    ] {
        let departure = departure(&blocks(&RAM), 2, MigrateOptions::new(), &Stop::new());
        let error = departure.run(&nowhere, &mut NeverDirty, &mut Devices(devices)).expect_err("refused");
        let told = std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source());
        let told: String = told.map(|error| format!("{error}: ")).collect();
        assert!(told.contains(why), "{told}");
    }
}

/// A destination that has been promised pages which never come does not take the guest.
#[test]
fn ram_with_holes_is_refused() {
    let receiver = multifd::Receiver::new(multifd::ReceiveOptions::new(), Stop::new());
    receiver.set_blocks(blocks(&[("ram", 8)])).expect("set");
    let arrived = receiver.arrived().expect("set above");
    for page in (0..8).filter(|page| *page != 6) {
        arrived.clear(BlockIndex(0), PageIndex(page)).expect("cleared");
    }
    let error = arrived.check_complete(|_| multifd::MayMiss::Nothing).expect_err("a hole");
    assert!(matches!(error.kind(), Error::Violation(Violation::PagesMissing { missing: 1, .. })), "{error}");
}
