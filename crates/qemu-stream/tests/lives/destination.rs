//! The destination of a hop, in a separate thread, as a host would have it.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use fastrand::Rng;
use multifd::{
    ChannelCount, Error, ReceiveOptions, Result,
    channel::Listen,
    error::chain,
    live::RunState,
    ram::{BlockName, DirtyBitmaps, DirtyLog, DirtyPages, PageBitmap, RamBlock, RamBlocks},
};
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions, Pending},
    format::{BlockEntry, BlockList, MachineType},
    incoming::Expected,
};

use crate::{
    faults::{Moments, ON_PURPOSE},
    machine::{Load, Machine, World, count_in},
    memory::Kind,
    plan::{Hop, Place},
    trouble::{Log, Moment, Refusal},
};

/// All that a destination needs.
pub(crate) struct Destination {
    pub(crate) hop: Hop,
    pub(crate) host: u64,
    pub(crate) seed: u64,
    pub(crate) world: Arc<World>,
    pub(crate) load: Load,
    pub(crate) moments: Moments,
    pub(crate) seen: Arc<Seen>,
    pub(crate) former: Option<RamBlocks>,
    /// The source's dirty bits, for a second reader.
    pub(crate) marks: DirtyBitmaps,
}

/// State shared by the threads of the two sides, which two hosts would not share.
#[derive(Default)]
pub(crate) struct Seen {
    /// A source has come.
    pub(crate) found: AtomicBool,
    /// The source has ended, and its log may be read by others.
    pub(crate) ended: AtomicBool,
    /// The source has ended without its destination having the guest, and all its connections are closed.
    pub(crate) left: AtomicBool,
}

/// How a destination ended.
#[derive(Default)]
pub(crate) struct Arrived {
    /// The machine, if its guest was taken over.
    pub(crate) machine: Option<Machine>,
    /// The source had ended before the guest was taken over.
    pub(crate) too_late: bool,
    pub(crate) why_not: String,
}

impl Destination {
    /// Takes a guest in.
    pub(crate) fn arrive(mut self, listener: Box<dyn Listen>) -> Arrived {
        let mut arrived = Arrived::default();
        let done = catch_unwind(AssertUnwindSafe(|| self.take_in(listener, &mut arrived)));
        match done {
            Ok(Ok(())) => {}
            Ok(Err(error)) => arrived.why_not = chain(&error).to_string(),
            Err(_) => arrived.why_not = "it panicked".into(),
        }
        arrived
    }

    fn take_in(&mut self, listener: Box<dyn Listen>, arrived: &mut Arrived) -> Result<()> {
        let (hop, refusal) = (self.hop.clone(), self.hop.trouble.destination);
        let receive = ReceiveOptions::new()
            .channels(if hop.told { ChannelCount::Exact(hop.channels) } else { ChannelCount::Auto })
            .method(hop.told.then_some(hop.method))
            .drain_timeout(Duration::from_millis(500))
            .stall_timeout(Some(STALL));
        let machine = if refusal == Some(Refusal::WrongMachine) { "another" } else { hop.machine };
        let expected = Expected::Type(MachineType::new(machine).expect("a name"));
        let options = ArrivalOptions::new(expected).receive(receive).channels_may_break(hop.may_break);
        let stop = self.moments.destination.clone();
        let arrival = Arrival::listen(listener, options, &stop)?.accept()?;
        self.seen.found.store(true, Ordering::SeqCst);
        let former = Mutex::new(self.former.take());
        let pending = arrival.load(|_, list| {
            self.moments.pass(Moment::Make);
            self.read_too();
            self.make(list, former.lock().unwrap_or_else(PoisonError::into_inner).take())
        })?;
        drop(former);
        self.moments.pass(Moment::Pending);
        if hop.until_left {
            // The confirmation follows at once: nothing may have time to notice the end of the source before it.
            let most = Instant::now() + Duration::from_millis(200);
            while !self.seen.left.load(Ordering::SeqCst) && Instant::now() < most {
                thread::yield_now();
            }
        } else {
            thread::sleep(Duration::from_millis(hop.hold));
        }
        match refusal {
            Some(Refusal::Refuses) => return Err(pending.refuse(Error::other("restore", ON_PURPOSE))),
            Some(Refusal::Drops) => return Err(Error::other("restore", ON_PURPOSE)),
            Some(Refusal::PanicsWithAll) => panic!("{ON_PURPOSE}"),
            _ => {}
        }
        let Some(count) = count_in(&pending.loaded().devices) else {
            self.world.wrong("the devices' states have not arrived".into());
            return Err(pending.refuse(Error::other("restore", "no devices")));
        };
        arrived.too_late = self.seen.left.load(Ordering::SeqCst);
        self.confirm(pending, count, arrived)
    }

