//! A live migration at the source: passes over dirty RAM while the guest runs, then the switchover.
//!
//! ```text
//! none ─▶ setup ─▶ active ─▶ [pre-switchover] ─▶ device ─▶ completed
//!            └───────┴──────────────┴──────────────┴──▶ failed, or cancelling ─▶ cancelled
//!
//! pass: dirty bits ─▶ pages ─▶ channels (or main)          flush: SYNC on all channels, then main's record
//! ```
//!
//! [`Migration::run`] drives the whole of it in the caller's thread: it knows when to walk, when to sync and how to go
//! back. When the rest fits into the downtime, what to expect and whether to hold the guest back it asks `converge/`; what
//! the main stream looks like a [`Main`], what the guest has written a [`DirtyLog`], and to stop it a [`Guest`].

mod control;
mod converge;
mod deadline;
#[cfg(shuttle)]
pub mod model;
mod options;
mod pace;
mod pass;
mod progress;
mod status;

use std::{sync::Arc, time::Instant};

pub use control::Control;
use control::Gate;
pub use converge::{Bound, NotConverged, Percent, Remedy, Stall};
use converge::{Converge, Judgement, Round, Step};
use deadline::Deadline;
pub use options::{MigrateOptions, ZeroPageDetection};
use pace::Pace;
use pass::Walk;
use progress::PassRate;
pub use progress::{MigrationInfo, Progress, RamInfo};
pub use status::Status;

use crate::{
    channel::Stop,
    error::{Error, Result},
    ram::{BlockIndex, DirtyLog, PageBitmap, PageIndex, RamBlock, RamBlocks, touched},
    send::Sender,
};

/// A pass over RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// The guest runs meanwhile.
    Live,
    /// The guest has stopped; nothing remains afterwards.
    Final,
}

/// The main stream of a source, as the passes see it. `qemu-stream` writes QEMU's.
///
/// Calls come in this order: `begin`, `setup`, then for each pass `begin_pass`, pages, `end_pass`; before the
/// final pass `switchover`, after it `devices` and `complete`. Before `setup` and each `end_pass` a SYNC has left on
/// every channel, so what marks the sync point on main must leave at once.
pub trait Main {
    /// Opens the stream. It is the stream's task to tell the destination the number of channels, if it can: they connect
    /// now, and main's bytes may arrive before they do. 0 is a migration without channels.
    ///
    /// # Errors
    /// Any of these calls fails if the stream breaks, and the migration with it.
    fn begin(&mut self, channels: u8) -> Result<()>;
    /// Announces the blocks; a sync point.
    ///
    /// # Errors
    /// If the stream breaks.
    fn setup(&mut self, blocks: &RamBlocks) -> Result<()>;
    /// A pass begins.
    ///
    /// # Errors
    /// If the stream breaks.
    fn begin_pass(&mut self, pass: Pass) -> Result<()>;
    /// A page that is zero, when zero pages go over main.
    ///
    /// # Errors
    /// If the stream breaks.
    fn zero_page(&mut self, block: BlockIndex, page: PageIndex) -> Result<()>;
    /// A page, in a migration without channels.
    ///
    /// # Errors
    /// If the stream breaks.
    fn page(&mut self, block: BlockIndex, page: PageIndex, bytes: &[u8]) -> Result<()>;
    /// The pass is over; a sync point.
    ///
    /// # Errors
    /// If the stream breaks.
    fn end_pass(&mut self, pass: Pass) -> Result<()>;
    /// The guest has stopped.
    ///
    /// # Errors
    /// If the stream breaks.
    fn switchover(&mut self) -> Result<()>;
    /// The devices' state, as the guest's stop gave it.
    ///
    /// # Errors
    /// If the stream breaks.
    fn devices(&mut self, devices: Vec<DeviceSection>) -> Result<()>;
    /// Ends the stream and waits for the destination's word that it has everything.
    ///
    /// # Errors
    /// If the destination says otherwise, or nothing.
    fn complete(&mut self) -> Result<()>;
    /// Bytes written so far.
    fn bytes(&self) -> u64;
}

