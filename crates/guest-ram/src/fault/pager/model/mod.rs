//! Models of a pager: faults, prefetch, discarded memory, decisions and the end meet.
//!
//! The package `guest-ram-models` runs each under many schedules; see `docs/develop/concurrency.md`. The threads are the pager's
//! own. The memory is a model of the kernel's: a thread that accesses a missing page reports a fault and waits until that page is placed
//! or its threads are woken; a thread that discards memory waits until its message was read, and nothing can be placed meanwhile.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use shuttle::thread;

use super::{
    super::{FaultError, FaultEvent, FaultKind, MemoryKind, PlaceEnd, Placed, Region},
    counts::Counts,
    error::PagerError,
    memory::Serve,
    options::PagerOptions,
    pages::Pages,
    source::{Decision, LoadError, PageSource},
    supply::Supply,
    work::Shared,
};
use crate::{
    BlockIndex, BlockName, BlockOffset, PageBitmap, PageIndex, PageRun, Walk,
    sync_types::{Condvar, Mutex, MutexGuard, RwLock},
};

mod push;

pub use push::every_fault_is_answered_however_pages_and_requests_meet;

const PAGES: usize = 4;
/// The only page without contents.
const ZERO: usize = 3;
const BLOCK: BlockIndex = BlockIndex(0);
const PAGE: u64 = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    Missing,
    Zero,
    Contents,
    Poisoned,
}

struct Kernel {
    state: Mutex<KernelState>,
    changed: Condvar,
}

struct KernelState {
    pages: [Page; PAGES],
    /// How often the threads that wait for a page were woken.
    woken: [u32; PAGES],
    messages: VecDeque<(FaultEvent, u32)>,
    /// Messages of discarded memory that were read.
    read: u32,
    sent: u32,
    /// Threads that are about to discard memory.
    changing: u32,
    is_armed: bool,
    notified: u32,
    is_stopped: bool,
}

impl Kernel {
    fn new() -> Self {
        let state = KernelState {
            pages: [Page::Missing; PAGES],
            woken: [0; PAGES],
            messages: VecDeque::new(),
            read: 0,
            sent: 0,
            changing: 0,
            is_armed: true,
            notified: 0,
            is_stopped: false,
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, KernelState> {
        self.state.lock().expect("whole")
    }

    /// An access of the guest.
    fn access(&self, page: usize) -> Page {
        let mut state = self.lock();
        loop {
            match state.pages[page] {
                Page::Missing if !state.is_armed => state.pages[page] = Page::Zero,
                Page::Missing => {}
                found => return found,
            }
            if !state.is_armed {
                continue;
            }
            let offset = BlockOffset(page as u64 * PAGE);
            let kind = FaultKind::Missing;
            let fault = FaultEvent::Fault { block: BLOCK, offset, kind, write: false, thread: None };
            state.messages.push_back((fault, 0));
            self.changed.notify_all();
            let woken = state.woken[page];
            state = self.changed.wait_while(state, |state| state.woken[page] == woken).expect("whole");
        }
    }

    /// `MADV_DONTNEED` of a page.
    fn discard(&self, page: usize) {
        let mut state = self.lock();
        if state.is_armed {
            state.changing += 1;
            state.sent += 1;
            let number = state.sent;
            let offset = BlockOffset(page as u64 * PAGE);
            state.messages.push_back((FaultEvent::Removed { block: BLOCK, offset, len: PAGE }, number));
            self.changed.notify_all();
            state =
                self.changed.wait_while(state, |state| state.read < number && state.is_armed).expect("whole");
            drop(state);
            state = self.lock();
            state.changing -= 1;
            drop(state);
            state = self.lock();
        }
        if state.pages[page] != Page::Poisoned {
            state.pages[page] = Page::Missing;
        }
    }

    fn place(&self, offset: BlockOffset, len: u64, as_what: Page) -> Placed {
        let mut state = self.lock();
        if state.changing > 0 {
            return Placed { bytes: 0, end: PlaceEnd::Changing };
        }
        let first = index(offset.0);
        for page in first..first + index(len) {
            // The kernel places a page over poison, and no zeros.
            let is_free = match state.pages[page] {
                Page::Missing => true,
                Page::Poisoned => as_what == Page::Contents,
                Page::Zero | Page::Contents => false,
            };
            if !is_free {
                return Placed { bytes: (page - first) as u64 * PAGE, end: PlaceEnd::Exists };
            }
            state.pages[page] = as_what;
            state.woken[page] += 1;
        }
        self.changed.notify_all();
        Placed { bytes: len, end: PlaceEnd::All }
    }
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes / PAGE).expect("small")
}

/// The pager's view of the kernel.
struct Memory(Arc<Kernel>);

impl Serve for Memory {
    fn read(&self, events: &mut Vec<FaultEvent>) -> Result<(), FaultError> {
        let mut state = self.0.lock();
        if let Some((event, number)) = state.messages.pop_front() {
            events.push(event);
            if number > 0 {
                state.read = state.read.max(number);
                self.0.changed.notify_all();
            }
        }
        Ok(())
    }

