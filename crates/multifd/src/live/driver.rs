//! The stages of a migration: set-up, passes while the guest runs, the switchover.

use std::time::{Duration, Instant};

use super::{
    DeviceInfo, DeviceSection, Guest, Main, Pace, Pass, Plan, RunState, Verdict,
    control::Bandwidth,
    converge::{Converge, Judgement, Round, Step},
    deadline::Deadline,
    guest::check_saved,
    known,
    pass::Walk,
    progress::PassRate,
    rounds,
};
use crate::{
    channel::Watch,
    error::{Error, Fault, Result, Usage},
    options::PostcopyWhen,
    outcome::{Callback, NotConverged, Percent, Status},
    ram::{BlockIndex, DirtyLog, DirtyPages, LogMark, PageBitmap, RamBlock},
    send::{Sender, Synced},
};

/// How far the guest has been stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    /// It is as it was.
    No,
    /// It is being stopped or is stopped, and was in this state before.
    From(RunState),
    /// The same, and the destination is asked whether it has the guest: it may have it.
    Asked(RunState),
}

impl Stopped {
    /// Whether the guest resumes if it stays here.
    pub(super) fn resumes(self) -> bool {
        matches!(self, Self::From(RunState::Running) | Self::Asked(RunState::Running))
    }

    /// The error of a migration that has panicked here.
    pub(super) fn after_panic(self, panicked: Error) -> Error {
        match self {
            Self::No | Self::From(_) => panicked,
            Self::Asked(_) => Error::OwnerUnknown(Box::new(panicked)),
        }
    }
}

/// How far a migration was driven.
pub(super) enum Driven {
    /// The destination has everything.
    Completed,
    /// The destination was sent the command to run the guest, and lacks these pages.
    Switched { lacking: Vec<PageBitmap>, stopped_at: Instant },
}

/// The parts of a running migration.
pub(super) struct Driver<'a> {
    plan: &'a Plan,
    sender: Option<&'a mut Sender>,
    main: &'a mut dyn Main,
    log: &'a mut dyn DirtyLog,
    guest: &'a mut dyn Guest,
    /// Pages to send, one bitmap for each block.
    pending: Vec<PageBitmap>,
    /// Whether no pass has begun yet.
    is_first: bool,
    page: Vec<u8>,
    stopped: &'a mut Stopped,
    /// The devices whose state the guest will give after it has been stopped.
    announced: Vec<DeviceInfo>,
    /// When the dirty bits were last taken.
    synced: Instant,
}

impl<'a> Driver<'a> {
    pub(super) fn new(
        plan: &'a Plan,
        sender: Option<&'a mut Sender>,
        main: &'a mut dyn Main,
        log: &'a mut dyn DirtyLog,
        guest: &'a mut dyn Guest,
        stopped: &'a mut Stopped,
    ) -> Self {
        let blocks = &plan.blocks;
        let pending = blocks.iter().map(|(_, block)| first_pass(block)).collect();
        let (is_first, announced, synced) = (true, Vec::new(), Instant::now());
        let page = vec![0; blocks.page_size().bytes()];
        Self { plan, sender, main, log, guest, pending, is_first, page, stopped, announced, synced }
    }