/// The state of one device, as bytes that only that device understands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceSection {
    /// The device's name, 1 to 255 bytes.
    pub name: String,
    /// Which of several devices of that name.
    pub instance_id: u32,
    /// The version of the state's layout.
    pub version: u32,
    /// The state.
    pub data: Vec<u8>,
}

/// The guest whose RAM moves.
pub trait Guest {
    /// Stops the guest and gives the state of its devices. From here on nothing writes to RAM.
    ///
    /// # Errors
    /// If it cannot be stopped; the migration then fails and the guest runs on.
    fn stop(&mut self) -> std::io::Result<Vec<DeviceSection>>;

    /// Lets the stopped guest run on: the migration failed or was cancelled, or the guest could not be stopped whole.
    fn resume(&mut self);

    /// Has the guest's processors stand for a [share of the time](Percent::pause_after) from now on, so that it dirties
    /// less; [`Percent::NONE`] lets them run freely. Called with [`auto-converge`](MigrateOptions::auto_converge) alone: with
    /// none at the beginning, with more and more while the guest runs, and with none again when it has been stopped or the
    /// migration has failed. [`stop`](Self::stop) must not wait for a turn to end.
    ///
    /// # Errors
    /// If it cannot be held back; the migration then fails and the guest runs on. Unless it is written, it always fails.
    fn throttle(&mut self, stand: Percent) -> std::io::Result<()> {
        let _ = stand;
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

/// One live migration, from set-up to its end.
pub struct Migration {
    options: MigrateOptions,
    blocks: Arc<RamBlocks>,
    stop: Stop,
    progress: Progress,
    gate: Gate,
}

impl Migration {
    /// A migration of `blocks`. `stop` cancels it from any thread, and must be the sender's; for a cancel to end a wait
    /// on main, main's waker must be [watched](Stop::watch_failure) by it.
    pub fn new(options: MigrateOptions, blocks: Arc<RamBlocks>, stop: Stop) -> Self {
        let progress = Progress::new(blocks.total(), blocks.page_size());
        Self { options, blocks, stop, progress, gate: Gate::default() }
    }

    /// What tells this migration, from any thread, to go on where it pauses before the switchover, and what else can change
    /// while it runs.
    pub fn control(&self) -> Control {
        self.gate.control(self.progress.clone())
    }

    /// The numbers of this migration, for another thread to read.
    pub fn progress(&self) -> Progress {
        self.progress.clone()
    }

    /// Migrates. `sender` has been set up for the same blocks; without one, pages go over main.
    ///
    /// Whatever happens before the destination has said that it has everything, the guest can go on: a failed or
    /// cancelled migration resumes it and puts the dirty bits of all pages back, for no destination has them.
    ///
    /// # Errors
    /// The first error, or [`Error::Cancelled`].
    pub fn run(
        self,
        mut sender: Option<Sender>,
        main: &mut dyn Main,
        log: &mut dyn DirtyLog,
        guest: &mut dyn Guest,
    ) -> Result<MigrationInfo> {
        let mut stopped = false;
        let mut driver = Driver {
            pending: self.blocks.iter().map(|(_, block)| first_pass(block)).collect(),
            touched: Vec::new(),
            page: vec![0; self.blocks.page_size().bytes()],
            migration: &self,
            sender: sender.as_mut(),
            main,
            log,
            guest,
            stopped: &mut stopped,
            synced: Instant::now(),
        };
        let driven = driver.drive();
        if let Err(error) = driven {
            // The first error is the one to report, and it has shut everything down.
            let error = self.stop.fail(error);
            if self.progress.throttle().is_some()
                && let Err(error) = guest.throttle(Percent::NONE)
            {
                tracing::warn!(%error, "the guest is still throttled");
            }
            // First of all: nothing that is left to be cleaned up writes to its RAM.
            if stopped {
                guest.resume();
            }
            drop(sender);
            for (index, block) in self.blocks.iter() {
                log.put_back(index, &PageBitmap::full(block.pages()));
            }
            if error.is_cancelled() {
                self.progress.advance(Status::Cancelling)?;
                self.progress.advance(Status::Cancelled)?;
            } else {
                self.progress.advance(Status::Failed)?;
            }
            return Err(error);
        }
        if let Some(sender) = sender {
            // The destination runs the guest now; an error in taking leave of it changes nothing.
            if let Err(error) = sender.finish() {
                tracing::debug!(%error, "an error after completion");
            }
        }
        self.progress.advance(Status::Completed)?;
        Ok(self.progress.info())
    }
}

/// The parts of a running migration.
struct Driver<'a> {
    migration: &'a Migration,
    sender: Option<&'a mut Sender>,
    main: &'a mut dyn Main,
    log: &'a mut dyn DirtyLog,
    guest: &'a mut dyn Guest,
    /// Pages to send, a bitmap for each block.
    pending: Vec<PageBitmap>,
    /// For the first pass; empty afterwards.
    touched: Vec<Option<PageBitmap>>,
    page: Vec<u8>,
    stopped: &'a mut bool,
    /// When the dirty bits were last taken.
    synced: Instant,
}

impl Driver<'_> {
    fn drive(&mut self) -> Result<()> {
        let Migration { options, blocks, stop, progress, gate } = self.migration;
        stop.check()?;
        options.check()?;
        if options.auto_converge {
            self.throttle(Percent::NONE)?;
        }
        let deadline = self.deadline()?;
        progress.advance(Status::Setup)?;
        self.set_up()?;
        progress.advance(Status::Active)?;
        let mut pace = Pace::new(options.max_bandwidth);
        let pages = blocks.total() / blocks.page_size().bytes() as u64;
        let channels = self.sender.as_ref().map_or(0, |sender| sender.channels());
        let mut converge = Converge::new(options, blocks.page_size(), pages, channels);
        self.bitmap_sync(None)?;
        if options.look_for_zero_pages && options.zero_page_detection != ZeroPageDetection::None {
            // Behind it: what is touched after this has its dirty bit set.
            self.touched = blocks.iter().map(|(_, block)| touched(block)).collect();
        }
        loop {
            let round = self.round(&mut pace)?;
            self.touched.clear();
            if let Some(limit) = gate.downtime_limit() {
                converge.set_downtime_limit(limit);
            }
            let judgement = converge.judge(&round, progress.elapsed());
            self.tell(&round, &judgement);
            match judgement.step {
                Step::Pass(None) => {}
                Step::Pass(Some(percent)) => {
                    progress.throttled(percent);
                    self.throttle(percent)?;
                }
                Step::GiveUp(bound) => {
                    let Judgement { doubt: stall, remaining_time: expected_remaining_time, .. } = judgement;
                    let error = NotConverged { bound, stall, expected_remaining_time };
                    return Err(Error::NotConverged(Box::new(error)));
                }
                Step::SwitchOver => break,
            }
        }
        // Joined: from here on it is over, or will never be.
        drop(deadline);
        self.switch_over()
    }