    fn copy(&self, _: BlockIndex, offset: BlockOffset, bytes: &[u8]) -> Result<Placed, FaultError> {
        Ok(self.0.place(offset, bytes.len() as u64, Page::Contents))
    }

    fn zero(&self, _: BlockIndex, offset: BlockOffset, len: u64) -> Result<Placed, FaultError> {
        Ok(self.0.place(offset, len, Page::Zero))
    }

    fn poison(&self, _: BlockIndex, offset: BlockOffset, len: u64) -> Result<Placed, FaultError> {
        Ok(self.0.place(offset, len, Page::Poisoned))
    }

    fn wake(&self, _: BlockIndex, offset: BlockOffset, len: u64) -> Result<(), FaultError> {
        let mut state = self.0.lock();
        (index(offset.0)..index(offset.0 + len)).for_each(|page| state.woken[page] += 1);
        self.0.changed.notify_all();
        Ok(())
    }

    fn wait(&self) -> Result<(), FaultError> {
        let nothing =
            |state: &mut KernelState| state.messages.is_empty() && state.notified == 0 && !state.is_stopped;
        let mut state = self.0.changed.wait_while(self.0.lock(), nothing).expect("whole");
        state.notified = state.notified.saturating_sub(1);
        Ok(())
    }

    fn notify(&self) {
        self.0.lock().notified += 1;
        self.0.changed.notify_all();
    }

    fn stop(&self) {
        self.0.lock().is_stopped = true;
        self.0.changed.notify_all();
    }

    fn disarm(&self) {
        let mut state = self.0.lock();
        state.is_armed = false;
        (0..PAGES).for_each(|page| state.woken[page] += 1);
        self.0.changed.notify_all();
    }

    fn stay_armed(&self) {}
}

/// Counts the loads of each page; fails the first ones of page 1.
#[derive(Default)]
struct Source {
    loads: [AtomicU32; PAGES],
    failures: u32,
}

impl PageSource for Source {
    fn contents(&self, _: BlockIndex) -> Result<Option<PageBitmap>, LoadError> {
        Ok(None)
    }

    fn load(&self, run: PageRun, _: &mut [u8]) -> Result<(), LoadError> {
        let mut fails = false;
        for page in index(run.first.0 * PAGE)..index(run.end() * PAGE) {
            let before = self.loads[page].fetch_add(1, Ordering::Relaxed);
            fails |= page == 1 && before < self.failures;
        }
        // Others run while it loads.
        thread::yield_now();
        if fails { Err("not yet".into()) } else { Ok(()) }
    }
}

struct Model {
    shared: Arc<Shared>,
    kernel: Arc<Kernel>,
    source: Arc<Source>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Model {
    /// A pager with `serving` threads for faults, and one that prefetches pairs of pages.
    fn start(serving: usize, source: Source) -> Self {
        let (kernel, source) = (Arc::new(Kernel::new()), Arc::new(source));
        let (walk, regions) = memory();
        let options =
            PagerOptions::new().fault_threads(serving).prefetch_bytes(2 * PAGE).retry(Duration::ZERO);
        let shared = Arc::new(Shared {
            memory: Box::new(Memory(kernel.clone())),
            source: Supply::Loaded(source.clone()),
            pages: Pages::new(walk, &regions),
            regions,
            options: options.judge(|_| Decision::Wait),
            gate: RwLock::new(()),
            counts: Counts::default(),
        });
        let mut model = Self { shared, kernel, source, threads: Vec::new() };
        (0..serving).for_each(|_| model.work(Shared::serve));
        model.work(Shared::prefetch);
        model
    }

    fn work(&mut self, work: impl FnOnce(&Shared) -> Result<(), FaultError> + Send + 'static) {
        let shared = self.shared.clone();
        shared.pages.thread_starts();
        self.threads.push(thread::spawn(move || shared.run(work)));
    }

    /// A thread of the guest.
    fn guest<T: Send + 'static>(
        &self,
        does: impl FnOnce(&Kernel) -> T + Send + 'static,
    ) -> thread::JoinHandle<T> {
        let kernel = self.kernel.clone();
        thread::spawn(move || does(&kernel))
    }

