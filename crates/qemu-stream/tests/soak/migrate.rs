//! One migration, with both sides in this process, as a VMM would run them.

use std::{
    fs::File,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use multifd::{
    ChannelCount, Error, ReceiveOptions, Result, SendOptions,
    channel::{
        Address, Connect, Listen, Listener, Stop, memory,
        tls::{ClientCredentials, ServerCredentials, TlsConnector, TlsListener},
    },
    live::{MigrateOptions, Status},
    ram::{BlockIndex, Mapping, Memory, PageBitmap, Places, RamBlock, RamBlocks},
};
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions, Listening},
    format::{BlockList, Configuration, MachineType},
    incoming::Expected,
    source::{Source, SourceOptions},
};

use crate::{
    fault::{Misfortune, UnluckyConnector, UnluckyListener},
    guest::{DEVICE, SoakGuest, Unreadable},
    plan::{DOES_NOT_FIT, Fault, ODD, Plan, Side, Transport},
};

/// The result of a source.
pub(crate) struct SourceEnd {
    pub(crate) result: Result<()>,
    pub(crate) status: Status,
    pub(crate) dirty: u64,
    pub(crate) guest: SoakGuest,
}

/// The result of a destination.
pub(crate) struct DestinationEnd {
    /// Whether it has everything, and could report it.
    pub(crate) result: Result<()>,
    pub(crate) blocks: Option<Arc<RamBlocks>>,
    pub(crate) device: Option<Vec<u8>>,
}

pub(crate) struct Ends {
    pub(crate) source: SourceEnd,
    pub(crate) destination: DestinationEnd,
    /// Whether the destination still waited for main after the source had ended, and had to be cancelled.
    pub(crate) abandoned: bool,
    /// From the fault to the end of both, if it happened.
    pub(crate) took: Option<Duration>,
}

/// Credentials of both sides, and a folder for sockets.
pub(crate) struct Means {
    pub(crate) client: ClientCredentials,
    pub(crate) server: ServerCredentials,
    pub(crate) folder: tempfile::TempDir,
}

/// Migrates; `None` if a side has not ended after [`HANG`], or has panicked.
pub(crate) fn migrate(plan: &Plan, means: &Means, mut guest: SoakGuest) -> Option<Ends> {
    let (stops, limits) = ((Stop::new(), Stop::new()), Limits::of(plan));
    let fortunes =
        (Misfortune::new(plan.fault, Side::Source), Misfortune::new(plan.fault, Side::Destination));
    let (connector, listener) = network(plan, means, &fortunes);
    let ((ended, ends), found) = (mpsc::channel(), Arc::new(AtomicBool::new(false)));
    let receiving = {
        let (plan, stop, ended, found) = (plan.clone(), stops.1.clone(), ended.clone(), found.clone());
        spawn("destination", move || {
            let end = receive(&plan, limits, listener, &stop, &found);
            let _ = ended.send(Side::Destination);
            end
        })
    };
    let sending = {
        let (plan, stop) = (plan.clone(), stops.0.clone());
        spawn("source", move || {
            (guest.stopped, guest.resumed) = (false, false);
            guest.stays_up = plan.fault == Fault::GuestStaysUp;
            let end = send(&plan, limits, connector, &stop, guest);
            // The connections of an ended process are closed, which its peer notices.
            if end.result.is_err() {
                stop.cancel();
            }
            let _ = ended.send(Side::Source);
            end
        })
    };
    if let Fault::Cancel(side, after) = plan.fault {
        thread::sleep(after);
        fortunes.0.strike();
        match side {
            Side::Source => stops.0.cancel(),
            Side::Destination => stops.1.cancel(),
        }
    }
    let first = ends.recv_timeout(HANG).ok()?;
    // A destination without main waits for it without limit.
    let (mut abandoned, left) = (false, Instant::now());
    if ends.recv_timeout(GRACE).is_err() {
        abandoned = first == Side::Source && !found.load(Ordering::SeqCst);
        if abandoned {
            stops.1.cancel();
        }
        ends.recv_timeout(HANG).ok()?;
    }
    let ended = if abandoned { left } else { Instant::now() };
    let struck = [&fortunes.0, &fortunes.1].into_iter().filter_map(|fortune| fortune.struck.get()).min();
    let took = struck.map(|struck| ended.saturating_duration_since(*struck));
    Some(Ends { source: sending.join().ok()?, destination: receiving.join().ok()?, abandoned, took })
}

