//! A hop: the source in this thread, its destination in another, and the check of the guest's owner.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering},
    thread,
    time::Duration,
};

use fastrand::Rng;
use multifd::{
    Error, SendOptions,
    error::chain,
    live::{Control, MigrateOptions, MigrationInfo, Percent, RunState, Status},
    ram::{DirtyBitmaps, PageSize, RamBlocks},
};
use qemu_stream::{
    format::{Configuration, MachineType},
    source::{Source, SourceOptions},
};

use crate::{
    destination::{Arrived, Destination, STALL, Seen},
    faults::{Faults, FaultyGuest, FaultyLog, Moments, ON_PURPOSE},
    life::Life,
    machine::{Machine, random_write},
    memory::Kind,
    network::{Means, Network, network},
    plan::{Hop, PATIENT, Place},
    trouble::{Action, Call, Fault, Log, Moment, Trouble},
};

/// A correct end of a hop or a capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Outcome {
    /// At the destination, or in the file.
    Done,
    /// The guest stayed where it was, unchanged.
    Stayed,
    /// The source did not know the owner, and the destination did.
    Unknown,
}

impl Life {
    /// Migrates, and checks the result.
    ///
    /// # Errors
    /// What is not allowed to happen.
    pub(crate) fn hop(&mut self, hop: &Hop, seed: u64, means: &Means) -> Result<Outcome, String> {
        let mut random = Rng::with_seed(seed);
        let closes = matches!(hop.trouble.action, Some((Action::Close, _)));
        let Network { connector, listener, taken } = network(hop.transport, hop.tls, closes, means);
        let moments = Moments::new(&hop.trouble, taken.clone());
        let seen = Arc::new(Seen::default());
        let destination = Destination {
            hop: hop.clone(),
            host: self.next_host(),
            seed,
            world: self.world.clone(),
            load: self.machine.load(),
            moments: moments.clone(),
            seen: seen.clone(),
            former: if hop.memory == Place::Former { self.take_former() } else { None },
            marks: self.machine.marks.clone(),
        };
        moments.pass(Moment::BeforeConnecting);
        let arriving = thread::Builder::new().name("destination".into());
        let arriving = arriving.spawn(move || destination.arrive(listener)).expect("a thread");
        let leaving = self.departure(hop, &moments);
        let progress = leaving.progress();
        let operator = hop.pauses.then(|| operator(leaving.control(), self, hop, &moments, random.u64(..)));
        let source = self.attempt(&hop.trouble, &moments, &mut random, |log, guest| {
            let result = leaving.migrate(connector.clone(), log, guest);
            seen.ended.store(true, Ordering::SeqCst);
            seen.left.store(result.is_err(), Ordering::SeqCst);
            result
        })?;
        drop(connector);
        // It waits for a source, which will not come any more.
        if source.result.is_err() && !seen.found.load(Ordering::SeqCst) {
            moments.destination.cancel();
        }
        let arrived = arriving.join().map_err(|_| "the destination's thread panicked".to_owned())?;
        taken.forget();
        if let Some(operator) = operator {
            operator.join().map_err(|_| "the operator's thread panicked".to_owned())?;
        }
        let result = source.join();
        self.judge(hop, result, progress.status(), arrived)
    }

    fn departure(&self, hop: &Hop, moments: &Moments) -> Source {
        let migrate = MigrateOptions::new()
            .zero_page_detection(hop.detection)
            .auto_converge(hop.auto_converge)
            .pause_before_switchover(hop.pauses)
            .max_bandwidth(hop.max_bandwidth)
            .resume_if_unknown(hop.resumes_if_unknown)
            .max_total_time(hop.max_total_time.map(Duration::from_micros))
            .switchover_timeout(Some(hop.switchover_timeout.map_or(STALL, Duration::from_micros)));
        let options = SourceOptions::new(configuration(hop.machine, self.page_size))
            .channels(hop.channels)
            .send(SendOptions::new().method(hop.method))
            .migrate(migrate)
            .channels_may_break(hop.may_break)
            .stall_timeout(Some(STALL))
            .end_timeout(Some(Duration::from_millis(hop.end_timeout)))
            .verdict_timeout(Duration::from_millis(hop.verdict_timeout));
        Source::new(self.machine.blocks.clone(), options, &moments.source).expect("options that fit")
    }