    /// Waits for all pages and for all threads, as `Pager::finish` does.
    fn finish(self) -> [Page; PAGES] {
        assert!(self.shared.pages.wait_until_done(None));
        self.shared.end(None);
        self.shared.pages.wait_until_disarmed();
        self.threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
        assert_eq!(self.shared.pages.take_error().map(|error| error.to_string()), None);
        self.kernel.lock().pages
    }
}

/// The memory of a model: its walk, and its one region.
fn memory() -> (Walk, Vec<Region>) {
    let region = Region {
        block: BLOCK,
        name: BlockName::new("ram").expect("a name"),
        addresses: 0..PAGES as u64 * PAGE,
        host_page: PAGE,
        kind: MemoryKind::Anonymous,
        page: PAGE,
        pages: PAGES as u64,
    };
    let (first, there) = (PageBitmap::new(PAGES as u64), PageBitmap::new(PAGES as u64));
    there.set_run(PageIndex(ZERO as u64), 1);
    let walk = Walk::new(&[region.shape()], &[first], &[there]);
    let regions = vec![region];
    (walk, regions)
}

fn contents(page: usize) -> Page {
    if page == ZERO { Page::Zero } else { Page::Contents }
}

/// Two threads of the guest access all pages in different orders, two threads serve them, one prefetches.
pub fn every_fault_is_answered_and_each_page_is_loaded_once() {
    let model = Model::start(2, Source::default());
    let guests = [[1, 0, 3, 2], [2, 1, 0, 3]].map(|order| {
        model.guest(move |kernel| order.map(|page| assert_eq!(kernel.access(page), contents(page))))
    });
    for guest in guests {
        guest.join().expect("the right contents");
    }
    let source = model.source.clone();
    let pages = model.finish();
    assert_eq!(pages[..ZERO], [Page::Contents; ZERO]);
    let loads = source.loads.each_ref().map(|loads| loads.load(Ordering::Relaxed));
    assert_eq!(loads, [1, 1, 1, 0]);
}

/// The thread that discards a page never finds its old contents afterwards, although pages are being placed.
pub fn a_discarded_page_is_zero_until_it_is_written() {
    let model = Model::start(1, Source::default());
    let discards = model.guest(|kernel| {
        for page in [0, 2] {
            kernel.discard(page);
            assert_eq!(kernel.access(page), Page::Zero);
        }
    });
    let reads = model.guest(|kernel| {
        assert_ne!(kernel.access(2), Page::Poisoned);
        assert_eq!(kernel.access(1), Page::Contents);
    });
    discards.join().expect("zero");
    reads.join().expect("the right contents");
    model.finish();
}

/// A fault that was read because memory was being discarded is served, and so is a thread that waits for what was discarded.
pub fn faults_that_meet_discarded_memory_are_answered() {
    let model = Model::start(1, Source::default());
    let discards = model.guest(|kernel| kernel.discard(0));
    let guests = [0, 2].map(|page| model.guest(move |kernel| kernel.access(page)));
    let [first, second] = guests.map(|guest| guest.join().expect("answered"));
    discards.join().expect("no panic");
    assert!(first == Page::Contents || first == Page::Zero);
    assert_eq!(second, Page::Contents);
    assert_ne!(model.finish()[0], Page::Contents, "it was discarded, and nobody wrote to it");
}

/// A page that is missing at the end is poisoned, and every thread that waits is released.
pub fn an_end_at_any_time_leaves_nobody_waiting_and_no_zeros() {
    let model = Model::start(1, Source::default());
    let guests = [[0, 1, 3], [2, 0, 3]]
        .map(|order| model.guest(move |kernel| order.map(|page| (page, kernel.access(page)))));
    model.shared.end(Some(PagerError::Cancelled));
    model.shared.pages.wait_until_disarmed();
    let found = guests.map(|guest| guest.join().expect("answered"));
    model.threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
    let pages = model.kernel.lock().pages;
    assert!(pages[..ZERO].iter().all(|page| *page == Page::Contents || *page == Page::Poisoned), "{pages:?}");
    for (page, found) in found.into_iter().flatten() {
        assert_eq!(found, pages[page], "page {page} has changed");
    }
}

/// Pages are abandoned while they are loaded and placed: a page that was found poisoned stays so.
pub fn an_abandoned_page_stays_poisoned() {
    let model = Model::start(1, Source::default());
    let guest = model.guest(|kernel| [0, 1, 2].map(|page| (page, kernel.access(page))));
    let shared = model.shared.clone();
    let judges = thread::spawn(move || {
        for _ in 0..2 {
            for late in shared.pages.late(Duration::ZERO) {
                shared.give_up(late.id, late.run).expect("poisoned");
            }
        }
    });
    let found = guest.join().expect("answered");
    judges.join().expect("no panic");
    let shared = model.shared.clone();
    let pages = model.finish();
    for (page, found) in found {
        assert_ne!(found, Page::Zero);
        assert_eq!(pages[page], found, "page {page}");
    }
    let poisoned = pages.iter().filter(|page| **page == Page::Poisoned).count() as u64;
    assert_eq!(shared.pages.poisoned().0, poisoned);
}

/// A load that fails comes back through the thread that watches.
pub fn a_failed_load_is_repeated_and_nobody_waits_forever() {
    let mut model = Model::start(1, Source { failures: 2, ..Source::default() });
    model.work(|shared| shared.watch(|_| {}));
    let guests = [[1, 0], [2, 1]].map(|order| {
        model.guest(move |kernel| order.map(|page| assert_eq!(kernel.access(page), Page::Contents)))
    });
    for guest in guests {
        guest.join().expect("the right contents");
    }
    let pages = model.finish();
    assert_eq!(pages[..ZERO], [Page::Contents; ZERO]);
}