/// The time limits of each wait.
#[derive(Clone, Copy)]
struct Limits {
    stall: Duration,
    connect: Duration,
    greeting: Duration,
}

impl Limits {
    fn of(plan: &Plan) -> Self {
        // If no wait is in vain, no limit may have an effect on a machine with other load.
        let stall = if plan.waits() { Duration::from_millis(800) } else { Duration::from_secs(60) };
        // A foreign connection that sends nothing is waited for.
        let greeting = if matches!(plan.fault, Fault::Stranger(..)) { Duration::from_secs(3) } else { stall };
        Self { stall, connect: stall, greeting }
    }
}

fn network(
    plan: &Plan,
    means: &Means,
    fortunes: &(Arc<Misfortune>, Arc<Misfortune>),
) -> (Arc<dyn Connect>, Box<dyn Listen>) {
    let (connector, listener): (Arc<dyn Connect>, Box<dyn Listen>) = match plan.transport {
        Transport::Memory => {
            let (connector, listener) = memory::network(1 << 16);
            (Arc::new(connector), Box::new(listener))
        }
        Transport::Tcp | Transport::Unix => {
            let unix = format!("unix:{}", means.folder.path().join("socket").display());
            let wanted = if plan.transport == Transport::Tcp { "tcp:127.0.0.1:0" } else { &unix };
            let listener = Listener::bind(&wanted.parse().expect("an address")).expect("listening");
            let address: Address = listener.local_address().clone();
            (Arc::new(address), Box::new(listener))
        }
    };
    let (inner, fortune) = (connector, fortunes.0.clone());
    let connector = Arc::new(UnluckyConnector { inner, fortune, strangers: Mutex::default() });
    let fortune = fortunes.1.clone();
    let listener = Box::new(UnluckyListener { inner: listener, fortune });
    if plan.tls {
        let connector = TlsConnector::new(connector, means.client.clone());
        (Arc::new(connector), Box::new(TlsListener::new(listener, means.server.clone())))
    } else {
        (connector, listener)
    }
}

fn send(
    plan: &Plan,
    limits: Limits,
    connector: Arc<dyn Connect>,
    stop: &Stop,
    mut guest: SoakGuest,
) -> SourceEnd {
    let blocks = guest.blocks.clone();
    let options = MigrateOptions::new()
        .zero_page_detection(plan.detection)
        .max_bandwidth(plan.max_bandwidth)
        .downtime_limit(plan.downtime_limit);
    let left = if let Fault::LogUnreadable(takes) = plan.fault { Some(takes) } else { None };
    let mut log = Unreadable { log: guest.log.reader().expect("nobody else reads it"), left };
    let target_page_size = (plan.page_size.bytes() != 4096).then_some(plan.page_size);
    let machine = MachineType::new(plan.machine).expect("a name");
    let configuration = Configuration { target_page_size, ..Configuration::new(machine) };
    // A destination that fails in the meantime has time to report it.
    let mut options = SourceOptions::new(configuration)
        .channels(plan.channels)
        .send(SendOptions::new().method(plan.method))
        .migrate(options)
        .channels_may_break(plan.may_break)
        .connect_timeout(limits.connect)
        .stall_timeout(Some(limits.stall))
        .end_timeout(Some(2 * limits.stall));
    if !plan.return_path {
        options = options.unconfirmed();
    }
    let source = Source::new(blocks.clone(), options, stop).expect("options that fit");
    let progress = source.progress();
    let result = source.migrate(connector, &mut log, &mut guest).map(drop);
    let dirty = (0..blocks.len()).map(|block| guest.log.count(BlockIndex(block))).sum();
    SourceEnd { result, status: progress.status(), dirty, guest }
}