    /// Checks who has the guest, and whether it is unchanged.
    fn judge(
        &mut self,
        hop: &Hop,
        result: multifd::Result<MigrationInfo>,
        status: Status,
        arrived: Arrived,
    ) -> Result<Outcome, String> {
        let Arrived { machine, too_late, why_not } = arrived;
        let was = self.machine.state;
        match (result, machine) {
            (Ok(_), None) => {
                Err(format!("no owner: the source completed, the destination did not: {why_not}"))
            }
            (Ok(info), Some(machine)) => {
                if hop.trouble.must_fail() {
                    return Err("it completed, though it cannot be".into());
                }
                if status != Status::Completed || info.guest_was != Some(was) {
                    return Err(format!("completed, but {status} and the guest was {:?}", info.guest_was));
                }
                self.moves_to(machine, was)?;
                Ok(Outcome::Done)
            }
            (Err(error), machine) => {
                let text = format!("source: {}; destination: {why_not:?}", chain(&error));
                if hop.must_arrive() {
                    return Err(format!("failed without a cause: {text}"));
                }
                let unknown = matches!(error.kind(), Error::OwnerUnknown(_));
                if error.is_cancelled() && !hop.trouble.cancels_source() {
                    return Err(format!("nobody has cancelled: {text}"));
                }
                if hop.end_timeout == PATIENT && hop.max_total_time.or(hop.switchover_timeout).is_none() {
                    first_cause(&hop.trouble, &error)?;
                }
                self.stays(&hop.trouble, hop.resumes_if_unknown, &error, status)?;
                match (machine, unknown) {
                    (Some(_), false) => Err(format!("two owners: the destination has the guest; {text}")),
                    (Some(_), true) if too_late => {
                        Err(format!("a destination took the guest of a source that had gone: {text}"))
                    }
                    (Some(machine), true) => {
                        self.moves_to(machine, was)?;
                        Ok(Outcome::Unknown)
                    }
                    (None, unknown) => {
                        // The destination was asked, and does not have it.
                        self.machine.as_wanted();
                        Ok(if unknown { Outcome::Unknown } else { Outcome::Stayed })
                    }
                }
            }
        }
    }

    /// Uses the destination's machine from here on.
    fn moves_to(&mut self, machine: Machine, was: RunState) -> Result<(), String> {
        if self.machine.is_running() {
            return Err("the guest runs at a source whose destination has it".into());
        }
        let runs = if machine.is_running() { RunState::Running } else { RunState::Paused };
        if machine.state != was || runs != was {
            return Err(format!("the guest was {was} at the source and is {runs} at the destination"));
        }
        let old = std::mem::replace(&mut self.machine, machine);
        self.former.push(old.blocks.clone());
        Ok(())
    }

    /// Checks that a guest whose migration has failed is unchanged.
    pub(crate) fn stays(
        &mut self,
        trouble: &Trouble,
        resumes_if_unknown: bool,
        error: &Error,
        status: Status,
    ) -> Result<(), String> {
        let machine = &mut self.machine;
        let stands = match error.kind() {
            Error::OwnerUnknown(_) => !resumes_if_unknown,
            error => matches!(error, Error::NotResumed { .. }),
        };
        let expected = machine.state == RunState::Running && !stands;
        if machine.is_running() != expected {
            let (runs, was) = (machine.is_running(), machine.state);
            return Err(format!("the guest was {was}, runs afterwards: {runs}; {}", chain(error)));
        }
        let may_stand = trouble.fault.is_some_and(|fault| fault.call == Call::Resume);
        if matches!(error.kind(), Error::NotResumed { .. }) && !may_stand {
            return Err(format!("the guest was not resumed: {}", chain(error)));
        }
        if machine.throttled != Percent::NONE {
            return Err(format!("the guest is still held back: {:?}", machine.throttled));
        }
        if !matches!(status, Status::Failed | Status::Cancelled | Status::None) {
            return Err(format!("failed, but the status is {status}: {}", chain(error)));
        }
        let begun = status != Status::None;
        if begun && !self.machine.load().pagemap && trouble.log == Log::Right && trouble.fault.is_none() {
            let blocks = &self.machine.blocks;
            let marked: u64 = blocks.iter().map(|(index, _)| self.machine.marks.count(index)).sum();
            let pages: u64 = blocks.iter().map(|(_, block)| block.pages()).sum();
            if marked != pages {
                return Err(format!("{marked} of {pages} pages are dirty at the source; {}", chain(error)));
            }
        }
        Ok(())
    }

