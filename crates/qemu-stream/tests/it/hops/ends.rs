//! The owner of the guest when a migration fails, or succeeds late.

use std::{
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use multifd::{
    Callback, Error, Fault,
    channel::{Address, Stop},
    error::Usage,
    live::{DeviceInfo, DeviceName, DeviceSection, Guest, MigrateOptions, RunState},
    ram::{BlockIndex, DirtyBitmaps, DirtyLog, DirtyPages, NeverDirty, PageBitmap, PageIndex, RamBlocks},
};
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions, Pending},
    format::{Configuration, MachineType},
    incoming::Expected,
    source::{Source, SourceOptions},
};

use super::kit::{RAM, Told, as_announced, block, blocks, departure, hop, listening, taken};

#[test]
fn a_paused_guest_stays_paused_on_whichever_side_it_ends_up() {
    let source = blocks(&RAM);
    for paused in [false, true] {
        let mut guest = Told { paused, ..Told::default() };
        let refuse = |pending: Pending| Err::<(), _>(pending.refuse(Error::other("refuse", "as told")));
        let options = MigrateOptions::new;
        let (left, arrived) = hop(&source, 2, options(), &mut NeverDirty, &mut guest, as_announced, refuse);
        assert_eq!(left.expect_err("refused").fault(), Fault::Peer);
        let error = arrived.expect_err("refused");
        assert!(error.to_string().contains("refuse"), "the reason and no other: {error}");
        assert_eq!((guest.stops, guest.resumes), (1, u32::from(!paused)), "paused {paused}");
        let (left, arrived) = hop(&source, 2, options(), &mut NeverDirty, &mut guest, as_announced, taken);
        let was = if paused { RunState::Paused } else { RunState::Running };
        assert_eq!(left.expect("left").guest_was, Some(was));
        assert_eq!(arrived.expect("arrived").1, was);
    }
}

/// Between the announcement and `load` nobody has decided yet: a drop, a refusal and blocks that do not match leave the
/// guest at the source.
#[test]
fn a_machine_that_was_only_announced_stays_at_the_source() {
    for (channels, end) in [0, 3].into_iter().flat_map(|channels| (0..3).map(move |end| (channels, end))) {
        let source = blocks(&RAM);
        let (listener, address) = listening();
        let arriving = thread::spawn(move || {
            let options = ArrivalOptions::new(Expected::Type(MachineType::new("told-1").expect("a name")));
            let arrival = Arrival::listen(listener, options, &Stop::new())?.accept()?;
            let announced = arrival.announced()?;
            assert_eq!(announced.list().entries().len(), RAM.len());
            assert_eq!(announced.configuration().expect("sent").machine.as_str(), "told-1");
            match end {
                0 => {
                    drop(announced);
                    Ok(())
                }
                1 => Err(announced.refuse(Error::other("refuse", "as told"))),
                _ => announced.load(RamBlocks::new(vec![block("another", 4)])?).map(drop),
            }
        });
        let mut guest = Told::default();
        let leaving = departure(&source, channels, MigrateOptions::new(), &Stop::new());
        let error = leaving.migrate(address, &mut NeverDirty, &mut guest).expect_err("not taken");
        // The reason comes on main, also where a channel has noticed first that it is closed.
        assert_eq!(error.fault(), Fault::Peer, "{channels} channels, {end}: {error:?}");
        assert_eq!(guest.stops, guest.resumes, "{channels} channels, {end}");
        assert_eq!(arriving.join().expect("no panic").is_ok(), end == 0);
    }
}