    fn confirm(&self, pending: Pending, count: u64, arrived: &mut Arrived) -> Result<()> {
        let late = match self.hop.trouble.action {
            Some((_, Moment::Confirm(after))) => {
                let moments = self.moments.clone();
                let act = move || {
                    thread::sleep(Duration::from_micros(after));
                    moments.act();
                };
                Some(thread::Builder::new().name("racer".into()).spawn(act).expect("a thread"))
            }
            _ => None,
        };
        let confirmed = pending.confirm();
        if let Ok(confirmed) = &confirmed {
            // From here on the guest is ours, and runs at once if it ran before.
            let blocks = confirmed.blocks().clone();
            let mut machine = Machine::new(self.host, blocks, count, self.load, self.world.clone());
            machine.state = confirmed.run_state();
            if machine.state == RunState::Running {
                machine.run();
            }
            arrived.machine = Some(machine);
            self.moments.pass(Moment::Confirmed);
        }
        let confirmed = confirmed.map(|confirmed| match self.hop.takes_leave {
            true => drop(confirmed.finish()),
            false => drop(confirmed),
        });
        if let Some(late) = late {
            late.join().expect("it does not panic");
        }
        confirmed
    }

    /// Tries to read the source's log during its migration.
    fn read_too(&self) {
        if self.hop.trouble.log != Log::ReadByTwo {
            return;
        }
        if let Ok(mut second) = self.marks.reader()
            && !self.seen.ended.load(Ordering::SeqCst)
        {
            self.world.wrong("a log has two readers at once".into());
            let bits = PageBitmap::new(1 << 20);
            let _ = catch_unwind(AssertUnwindSafe(|| {
                second.take(multifd::ram::BlockIndex(0), &mut DirtyPages::new(&bits))
            }));
        }
    }

    /// The blocks, in a different order than announced.
    fn make(&self, list: &BlockList, former: Option<RamBlocks>) -> Result<RamBlocks> {
        let mut random = Rng::with_seed(self.seed);
        let refusal = self.hop.trouble.destination;
        match refusal {
            Some(Refusal::MakeFails) => return Err(Error::other("make the memory", ON_PURPOSE)),
            Some(Refusal::MakePanics) => panic!("{ON_PURPOSE}"),
            _ => {}
        }
        let alike = |former: &RamBlocks| {
            let same = |entry: &BlockEntry| {
                let block = former.find(entry.name.as_bytes()).and_then(|at| former.get(at));
                block.is_some_and(|block| block.used_length() == entry.used_length)
            };
            former.len() == list.entries().len() && list.entries().iter().all(same)
        };
        let used = self.hop.memory != Place::New;
        let mut blocks: Vec<RamBlock> = match former.filter(alike) {
            Some(former) => former.into_iter().collect(),
            None => {
                let mut pool = self.world.pool();
                let mut block = |entry: &BlockEntry| {
                    let kind = Kind::any(&mut random);
                    pool.block(&entry.name, entry.used_length, list.page_size(), used, kind)
                };
                list.entries().iter().map(&mut block).collect()
            }
        };
        random.shuffle(&mut blocks);
        let (name, length) = (blocks[0].name().clone(), blocks[0].used_length());
        let new = |name: &BlockName, length| {
            self.world.pool().block(name, length, list.page_size(), used, Kind::ZeroIfAbsent)
        };
        match refusal {
            Some(Refusal::MissingBlock) => drop(blocks.swap_remove(0)),
            Some(Refusal::ShortBlock) => {
                blocks[0] = new(&name, length - list.page_size().bytes() as u64);
            }
            Some(Refusal::SurplusBlock) => {
                blocks.push(new(&BlockName::new("surplus").expect("a name"), length));
            }
            _ => {}
        }
        Ok(RamBlocks::new(blocks)?)
    }
}

/// Far above the time that a machine with other load needs.
pub(crate) const STALL: Duration = Duration::from_secs(30);
