//! Models of the [`Schedule`]: the meeting of requests, the walk, and the end.
//!
//! The package `multifd-models` runs each under many schedules; see `docs/develop/concurrency.md`.

use std::{collections::VecDeque, sync::Arc};

use super::{Cost, Lane, Schedule};
use crate::{
    ram::{BlockIndex, PageBitmap, PageIndex, PageRun, PageSize, Shape},
    sync_types::{
        Condvar, Mutex,
        model::{Thread, thread},
    },
};

const PAGES: usize = 6;

/// How often each page was sent.
type Sent = Arc<Mutex<[u32; PAGES]>>;

fn worker(schedule: &Arc<Schedule>, lane: Lane, sent: &Sent) -> Thread<()> {
    let (schedule, sent) = (schedule.clone(), sent.clone());
    thread::spawn(move || {
        while let Some(job) = schedule.next(lane, 2) {
            for page in job.run.first.0..job.run.first.0 + job.run.count {
                sent.lock().expect("whole")[usize::try_from(page).expect("small")] += 1;
            }
            schedule.sent(job, Cost::default());
        }
    })
}

fn schedule(walk: &[u64]) -> Arc<Schedule> {
    let bitmap = PageBitmap::new(PAGES as u64);
    walk.iter().for_each(|page| bitmap.set_run(PageIndex(*page), 1));
    let shape = Shape { pages: PAGES as u64, host_page: 1 };
    Arc::new(Schedule::new(PageSize::KIB_4, &[shape], &[bitmap], &[PageBitmap::new(PAGES as u64)]))
}

fn page(page: u64) -> PageRun {
    PageRun { block: BlockIndex(0), first: PageIndex(page), count: 1 }
}

/// Requests come over their own connection, and hold one of the two threads of the walk. Each page is sent once, and when the schedule is drained after the
/// walk, everything that was requested before was sent.
pub fn each_page_is_sent_once_and_a_drained_schedule_has_sent_all() {
    let (schedule, sent) = (schedule(&[0, 1, 3, 4]), Sent::default());
    let walk = [(); 2].map(|()| worker(&schedule, Lane::Walk, &sent));
    let requests = [(); 2].map(|()| worker(&schedule, Lane::Requests, &sent));
    let asks = thread::spawn({
        let schedule = schedule.clone();
        move || [4, 5, 0, 4].map(|at| schedule.request(page(at)).expect("in the block"))
    });
    walk.into_iter().for_each(|worker| worker.join().expect("no panic"));
    asks.join().expect("no panic");
    assert!(schedule.drained());
    assert_eq!(*sent.lock().expect("whole"), [1; PAGES]);
    schedule.close();
    requests.into_iter().for_each(|worker| worker.join().expect("no panic"));
}

/// One connection for both. A request that comes before the threads have ended is sent; none is sent twice.
pub fn requests_on_the_connection_of_the_walk_are_sent_once() {
    let (schedule, sent) = (schedule(&[0, 1, 2]), Sent::default());
    let workers = [(); 2].map(|()| worker(&schedule, Lane::Both, &sent));
    for at in [1, 5] {
        schedule.request(page(at)).expect("in the block");
    }
    workers.into_iter().for_each(|worker| worker.join().expect("no panic"));
    assert!(schedule.drained());
    assert_eq!(*sent.lock().expect("whole"), [1; PAGES]);
}

/// The connections of one generation: what was sent and not received yet. A break loses it.
#[derive(Default)]
struct Generation {
    wire: Mutex<Wire>,
    changed: Condvar,
}

#[derive(Default)]
struct Wire {
    on_its_way: VecDeque<usize>,
    sent: [u32; PAGES],
    broken: bool,
    ended: bool,
}

impl Generation {
    /// Sends what `schedule` gives to this lane.
    fn send(self: &Arc<Self>, schedule: &Arc<Schedule>, lane: Lane) -> Thread<()> {
        let (this, schedule) = (self.clone(), schedule.clone());
        thread::spawn(move || {
            while let Some(job) = schedule.next(lane, 2) {
                let mut wire = this.wire.lock().expect("whole");
                for page in job.run.first.0..job.run.first.0 + job.run.count {
                    let page = usize::try_from(page).expect("small");
                    wire.sent[page] += 1;
                    if !wire.broken {
                        wire.on_its_way.push_back(page);
                    }
                }
                drop(wire);
                this.changed.notify_all();
                schedule.sent(job, Cost::default());
            }
        })
    }