fn receive(
    plan: &Plan,
    limits: Limits,
    listener: Box<dyn Listen>,
    stop: &Stop,
    found: &AtomicBool,
) -> DestinationEnd {
    let options = ReceiveOptions::new()
        .channels(if plan.told { ChannelCount::Exact(plan.channels) } else { ChannelCount::Auto })
        .method(plan.told.then_some(plan.method))
        .greeting_timeout(limits.greeting)
        .channels_timeout(limits.greeting)
        .drain_timeout(Duration::from_millis(500));
    let options = ArrivalOptions::new(Expected::AnyMachine)
        .receive(options)
        .channels_may_break(plan.may_break)
        .stall_timeout(Some(limits.stall))
        .silence(limits.stall);
    let failed = |error| DestinationEnd { result: Err(error), blocks: None, device: None };
    let arrival = match Arrival::listen(listener, options, stop).and_then(Listening::accept) {
        Ok(arrival) => arrival,
        Err(error) => return failed(error),
    };
    found.store(true, Ordering::SeqCst);
    let pending = match arrival.load(|_, list| memory_of(plan, list)) {
        Ok(pending) => pending,
        Err(error) => return failed(error),
    };
    let (blocks, device) = (pending.blocks().clone(), pending.device(DEVICE.as_str(), 0));
    let (blocks, device) = (Some(blocks), device.map(|(_, state)| state.to_vec()));
    let result = if plan.fault == Fault::LoadFails {
        Err(pending.refuse(Error::other("the devices were not loaded", ODD)))
    } else {
        // Whatever happens to the connections from here on, the guest has moved.
        pending.confirm().map(|confirmed| drop(confirmed.finish()))
    };
    DestinationEnd { result, blocks, device }
}

fn memory_of(plan: &Plan, list: &BlockList) -> Result<RamBlocks> {
    if plan.fault == Fault::BlocksRefused {
        return Err(Error::other("take the machine in", DOES_NOT_FIT));
    }
    let mut offset = 0;
    let file =
        plan.in_file.then(tempfile::tempfile).transpose().map_err(|error| Error::io("make a file", error))?;
    let file: Option<Arc<File>> = file.map(Arc::new);
    let blocks = list.entries().iter().map(|entry| {
        let memory = match &file {
            Some(file) => {
                let present = PageBitmap::new(list.page_size().whole_pages_in(entry.used_length));
                Memory::MappedRam(Places::new(file.clone(), offset, present))
            }
            None => {
                let mapping = Mapping::anonymous(entry.used_length);
                Memory::Mapped(mapping.map_err(|error| Error::io("map memory", error))?)
            }
        };
        offset += entry.used_length.next_multiple_of(1 << 16);
        Ok(RamBlock::new(entry.name.clone(), entry.used_length, list.page_size(), memory)?)
    });
    let blocks = RamBlocks::new(blocks.collect::<Result<_>>()?)?;
    if let Some(file) = &file {
        file.set_len(offset).map_err(|error| Error::io("extend a file", error))?;
    }
    Ok(blocks)
}

fn spawn<T: Send + 'static>(name: &str, run: impl FnOnce() -> T + Send + 'static) -> thread::JoinHandle<T> {
    thread::Builder::new().name(name.into()).spawn(run).expect("a thread")
}

/// From the source's end until the check whether the destination has noticed the source at all.
const GRACE: Duration = Duration::from_secs(1);
/// Longer than all waits of a side, on a machine with other load.
pub(crate) const HANG: Duration = Duration::from_secs(180);