/// A stop belongs to one migration. With the stop of one that has ended, a cancel would have no effect; with that of one
/// that runs, a cancel would end both.
#[test]
fn a_stop_of_another_migration_is_refused_on_both_sides_and_stays_as_it_was() {
    let taken = |error: &Error| matches!(error.kind(), Error::Usage(Usage::StopTaken));
    for channels in [0, 2] {
        let source = blocks(&RAM);
        let configuration = || Configuration::new(MachineType::new("told-1").expect("a name"));
        let options = || SourceOptions::new(configuration()).channels(channels);
        let stop = Stop::new();
        let first = Source::new(source.clone(), options(), &stop).expect("a new stop");
        assert!(taken(&Source::new(source.clone(), options(), &stop).expect_err("taken")));
        let expected = Expected::Type(MachineType::new("told-1").expect("a name"));
        let arrival = Arrival::listen(listening().0, ArrivalOptions::new(expected), &stop);
        assert!(taken(&arrival.expect_err("taken")));
        assert!(!stop.is_stopped(), "the first migration goes on");
        drop(first);
        assert!(taken(&Source::new(source, options(), &stop).expect_err("taken for ever")));
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

/// Regression: the guest stayed stopped, no bits were put back, and the status stayed `device`.
#[test]
fn a_callback_that_panics_or_fails_leaves_the_guest_as_it_was() {
    for (call, panics, paused) in [
        ("Guest::run_state", true, false),
        ("Guest::stop", true, false),
        ("Guest::stop", true, true),
        ("Guest::stop", false, false),
        ("Guest::save", true, false),
        ("Guest::save", true, true),
        ("Guest::save", false, false),
        ("Guest::save", false, true),
    ] {
        let source = blocks(&RAM);
        let bits = DirtyBitmaps::new(&source);
        let mut guest = Told { paused, ..Told::default() };
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
                matches!(error.kind(), Error::Panicked { call: found, .. } if found.as_str() == call),
                "{error:?}"
            );
        }
        // A guest that fails to stop was not stopped; of one that panics it is unknown.
        let stopped = call == "Guest::save" || (call == "Guest::stop" && panics);
        assert_eq!(guest.resumes, u32::from(stopped && !paused), "{call}, panics {panics}, paused {paused}");
        let dirty: u64 = (0..3).map(|block| bits.count(BlockIndex(block))).sum();
        assert_eq!(dirty, 136, "{call}: all pages are dirty again");
    }
    // Of three blocks: before the first pass, after it, after the stop, after the last pass.
    for odd in 1..=12 {
        for panics in [true, false] {
            let source = blocks(&RAM);
            let (mut guest, mut log) = (Told::default(), Odd { calls: 0, odd, panics });
            let options = MigrateOptions::new();
            let (left, arrived) = hop(&source, 2, options, &mut log, &mut guest, as_announced, taken);
            arrived.expect_err("nothing whole has come");
            let error = left.expect_err("as told");
            assert_eq!(
                matches!(error.kind(), Error::Panicked { call: Callback::DirtyLogTake, .. }),
                panics,
                "{error:?}"
            );
            let (block, _) = RAM[(odd as usize - 1) % RAM.len()];
            let named = error.to_string().contains(&format!("take the dirty bits of block {block:?}"));
            assert!(panics || named, "{error}");
            assert_eq!(guest.stops, guest.resumes, "take {odd}");
        }
    }
}

/// A relay that forwards bytes until it is cut.
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

/// The network is cut when everything has been sent and the destination has not replied yet. The source cannot know the
/// owner, and the guest stays stopped unless the embedder has chosen otherwise.
#[test]
fn where_nobody_can_know_the_guest_stays_stopped_until_the_embedder_decides() {
    for resumes in [false, true] {
        let source = blocks(&RAM);
        let (listener, address) = listening();
        let target = address.to_string().strip_prefix("tcp:").expect("tcp").parse().expect("an address");
        let (between, address) = Between::start(target);
        let arriving = thread::spawn(move || {
            let expected = Expected::Type(MachineType::new("told-1").expect("a name"));
            let arrival = Arrival::listen(listener, ArrivalOptions::new(expected), &Stop::new())?.accept()?;
            let pending = arrival.load(as_announced)?;
            between.cut();
            // The end of its connection arrives within this time.
            thread::sleep(Duration::from_millis(100));
            taken(pending)
        });
        let (mut guest, options) = (Told::default(), MigrateOptions::new().resume_if_unknown(resumes));
        let left = departure(&source, 2, options, &Stop::new()).migrate(address, &mut NeverDirty, &mut guest);
        let error = left.expect_err("cut");
        assert!(matches!(error, Error::OwnerUnknown(_)), "{error:?}");
        assert_eq!((guest.stops, guest.resumes), (1, u32::from(resumes)));
        arriving.join().expect("no panic").expect_err("the source has gone");
    }
}