    /// Receives until the connections end or break.
    fn receive(self: &Arc<Self>, there: &There) -> Thread<()> {
        let (this, there) = (self.clone(), there.clone());
        thread::spawn(move || {
            loop {
                let mut wire = this.wire.lock().expect("whole");
                let page = loop {
                    match wire.on_its_way.pop_front() {
                        Some(page) => break page,
                        None if wire.broken || wire.ended => return,
                        None => wire = this.changed.wait(wire).expect("whole"),
                    }
                };
                drop(wire);
                there.0.lock().expect("whole")[page] = true;
                there.1.notify_all();
            }
        })
    }

    fn ends(&self, broken: bool) {
        let mut wire = self.wire.lock().expect("whole");
        if broken {
            wire.broken = true;
            wire.on_its_way.clear();
        }
        wire.ended = true;
        drop(wire);
        self.changed.notify_all();
    }
}

/// Which pages the destination has.
type There = Arc<(Mutex<[bool; PAGES]>, Condvar)>;

/// All connections break at any time, with requests and the walk over several channels, and the source returns. In each generation
/// a page is sent once at most; a request is answered in the end; and when the walk of the last generation has ended, every page is
/// there.
pub fn a_request_outlives_a_break_and_the_walk_after_it_ends() {
    let there = There::default();
    let guest = thread::spawn({
        let there = there.clone();
        move || {
            let mut pages = there.0.lock().expect("whole");
            while !pages[WANTED] {
                pages = there.1.wait(pages).expect("whole");
            }
        }
    });
    for breaks in [true, false] {
        let pages = *there.0.lock().expect("whole");
        let (walk, arrived) = (PageBitmap::new(PAGES as u64), PageBitmap::new(PAGES as u64));
        for (index, is_there) in (0..).map(PageIndex).zip(pages) {
            if is_there {
                arrived.set(index)
            } else {
                walk.set(index)
            };
        }
        let shape = Shape { pages: PAGES as u64, host_page: 1 };
        let schedule = Arc::new(Schedule::new(PageSize::KIB_4, &[shape], &[walk], &[arrived]));
        let generation = Arc::new(Generation::default());
        let receives = generation.receive(&there);
        let walks = [Lane::Walk, Lane::Walk].map(|lane| generation.send(&schedule, lane));
        let requests = generation.send(&schedule, Lane::Requests);
        // A destination asks again for what it lacks.
        let asks = thread::spawn({
            let schedule = schedule.clone();
            move || (!pages[WANTED]).then(|| schedule.request(page(WANTED as u64)).expect("in the block"))
        });
        if breaks {
            generation.ends(true);
            schedule.close();
        }
        walks.into_iter().for_each(|walk| walk.join().expect("no panic"));
        asks.join().expect("no panic");
        assert_eq!(schedule.drained(), !breaks);
        schedule.close();
        requests.join().expect("no panic");
        generation.ends(breaks);
        receives.join().expect("no panic");
        let sent = generation.wire.lock().expect("whole").sent;
        assert!(sent.iter().zip(pages).all(|(times, is_there)| *times <= u32::from(!is_there)));
    }
    assert_eq!(*there.0.lock().expect("whole"), [true; PAGES]);
    guest.join().expect("no panic");
}

/// The page that the guest waits for.
const WANTED: usize = 4;

/// A broken connection closes the schedule: nobody waits any more.
pub fn closing_ends_every_wait() {
    let (schedule, sent) = (schedule(&[0]), Sent::default());
    let workers = [Lane::Requests, Lane::Walk, Lane::Both].map(|lane| worker(&schedule, lane, &sent));
    let drains = thread::spawn({
        let schedule = schedule.clone();
        move || schedule.drained()
    });
    let asks = thread::spawn({
        let schedule = schedule.clone();
        move || schedule.request(page(5)).expect("in the block")
    });
    schedule.close();
    workers.into_iter().for_each(|worker| worker.join().expect("no panic"));
    drains.join().expect("no panic");
    asks.join().expect("no panic");
    assert!(sent.lock().expect("whole").iter().all(|times| *times <= 1));
}
