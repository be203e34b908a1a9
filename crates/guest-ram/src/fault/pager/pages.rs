//! Which pages are there, on their way, or missing. Each change is one step under one lock.
//!
//! ```text
//!              fault, prefetch            placed
//! missing ───────────────────▶ a Load ───────────────▶ there (or zero, or discarded)
//!    │                          │   ▲ retry      └──▶ poisoned
//!    └── removed, poisoned ─────┴───┘
//! ```
//!
//! A page that is neither missing, nor in a load, nor poisoned is answered with zeros: it has no contents, or its contents
//! were discarded. A page that is there causes no fault.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::PoisonError,
    time::{Duration, Instant},
};

use super::{
    super::Region,
    error::PagerError,
    load::{Answer, Dropped, Late, Load, LoadId, Stage, Task, Waits},
};
use crate::{
    BlockIndex, PageBitmap, PageIndex, PageRun, Walk,
    sync_types::{Condvar, Mutex, MutexGuard},
};

pub(crate) struct Pages {
    state: Mutex<State>,
    /// A load or a thread has ended, or everything has.
    changed: Condvar,
    /// A load is delayed, or everything has ended: for the thread that watches.
    alarm: Condvar,
}

pub(super) struct State {
    /// What is missing.
    pub(super) walk: Walk,
    pub(super) loads: BTreeMap<LoadId, Load>,
    next: u64,
    /// Loads that wait for a thread.
    queue: VecDeque<LoadId>,
    /// One bit for each page of the block.
    poisoned: BTreeMap<usize, PageBitmap>,
    /// Threads that have not ended.
    threads: usize,
    pub(super) is_ended: bool,
    /// Whether pages were missing when it ended.
    was_incomplete: bool,
    is_disarmed: bool,
    /// The first reason for an early end.
    error: Option<PagerError>,
}

impl Pages {
    /// `walk` has all pages that are missing.
    pub(crate) fn new(walk: Walk, regions: &[Region]) -> Self {
        let poisoned = regions.iter().map(|region| (region.block.0, PageBitmap::new(region.pages))).collect();
        let state = State {
            walk,
            loads: BTreeMap::new(),
            next: 0,
            queue: VecDeque::new(),
            poisoned,
            threads: 0,
            is_ended: false,
            was_incomplete: false,
            is_disarmed: false,
            error: None,
        };
        Self { state: Mutex::new(state), changed: Condvar::new(), alarm: Condvar::new() }
    }

    /// A thread waits for this page.
    pub(crate) fn fault(&self, block: BlockIndex, page: PageIndex, thread: Option<u32>) -> Answer {
        let mut state = self.lock();
        if state.is_ended {
            return Answer::Ended;
        }
        let Some(run) = state.walk.host_page(block, page) else { return Answer::Ended };
        if state.poisoned.get(&block.0).is_some_and(|poisoned| poisoned.contains(run.first)) {
            return Answer::Poisoned(run);
        }
        let now = Instant::now();
        if state.walk.claim(run) {
            state.walk.continue_after(run);
            let id = state.begin(run, Waits::of(thread, now), Stage::Queued);
            state.queue.push_back(id);
            return Answer::Load(id);
        }
        let load = state
            .loads
            .values_mut()
            .find(|load| load.run.contains(&run) && !load.dropped.contains_key(&run.first.0));
        match load {
            Some(load) => {
                load.awaited.add(thread, now);
                Answer::Underway
            }
            None => Answer::Zero(run),
        }
    }

    /// A load from the queue; `None` if it is empty.
    pub(crate) fn queued(&self) -> Option<Task> {
        let mut state = self.lock();
        while let Some(id) = state.queue.pop_front() {
            // It may have been poisoned.
            if let Some(load) = state.loads.get_mut(&id) {
                load.stage = Stage::Running { since: Instant::now(), for_fault: true };
                return Some(Task { id, run: load.run, for_fault: true });
            }
        }
        None
    }

    /// The next pages that nobody has asked for; `None` if no page is left.
    pub(crate) fn prefetch(&self, most: u64) -> Option<Task> {
        let mut state = self.lock();
        if state.is_ended {
            return None;
        }
        let run = state.walk.next_first(most).or_else(|| state.walk.next_any(most))?;
        let id =
            state.begin(run, Waits::default(), Stage::Running { since: Instant::now(), for_fault: false });
        Some(Task { id, run, for_fault: false })
    }