/// The source is cancelled while the destination restores: the guest continues on the source, and the destination does
/// not get it.
#[test]
fn a_cancel_while_the_destination_restores_takes_the_guest_back() {
    for channels in [0, 3] {
        let source = blocks(&RAM);
        let (listener, address) = listening();
        let stop = Stop::new();
        let cancelled = stop.clone();
        let arriving = thread::spawn(move || {
            let expected = Expected::Type(MachineType::new("told-1").expect("a name"));
            let arrival = Arrival::listen(listener, ArrivalOptions::new(expected), &Stop::new())?.accept()?;
            let pending = arrival.load(as_announced)?;
            cancelled.cancel();
            thread::sleep(Duration::from_millis(50));
            taken(pending)
        });
        let mut guest = Told::default();
        let leaving = departure(&source, channels, MigrateOptions::new(), &stop);
        let error = leaving.migrate(address, &mut NeverDirty, &mut guest).expect_err("cancelled");
        assert!(error.is_cancelled(), "{error:?}");
        assert_eq!((guest.stops, guest.resumes), (1, 1));
        arriving.join().expect("no panic").expect_err("taken back");
    }
}

/// A write after the stop is in no pass.
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
            // Of three blocks: the first after the last pass.
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

/// Regression: if a destination loaded nothing more after the guest had stopped, the guest was stopped for up to 600 s.
#[test]
fn the_blackout_has_a_bound() {
    let (listener, address) = listening();
    // It accepts connections and bytes, and sends nothing.
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
    let begun = std::time::Instant::now();
    let error = departure(&source, 0, options, &Stop::new())
        .migrate(address, &mut NeverDirty, &mut guest)
        .expect_err("given up");
    assert!(matches!(error.kind(), Error::SwitchoverTimeout { .. }), "{error:?}");
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    assert_eq!((guest.stops, guest.resumes), (1, 1));
    silent.join().expect("no panic");
}

/// Devices that a destination would refuse are refused while the guest runs, before anything is connected.
#[test]
fn devices_that_cannot_be_sent_are_refused_before_anything_is_connected() {
    struct Devices(Vec<DeviceInfo>);
    impl Guest for Devices {
        fn devices(&self) -> Vec<DeviceInfo> {
            self.0.clone()
        }
        fn run_state(&mut self) -> RunState {
            unreachable!("it runs")
        }
        fn stop(&mut self) -> std::io::Result<()> {
            unreachable!("it runs")
        }
        fn save(&mut self) -> std::io::Result<Vec<DeviceSection>> {
            unreachable!("it runs")
        }
        fn resume(&mut self) {
            unreachable!("it runs")
        }
    }
    let nowhere: Address = "tcp:127.0.0.1:1".parse().expect("an address");
    let cpu = |bytes| DeviceInfo::new(DeviceName::from_static("cpu"), bytes);
    for (devices, why) in [
        (vec![cpu(1), cpu(1)], "device \"cpu\" instance 0 exists twice"),
        (vec![DeviceInfo::new(DeviceName::from_static("globalstate"), 1)], "run state"),
        ((0..65_536).map(|instance| cpu(1).instance(instance)).collect(), "expected at most 65536 with"),
        (vec![cpu(200 << 20)], "a destination accepts at most 0x8000000"),
    ] {
        let leaving = departure(&blocks(&RAM), 2, MigrateOptions::new(), &Stop::new());
        let error =
            leaving.migrate(nowhere.clone(), &mut NeverDirty, &mut Devices(devices)).expect_err("refused");
        let told = multifd::error::chain(&error).to_string();
        assert!(told.contains(why), "{told}");
    }
}
