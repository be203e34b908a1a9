//! Which page is sent next, and by which thread.
//!
//! A page is claimed when it is requested or when the walk reaches it, under one lock, so it is sent once. The walk continues
//! where the guest was last found to need a page, and around to the beginning.

use std::{collections::VecDeque, fmt, sync::PoisonError, time::Duration};

use super::pace::{Cost, Pace};
use crate::{
    channel::Wake,
    ram::{BlockIndex, PageBitmap, PageIndex, PageRun, PageSize, Shape, Walk},
    slices::Slices,
    sync_types::{Condvar, Instant, Mutex, MutexGuard},
};

/// What a thread sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// Only what was requested.
    Requests,
    /// Only the walk.
    Walk,
    /// Requests first, otherwise the walk.
    Both,
}

/// Pages to send now. The thread calls [`Schedule::sent`] afterwards.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    /// The pages.
    pub run: PageRun,
    /// When they were requested; `None` if nobody waits for them.
    pub requested: Option<Instant>,
    /// How many bytes may wait in the connection that carries the walk; `None` if it does not matter. See
    /// [`Link::limit_backlog`](crate::channel::Link::limit_backlog).
    pub backlog: Option<u64>,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RefusedRequest {
    /// There is no such block.
    #[error("there is no block number {0}")]
    NoSuchBlock(usize),
    /// It is not within the block.
    #[error("pages {first:#x} to {:#x} are not in the block, which has {pages:#x}", first.saturating_add(*count))]
    Outside {
        /// The first page.
        first: u64,
        /// The number of pages.
        count: u64,
        /// The number of pages of the block.
        pages: u64,
    },
    /// It is empty, or begins or ends within a host page.
    #[error("{count:#x} pages from page {first:#x} on are not whole host pages of {host_page:#x} pages")]
    NotWhole {
        /// The first page.
        first: u64,
        /// The number of pages.
        count: u64,
        /// The number of pages in a host page.
        host_page: u64,
    },
}

/// The order in which pages are sent after the switch to post-copy, for one set of connections.
pub struct Schedule {
    /// Pages that the destination has requested, whether they were sent already or not; changed under the lock.
    asked: Vec<PageBitmap>,
    page_bytes: u64,
    start: Instant,
    state: Mutex<State>,
    /// A request is pending, for the threads that answer them. One is woken at a time.
    requested: Condvar,
    /// Anything else has changed.
    changed: Condvar,
}

struct State {
    requests: VecDeque<Request>,
    /// What was not claimed yet.
    walk: Walk,
    /// Threads that send what they have claimed.
    busy: usize,
    /// Those of them that send a part of the walk.
    walking: usize,
    /// Threads that wait until fewer do.
    held: usize,
    pace: Pace,
    /// When the destination has last requested something, whether it was on its way or not.
    last: Option<Instant>,
    /// The bandwidth of the walk, if it is limited.
    slices: Option<Slices>,
    closed: bool,
}

#[derive(Clone, Copy)]
struct Request {
    run: PageRun,
    since: Instant,
}

impl fmt::Debug for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Schedule").field("blocks", &self.asked.len()).finish_non_exhaustive()
    }
}

impl Schedule {
    /// Creates the schedule of blocks with these shapes. `there` are the pages that the destination has already: they are not
    /// sent again, unless another page of their host page is missing. `walk` are the pages that are sent first, those with
    /// contents; all others follow, because a destination may wait for a page that it has requested when everything else is
    /// there. All three have an element for each block. There is no [limit](Self::limit_walk) for the walk.
    ///
    /// # Panics
    /// If the lists have different lengths, or a bitmap is not that of its block.
    pub fn new(page_size: PageSize, shapes: &[Shape], walk: &[PageBitmap], there: &[PageBitmap]) -> Self {
        let walk = Walk::new(shapes, walk, there);
        let requests = VecDeque::new();
        Self {
            asked: shapes.iter().map(|shape| PageBitmap::new(shape.pages)).collect(),
            page_bytes: page_size.bytes() as u64,
            start: Instant::now(),
            state: Mutex::new(State {
                requests,
                walk,
                busy: 0,
                walking: 0,
                held: 0,
                pace: Pace::new(Instant::now()),
                last: None,
                slices: None,
                closed: false,
            }),
            requested: Condvar::new(),
            changed: Condvar::new(),
        }
    }

