//! Dispatches batches between the collector and the channels: full batches go out, empty ones come back.
//!
//! There is one lock, held only to move batches and numbers, never while bytes are written. Any idle channel takes the
//! next batch. A channel sync is a number, which the collector increments. A channel that finds no batch from before
//! sends its SYNC and reports it. A batch queued after the increment waits until the channel that takes it has sent its
//! own SYNC, so no channel carries a newer page ahead of the sync point.
//!
//! A channel can be [lost](Dispatch::lose): it gets no more work, and no sync point waits for it.

use std::{
    collections::VecDeque,
    sync::{Arc, PoisonError},
};

use super::{serving::Serving, zero_copy::DEPTH};
use crate::{
    batch::Batch,
    channel::{Stop, Wake},
    error::{Error, Result},
    ram::PageSize,
    sync_types::{Condvar, Mutex, MutexGuard},
    wire::ChannelId,
};

/// The next job of a channel.
pub(super) enum Job {
    /// Send these pages.
    Batch(Batch),
    /// Send a SYNC packet.
    Sync,
    /// Send what this has, until it has nothing more.
    Serve(Arc<Serving>),
    /// Nothing more follows.
    End,
    /// This channel is lost: its connection is not used any more.
    Lost,
}

pub(super) struct Dispatch {
    queue: Mutex<Queue>,
    /// Channels wait here for a batch, a sync, or the end.
    work: Condvar,
    /// The collector waits here for an empty batch, for all SYNCs, and for all channels to connect.
    progress: Condvar,
    channels: usize,
}

/// The progress of a channel.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Point {
    /// It has sent this number of SYNCs.
    Synced(u64),
    /// Its connection is broken.
    Lost,
}

struct Queue {
    ready: VecDeque<(u64, Batch)>,
    free: Vec<Batch>,
    /// Channels waiting for work.
    idle: usize,
    /// The collector waits for an empty batch.
    starved: bool,
    /// Channels that have connected.
    connected: usize,
    /// The number of requested sync points.
    syncs: u64,
    /// What each channel has sent.
    points: Box<[Point]>,
    /// The migration continues without a channel that breaks.
    tolerant: bool,
    /// Batches were handed over since.
    unsynced: bool,
    /// What the channels send by themselves, how often it was taken, and how often that was done.
    serving: Option<Arc<Serving>>,
    serves: usize,
    served: usize,
    stopped: bool,
}

impl Dispatch {
    /// Creates batches for `channels` channels: one for each to carry, three for each to be ready. The collector brings
    /// its own.
    pub(super) fn new(channels: u8, page_size: PageSize, in_place: bool) -> Self {
        let each = if in_place { 1 + READY + DEPTH } else { 1 + READY };
        Self::of(channels, each, || Batch::new(page_size))
    }

    /// Creates batches for channels that copy, with room for `room` pages in each.
    pub(super) fn for_copies(channels: u8, room: usize) -> Self {
        Self::of(channels, 1 + READY, || Batch::with_room(room))
    }

    fn of(channels: u8, each: usize, batch: impl FnMut() -> Batch) -> Self {
        let channels = usize::from(channels);
        let free: Vec<Batch> = std::iter::repeat_with(batch).take(channels * each).collect();
        Self {
            queue: Mutex::new(Queue {
                ready: VecDeque::with_capacity(free.len()),
                free,
                idle: 0,
                starved: false,
                connected: 0,
                syncs: 0,
                points: vec![Point::Synced(0); channels].into(),
                tolerant: false,
                unsynced: false,
                serving: None,
                serves: 0,
                served: 0,
                stopped: false,
            }),
            work: Condvar::new(),
            progress: Condvar::new(),
            channels,
        }
    }

