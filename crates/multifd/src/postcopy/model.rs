//! Models of the [`Schedule`]: the meeting of requests, the walk, and the end.
//!
//! The package `multifd-models` runs each under many schedules; see `docs/develop/concurrency.md`.

use std::sync::Arc;

use super::{Cost, Lane, Schedule};
use crate::{
    ram::{BlockIndex, PageBitmap, PageIndex, PageRun, PageSize, Shape},
    sync_types::{
        Mutex,
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