    /// Limits the walk to this number of bytes of pages in a second; `None` is no limit. Requests have no limit.
    pub fn limit_walk(&self, bytes: Option<u64>) {
        self.lock().slices = bytes.map(Slices::new);
        self.notify();
    }

    /// Accepts a request of the destination. Waits while very many are pending. Returns whether any of its pages will be sent
    /// because of it: pages that were sent or requested before are on their way.
    ///
    /// # Errors
    /// If no page of these blocks can be meant.
    pub fn request(&self, run: PageRun) -> Result<bool, RefusedRequest> {
        let PageRun { block: index, first, count } = run;
        let asked = self.asked.get(index.0).ok_or(RefusedRequest::NoSuchBlock(index.0))?;
        let mut state = self.lock();
        let shape = state.walk.shape(index).ok_or(RefusedRequest::NoSuchBlock(index.0))?;
        let Shape { pages, host_page } = shape;
        let end = first.0.checked_add(count).filter(|end| *end <= pages);
        let end = end.ok_or(RefusedRequest::Outside { first: first.0, count, pages })?;
        if count == 0 || first.0 % host_page != 0 || (end % host_page != 0 && end != pages) {
            return Err(RefusedRequest::NotWhole { first: first.0, count, host_page });
        }
        while state.requests.len() >= PENDING && !state.closed {
            state = wait(&self.changed, state, None);
        }
        asked.set_run(first, count);
        let since = Instant::now();
        let mut claimed = false;
        let mut page = first.0;
        while page < end {
            let host_end = (page + host_page).min(end);
            let run = PageRun { block: index, first: PageIndex(page), count: host_end - page };
            if state.walk.claim(run) {
                claimed = true;
                let joined = match state.requests.back_mut() {
                    Some(last) if last.since == since && last.run.first.0 + last.run.count == page => {
                        last.run.count += host_end - page;
                        true
                    }
                    _ => false,
                };
                if !joined {
                    state.requests.push_back(Request { run, since });
                }
            }
            page = host_end;
        }
        state.last = Some(since);
        if claimed {
            state.walk.continue_after(run);
            self.requested.notify_one();
        }
        Ok(claimed)
    }

