//! Channels that break before the guest moves, in a migration that continues without them.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use multifd::{
    Error,
    channel::{Address, Connect, Context, Link, Listener, Stop},
    live::{MigrateOptions, PostcopyWhen, ZeroPageDetection},
    wire::ChannelId,
};
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions, EarlyOptions, Landing},
    format::Configuration,
    incoming::Expected,
    outgoing::postcopy::{Moved, PostcopyOptions},
    source::{Source, SourceOptions},
};

use crate::{
    LIMIT,
    kind::Kind,
    machine::{Machine, Shadow, memory},
    machine_type, may_run,
};

/// Where a connection breaks. Bytes that are on their way are lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Breaks {
    /// Both sides find it reset.
    Both,
    /// The source's bytes are accepted, and go nowhere.
    AtDestination,
    /// The destination's side stays open, and silent.
    AtSource,
}

/// Which connections break, counted from 0, which is main, and after which number of bytes.
type Plan = BTreeMap<usize, (u64, Breaks)>;

/// Connects through a relay that breaks connections.
#[derive(Clone)]
struct Fragile {
    to: SocketAddr,
    plan: Arc<Plan>,
    connections: Arc<AtomicUsize>,
    broken: Arc<Mutex<Vec<usize>>>,
    /// What stays open until the end.
    open: Arc<Mutex<Vec<TcpStream>>>,
    is_over: Arc<AtomicBool>,
}

impl Fragile {
    fn new(listener: &Listener, plan: Plan) -> Self {
        let to = listener.local_address().to_string();
        let to = to.trim_start_matches("tcp:").parse().expect("an address");
        let (connections, broken, open, is_over) = Default::default();
        Self { to, plan: Arc::new(plan), connections, broken, open, is_over }
    }

    fn relay(&self, number: usize, mut from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
        let plan = self.plan.get(&number).copied();
        let (mut buffer, mut passed) = (vec![0; 32 << 10], 0);
        loop {
            let got = from.read(&mut buffer)?;
            if got == 0 {
                return to.shutdown(Shutdown::Write);
            }
            let most = plan.map_or(u64::MAX, |(at, _)| at - passed).min(got as u64);
            to.write_all(&buffer[..usize::try_from(most).expect("small")])?;
            passed += got as u64;
            if let Some((_, breaks)) = plan.filter(|(at, _)| *at < passed) {
                self.broken.lock().expect("whole").push(number);
                return self.breaks(breaks, from, to);
            }
        }
    }

    fn breaks(&self, breaks: Breaks, from: &TcpStream, to: &TcpStream) -> io::Result<()> {
        // Bytes that were not read make the close a reset.
        let keep = |stream: &TcpStream| {
            stream.try_clone().map(|stream| self.open.lock().expect("whole").push(stream))
        };
        match breaks {
            Breaks::Both => from.shutdown(Shutdown::Both).and_then(|()| to.shutdown(Shutdown::Both)),
            Breaks::AtSource => keep(to).and_then(|()| from.shutdown(Shutdown::Both)),
            Breaks::AtDestination => {
                keep(from)?;
                to.shutdown(Shutdown::Both)?;
                let mut rest = vec![0; 32 << 10];
                let mut from = from;
                from.set_read_timeout(Some(Duration::from_millis(50)))?;
                while !self.is_over.load(Ordering::Relaxed) {
                    match from.read(&mut rest) {
                        Ok(0) => break,
                        Ok(_) => {}
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        Err(error) => return Err(error),
                    }
                }
                Ok(())
            }
        }
    }
}

impl Connect for Fragile {
    fn connect(&self, context: &Context) -> io::Result<Box<dyn Link>> {
        let number = self.connections.fetch_add(1, Ordering::Relaxed);
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = format!("tcp:{}", listener.local_addr()?);
        // Before this side sends, so that the destination sees main first.
        let to = TcpStream::connect(self.to)?;
        let this = self.clone();
        thread::spawn(move || {
            let Ok((from, _)) = listener.accept() else { return };
            let (from, to) = (Arc::new(from), Arc::new(to));
            let back = thread::spawn({
                let (from, to) = (from.clone(), to.clone());
                move || {
                    let _ = io::copy(&mut &*to, &mut &*from);
                    // The end of a channel that is broken on one side only is not passed on.
                    let _ = from.shutdown(Shutdown::Write);
                }
            });
            let _ = this.relay(number, &from, &to);
            let _ = back.join();
        });
        address.parse::<Address>().expect("an address").connect(context)
    }

    fn target(&self) -> String {
        format!("tcp:{}", self.to)
    }
}

/// One migration.
#[derive(Clone, Debug)]
struct Case {
    channels: u8,
    when: PostcopyWhen,
    detection: ZeroPageDetection,
    plan: Plan,
    here: bool,
    there: bool,
}