    fn deadline(&self) -> Result<Option<Deadline>> {
        let Migration { options, stop, progress, .. } = self.migration;
        let Some(limit) = options.max_total_time else { return Ok(None) };
        let left = limit.saturating_sub(progress.elapsed());
        let deadline = Deadline::start((limit, left), stop, progress);
        deadline.map(Some).map_err(|error| Error::io("start the thread for max-total-time", error))
    }

    /// A pass, and the bitmap sync after it.
    fn round(&mut self, pace: &mut Pace) -> Result<Round> {
        let progress = &self.migration.progress;
        let (start, before) = (self.synced, progress.sent());
        self.pass(Pass::Live, pace)?;
        let dirty = self.bitmap_sync(Some(start))?;
        let after = progress.sent();
        Ok(Round {
            time: self.synced.duration_since(start),
            bytes: after.bytes - before.bytes,
            normal: after.normal - before.normal,
            zero: after.zero - before.zero,
            dirty,
        })
    }

    fn tell(&self, round: &Round, judgement: &Judgement) {
        let progress = &self.migration.progress;
        let Judgement { expected_downtime, remaining_time, stall, bandwidth, step, .. } = judgement;
        let told = progress.info().stall.is_some();
        progress.judged(judgement);
        tracing::debug!(
            dirty_pages = round.dirty,
            ?expected_downtime,
            ?remaining_time,
            bandwidth,
            ?step,
            "migration_iteration"
        );
        // Once: it may last.
        if let Some(stall) = stall.as_ref().filter(|_| !told) {
            tracing::warn!("the migration {stall}");
        }
    }