    /// Waits for what a thread of this `lane` sends next: at most `most` pages, or one host page; after the first part of the
    /// walk, eight times as many. While requests come, jobs of the walk are short, because what a guest needs next is often in
    /// one that is being sent; and only as many are sent at once as the line needs, because a requested page waits for what is
    /// before it there. `None` if it has nothing more to do: for [`Lane::Requests`] after [`close`](Self::close), for the others when everything was claimed.
    pub fn next(&self, lane: Lane, most: u64) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            if lane != Lane::Walk
                && let Some(job) = self.requested(&mut state, most)
            {
                state.busy += 1;
                return Some(job);
            }
            let mut limit = None;
            if lane != Lane::Requests {
                let now = self.start.elapsed();
                limit = state.slices.as_mut().and_then(|slices| slices.wait(now));
                let awaited = state.is_awaited().then(|| state.pace.limit());
                // A guest that stops to wait is not noticed otherwise.
                let held = awaited.filter(|limit| state.walking >= limit.threads).map(|_| LATELY);
                limit = limit.or(held);
                // Without pages, there is nothing to wait for.
                if limit.is_none() || state.walk.is_done() {
                    let most = if awaited.is_some() { most.min(SHORT) } else { most };
                    let (run, page) = match state.walk.next_first(most) {
                        Some(run) => (run, self.page_bytes),
                        None => (state.walk.next_any(most * REST)?, ZERO_BYTES),
                    };
                    state.busy += 1;
                    state.walking += 1;
                    let bytes = run.count * page;
                    state.slices.iter_mut().for_each(|slices| slices.spend(bytes));
                    let backlog = awaited.map(|limit| limit.backlog);
                    return Some(Job { run, requested: None, backlog });
                }
            }
            let condition = if lane == Lane::Walk { &self.changed } else { &self.requested };
            let held = usize::from(limit.is_some());
            state.held += held;
            state = wait(condition, state, limit);
            state.held -= held;
        }
    }

    /// A thread has sent its job, or could not.
    pub fn sent(&self, job: Job, cost: Cost) {
        let mut state = self.lock();
        state.busy -= 1;
        state.pace.sent(job.run.count * self.page_bytes, cost, Instant::now());
        if job.requested.is_none() {
            state.walking -= 1;
            if state.held > 0 {
                self.notify();
            }
        }
        if state.busy == 0 && state.requests.is_empty() {
            self.changed.notify_all();
        }
    }

    /// Waits until all that was claimed so far has been sent. Returns `false` if the schedule was [closed](Self::close) before.
    pub fn drained(&self) -> bool {
        let mut state = self.lock();
        while !state.closed && (state.busy > 0 || !state.requests.is_empty()) {
            state = wait(&self.changed, state, None);
        }
        !state.closed
    }

    /// Ends all waits, and those to come.
    pub fn close(&self) {
        self.lock().closed = true;
        self.notify();
    }

    /// The number of pages that were not claimed yet.
    pub fn left(&self) -> u64 {
        self.lock().walk.left()
    }

    /// The pages of a block that the destination has requested.
    pub fn asked(&self, block: BlockIndex) -> Option<&PageBitmap> {
        self.asked.get(block.0)
    }

    fn requested(&self, state: &mut State, most: u64) -> Option<Job> {
        let State { requests, walk, .. } = state;
        let first = requests.front_mut()?;
        let Request { mut run, since } = *first;
        let host_page = walk.shape(run.block)?.host_page;
        let piece = run.count.min((most - most % host_page).max(host_page));
        first.run.first.0 += piece;
        first.run.count -= piece;
        if first.run.count == 0 {
            requests.pop_front();
            if requests.len() + 1 == PENDING {
                self.changed.notify_all();
            }
        }
        if !requests.is_empty() {
            self.requested.notify_one();
        }
        run.count = piece;
        Some(Job { run, requested: Some(since), backlog: None })
    }

    fn notify(&self) {
        self.requested.notify_all();
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whether a guest has lately waited for a page.
    fn is_awaited(&self) -> bool {
        self.last.is_some_and(|last| last.elapsed() < LATELY)
    }
}

impl Wake for Schedule {
    fn wake(&self) {
        self.close();
    }
}

fn wait<'a>(
    condition: &Condvar,
    state: MutexGuard<'a, State>,
    limit: Option<Duration>,
) -> MutexGuard<'a, State> {
    match limit {
        None => condition.wait(state).unwrap_or_else(PoisonError::into_inner),
        Some(limit) => condition.wait_timeout(state, limit).unwrap_or_else(PoisonError::into_inner).0,
    }
}

/// Pages of a job of the walk while a guest waits now and then. A head of 1 KiB comes with it: 1.6 %.
const SHORT: u64 = 16;
/// Long beside the time between two faults of a guest that needs what is missing, and short beside a migration.
const LATELY: Duration = Duration::from_millis(50);
/// Pages without contents take less time, and about this number of bytes.
const REST: u64 = 8;
const ZERO_BYTES: u64 = 9;
/// A guest waits with each of its threads for one page, so there are far fewer requests of a real destination.
const PENDING: usize = 1 << 16;

#[cfg(test)]
mod tests {
    use std::{sync::Arc, thread, time::Duration};

    use super::*;

    fn schedule(shapes: &[(u64, u64)], walk: &[&[u64]], there: &[&[u64]]) -> Schedule {
        let shapes: Vec<_> =
            shapes.iter().map(|(pages, host_page)| Shape { pages: *pages, host_page: *host_page }).collect();
        let bits = |lists: &[&[u64]]| -> Vec<_> {
            let of = |(shape, list): (&Shape, &&[u64])| {
                let bitmap = PageBitmap::new(shape.pages);
                list.iter().for_each(|page| bitmap.set_run(PageIndex(*page), 1));
                bitmap
            };
            shapes.iter().zip(lists).map(of).collect()
        };
        Schedule::new(PageSize::KIB_4, &shapes, &bits(walk), &bits(there))
    }

