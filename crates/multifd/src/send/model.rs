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
    given::Given,
    worker::{Carrier, Recorder, work},
};
use crate::{
    batch::{Batch, Kind},
    channel::{Stop, Wake},
    error::{Error, Result},
    ram::{BlockIndex, BlockName, Mapping, Memory, PageBitmap, PageIndex, PageSize, RamBlock, RamBlocks},
    sync_types::{
        Condvar, Mutex, OnceLock,
        model::{Thread, thread},
    },
    wire::ChannelId,
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
fn channel(id: u8, dispatch: &Arc<Dispatch>, carried: &Carried) -> Thread<u64> {
    channel_that_keeps(0, id, dispatch, carried)
}

/// A zero-copy channel: it returns the oldest batch when it has more than `most`. Its SYNCs are counted.
fn channel_that_keeps(most: usize, id: u8, dispatch: &Arc<Dispatch>, carried: &Carried) -> Thread<u64> {
    let (dispatch, carried) = (dispatch.clone(), carried.clone());
    thread::spawn(move || {
        let mut synced = 0;
        let channel = Keeping { most, carried, kept: VecDeque::new(), synced: &mut synced };
        let (id, given) = (ChannelId(id), OnceLock::new());
        let recorder = Recorder { id, given: &given };
        work(id, &dispatch, &recorder, channel).expect("it never fails");
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
    let channels: Vec<_> = (0..CHANNELS).map(|id| channel(id, &dispatch, &carried)).collect();
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
    let channels = [0, 1].map(|id| channel_that_keeps(3, id, &dispatch, &carried));
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
                match dispatch.next(ChannelId(0), None) {
                    Job::Batch(_) => assert_eq!(synced, 1),
                    Job::Sync => {
                        *raised.0.lock().expect("whole") = true;
                        raised.1.notify_all();
                        synced += 1;
                        dispatch.synced(ChannelId(0));
                    }
                    Job::Serve(_) | Job::Lost => unreachable!("nothing is served or lost"),
                    Job::End => return,
                }
            }
        }
    });
    let second = channel(1, &dispatch, &carried);
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
    let lasting = channel(1, &dispatch, &carried);
    let breaking = thread::spawn({
        let (dispatch, stop) = (dispatch.clone(), stop.clone());
        move || {
            dispatch.connected();
            let job = dispatch.next(ChannelId(0), None);
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
    assert!(matches!(dispatch.next(ChannelId(0), None), Job::End));
    drop(watch);
}

/// A connect fails at any time.
pub fn a_connect_that_fails_ends_the_wait_for_the_channels() {
    let stop = Stop::new();
    let dispatch = Arc::new(Dispatch::new(2, PAGE, false));
    let watch = stop.watch(dispatch.clone());
    let lasting = channel(1, &dispatch, &Carried::default());
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

/// A channel whose connection breaks at any job, with what it has sent before.
struct Breaking {
    jobs: u32,
    carried: Carried,
}

impl Breaking {
    fn job(&mut self) -> Result<()> {
        self.jobs = self.jobs.checked_sub(1).ok_or_else(|| Error::other("broken", "no cause"))?;
        Ok(())
    }
}

impl Carrier for Breaking {
    fn carry(&mut self, batch: Batch) -> Result<Option<Batch>> {
        self.job()?;
        self.carried.lock().expect("whole").push((0, batch.normal()[0].0));
        Ok(Some(batch))
    }

    fn sync(&mut self) -> Result<()> {
        self.job()
    }

    fn end(self) {}
}

/// One of two channels breaks at its first, second or third job, and the migration continues without it. Each sync point is
/// passed, and every page that the lost channel was given since the last one is sent again by the other.
pub fn what_a_lost_channel_was_given_is_sent_again_after_the_sync_point() {
    for jobs in 0..3 {
        let (stop, blocks) = (Stop::new(), one_block());
        let dispatch = Arc::new(Dispatch::new(2, PAGE, false));
        let watch = stop.watch(dispatch.clone());
        let given = Arc::new(OnceLock::new());
        assert!(given.set(Given::new(2, &blocks)).is_ok());
        dispatch.tolerate();
        let (lasting, breaking) = (Carried::default(), Carried::default());
        let threads = [0, 1].map(|id| {
            let (dispatch, given) = (dispatch.clone(), given.clone());
            let (lasting, breaking) = (lasting.clone(), breaking.clone());
            thread::spawn(move || {
                let id = ChannelId(id);
                let recorder = Recorder { id, given: &given };
                if id.0 == 0 {
                    let channel =
                        Keeping { most: 0, carried: lasting, kept: VecDeque::new(), synced: &mut 0 };
                    work(id, &dispatch, &recorder, channel).expect("it never fails");
                } else if work(id, &dispatch, &recorder, Breaking { jobs, carried: breaking }).is_err() {
                    assert!(dispatch.lose(id), "it is not the last one");
                }
            })
        });
        dispatch.wait_connected(&stop).expect("running");
        let pending = PageBitmap::new(PAGES);
        let (mut hand, mut rounds, mut was_lost) = (Batch::new(PAGE), 0, false);
        pending.fill();
        while !pending.is_empty() {
            for page in (0..PAGES).map(PageIndex).filter(|page| pending.clear(*page)) {
                hand.push(Kind::Normal, BlockIndex(0), page, 1);
                dispatch.swap(&mut hand, &stop).expect("running");
            }
            let lost = dispatch.sync(&stop).expect("running");
            let again = given.get().expect("set").settle(&lost, std::slice::from_ref(&pending));
            assert!(again == 0 || !was_lost, "a lost channel is given nothing");
            was_lost |= !lost.is_empty();
            rounds += 1;
        }
        assert!(rounds <= 2);
        let carried =
            |by: &Carried| by.lock().expect("whole").iter().map(|(_, page)| *page).collect::<Vec<_>>();
        let mut pages = carried(&lasting);
        if !was_lost {
            pages.extend(carried(&breaking));
        }
        assert!((0..PAGES).all(|page| pages.contains(&page)), "a page was not sent again");
        assert!(stop.finish());
        threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
        drop(watch);
    }
}

const PAGES: u64 = 3;

fn one_block() -> RamBlocks {
    let length = PAGES * PAGE.bytes() as u64;
    let memory = Memory::Mapped(Mapping::anonymous(length).expect("memory"));
    let block = RamBlock::new(BlockName::new("ram").expect("a name"), length, PAGE, memory);
    RamBlocks::new(vec![block.expect("a block")]).expect("distinct")
}