    fn throttle(&mut self, percent: Percent) -> Result<()> {
        let done = self.guest.throttle(percent);
        done.map_err(|error| Error::io(format!("auto-converge: throttle the guest by {percent}"), error))
    }

    fn set_up(&mut self) -> Result<()> {
        let Migration { blocks, progress, .. } = self.migration;
        progress.started(self.sender.as_deref());
        // First: a destination may look at main's first bytes before it takes the channels.
        self.main.begin(self.sender.as_ref().map_or(0, |sender| sender.channels()))?;
        if let Some(sender) = &mut self.sender {
            sender.wait_connected()?;
            sender.sync()?;
        }
        self.main.setup(blocks)?;
        progress.set_up();
        Ok(())
    }

    fn switch_over(&mut self) -> Result<()> {
        let Migration { options, stop, progress, gate, .. } = self.migration;
        stop.check()?;
        let start = Instant::now();
        let precopy = self.main.bytes();
        progress.main_bytes(precopy, 0);
        *self.stopped = true;
        let devices = self.guest.stop().map_err(|error| Error::io("stop the guest", error))?;
        if progress.throttle().is_some() {
            self.throttle(Percent::NONE)?;
        }
        if options.pause_before_switchover {
            gate.pause(progress, stop)?;
        }
        progress.advance(Status::Device)?;
        self.main.switchover()?;
        self.bitmap_sync(None)?;
        self.pass(Pass::Final, &mut Pace::new(None))?;
        self.main.devices(devices)?;
        self.main.complete()?;
        progress.main_bytes(precopy, self.main.bytes().saturating_sub(precopy));
        progress.downtime(start.elapsed());
        Ok(())
    }

    /// Takes the dirty bits of all blocks, which the guest wrote `since` then; says how many pages remain to be sent.
    fn bitmap_sync(&mut self, since: Option<Instant>) -> Result<u64> {
        for ((index, block), pending) in self.migration.blocks.iter().zip(&self.pending) {
            let taken = self.log.take(index, pending);
            taken.map_err(|error| {
                Error::io(format!("take the dirty bits of block {:?}", block.name()), error)
            })?;
            if block.is_ignored() {
                pending.forget();
            }
        }
        let remaining = self.pending.iter().map(PageBitmap::count).sum();
        self.synced = Instant::now();
        let time = since.map(|since| self.synced.duration_since(since));
        self.migration.progress.bitmap_sync(remaining, time);
        Ok(remaining)
    }

    fn pass(&mut self, pass: Pass, pace: &mut Pace) -> Result<()> {
        let Migration { options, blocks, stop, progress, .. } = self.migration;
        let (start, before) = (Instant::now(), progress.sent());
        self.main.begin_pass(pass)?;
        let mut walk = Walk {
            sender: self.sender.as_deref_mut(),
            main: self.main,
            detection: options.zero_page_detection,
            look: options.look_for_zero_pages,
            touched: &self.touched,
            pace,
            progress,
            stop,
            page: &mut self.page,
        };
        for ((index, block), pending) in blocks.iter().zip(&self.pending) {
            walk.block(index, block, pending)?;
        }
        if let Some(sender) = &mut self.sender {
            sender.sync()?;
        }
        self.main.end_pass(pass)?;
        if pass == Pass::Live {
            progress.main_bytes(self.main.bytes(), 0);
        }
        let after = progress.sent();
        let pages = after.normal + after.zero - before.normal - before.zero;
        progress.passed(&PassRate { bytes: after.bytes - before.bytes, pages, time: start.elapsed() });
        Ok(())
    }
}

/// What the first pass sends of a block: every page, or none.
fn first_pass(block: &RamBlock) -> PageBitmap {
    if block.is_ignored() { PageBitmap::new(block.pages()) } else { PageBitmap::full(block.pages()) }
}