    fn run(block: usize, first: u64, count: u64) -> PageRun {
        PageRun { block: BlockIndex(block), first: PageIndex(first), count }
    }

    fn all(schedule: &Schedule, lane: Lane, most: u64) -> Vec<(usize, u64, u64)> {
        let next = || {
            let job = schedule.next(lane, most)?;
            schedule.sent(job, Cost::default());
            Some((job.run.block.0, job.run.first.0, job.run.count))
        };
        std::iter::from_fn(next).collect()
    }

    #[test]
    fn the_walk_sends_each_wanted_page_once_and_wraps_around() {
        let schedule = schedule(&[(10, 1), (4, 1)], &[&[0, 1, 2, 5, 9], &[1]], &[&[1], &[]]);
        assert_eq!(schedule.left(), 13);
        assert_eq!(schedule.request(run(0, 4, 1)), Ok(true));
        let requested = schedule.next(Lane::Both, 2).expect("requested");
        assert_eq!((requested.run, requested.requested.is_some()), (run(0, 4, 1), true));
        schedule.sent(requested, Cost::default());
        // From the fault on: the rest of its block, the other block, and the beginning.
        let expected = [(0, 5, 1), (0, 9, 1), (1, 1, 1), (0, 0, 1), (0, 2, 1)];
        let found = all(&schedule, Lane::Both, 2);
        assert_eq!(found[..5], expected);
        // Then all that nobody wants, so that no request is left without an answer.
        assert_eq!(found[5..], [(0, 3, 1), (0, 6, 3), (1, 0, 1), (1, 2, 2)]);
        assert_eq!(schedule.left(), 0);
        assert!(schedule.drained());
    }

    #[test]
    fn jobs_of_the_walk_are_short_while_requests_come() {
        let pages = (0..256).collect::<Vec<_>>();
        let schedule = schedule(&[(256, 1)], &[&pages], &[&[]]);
        let walk = |schedule: &Schedule| {
            let job = schedule.next(Lane::Walk, 128).expect("pages are left");
            schedule.sent(job, Cost::default());
            (job.run, job.backlog.is_some())
        };
        assert_eq!(walk(&schedule), (run(0, 0, 128), false));
        // It is on its way, and the guest waits for it.
        assert_eq!(schedule.request(run(0, 127, 1)), Ok(false));
        assert_eq!(walk(&schedule), (run(0, 128, SHORT), true));
        schedule.lock().last = Instant::now().checked_sub(LATELY);
        assert_eq!(walk(&schedule), (run(0, 144, 112), false));
    }

    #[test]
    fn the_walk_has_one_thread_while_requests_come_until_the_line_needs_more() {
        let pages = (0..256).collect::<Vec<_>>();
        let schedule = Arc::new(schedule(&[(256, 1)], &[&pages], &[&[]]));
        assert_eq!(schedule.request(run(0, 200, 1)), Ok(true));
        let first = schedule.next(Lane::Walk, 128).expect("pages are left");
        let second = thread::spawn({
            let schedule = schedule.clone();
            move || schedule.next(Lane::Walk, 128)
        });
        while schedule.lock().held == 0 {
            // The guest still waits.
            schedule.lock().last = Some(Instant::now());
            thread::yield_now();
        }
        assert!(!second.is_finished());
        schedule.sent(first, Cost::default());
        assert_eq!(second.join().expect("no panic").expect("pages are left").run.count, SHORT);
    }

    #[test]
    fn runs_are_as_long_as_a_job_may_be_and_host_pages_stay_whole() {
        let first = schedule(&[(64, 1)], &[&(0..64).collect::<Vec<_>>()], &[&[]]);
        assert_eq!(all(&first, Lane::Walk, 48), [(0, 0, 48), (0, 48, 16)]);
        // One page of the second host page is wanted, and one of the third is missing.
        let there = [&[0, 1, 2, 3, 8, 9, 10, 12, 13][..]];
        let huge = schedule(&[(14, 4)], &[&[0, 5, 9, 13]], &there);
        assert_eq!(all(&huge, Lane::Walk, 1), [(0, 4, 4), (0, 8, 4)]);
        assert!(huge.drained());
        assert_eq!(huge.request(run(0, 12, 2)), Ok(false), "the last, shorter host page is there");
        assert_eq!(huge.request(run(0, 0, 8)), Ok(false));
    }