    /// What is done with the first pages of a part of a load, and how many pages that is true for; `None` if the pager has ended. The
    /// caller prevents removals until it has done it.
    pub(crate) fn first_wanted(&self, id: LoadId, part: PageRun) -> Option<(PageRun, Option<Dropped>)> {
        let state = self.lock();
        let load = state.loads.get(&id).filter(|_| !state.is_ended)?;
        if load.dropped.is_empty() {
            return Some((part, None));
        }
        let host_page = state.host_page(part.block);
        let mut firsts = part.host_pages(host_page);
        let how = load.dropped.get(&firsts.next()?).copied();
        let end = firsts.find(|first| load.dropped.get(first).copied() != how).unwrap_or(part.end());
        Some((PageRun { count: end - part.first.0, ..part }, how))
    }

    /// A load has ended. Returns who has waited for it, and whether another thread has replaced the one that executed it.
    pub(super) fn ended(&self, id: LoadId) -> (Waits, bool) {
        let mut state = self.lock();
        let load = state.loads.remove(&id);
        self.changed.notify_all();
        load.map_or_else(Default::default, |load| (load.awaited, load.is_replaced))
    }

    /// A load was abandoned, and its thread may never return. Returns whether it was for a fault; `None` if no thread executes it.
    pub(crate) fn replace(&self, id: LoadId) -> Option<bool> {
        let mut state = self.lock();
        let load = state.loads.get_mut(&id)?;
        let Stage::Running { for_fault, .. } = load.stage else { return None };
        load.is_replaced = true;
        Some(for_fault)
    }

    /// How long the pages of a load were needed, and by which thread: since when, whether awaited, decisions.
    pub(crate) fn history(&self, id: LoadId) -> (Duration, bool, u32) {
        let state = self.lock();
        let load = state.loads.get(&id);
        load.map_or((Duration::ZERO, false, 0), |load| {
            (load.since.elapsed(), !load.awaited.is_empty(), load.decided)
        })
    }

    /// A part of a load has failed and is loaded once more, later.
    pub(crate) fn retry(&self, id: LoadId, part: PageRun, after: Duration) {
        let mut state = self.lock();
        let Some(load) = state.loads.get(&id).filter(|_| !state.is_ended) else { return };
        let (since, awaited, decided) = (load.since, load.awaited.clone(), load.decided + 1);
        let dropped: BTreeMap<_, _> =
            load.dropped.range(part.first.0..part.end()).map(|(first, how)| (*first, *how)).collect();
        let again = state.begin(part, awaited, Stage::Delayed(Instant::now() + after));
        if let Some(load) = state.loads.get_mut(&again) {
            (load.since, load.decided, load.dropped) = (since, decided, dropped);
        }
        // The first load answers for it no longer.
        let host_page = state.host_page(part.block);
        if let Some(load) = state.loads.get_mut(&id) {
            for first in part.host_pages(host_page) {
                load.dropped.insert(first, Dropped::GivenUp);
            }
        }
        self.alarm.notify_all();
    }

    /// Puts delayed loads whose time is over into the queue. Returns their number.
    pub(crate) fn due(&self, now: Instant) -> usize {
        let mut state = self.lock();
        let State { loads, queue, .. } = &mut *state;
        let mut count = 0;
        for (id, load) in loads.iter_mut() {
            if matches!(load.stage, Stage::Delayed(until) if until <= now) {
                load.stage = Stage::Queued;
                queue.push_back(*id);
                count += 1;
            }
        }
        count
    }

    /// The loads that have taken longer than `limit` since the judge was last asked. It counts as asked now.
    pub(crate) fn late(&self, limit: Duration) -> Vec<Late> {
        let mut state = self.lock();
        let now = Instant::now();
        let late = state.loads.iter_mut().filter(|(_, load)| {
            let delayed = matches!(load.stage, Stage::Delayed(_));
            !delayed && !load.is_dropped() && now.saturating_duration_since(load.judged) >= limit
        });
        let late = late.map(|(id, load)| {
            load.judged = now;
            load.decided += 1;
            Late {
                id: *id,
                run: load.run,
                since: load.since.elapsed(),
                is_awaited: !load.awaited.is_empty(),
                decided: load.decided - 1,
            }
        });
        late.collect()
    }

