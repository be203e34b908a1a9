//! Models of the [`Dispatch`] between collector and channels.
//!
//! The package `multifd-models` runs each under many schedules; see `docs/develop/concurrency.md`. The models use the
//! channels' loop without a connection.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex as Note},
};

use super::{
    dispatch::{Dispatch, Job},
    worker::{Carrier, work},
};
use crate::{
    batch::{Batch, Kind},
    channel::{Stop, Wake},
    error::{Error, Result},
    ram::{BlockIndex, PageIndex, PageSize},
    sync_types::{
        Condvar, Mutex,
        model::{Thread, thread},
    },
};

const PAGE: PageSize = PageSize::KIB_4;

/// What the channels have carried: for each page, the number of SYNCs that its channel had sent by then. The checker
/// does not switch threads at these accesses.
type Carried = Arc<Note<Vec<(u64, u64)>>>;

fn one_page(page: u64) -> Batch {
    let mut batch = Batch::new(PAGE);
    batch.push(Kind::Normal, BlockIndex(0), PageIndex(page), 1);
    batch
}

/// A channel that carries all batches that it is given, until the end.
fn channel(dispatch: &Arc<Dispatch>, carried: &Carried) -> Thread<u64> {
    channel_that_keeps(0, dispatch, carried)
}

/// A zero-copy channel: it returns the oldest batch when it has more than `most`. Its SYNCs are counted.
fn channel_that_keeps(most: usize, dispatch: &Arc<Dispatch>, carried: &Carried) -> Thread<u64> {
    let (dispatch, carried) = (dispatch.clone(), carried.clone());
    thread::spawn(move || {
        let mut synced = 0;
        let channel = Keeping { most, carried, kept: VecDeque::new(), synced: &mut synced };
        work(&dispatch, channel).expect("it never fails");
        synced
    })
}

struct Keeping<'a> {
    most: usize,
    carried: Carried,
    kept: VecDeque<Batch>,
    synced: &'a mut u64,
}

impl Carrier for Keeping<'_> {
    fn carry(&mut self, batch: Batch) -> Result<Option<Batch>> {
        self.carried.lock().expect("whole").push((*self.synced, batch.normal()[0].0));
        self.kept.push_back(batch);
        Ok(if self.kept.len() > self.most { self.kept.pop_front() } else { None })
    }

    fn sync(&mut self) -> Result<()> {
        *self.synced += 1;
        Ok(())
    }

    fn end(self) {}
}

/// There are more batches to carry than the eight that exist, so the collector waits for empty ones. All of them come
/// back; each is carried once, before its sync point.
pub fn every_batch_is_carried_once_before_its_sync_point_and_comes_back() {
    const CHANNELS: u8 = 2;
    const BATCHES: usize = 12;
    let stop = Stop::new();
    let dispatch = Arc::new(Dispatch::new(CHANNELS, PAGE, false));
    let watch = stop.watch(dispatch.clone());
    let carried = Carried::default();
    let channels: Vec<_> = (0..CHANNELS).map(|_| channel(&dispatch, &carried)).collect();
    dispatch.wait_connected(&stop).expect("running");
    let mut hand = Batch::new(PAGE);
    for round in 0..2 {
        for _ in 0..BATCHES {
            hand.push(Kind::Normal, BlockIndex(0), PageIndex(round), 1);
            dispatch.swap(&mut hand, &stop).expect("running");
            assert!(hand.is_empty());
        }
        assert!(dispatch.is_unsynced());
        dispatch.sync(&stop).expect("running");
        assert!(!dispatch.is_unsynced());
        let carried = carried.lock().expect("whole");
        assert_eq!(carried.len(), BATCHES * (1 + usize::try_from(round).expect("small")));
        assert!(carried.iter().all(|(synced, page)| synced == page));
    }
    assert!(stop.finish());
    assert!(channels.into_iter().all(|channel| channel.join().expect("no panic") == 2));
    drop(watch);
}

/// Of eight batches six stay with the channels. So too few are ever empty at once to justify a wake, except that none
/// is ready.
pub fn a_collector_is_woken_for_each_empty_batch_while_channels_keep_the_others() {
    const BATCHES: usize = 14;
    let stop = Stop::new();
    let dispatch = Arc::new(Dispatch::new(2, PAGE, false));
    let watch = stop.watch(dispatch.clone());
    let carried = Carried::default();
    let channels = [(); 2].map(|()| channel_that_keeps(3, &dispatch, &carried));
    let mut hand = Batch::new(PAGE);
    for _ in 0..BATCHES {
        hand.push(Kind::Normal, BlockIndex(0), PageIndex(0), 1);
        dispatch.swap(&mut hand, &stop).expect("running");
    }
    dispatch.sync(&stop).expect("running");
    assert_eq!(carried.lock().expect("whole").len(), BATCHES);
    assert!(stop.finish());
    assert!(channels.into_iter().all(|channel| channel.join().expect("no panic") == 1));
    drop(watch);
}