    #[test]
    fn a_request_is_split_where_pages_are_under_way() {
        let schedule = schedule(&[(16, 1)], &[&[]], &[&[3]]);
        assert_eq!(schedule.request(run(0, 5, 1)), Ok(true));
        assert_eq!(schedule.request(run(0, 5, 1)), Ok(false));
        assert_eq!(schedule.request(run(0, 2, 6)), Ok(true));
        let found: Vec<_> = (0..5).map(|_| schedule.next(Lane::Requests, 1).expect("pending").run).collect();
        assert_eq!(found, [run(0, 5, 1), run(0, 2, 1), run(0, 4, 1), run(0, 6, 1), run(0, 7, 1)]);
        let asked: Vec<_> = schedule.asked(BlockIndex(0)).expect("there").set_runs().collect();
        assert_eq!(asked, [(PageIndex(2), 6)]);
        schedule.close();
        assert!(schedule.next(Lane::Requests, 1).is_none());
        assert!(!schedule.drained());
    }

    #[test]
    fn requests_that_no_page_can_be_meant_by_are_refused() {
        let schedule = schedule(&[(16, 4)], &[&[]], &[&[]]);
        assert_eq!(schedule.request(run(1, 0, 4)), Err(RefusedRequest::NoSuchBlock(1)));
        for (first, count) in [(0, 17), (16, 4), (u64::MAX, 2), (12, u64::MAX)] {
            let refused = schedule.request(run(0, first, count));
            assert_eq!(refused, Err(RefusedRequest::Outside { first, count, pages: 16 }));
        }
        for (first, count) in [(0, 0), (1, 4), (0, 3), (4, 5)] {
            let refused = schedule.request(run(0, first, count));
            assert_eq!(refused, Err(RefusedRequest::NotWhole { first, count, host_page: 4 }));
        }
        assert_eq!(all(&schedule, Lane::Both, 1), [(0, 0, 8), (0, 8, 8)]);
    }

    #[test]
    fn the_walk_keeps_its_bandwidth_and_a_request_does_not_wait_for_it() {
        let schedule = schedule(&[(1000, 1)], &[&(0..900).collect::<Vec<_>>()], &[&[]]);
        // Ten pages in each slice of 50 ms.
        schedule.limit_walk(Some(10 * 20 * 4096));
        let started = Instant::now();
        let walked: u64 = (0..3).map(|_| schedule.next(Lane::Walk, 10).expect("pages").run.count).sum();
        assert_eq!(walked, 30);
        assert!(started.elapsed() >= Duration::from_millis(40), "{:?}", started.elapsed());
        assert_eq!(schedule.request(run(0, 950, 1)), Ok(true));
        assert_eq!(schedule.next(Lane::Both, 10).expect("requested").run, run(0, 950, 1));
        schedule.limit_walk(None);
        let rest: u64 = all(&schedule, Lane::Walk, 64).iter().map(|(_, _, count)| count).sum();
        assert_eq!(rest, 1000 - 31);
    }

    #[test]
    fn requests_beyond_the_limit_wait_until_others_were_taken_or_the_schedule_is_closed() {
        for closes in [false, true] {
            let schedule = Arc::new(schedule(&[(1 << 20, 1)], &[&[]], &[&[]]));
            // Every second page, so that none can be joined with the one before.
            (0..PENDING as u64).for_each(|page| {
                assert_eq!(schedule.request(run(0, 2 * page, 1)), Ok(true));
            });
            let more = thread::spawn({
                let schedule = schedule.clone();
                move || schedule.request(run(0, (1 << 20) - 1, 1))
            });
            thread::sleep(Duration::from_millis(20));
            assert!(!more.is_finished());
            if closes {
                schedule.close();
            } else {
                schedule.next(Lane::Requests, 1).expect("pending");
            }
            assert_eq!(more.join().expect("no panic"), Ok(true));
        }
    }
}