impl Case {
    /// Some channels, but not all of them, break within their first bytes, after the set-up.
    fn random(random: &mut fastrand::Rng, channels: u8, may_switch: bool) -> Self {
        let mut ids: Vec<_> = (1..=usize::from(channels)).collect();
        random.shuffle(&mut ids);
        let count = random.usize(usize::from(channels > 1)..=usize::from(channels - 1));
        let kinds = [Breaks::Both, Breaks::AtSource, Breaks::AtDestination];
        let plan = ids.iter().take(count).map(|id| {
            let bits = random.u32(11..20);
            (*id, (random.u64(1 << bits..2 << bits), *random.choice(&kinds).expect("one")))
        });
        let plan = plan.collect();
        let when =
            if may_switch { PostcopyWhen::After(Duration::from_millis(150)) } else { PostcopyWhen::Never };
        let detections = [ZeroPageDetection::None, ZeroPageDetection::Legacy, ZeroPageDetection::Multifd];
        let detection = *random.choice(&detections).expect("one");
        Self { channels, when, detection, plan, here: true, there: true }
    }

    fn source(&self, kind: &Kind, machine: &Machine) -> Source {
        let migrate = MigrateOptions::new().postcopy(self.when).zero_page_detection(self.detection);
        let migrate = migrate.max_bandwidth(Some(40_000_000)).downtime_limit(Duration::from_millis(40));
        let options = SourceOptions::new(Configuration::new(machine_type())).channels(self.channels);
        let options = options.migrate(migrate).channels_may_break(self.here);
        let options = kind.source(options, PostcopyOptions::new(), self.channels);
        Source::new(machine.blocks.clone(), options, &Stop::new()).expect("options")
    }

    fn destination(&self) -> ArrivalOptions {
        let options = ArrivalOptions::new(Expected::Type(machine_type())).channels_may_break(self.there);
        let options = options.pause_timeout(Some(Duration::from_secs(20)));
        options.run_early(self.when != PostcopyWhen::Never)
    }
}

/// How a migration has ended.
#[derive(Debug)]
struct End {
    /// The source's channels that broke in the network.
    broken: Vec<usize>,
    lost: Vec<ChannelId>,
    source: Result<u64, Error>,
    /// The machine that runs, or was stopped to be checked.
    arrived: bool,
    stops: u64,
    resumes: u64,
}

/// Migrates a busy guest, and checks every page where it runs in the end.
fn migrate(seed: u64, kind: &Kind, case: &Case) -> Result<End, String> {
    let shadow = Shadow::new();
    let mut machine = Machine::new(Arc::new(memory()), shadow.clone());
    machine.pace = Duration::from_micros(400);
    machine.run(seed);
    shadow.wait_written(200);
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().expect("an address")).expect("bound");
    let network = Fragile::new(&listener, case.plan.clone());
    let (listener, options) = (kind.listener(listener), case.destination());
    let early = case.when != PostcopyWhen::Never;
    let (there_shadow, make) = (shadow.clone(), kind.memory());
    let arriving = thread::spawn(move || -> Result<Machine, Error> {
        let announced = Arrival::listen(listener, options, &Stop::new())?.accept()?.announced()?;
        let landing = if early {
            announced.load_early(make(), EarlyOptions::new())?
        } else {
            Landing::Complete(Box::new(announced.load(make())?))
        };
        let run = |blocks: &Arc<_>| {
            let mut machine = Machine::new(Arc::clone(blocks), there_shadow.clone());
            machine.pace = Duration::from_micros(400);
            machine.run(seed + 1);
            machine
        };
        match landing {
            Landing::Complete(pending) => {
                let confirmed = pending.confirm()?;
                let machine = run(confirmed.blocks());
                confirmed.finish();
                Ok(machine)
            }
            Landing::Early(early) => {
                let mut running = early.confirm()?;
                let machine = run(running.blocks());
                assert!(running.wait(Some(LIMIT)), "{running:?}");
                running.finish()?;
                Ok(machine)
            }
        }
    });
    let connector = kind.over(Arc::new(network.clone()));
    let mut log = machine.writes.clone().reader().expect("the only one");
    let source = case.source(kind, &machine);
    let progress = source.progress();
    let (mut moved, begun, mut pauses) =
        (source.run(connector.clone(), &mut log, &mut machine), Instant::now(), 0);
    while let Ok(Moved::Interrupted(interrupted)) = moved {
        pauses += 1;
        if pauses > 50 || begun.elapsed() > LIMIT {
            return Err("it cannot be resumed".to_owned());
        }
        moved = interrupted.resume(connector.clone(), &Stop::new(), &mut log, &mut machine);
    }
    let arrived = arriving.join().expect("no panic");
    network.is_over.store(true, Ordering::Relaxed);
    let (source, mut place, is_there) = match (moved, arrived) {
        (Ok(Moved::Completed { .. }), Ok(there)) => (Ok(pauses), there, true),
        (Err(error), Err(_)) if machine.is_running() => {
            let (stops, resumes) = (machine.stops, machine.resumes);
            let here = std::mem::replace(&mut machine, Machine::new(Arc::new(memory()), Shadow::new()));
            (machine.stops, machine.resumes) = (stops, resumes);
            (Err(error), here, false)
        }
        (moved, arrived) => return Err(format!("source {moved:?}, destination {:?}", arrived.map(drop))),
    };
    thread::sleep(Duration::from_millis(5));
    place.halt();
    shadow.wrong().map_or(Ok(()), Err)?;
    shadow.check(&place.blocks)?;
    let broken = network.broken.lock().expect("whole").clone();
    let lost = progress.info().lost_channels;
    Ok(End { broken, lost, source, arrived: is_there, stops: machine.stops, resumes: machine.resumes })
}