/// While one thread waits in the sync, another one hands over a page. The channels' own order shows that it is newer.
pub fn a_batch_from_after_the_sync_point_waits_for_its_channels_sync() {
    let stop = Stop::new();
    let dispatch = Arc::new(Dispatch::new(2, PAGE, false));
    let watch = stop.watch(dispatch.clone());
    let raised = Arc::new((Mutex::new(false), Condvar::new()));
    let newer = thread::spawn({
        let (dispatch, stop, raised) = (dispatch.clone(), stop.clone(), raised.clone());
        move || {
            let mut is_raised = raised.0.lock().expect("whole");
            while !*is_raised {
                is_raised = raised.1.wait(is_raised).expect("whole");
            }
            drop(is_raised);
            dispatch.swap(&mut one_page(1), &stop)
        }
    });
    let carried = Carried::default();
    let first = thread::spawn({
        let (dispatch, raised) = (dispatch.clone(), raised.clone());
        move || {
            let mut synced = 0;
            loop {
                match dispatch.next(None, synced) {
                    Job::Batch(_) => assert_eq!(synced, 1),
                    Job::Sync => {
                        *raised.0.lock().expect("whole") = true;
                        raised.1.notify_all();
                        synced += 1;
                        dispatch.synced();
                    }
                    Job::Serve(_) => unreachable!("nothing is served"),
                    Job::End => return,
                }
            }
        }
    });
    let second = channel(&dispatch, &carried);
    dispatch.sync(&stop).expect("running");
    newer.join().expect("no panic").expect("running");
    // The next sync point follows.
    dispatch.sync(&stop).expect("running");
    assert!(carried.lock().expect("whole").iter().all(|found| *found == (1, 1)));
    assert!(stop.finish());
    first.join().expect("no panic");
    assert_eq!(second.join().expect("no panic"), 2);
    drop(watch);
}

/// A channel fails with its first batch or its first SYNC, and keeps the batch; the other one continues. The collector
/// may be in any of its waits by then.
pub fn a_channel_that_breaks_ends_every_wait_of_the_others() {
    let stop = Stop::new();
    let dispatch = Arc::new(Dispatch::new(2, PAGE, false));
    let watch = stop.watch(dispatch.clone());
    let carried = Carried::default();
    let lasting = channel(&dispatch, &carried);
    let breaking = thread::spawn({
        let (dispatch, stop) = (dispatch.clone(), stop.clone());
        move || {
            dispatch.connected();
            let job = dispatch.next(None, 0);
            assert!(!matches!(job, Job::End), "nobody has stopped it");
            stop.fail(Error::other("a channel broke", "no cause"));
        }
    });
    let mut hand = Batch::new(PAGE);
    let collected = dispatch.wait_connected(&stop).and_then(|()| {
        loop {
            for _ in 0..10 {
                hand.push(Kind::Normal, BlockIndex(0), PageIndex(0), 1);
                dispatch.swap(&mut hand, &stop)?;
            }
            dispatch.sync(&stop)?;
        }
    });
    let error: Result<()> = collected;
    assert_eq!(error.expect_err("broken").to_string(), "a channel broke");
    lasting.join().expect("no panic");
    breaking.join().expect("no panic");
    assert!(matches!(dispatch.next(None, 0), Job::End));
    drop(watch);
}

/// A connect fails at any time.
pub fn a_connect_that_fails_ends_the_wait_for_the_channels() {
    let stop = Stop::new();
    let dispatch = Arc::new(Dispatch::new(2, PAGE, false));
    let watch = stop.watch(dispatch.clone());
    let lasting = channel(&dispatch, &Carried::default());
    let failing = thread::spawn({
        let stop = stop.clone();
        move || {
            stop.fail(Error::other("no connection", "no cause"));
        }
    });
    assert!(dispatch.wait_connected(&stop).is_err());
    lasting.join().expect("no panic");
    failing.join().expect("no panic");
    dispatch.wake();
    drop(watch);
}