    /// Whether this number of threads, or more, have been serving one fault each for `limit`.
    pub(crate) fn are_stuck(&self, threads: usize, limit: Duration) -> bool {
        let state = self.lock();
        let is_stuck = |load: &&Load| matches!(load.stage, Stage::Running { since, for_fault: true } if since.elapsed() >= limit);
        state.loads.values().filter(is_stuck).count() >= threads
    }

    /// Memory was discarded and is zero now. Returns the number of pages that are not loaded because of it.
    pub(crate) fn removed(&self, removed: PageRun) -> u64 {
        let mut state = self.lock();
        let State { walk, loads, .. } = &mut *state;
        let Some(shape) = walk.shape(removed.block) else { return 0 };
        let mut count = 0;
        for first in removed.host_pages(shape.host_page) {
            let page = PageRun {
                first: PageIndex(first),
                count: shape.host_page.min(shape.pages - first),
                ..removed
            };
            if walk.claim(page) {
                count += page.count;
                continue;
            }
            for load in loads.values_mut().filter(|load| load.run.contains(&page)) {
                if load.dropped.insert(first, Dropped::Removed).is_none() {
                    count += page.count;
                }
            }
        }
        self.changed.notify_all();
        count
    }

    /// Pages of a load are abandoned. Returns those that must be poisoned now: not the discarded ones.
    pub(crate) fn give_up(&self, id: LoadId, part: PageRun) -> Vec<PageRun> {
        let mut state = self.lock();
        let State { walk, loads, queue, poisoned, .. } = &mut *state;
        let host_page = walk.shape(part.block).map_or(1, |shape| shape.host_page);
        let mut runs: Vec<PageRun> = Vec::new();
        if let Some(load) = loads.get_mut(&id) {
            for first in part.host_pages(host_page) {
                if load.dropped.contains_key(&first) {
                    continue;
                }
                load.dropped.insert(first, Dropped::GivenUp);
                let count = host_page.min(part.end() - first);
                if let Some(poisoned) = poisoned.get_mut(&part.block.0) {
                    poisoned.set_run(PageIndex(first), count);
                }
                match runs.last_mut() {
                    Some(last) if last.end() == first => last.count += count,
                    _ => runs.push(PageRun { first: PageIndex(first), count, ..part }),
                }
            }
            if !matches!(load.stage, Stage::Running { .. }) && load.is_dropped() {
                loads.remove(&id);
                queue.retain(|queued| *queued != id);
            }
        }
        self.changed.notify_all();
        runs
    }

    /// A page that was to be poisoned exists.
    pub(crate) fn exists(&self, block: BlockIndex, page: PageIndex) {
        let state = self.lock();
        let run = state.walk.host_page(block, page);
        if let (Some(poisoned), Some(run)) = (state.poisoned.get(&block.0), run) {
            poisoned.clear_run(run.first, run.count);
        }
    }

    /// Everything ends. Returns all pages that are missing, the first time; the caller poisons them, and then
    /// [reports](Self::disarmed) that.
    pub(crate) fn end(&self, error: Option<PagerError>) -> Option<Vec<PageRun>> {
        let mut state = self.lock();
        if state.is_ended {
            if let Some(later) = error {
                tracing::debug!(error = %later, "a later error of a pager that has ended");
            }
            return None;
        }
        state.was_incomplete =
            !state.is_done() || error.as_ref().is_some_and(|error| !matches!(error, PagerError::Cancelled));
        state.is_ended = true;
        state.error = error;
        let mut missing = Vec::new();
        while let Some(run) = state.walk.next_any(u64::MAX) {
            missing.push(run);
        }
        let State { walk, loads, poisoned, .. } = &mut *state;
        for load in loads.values() {
            let host_page = walk.shape(load.run.block).map_or(1, |shape| shape.host_page);
            for first in load.run.host_pages(host_page).filter(|first| !load.dropped.contains_key(first)) {
                let count = host_page.min(load.run.end() - first);
                missing.push(PageRun { first: PageIndex(first), count, ..load.run });
            }
        }
        for run in &missing {
            if let Some(poisoned) = poisoned.get_mut(&run.block.0) {
                poisoned.set_run(run.first, run.count);
            }
        }
        self.changed.notify_all();
        self.alarm.notify_all();
        Some(missing)
    }