    /// One attempt of `run` to move the machine, with its log and all faults.
    pub(crate) fn attempt(
        &mut self,
        trouble: &Trouble,
        moments: &Moments,
        random: &mut Rng,
        run: impl FnOnce(&mut FaultyLog<'_>, &mut FaultyGuest<'_>) -> multifd::Result<MigrationInfo>,
    ) -> Result<Attempt, String> {
        let faults = Faults::new(trouble, moments);
        let (blocks, world) = (self.machine.blocks.clone(), self.world.clone());
        let others = (trouble.log == Log::OfOtherBlocks).then(|| self.other_blocks());
        let marks =
            others.as_ref().map_or_else(|| self.machine.marks.clone(), |others| DirtyBitmaps::new(others));
        let log = self.machine.log_of(&marks, others.as_ref().unwrap_or(&blocks));
        let log =
            log.map_err(|error| format!("the machine's log cannot be read again: {}", chain(&error)))?;
        let seed = random.u64(..);
        let mut log = FaultyLog {
            log,
            faults: &faults,
            blocks,
            marks: self.machine.marks.clone(),
            world: world.clone(),
            random: Rng::with_seed(seed),
            late: 0,
        };
        let machine = &mut self.machine;
        let mut guest = FaultyGuest { machine, faults: &faults, world, random: Rng::with_seed(!seed) };
        let canceller = match trouble.action {
            Some((_, Moment::After(micros))) => {
                let moments = moments.clone();
                let act = move || {
                    thread::sleep(Duration::from_micros(micros));
                    moments.act();
                };
                Some(thread::Builder::new().name("canceller".into()).spawn(act).expect("a thread"))
            }
            _ => None,
        };
        let result = catch_unwind(AssertUnwindSafe(|| run(&mut log, &mut guest)));
        let result = result.map_err(|_| "a panic of a call came out of the engine".to_owned())?;
        Ok(Attempt { result, canceller })
    }

    /// Blocks that look like the machine's, with different memory.
    fn other_blocks(&self) -> Arc<RamBlocks> {
        let blocks = self.machine.blocks.iter().map(|(_, block)| {
            let mut pool = self.world.pool();
            pool.block(block.name(), block.used_length(), self.page_size, false, Kind::Private)
        });
        Arc::new(RamBlocks::new(blocks.collect()).expect("distinct"))
    }
}

/// Checks that an error that only a failing call can cause names it.
pub(crate) fn first_cause(trouble: &Trouble, error: &Error) -> Result<(), String> {
    let text = chain(error).to_string();
    match trouble.fault {
        Some(Fault { call: Call::Resume | Call::PutBack, .. }) | None => Ok(()),
        Some(_) if !trouble.is_fault_alone() || text.contains(ON_PURPOSE) => Ok(()),
        Some(fault) => Err(format!("not the first cause, which was {fault:?}: {text}")),
    }
}

/// The result of an attempt.
pub(crate) struct Attempt {
    pub(crate) result: multifd::Result<MigrationInfo>,
    canceller: Option<thread::JoinHandle<()>>,
}

impl Attempt {
    /// The result, after everything that acts on it has ended.
    pub(crate) fn join(self) -> multifd::Result<MigrationInfo> {
        if let Some(canceller) = self.canceller {
            canceller.join().expect("it does not panic");
        }
        self.result
    }
}

/// Continues a migration that has paused. Without other trouble, devices finish their requests first.
fn operator(
    control: Control,
    life: &Life,
    hop: &Hop,
    moments: &Moments,
    seed: u64,
) -> thread::JoinHandle<()> {
    let (blocks, marks) = (life.machine.blocks.clone(), life.machine.marks.clone());
    let (world, moments, drains) = (life.world.clone(), moments.clone(), hop.trouble.is_none());
    let proceed = move || {
        if !control.wait_pre_switchover() {
            return;
        }
        let mut random = Rng::with_seed(seed);
        for _ in 0..if drains { random.u64(..8) } else { 0 } {
            let block = random.usize(..blocks.len());
            world.write(&blocks, &marks, random_write(&mut random, &blocks, block));
        }
        moments.pass(Moment::PreSwitchover);
        let _ = control.proceed();
    };
    thread::Builder::new().name("operator".into()).spawn(proceed).expect("a thread")
}

pub(crate) fn configuration(machine: &str, page_size: PageSize) -> Configuration {
    let target_page_size = (page_size != PageSize::KIB_4).then_some(page_size);
    let machine = MachineType::new(machine).expect("a name");
    Configuration { target_page_size, ..Configuration::new(machine) }
}
