//! A peer that says something else than what it should: a relay between both sides that changes bytes once.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use multifd::{
    Error, ReceiveOptions,
    channel::{Address, Connect, Context, Link, Listener, Stop},
    live::PostcopyWhen,
};
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions, EarlyOptions, Landing},
    incoming::Expected,
    outgoing::postcopy::Moved,
};

use crate::{
    kind::Kind,
    machine::{Machine, Shadow, memory},
    machine_type, may_run,
    network::Network,
    source_of,
};

/// What happens to the bytes of one direction of one connection.
#[derive(Clone, Copy, Debug)]
struct Change {
    /// In the order of the connections: 0 is main.
    connection: usize,
    /// From the destination to the source.
    is_reply: bool,
    /// After this number of bytes.
    at: u64,
    how: How,
}

#[derive(Clone, Copy, Debug)]
enum How {
    /// A byte is another one.
    Replace(u8),
    /// Bytes are added.
    Insert([u8; 8]),
    /// A byte is missing.
    Drop,
}

impl Change {
    fn random(random: &mut fastrand::Rng, channels: u8) -> Self {
        let is_main = channels == 0 || random.u8(..4) > 0;
        let connection = if is_main { 0 } else { random.usize(1..=usize::from(channels)) };
        let is_reply = is_main && random.bool();
        // Most of what is not pages comes early, so small numbers are as likely as large ones.
        let digits = random.u32(4..if is_reply { 12 } else { 17 });
        let at = random.u64(..1 << digits);
        let how = match random.u8(..3) {
            0 => How::Replace(random.u8(1..)),
            1 => How::Insert(std::array::from_fn(|_| random.u8(..))),
            _ => How::Drop,
        };
        Self { connection, is_reply, at, how }
    }

    /// Changes `bytes`, before which `passed` have come.
    fn apply(self, passed: u64, bytes: &mut Vec<u8>) {
        let Some(at) = self.at.checked_sub(passed).filter(|at| *at < bytes.len() as u64) else { return };
        let at = usize::try_from(at).expect("within a buffer");
        match self.how {
            How::Replace(other) => bytes[at] ^= other,
            How::Insert(added) => drop(bytes.splice(at..at, added)),
            How::Drop => drop(bytes.remove(at)),
        }
    }
}

/// Connects through a relay that changes bytes.
struct Tampered {
    to: Network,
    change: Change,
    connections: AtomicUsize,
}

impl Connect for Tampered {
    fn connect(&self, context: &Context) -> io::Result<Box<dyn Link>> {
        let number = self.connections.fetch_add(1, Ordering::Relaxed);
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = format!("tcp:{}", listener.local_addr()?);
        let (to, change) = (self.to.target(), self.change);
        thread::spawn(move || {
            let Ok((from, _)) = listener.accept() else { return };
            let Ok(to) = TcpStream::connect(to.trim_start_matches("tcp:")) else { return };
            let change = Some(change).filter(|change| change.connection == number);
            let (from, to) = (Arc::new(from), Arc::new(to));
            let back = thread::spawn({
                let (from, to) = (from.clone(), to.clone());
                move || relay(&to, &from, change.filter(|change| change.is_reply))
            });
            relay(&from, &to, change.filter(|change| !change.is_reply));
            let _ = back.join();
        });
        address.parse::<Address>().expect("an address").connect(context)
    }

    fn target(&self) -> String {
        self.to.target()
    }
}

fn relay(mut from: &TcpStream, mut to: &TcpStream, change: Option<Change>) {
    let (mut buffer, mut passed) = (vec![0; 64 << 10], 0);
    let (how, failed) = loop {
        let got = match from.read(&mut buffer) {
            Ok(0) => break (Shutdown::Write, false),
            Ok(got) => got,
            Err(_) => break (Shutdown::Both, true),
        };
        let mut bytes = buffer[..got].to_vec();
        if let Some(change) = change {
            change.apply(passed, &mut bytes);
        }
        passed += got as u64;
        if to.write_all(&bytes).is_err() {
            break (Shutdown::Both, true);
        }
    };
    let _ = to.shutdown(how);
    if failed {
        let _ = from.shutdown(Shutdown::Both);
    }
}