    pub(super) fn drive(&mut self) -> Result<Driven> {
        let Plan { options, blocks, stop, progress, gate, .. } = self.plan;
        stop.check()?;
        self.prepare()?;
        // Until the devices are sent, any end of the migration ends the waits on main.
        let watch = self.main.waker().map(|waker| stop.watch_failure(waker));
        let deadline = self.deadline()?;
        progress.advance(Status::Setup)?;
        self.set_up()?;
        progress.advance(Status::Active)?;
        let mut pace = Pace::new(gate.bandwidth());
        let pages = blocks.total() / blocks.page_size().bytes() as u64;
        let channels = self.sender.as_ref().map_or(0, |sender| sender.channels());
        let mut converge = Converge::new(options, blocks.page_size(), pages, channels);
        self.bitmap_sync(None)?;
        let mut passes = 0;
        let switches = loop {
            if self.is_postcopy_due(passes) {
                break true;
            }
            let Some(round) = self.round(&mut pace)? else { break true };
            passes += 1;
            if let Some(limit) = gate.downtime_limit() {
                converge.set_downtime_limit(limit);
            }
            converge.set_max_bandwidth(gate.bandwidth().get());
            let judgement = converge.judge(&round, progress.elapsed());
            self.tell(&round, &judgement);
            let gives_up = matches!(judgement.step, Step::GiveUp(_));
            if options.postcopy == PostcopyWhen::Stall && (gives_up || judgement.stall.is_some()) {
                break true;
            }
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
                Step::SwitchOver => break false,
            }
        };
        // The deadline's thread is joined: the deadline has passed by now or can no longer pass.
        drop(deadline);
        if switches { self.switch_early(watch) } else { self.switch_over(watch).map(|()| Driven::Completed) }
    }

    /// Whether the migration switches to post-copy now. `passes` have ended.
    fn is_postcopy_due(&self, passes: u64) -> bool {
        let Plan { options, gate, progress, .. } = self.plan;
        gate.is_postcopy_requested()
            || match options.postcopy {
                PostcopyWhen::Never | PostcopyWhen::Request | PostcopyWhen::Stall => false,
                PostcopyWhen::Start => true,
                PostcopyWhen::Passes(most) => passes >= most,
                PostcopyWhen::After(time) => progress.elapsed() >= time,
            }
    }

    /// Checks everything that can be refused before a byte is sent.
    fn prepare(&mut self) -> Result<()> {
        let Plan { options, blocks, .. } = self.plan;
        self.announced = self.plan.devices_of(self.guest)?;
        self.main.expect(&self.announced)?;
        if options.auto_converge {
            self.throttle(Percent::NONE)?;
        }
        let begun = self.call(Callback::DirtyLogBegin, |driver| driver.log.begin(blocks));
        begun.map_err(|error| {
            Error::other("begin to read the dirty log (DirtyLog::begin)", error).because(Fault::DirtyLog)
        })?;
        self.main.since().map_or(Ok(()), |mark| self.only_since(mark))
    }

    /// The other side has everything up to `mark`: the first pass sends what was written since.
    fn only_since(&mut self, mark: LogMark) -> Result<()> {
        for (index, block) in self.plan.blocks.iter() {
            let written = PageBitmap::new(block.pages());
            let pages = &mut DirtyPages::new(&written);
            let known = self.call(Callback::DirtyLogTake, |driver| driver.log.since(mark, index, pages));
            known.map_err(|error| {
                let doing = "find what was written since the base was captured (DirtyLog::since)";
                Error::other(doing, error).because(Fault::DirtyLog)
            })?;
            if let Some(pending) = self.pending.get_mut(index.0).filter(|_| !block.is_ignored()) {
                *pending = written;
            }
        }
        Ok(())
    }

    /// Calls a callback of the embedder and records its name while it runs.
    fn call<T>(&mut self, callback: Callback, run: impl FnOnce(&mut Self) -> T) -> T {
        self.plan.calls.enter(callback);
        let done = run(self);
        self.plan.calls.leave();
        done
    }

    fn deadline(&self) -> Result<Option<Deadline>> {
        let Plan { options, stop, progress, .. } = self.plan;
        let Some(limit) = options.max_total_time else { return Ok(None) };
        let (left, progress) = (limit.saturating_sub(progress.elapsed()), progress.clone());
        let late = move || {
            let hangs = progress.callbacks().used_up(limit.min(LARGE));
            hangs.unwrap_or_else(|| Error::NotConverged(Box::new(progress.not_converged_in(limit))))
        };
        Deadline::start(left, stop, late).map(Some)
    }

    /// A pass, and the bitmap sync after it; `None` if the pass has ended early, to switch to post-copy.
    fn round(&mut self, pace: &mut Pace) -> Result<Option<Round>> {
        let progress = &self.plan.progress;
        let (start, before) = (self.synced, progress.sent());
        if !self.pass(Pass::Live, pace)? {
            return Ok(None);
        }
        let dirty = self.bitmap_sync(Some(start))?;
        let after = progress.sent();
        Ok(Some(Round {
            time: self.synced.duration_since(start),
            bytes: after.bytes - before.bytes,
            normal: after.normal - before.normal,
            zero: after.zero - before.zero,
            dirty,
        }))
    }

    fn tell(&self, round: &Round, judgement: &Judgement) {
        let progress = &self.plan.progress;
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
        // Logged once, because a stall may last.
        if let Some(stall) = stall.as_ref().filter(|_| !told) {
            tracing::warn!("the migration {stall}");
        }
    }

    fn throttle(&mut self, percent: Percent) -> Result<()> {
        let done = self.call(Callback::GuestThrottle, |driver| driver.guest.throttle(percent));
        let doing = format!("auto-converge: throttle the guest by {percent} (Guest::throttle)");
        done.map_err(|error| Error::other(doing, error).because(Fault::Guest))
    }

    fn set_up(&mut self) -> Result<()> {
        let Plan { blocks, progress, .. } = self.plan;
        progress.started(self.sender.as_deref());
        // Main begins first: a destination may read main's first bytes before it accepts the channels.
        self.main.begin(self.sender.as_ref().map_or(0, |sender| sender.channels()))?;
        if let Some(sender) = &mut self.sender {
            sender.wait_connected()?;
        }
        self.main.setup(blocks, synced(&mut self.sender)?)?;
        rounds::agree(self.main, self.sender.as_deref_mut(), &self.pending)?;
        self.count_main();
        progress.set_up();
        Ok(())
    }

    /// Records what main has written, for the progress and for the report of a failure.
    pub(super) fn count_main(&self) {
        self.plan.progress.main_bytes(self.main.bytes());
    }

    /// Stops the guest. Returns its state before, and when it was stopped: after a pause, when that has ended.
    fn stop_guest(&mut self) -> Result<(RunState, Instant)> {
        let Plan { options, stop, progress, gate, .. } = self.plan;
        stop.check()?;
        let mut start = Instant::now();
        self.count_main();
        progress.guest_stops();
        let state = self.call(Callback::GuestRunState, |driver| driver.guest.run_state());
        // Set before the stop: if `stop` panics, the guest may be in any state.
        *self.stopped = Stopped::From(state);
        if let Err(error) = self.call(Callback::GuestStop, |driver| driver.guest.stop()) {
            *self.stopped = Stopped::No;
            return Err(Error::other("stop the guest (Guest::stop)", error).because(Fault::Guest));
        }
        progress.guest_was(state);
        if progress.throttle().is_some() {
            self.throttle(Percent::NONE)?;
        }
        if options.pause_before_switchover {
            gate.pause(progress, stop)?;
            // The operator is responsible for the time of the pause; it does not count as downtime.
            start = Instant::now();
        }
        Ok((state, start))
    }

    /// A limit of the time until the destination has what it must have before the guest moves.
    fn switchover_deadline(&self) -> Result<Option<Deadline>> {
        let Plan { options, stop, gate, .. } = self.plan;
        let limit = options.switchover_limit(gate.downtime_limit());
        let late = move || Error::SwitchoverTimeout { limit: limit.unwrap_or_default() };
        limit.map(|limit| Deadline::start(limit, stop, late)).transpose()
    }

    /// Moves the guest to the destination before its RAM is there. `watch` shuts main down if the migration fails.
    fn switch_early(&mut self, watch: Option<Watch>) -> Result<Driven> {
        let progress = &self.plan.progress;
        let (state, stopped_at) = self.stop_guest()?;
        let deadline = self.switchover_deadline()?;
        let devices = self.save()?;
        progress.advance(Status::Device)?;
        self.bitmap_sync(None)?;
        self.nothing_written()?;
        let lacking = std::mem::take(&mut self.pending);
        self.main.postcopy(&lacking, devices, state)?;
        self.count_main();
        *self.stopped = Stopped::Asked(state);
        drop((deadline, watch));
        tracing::debug!(pages = lacking.iter().map(PageBitmap::count).sum::<u64>(), "migrate_start_postcopy");
        progress.advance(Status::PostcopyActive)?;
        Ok(Driven::Switched { lacking, stopped_at })
    }

    /// Stops the guest and hands it over. `watch` shuts main down if the migration fails.
    fn switch_over(&mut self, watch: Option<Watch>) -> Result<()> {
        let Plan { stop, progress, .. } = self.plan;
        let (state, start) = self.stop_guest()?;
        let deadline = self.switchover_deadline()?;
        let devices = self.save()?;
        progress.advance(Status::Device)?;
        self.main.switchover()?;
        loop {
            self.bitmap_sync(None)?;
            self.pass(Pass::Final, &mut Pace::new(Bandwidth::default()))?;
            // Pages of channels that were lost in this pass.
            if self.pending.iter().all(PageBitmap::is_empty) {
                break;
            }
        }
        self.nothing_written()?;
        if let Some(mark) = self.call(Callback::DirtyLogTake, |driver| driver.log.mark()) {
            self.main.marked(mark);
        }
        self.main.ready()?;
        self.main.end_ram(synced(&mut self.sender)?)?;
        if let Some(sender) = &mut self.sender {
            sender.all_sent();
        }
        // From here on the destination may get all that it needs. A failure closes only the sending side, so that the
        // destination's reply can still be read.
        let _half = self.main.send_waker().map(|waker| stop.watch_failure(waker));
        drop(watch);
        stop.check()?;
        self.main.devices(devices, state)?;
        drop(deadline);
        *self.stopped = Stopped::Asked(state);
        let verdict = self.main.complete(stop);
        self.count_main();
        match verdict {
            Verdict::Taken => {
                progress.downtime(start.elapsed());
                Ok(())
            }
            Verdict::Refused(error) => Err(error),
            Verdict::Unknown(error) => Err(Error::OwnerUnknown(Box::new(error))),
        }
    }

    fn save(&mut self) -> Result<Vec<DeviceSection>> {
        let saved = self.call(Callback::GuestSave, |driver| driver.guest.save());
        let saved = saved.map_err(|error| {
            Error::other("save the devices of the guest (Guest::save)", error).because(Fault::Guest)
        })?;
        check_saved(&self.announced, &saved)?;
        Ok(saved)
    }

    /// Checks that nothing was written after the last pass: the destination does not have pages that are dirty now.
    fn nothing_written(&mut self) -> Result<()> {
        for (index, block) in self.plan.blocks.iter().filter(|(_, block)| !block.is_ignored()) {
            let written = PageBitmap::new(block.pages());
            self.take((index, block), &written)?;
            let pages = written.count();
            if pages > 0 {
                return Err(Usage::WrittenAfterStop { name: block.name().clone(), pages }.into());
            }
        }
        Ok(())
    }

    fn take(&mut self, (index, block): (BlockIndex, &RamBlock), into: &PageBitmap) -> Result<()> {
        let taken =
            self.call(Callback::DirtyLogTake, |driver| driver.log.take(index, &mut DirtyPages::new(into)));
        taken.map_err(|error| {
            let doing = format!("take the dirty bits of block {:?} (DirtyLog::take)", block.name());
            Error::other(doing, error).because(Fault::DirtyLog)
        })
    }

    /// Takes the dirty bits of all blocks, which the guest wrote since `since`. Returns the number of pages that remain
    /// to be sent.
    fn bitmap_sync(&mut self, since: Option<Instant>) -> Result<u64> {
        let pending = std::mem::take(&mut self.pending);
        for ((index, block), pending) in self.plan.blocks.iter().zip(&pending) {
            self.take((index, block), pending)?;
            if block.is_ignored() {
                pending.forget();
            }
        }
        self.pending = pending;
        let remaining = self.pending.iter().map(PageBitmap::count).sum();
        self.synced = Instant::now();
        let time = since.map(|since| self.synced.duration_since(since));
        self.plan.progress.bitmap_sync(remaining, time);
        Ok(remaining)
    }

    /// Returns `false` if it has ended early, to switch to post-copy.
    fn pass(&mut self, pass: Pass, pace: &mut Pace) -> Result<bool> {
        let Plan { options, blocks, stop, progress, gate, .. } = self.plan;
        let (start, before) = (Instant::now(), progress.sent());
        let is_first = std::mem::replace(&mut self.is_first, false);
        let touched = known::before_pass(blocks, &self.pending, options.zero_page_detection, is_first)?;
        self.main.begin_pass(pass)?;
        let ends = || {
            let is_late = match options.postcopy {
                PostcopyWhen::After(time) => progress.elapsed() >= time,
                _ => false,
            };
            pass == Pass::Live && (is_late || gate.is_postcopy_requested())
        };
        let mut ended_early = false;
        let mut walk = Walk {
            sender: self.sender.as_deref_mut(),
            main: self.main,
            detection: options.zero_page_detection,
            look: options.look_for_zero_pages,
            touched: &touched,
            pace,
            progress,
            stop,
            page: &mut self.page,
            ends: &ends,
        };
        for ((index, block), pending) in blocks.iter().zip(&self.pending) {
            ended_early = walk.block(index, block, pending)?;
            if ended_early {
                break;
            }
        }
        self.main.end_pass(pass, synced(&mut self.sender)?)?;
        rounds::settle(self.main, self.sender.as_deref_mut(), &self.pending, progress)?;
        self.count_main();
        let after = progress.sent();
        let pages = after.normal + after.zero - before.normal - before.zero;
        progress.passed(&PassRate { bytes: after.bytes - before.bytes, pages, time: start.elapsed() });
        Ok(!ended_early)
    }
}

/// A callback that has run for half of this is the reason why `max-total-time` has passed.
const LARGE: Duration = Duration::from_secs(10);

/// A sync point of the channels, if there are any.
fn synced<'a>(sender: &'a mut Option<&mut Sender>) -> Result<Option<Synced<'a>>> {
    sender.as_mut().map(|sender| sender.sync()).transpose()
}

/// The pages of a block that the first pass sends: all or none.
fn first_pass(block: &RamBlock) -> PageBitmap {
    if block.is_ignored() { PageBitmap::new(block.pages()) } else { PageBitmap::full(block.pages()) }
}