fn rounds() -> u64 {
    multifd_testkit::number("MULTIFD_BROKEN_ROUNDS").unwrap_or(2)
}

#[test]
fn a_migration_continues_without_channels_that_break_and_no_page_is_wrong() {
    let may_run = may_run();
    let folder = tempfile::tempdir().expect("a folder");
    let plain = Kind::default();
    let kinds = [
        ("plain", plain.clone()),
        ("TLS", plain.clone().tls(folder.path())),
        ("zlib", plain.clone().compressed("zlib")),
        ("zstd", plain.clone().compressed("zstd")),
        ("TLS and zstd", plain.clone().tls(folder.path()).compressed("zstd")),
    ];
    let first = multifd_testkit::number("MULTIFD_BROKEN_SEED").unwrap_or(1);
    let (mut lost, mut paused, mut whole) = (0, 0, 0);
    for seed in first..first + rounds() {
        for (name, kind) in &kinds {
            for channels in [1, 2, 4] {
                let mut random = fastrand::Rng::with_seed(seed * 8 + u64::from(channels));
                let may_switch = may_run && random.bool();
                let case = Case::random(&mut random, channels, may_switch);
                let what = format!("{name}, seed {seed}, {case:?}");
                let end = migrate(seed, kind, &case).unwrap_or_else(|wrong| panic!("{what}: {wrong}"));
                let pauses = end.source.as_ref().unwrap_or_else(|error| panic!("{what}: {error:?}: {end:?}"));
                assert!(end.arrived && (end.stops, end.resumes) == (1, 0), "{what}: {end:?}");
                assert!(end.lost.len() <= end.broken.len(), "{what}: {end:?}");
                if case.when == PostcopyWhen::Never {
                    // A channel that breaks after its last page may not be noticed.
                    assert!(*pauses == 0, "{what}: {end:?}");
                }
                lost += end.lost.len();
                paused += pauses;
                whole += usize::from(end.broken.is_empty());
            }
        }
    }
    println!(
        "{lost} channels were lost, {paused} breaks after the switch, {whole} migrations without a break"
    );
    assert!(lost > 0, "no channel was lost before the guest moved");
}

#[test]
fn a_channel_that_breaks_ends_the_migration_if_a_side_has_not_agreed_and_the_guest_stays() {
    for (here, there) in [(false, false), (true, false), (false, true)] {
        for breaks in [Breaks::Both, Breaks::AtDestination] {
            let plan = [(2, (50_000, breaks))].into();
            let (when, detection) = (PostcopyWhen::Never, ZeroPageDetection::None);
            let case = Case { channels: 3, when, detection, plan, here, there };
            let end = migrate(1, &Kind::default(), &case).unwrap_or_else(|wrong| panic!("{case:?}: {wrong}"));
            assert!(end.source.is_err() && !end.arrived && end.stops == end.resumes, "{case:?}: {end:?}");
        }
    }
}

#[test]
fn main_and_the_last_channel_may_not_break_and_the_guest_stays() {
    let of = |numbers: &[usize]| numbers.iter().map(|number| (*number, (20_000, Breaks::Both))).collect();
    for (channels, plan) in [(2, of(&[1, 2])), (1, of(&[1])), (3, [(0, (1500, Breaks::Both))].into())] {
        // Main carries the zero pages.
        let (when, detection) = (PostcopyWhen::Never, ZeroPageDetection::Legacy);
        let case = Case { channels, when, detection, plan, here: true, there: true };
        let end = migrate(1, &Kind::default(), &case).unwrap_or_else(|wrong| panic!("{case:?}: {wrong}"));
        assert!(end.source.is_err() && !end.arrived && end.stops == end.resumes, "{case:?}: {end:?}");
    }
}