/// Whatever a peer says, both sides end, and the guest does not run twice. What it contains is another question: a changed page cannot be
/// told from one that the guest has written, unless TLS protects it.
#[test]
fn whatever_a_peer_says_both_sides_end_and_no_guest_runs_twice() {
    if !may_run() {
        return;
    }
    let rounds = multifd_testkit::number("MULTIFD_EARLY_CHANGES").unwrap_or(24);
    let first = multifd_testkit::number("MULTIFD_EARLY_SEED").unwrap_or(1);
    let mut tally = BTreeMap::<&str, u64>::new();
    for seed in first..first + rounds {
        let outcome = changed(seed).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
        *tally.entry(outcome).or_default() += 1;
    }
    println!("{rounds} rounds from seed {first} on: {tally:?}");
}

fn changed(seed: u64) -> Result<&'static str, String> {
    let mut random = fastrand::Rng::with_seed(seed);
    let channels = *random.choice(&[0, 1, 2, 4]).expect("one");
    let change = Change::random(&mut random, channels);
    let mut machine = Machine::new(Arc::new(memory()), Shadow::new());
    machine.run(seed);
    let (listener, network) = Network::listen();
    let connector: Arc<dyn Connect> =
        Arc::new(Tampered { to: network, change, connections: AtomicUsize::new(0) });
    let confirmed = Arc::new(AtomicBool::new(false));
    let arriving = thread::spawn({
        let confirmed = confirmed.clone();
        move || arrive(listener, &confirmed)
    });
    let mut log = machine.writes.clone().reader().expect("the only one");
    let (begun, stop) = (Instant::now(), Stop::new());
    let source = source_of(&Kind::default(), &machine.blocks, channels, PostcopyWhen::Start, &stop);
    let mut moved = source.run(connector.clone(), &mut log, &mut machine);
    if let Ok(Moved::Interrupted(interrupted)) = moved {
        moved = interrupted.resume_within(PAUSE, connector, &Stop::new(), &mut log, &mut machine);
    }
    let arrived = arriving.join().map_err(|_| format!("{change:?}: the destination has panicked"))?;
    let (here, there) = (machine.is_running(), confirmed.load(Ordering::Acquire));
    machine.halt();
    let what = format!("{change:?}, {channels} channels: source {moved:?}, destination {arrived:?}");
    if begun.elapsed() > LIMIT {
        return Err(format!("it took {:?}: {what}", begun.elapsed()));
    }
    match (&moved, &arrived) {
        _ if here && there => Err(format!("two guests: {what}")),
        (Ok(Moved::Completed { .. }), Ok(())) if there => Ok("moved"),
        (Ok(Moved::Completed { .. }), _) => Err(format!("only one side takes it for moved: {what}")),
        (Ok(Moved::Interrupted(_)), _) => Ok("said to be interrupted"),
        (Err(_), _) if here => Ok("stayed"),
        (Err(_), _) => Err(format!("no guest runs, and nobody waits for it: {what}")),
    }
}

/// Takes a guest, which does not run: one that accesses a page which never comes would end this process.
fn arrive(listener: Listener, confirmed: &AtomicBool) -> Result<(), Error> {
    let receive = ReceiveOptions::new().accept_timeout(Some(Duration::from_secs(2)));
    let options = ArrivalOptions::new(Expected::Type(machine_type())).receive(receive);
    let options = options.run_early(true).pause_timeout(Some(PAUSE));
    let arrival = Arrival::listen(listener, options, &Stop::new())?.accept()?;
    let mut running = match arrival.announced()?.load_early(memory(), EarlyOptions::new())? {
        Landing::Complete(pending) => {
            pending.confirm()?.finish();
            confirmed.store(true, Ordering::Release);
            return Ok(());
        }
        Landing::Early(early) => early.confirm()?,
    };
    confirmed.store(true, Ordering::Release);
    if !running.wait(Some(LIMIT / 2)) {
        return Err(Error::text("RAM is not complete in time"));
    }
    running.finish().map(drop)
}

/// How long a side waits for the other one to return.
const PAUSE: Duration = Duration::from_secs(3);
/// No side takes longer.
const LIMIT: Duration = Duration::from_secs(30);