    /// What [`end`](Self::end) returned was poisoned, and nothing is armed any more.
    pub(crate) fn disarmed(&self) {
        self.lock().is_disarmed = true;
        self.changed.notify_all();
    }

    /// Waits until nothing is armed any more.
    pub(crate) fn wait_until_disarmed(&self) {
        self.wait_until(None, |state| state.is_disarmed);
    }

    /// Waits until every page is there, or the pager has ended, or for `limit`. Returns whether it need not wait longer.
    pub(crate) fn wait_until_done(&self, limit: Option<Duration>) -> bool {
        self.wait_until(limit, |state| state.is_ended || state.is_done())
    }

    /// Waits until all threads have ended, or for `limit`. Returns whether they have.
    pub(crate) fn wait_for_threads(&self, limit: Duration) -> bool {
        self.wait_until(Some(limit), |state| state.threads == 0)
    }

    /// Another thread starts.
    pub(crate) fn thread_starts(&self) {
        self.lock().threads += 1;
    }

    /// A thread ends.
    pub(crate) fn thread_ends(&self) {
        self.lock().threads -= 1;
        self.changed.notify_all();
    }

    /// Waits for a delayed load, or for `limit`. Returns whether the pager has ended.
    pub(crate) fn pause(&self, limit: Duration) -> bool {
        let state = self.lock();
        if state.is_ended {
            return true;
        }
        let delayed = state.loads.values().filter_map(|load| match load.stage {
            Stage::Delayed(until) => Some(until.saturating_duration_since(Instant::now())),
            Stage::Queued | Stage::Requested | Stage::Running { .. } => None,
        });
        let limit = delayed.fold(limit, Duration::min);
        if limit.is_zero() {
            return false;
        }
        let waited = self.alarm.wait_timeout(state, limit);
        waited.unwrap_or_else(PoisonError::into_inner).0.is_ended
    }

    pub(crate) fn is_ended(&self) -> bool {
        self.lock().is_ended
    }

    /// Whether every page is there, or was abandoned.
    pub(crate) fn is_complete(&self) -> bool {
        self.lock().is_complete()
    }

    /// The reason of an early end, once.
    pub(crate) fn take_error(&self) -> Option<PagerError> {
        self.lock().error.take()
    }

    /// The number of pages that are missing.
    pub(crate) fn missing(&self) -> u64 {
        let state = self.lock();
        if state.is_ended {
            return 0;
        }
        let underway = state.loads.values().filter(|load| !load.is_dropped()).map(|load| load.run.count);
        state.walk.left() + underway.sum::<u64>()
    }

    /// The number of poisoned pages, and the first of them.
    pub(crate) fn poisoned(&self) -> (u64, Option<(BlockIndex, PageIndex)>) {
        let state = self.lock();
        let count = state.poisoned.values().map(PageBitmap::count).sum();
        let first = state.poisoned.iter().find_map(|(block, pages)| {
            let first = pages.next_set(PageIndex(0))?;
            Some((BlockIndex(*block), first))
        });
        (count, first)
    }

    fn wait_until(&self, limit: Option<Duration>, done: impl Fn(&State) -> bool) -> bool {
        let until = limit.map(|limit| Instant::now() + limit);
        let mut state = self.lock();
        while !done(&state) {
            state = match until.map(|until| until.saturating_duration_since(Instant::now())) {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return false,
                Some(left) => {
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        true
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    pub(super) fn begin(&mut self, run: PageRun, awaited: Waits, stage: Stage) -> LoadId {
        let (id, now) = (LoadId(self.next), Instant::now());
        self.next += 1;
        let host_pages = run.host_pages(self.host_page(run.block)).count() as u64;
        let dropped = BTreeMap::new();
        let is_replaced = false;
        let load = Load {
            run,
            since: now,
            awaited,
            host_pages,
            judged: now,
            decided: 0,
            stage,
            is_replaced,
            dropped,
        };
        self.loads.insert(id, load);
        id
    }

    fn host_page(&self, block: BlockIndex) -> u64 {
        self.walk.shape(block).map_or(1, |shape| shape.host_page)
    }

    fn is_complete(&self) -> bool {
        if self.is_ended { !self.was_incomplete } else { self.is_done() }
    }

    fn is_done(&self) -> bool {
        // A load that was abandoned may never return.
        self.walk.is_done() && self.loads.values().all(Load::is_dropped)
    }
}