    /// Hands over a full batch and takes an empty one; waits until there is one.
    ///
    /// # Errors
    /// The error that stopped the migration.
    pub(super) fn swap(&self, batch: &mut Batch, stop: &Stop) -> Result<()> {
        let mut queue = self.lock();
        loop {
            if queue.stopped {
                drop(queue);
                // After a normal end, no channel takes pages any more.
                return Err(stop.error().unwrap_or(Error::Cancelled));
            }
            if let Some(empty) = queue.free.pop() {
                let full = std::mem::replace(batch, empty);
                let epoch = queue.syncs;
                queue.ready.push_back((epoch, full));
                queue.unsynced = true;
                queue.starved = false;
                let idle = queue.idle > 0;
                // A woken channel need not wait for the lock first.
                drop(queue);
                if idle {
                    self.work.notify_one();
                }
                return Ok(());
            }
            queue.starved = true;
            queue = self.progress.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The channel sync: waits until everything queued so far, and then one SYNC on every channel, was sent. Returns the channels
    /// that are lost: what was queued may have been sent on them.
    ///
    /// # Errors
    /// The error that stopped the migration.
    pub(super) fn sync(&self, stop: &Stop) -> Result<Vec<ChannelId>> {
        let mut queue = self.lock();
        queue.syncs += 1;
        queue.unsynced = false;
        self.work.notify_all();
        while !queue.is_synced() && !queue.stopped {
            queue = self.progress.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        let lost = queue.lost().collect();
        drop(queue);
        stop.check().map(|()| lost)
    }

    /// From now on a channel can be lost.
    pub(super) fn tolerate(&self) {
        self.lock().tolerant = true;
    }

    /// A channel is broken: it gets no more work. Returns `false` if the migration cannot continue without it: channels must not be
    /// lost, or it is the last one.
    pub(super) fn lose(&self, id: ChannelId) -> bool {
        let mut queue = self.lock();
        let is_last = queue.living() == 1 && !queue.lost().any(|lost| lost == id);
        if !queue.tolerant || is_last {
            return false;
        }
        if let Some(point) = queue.points.get_mut(usize::from(id.0)) {
            *point = Point::Lost;
        }
        drop(queue);
        self.work.notify_all();
        self.progress.notify_all();
        true
    }

    /// The channels that are lost.
    pub(super) fn lost(&self) -> Vec<ChannelId> {
        self.lock().lost().collect()
    }

    /// The number of channels that are not lost.
    pub(super) fn living(&self) -> usize {
        self.lock().living()
    }

    /// Whether pages were handed over after the last SYNC.
    pub(super) fn is_unsynced(&self) -> bool {
        self.lock().unsynced
    }

    /// Lets the channels send what `serving` has. No channel can be lost from then on. [`end_serve`](Self::end_serve) must follow.
    pub(super) fn begin_serve(&self, serving: Arc<Serving>) {
        let mut queue = self.lock();
        (queue.serving, queue.serves, queue.served, queue.unsynced) = (Some(serving), 0, 0, true);
        // A break pauses both sides from here on.
        queue.tolerant = false;
        self.work.notify_all();
    }

    /// Waits until this number of channels have nothing more to send, or the migration has stopped.
    pub(super) fn wait_served(&self, channels: usize) {
        let mut queue = self.lock();
        while queue.served < channels && !queue.stopped {
            queue = self.progress.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// All channels have served.
    ///
    /// # Errors
    /// The error that stopped the migration.
    pub(super) fn end_serve(&self, stop: &Stop) -> Result<()> {
        self.wait_served(self.living());
        self.lock().serving = None;
        stop.check()
    }

    /// An empty batch for a channel that serves, in place of `done`.
    pub(super) fn empty(&self, done: Option<Batch>) -> Option<Batch> {
        let mut queue = self.lock();
        if let Some(mut batch) = done {
            batch.clear();
            return Some(batch);
        }
        queue.free.pop()
    }

    /// A channel has sent what it could, and returns its batch.
    pub(super) fn served(&self, batch: Option<Batch>) {
        let mut queue = self.lock();
        queue.free.extend(batch);
        queue.served += 1;
        self.progress.notify_all();
    }

    /// The next job of a channel. `done` is the batch that it has carried.
    pub(super) fn next(&self, id: ChannelId, done: Option<Batch>) -> Job {
        let mut queue = self.lock();
        if let Some(mut batch) = done {
            batch.clear();
            queue.free.push(batch);
        }
        loop {
            if queue.stopped {
                return Job::End;
            }
            let Some(Point::Synced(synced)) = queue.points.get(usize::from(id.0)).copied() else {
                return Job::Lost;
            };
            let job = match queue.ready.front() {
                Some((epoch, _)) if *epoch <= synced => {
                    queue.ready.pop_front().map(|(_, batch)| Job::Batch(batch))
                }
                _ if synced < queue.syncs => Some(Job::Sync),
                _ => match &queue.serving {
                    // A fast channel may take it twice, and then in place of one that found nothing to do.
                    Some(serving) if queue.serves < queue.living() => {
                        let job = Job::Serve(serving.clone());
                        queue.serves += 1;
                        Some(job)
                    }
                    _ => None,
                },
            };
            let feed = self.is_worth_a_wake(&mut queue);
            if let Some(job) = job {
                drop(queue);
                if feed {
                    self.progress.notify_one();
                }
                return job;
            }
            if feed {
                self.progress.notify_one();
            }
            queue.idle += 1;
            queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        }
    }

    /// Whether to wake a collector that waits for an empty batch. It fills a batch in a hundredth of the time that a
    /// channel needs to send one, so waking it for each batch would cost one thread switch per batch. It may sleep
    /// until half of the batches that can be ready are empty; the other half keeps the channels busy while it wakes. If
    /// no batch is ready, any empty batch wakes it, so that it never waits for a channel that waits for it.
    fn is_worth_a_wake(&self, queue: &mut Queue) -> bool {
        let empty = queue.free.len();
        let worth = empty > 0 && (2 * empty >= READY * self.channels || queue.ready.is_empty());
        // Woken once: the collector then checks by itself until it finds no empty batch again.
        worth && std::mem::take(&mut queue.starved)
    }

    /// Records that a channel has sent its SYNC.
    pub(super) fn synced(&self, id: ChannelId) {
        let mut queue = self.lock();
        if let Some(Point::Synced(synced)) = queue.points.get_mut(usize::from(id.0)) {
            *synced += 1;
        }
        if queue.is_synced() {
            self.progress.notify_all();
        }
    }

    /// A channel has connected.
    pub(super) fn connected(&self) {
        let mut queue = self.lock();
        queue.connected += 1;
        if queue.connected == self.channels {
            self.progress.notify_all();
        }
    }

    /// Waits until all channels have connected.
    ///
    /// # Errors
    /// The error that stopped the migration, such as a connect that failed.
    pub(super) fn wait_connected(&self, stop: &Stop) -> Result<()> {
        let mut queue = self.lock();
        while queue.connected < self.channels && !queue.stopped {
            queue = self.progress.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        drop(queue);
        stop.check()
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    /// Whether every channel that is not lost has sent the last requested SYNC.
    fn is_synced(&self) -> bool {
        self.points.iter().all(|point| *point == Point::Lost || *point == Point::Synced(self.syncs))
    }

    fn lost(&self) -> impl Iterator<Item = ChannelId> {
        let ids = (0..=u8::MAX).map(ChannelId).zip(&self.points);
        ids.filter(|(_, point)| **point == Point::Lost).map(|(id, _)| id)
    }

    fn living(&self) -> usize {
        self.points.len() - self.lost().count()
    }
}

/// The number of batches per channel that can be ready.
const READY: usize = 3;

impl Wake for Dispatch {
    fn wake(&self) {
        self.lock().stopped = true;
        self.work.notify_all();
        self.progress.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, Mutex},
        thread::{scope, spawn},
        time::Duration,
    };

    use super::*;
    use crate::{
        batch::Kind,
        ram::{BlockIndex, PageIndex},
    };

    const PAGE: PageSize = PageSize::KIB_4;

    fn one_page(batch: &mut Batch, page: u64) {
        batch.push(Kind::Normal, BlockIndex(0), PageIndex(page), 1);
    }

    #[test]
    fn no_channel_carries_a_page_of_after_a_sync_ahead_of_its_own_sync() {
        const CHANNELS: u8 = 4;
        let (dispatch, stop) = (Dispatch::new(CHANNELS, PAGE, false), Stop::new());
        let carried = Mutex::new(Vec::new());
        scope(|threads| {
            for id in (0..CHANNELS).map(ChannelId) {
                let (dispatch, carried) = (&dispatch, &carried);
                threads.spawn(move || {
                    let (mut done, mut synced) = (None, 0);
                    loop {
                        match dispatch.next(id, done.take()) {
                            Job::Batch(batch) => {
                                carried.lock().expect("whole").push((synced, batch.normal()[0].0));
                                done = Some(batch);
                            }
                            Job::Sync => {
                                synced += 1;
                                dispatch.synced(id);
                            }
                            Job::Serve(_) | Job::Lost => unreachable!("nothing is served or lost"),
                            Job::End => return,
                        }
                    }
                });
            }
            let mut hand = Batch::new(PAGE);
            for round in 0..200 {
                for _ in 0..7 {
                    one_page(&mut hand, round);
                    dispatch.swap(&mut hand, &stop).expect("running");
                    assert!(hand.is_empty());
                }
                dispatch.sync(&stop).expect("running");
            }
            dispatch.wake();
        });
        let carried = carried.into_inner().expect("whole");
        assert_eq!(carried.len(), 1400);
        assert!(carried.iter().all(|(synced, round)| synced == round));
    }

    /// Channels may keep all batches but one, as zero-copy channels do.
    #[test]
    fn a_collector_is_woken_for_a_single_empty_batch_when_none_is_ready() {
        let (dispatch, stop) = (Dispatch::new(2, PAGE, false), Stop::new());
        scope(|threads| {
            threads.spawn(|| {
                let mut hand = Batch::new(PAGE);
                for page in 0..9 {
                    one_page(&mut hand, page);
                    dispatch.swap(&mut hand, &stop).expect("running");
                }
            });
            let mut kept: Vec<_> = (0..8).map(|_| next(&dispatch, None)).collect();
            let last = next(&dispatch, kept.pop());
            assert_eq!(last.normal(), [PageIndex(8)]);
        });
    }

    fn next(dispatch: &Dispatch, done: Option<Batch>) -> Batch {
        match dispatch.next(ChannelId(0), done) {
            Job::Batch(batch) => batch,
            Job::Sync | Job::Serve(_) | Job::End | Job::Lost => panic!("a batch"),
        }
    }

    #[test]
    fn a_collector_waiting_for_channels_that_stand_still_is_woken_by_the_stop() {
        let (dispatch, stop) = (Arc::new(Dispatch::new(1, PAGE, false)), Stop::new());
        let _watch = stop.watch(dispatch.clone());
        let collectors = [0, 1, 2].map(|wait| {
            let (dispatch, stop) = (dispatch.clone(), stop.clone());
            spawn(move || match wait {
                0 => dispatch.sync(&stop).map(drop),
                1 => dispatch.wait_connected(&stop),
                _ => {
                    let mut hand = Batch::new(PAGE);
                    loop {
                        one_page(&mut hand, 1);
                        dispatch.swap(&mut hand, &stop)?;
                    }
                }
            })
        });
        std::thread::sleep(Duration::from_millis(20));
        stop.fail(Error::other("a channel broke", "no cause"));
        for collector in collectors {
            let error = collector.join().expect("no panic").expect_err("stopped");
            assert_eq!(error.to_string(), "a channel broke");
        }
        assert!(matches!(dispatch.next(ChannelId(0), None), Job::End));
    }
}
