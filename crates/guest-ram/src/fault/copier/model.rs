//! Models of a copier: writes, copying, discarded memory and the end meet.
//!
//! The package `guest-ram-models` runs each under many schedules; see `docs/develop/concurrency.md`. The threads are the copier's
//! own. The memory is a model of the kernel's: a thread that writes to a protected page reports a fault and waits until its page allows
//! writes; a thread that discards memory waits until its message was read, and no protection can be changed meanwhile. A page is one byte.

use std::{collections::VecDeque, sync::Arc};

use shuttle::thread;

use super::{
    super::{FaultError, FaultEvent, FaultKind, MemoryKind, PlaceEnd, Placed, Protection, Region},
    counts::Counts,
    error::CopierError,
    memory::Protect,
    options::CopierOptions,
    sink::{PageSink, StoreError},
    state::Pages,
    work::Shared,
};
use crate::{
    BlockIndex, BlockName, BlockOffset, PageBitmap, PageRun,
    sync_types::{Condvar, Mutex, MutexGuard, RwLock},
};

const PAGES: usize = 4;
const BLOCK: BlockIndex = BlockIndex(0);
const PAGE: u64 = 4096;

struct Kernel {
    state: Mutex<KernelState>,
    changed: Condvar,
}

struct KernelState {
    pages: [u8; PAGES],
    is_protected: [bool; PAGES],
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
            pages: [1, 2, 3, 4],
            is_protected: [false; PAGES],
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

    /// A write of the guest.
    fn write(&self, page: usize, byte: u8) {
        let mut state = self.lock();
        while state.is_armed && state.is_protected[page] {
            let offset = BlockOffset(page as u64 * PAGE);
            let kind = FaultKind::Protected;
            let fault = FaultEvent::Fault { block: BLOCK, offset, kind, write: true, thread: None };
            state.messages.push_back((fault, 0));
            self.changed.notify_all();
            let woken = state.woken[page];
            state = self.changed.wait_while(state, |state| state.woken[page] == woken).expect("whole");
        }
        state.pages[page] = byte;
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
            // Others run before the page goes.
            state = self.lock();
            state.changing -= 1;
        }
        state.pages[page] = 0;
        state.is_protected[page] = false;
    }
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes / PAGE).expect("small")
}

/// The copier's view of the kernel.
struct Memory(Arc<Kernel>);

impl Protect for Memory {
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

    fn protect(
        &self,
        _: BlockIndex,
        offset: BlockOffset,
        len: u64,
        protection: Protection,
    ) -> Result<Placed, FaultError> {
        let mut state = self.0.lock();
        if !state.is_armed {
            return Ok(Placed { bytes: 0, end: PlaceEnd::Gone });
        }
        if state.changing > 0 {
            return Ok(Placed { bytes: 0, end: PlaceEnd::Changing });
        }
        for page in index(offset.0)..index(offset.0 + len) {
            state.is_protected[page] = protection == Protection::Protected;
            state.woken[page] += 1;
        }
        self.0.changed.notify_all();
        Ok(Placed { bytes: len, end: PlaceEnd::All })
    }

    fn len(&self, run: PageRun) -> usize {
        usize::try_from(run.count).expect("small")
    }

    fn load(&self, run: PageRun, buffer: &mut [u8]) -> Result<(), CopierError> {
        for (page, byte) in (index(run.first.0 * PAGE)..).zip(buffer) {
            // Others run while it copies.
            *byte = self.0.lock().pages[page];
        }
        Ok(())
    }

    fn touched(&self, _: BlockIndex) -> Option<PageBitmap> {
        None
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
}

/// Keeps the pages, and refuses those that come twice.
struct Kept {
    state: Mutex<KeptState>,
    changed: Condvar,
    /// The page that cannot be stored.
    refused: Option<usize>,
}

struct KeptState {
    pages: [Option<u8>; PAGES],
    /// Whether stores end.
    is_open: bool,
}

impl Kept {
    fn open(&self) {
        self.state.lock().expect("whole").is_open = true;
        self.changed.notify_all();
    }
}

impl PageSink for Kept {
    fn store(&self, run: PageRun, bytes: &[u8]) -> Result<(), StoreError> {
        for (page, byte) in (index(run.first.0 * PAGE)..).zip(bytes) {
            let state = self.state.lock().expect("whole");
            let mut state = self.changed.wait_while(state, |state| !state.is_open).expect("whole");
            if state.pages[page].replace(*byte).is_some() {
                return Err("a page came twice".into());
            }
            if self.refused == Some(page) {
                return Err("the disk is full".into());
            }
        }
        Ok(())
    }
}

struct Model {
    shared: Arc<Shared>,
    kernel: Arc<Kernel>,
    kept: Arc<Kept>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Model {
    /// A copier with `serving` threads for faults, whose queue has room for `ahead` pages. Nothing is protected yet.
    fn start(serving: usize, ahead: u64) -> Self {
        Self::with(serving, ahead, true, None)
    }

    /// The same, with a sink that is not open, or that refuses a page.
    fn with(serving: usize, ahead: u64, is_open: bool, refused: Option<usize>) -> Self {
        let state = Mutex::new(KeptState { pages: [None; PAGES], is_open });
        let kept = Arc::new(Kept { state, changed: Condvar::new(), refused });
        let kernel = Arc::new(Kernel::new());
        let region = Region {
            block: BLOCK,
            name: BlockName::new("ram").expect("a name"),
            addresses: 0..PAGES as u64 * PAGE,
            host_page: PAGE,
            kind: MemoryKind::Anonymous,
            page: PAGE,
            pages: PAGES as u64,
        };
        let shared = Arc::new(Shared {
            memory: Box::new(Memory(kernel.clone())),
            noted: vec![PageBitmap::new(PAGES as u64)],
            regions: vec![region],
            sink: kept.clone(),
            // A page is a byte.
            options: CopierOptions::new().bytes(2 * PAGE).ahead(ahead),
            at_once: PAGE,
            gate: RwLock::new(()),
            pages: Pages::default(),
            faults: Default::default(),
            counts: Counts::default(),
        });
        let mut model = Self { shared, kernel, kept, threads: Vec::new() };
        (0..serving).for_each(|_| model.work(Shared::serve));
        model
    }

    fn work(&mut self, work: impl FnOnce(&Shared) -> Result<(), CopierError> + Send + 'static) {
        let shared = self.shared.clone();
        shared.pages.thread_starts();
        self.threads.push(thread::spawn(move || shared.run(work)));
    }

    /// A thread of the guest.
    fn guest(&self, does: impl FnOnce(&Kernel) + Send + 'static) -> thread::JoinHandle<()> {
        let kernel = self.kernel.clone();
        thread::spawn(move || does(&kernel))
    }

    /// Protects everything while `guests` run, and holds it when they have ended. Returns the bytes of that moment.
    fn hold(&mut self, guests: Vec<thread::JoinHandle<()>>) -> [u8; PAGES] {
        self.shared.protect_all().expect("protected");
        guests.into_iter().for_each(|guest| guest.join().expect("no panic"));
        let at_hold = self.kernel.lock().pages;
        self.shared.hold(super::walk(&self.shared.regions)).expect("held");
        self.work(|shared| {
            shared.skip_holes();
            shared.copy()
        });
        self.work(Shared::copy);
        at_hold
    }

    /// Waits until it has ended, and for all threads, as `Copier::finish` does.
    fn finish(self) -> (Result<(), CopierError>, [Option<u8>; PAGES]) {
        assert!(self.shared.pages.wait(None));
        self.threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
        assert!(!self.kernel.lock().is_armed);
        let kept = self.kept.state.lock().expect("whole").pages;
        (self.shared.pages.take_error(), kept)
    }
}

/// Guests write before and after the hold, several of them to one page.
fn written(serving: usize, ahead: u64) {
    let mut model = Model::start(serving, ahead);
    let before = [[0, 1], [1, 2]].map(|pages| {
        model.guest(move |kernel| {
            for page in pages {
                kernel.write(page, 10 + u8::try_from(page).expect("small"));
            }
        })
    });
    let at_hold = model.hold(before.into());
    assert_eq!(at_hold, [10, 11, 12, 4]);
    let after = [[3, 1, 0], [1, 2, 3]].map(|pages| {
        model.guest(move |kernel| {
            for page in pages {
                kernel.write(page, 20 + u8::try_from(page).expect("small"));
            }
        })
    });
    after.into_iter().for_each(|guest| guest.join().expect("no panic"));
    let kernel = model.kernel.clone();
    let (end, kept) = model.finish();
    end.expect("complete");
    assert_eq!(kept, at_hold.map(Some));
    assert_eq!(kernel.lock().pages, [20, 21, 22, 23]);
}

/// Two threads of the guest, two that serve their writes, two that copy.
pub fn every_page_is_stored_once_as_it_was_at_the_hold() {
    written(2, 1 << 20);
}

/// The same with one thread that serves writes and waits for the sink after each of them.
pub fn a_full_queue_delays_writes_and_loses_none() {
    written(1, 0);
}

/// A page is discarded while everything is being protected: its protection is gone, and is there again at the hold.
pub fn a_page_that_is_discarded_before_the_hold_is_protected_again() {
    let mut model = Model::start(2, 1 << 20);
    let discards = model.guest(|kernel| kernel.discard(1));
    let writes = model.guest(|kernel| kernel.write(0, 10));
    let at_hold = model.hold(vec![discards, writes]);
    assert_eq!(at_hold, [10, 0, 3, 4]);
    let after = model.guest(|kernel| [1, 0].into_iter().for_each(|page| kernel.write(page, 20)));
    after.join().expect("no panic");
    let (end, kept) = model.finish();
    end.expect("complete");
    assert_eq!(kept, at_hold.map(Some));
}

/// A page is discarded after the hold: it was copied before, or the copier ends with an error. It is never stored as zero.
pub fn a_page_that_is_discarded_after_the_hold_is_in_a_buffer_or_ends_the_copy() {
    let mut model = Model::start(2, 1 << 20);
    let at_hold = model.hold(Vec::new());
    let discards = model.guest(|kernel| kernel.discard(2));
    let writes = model.guest(|kernel| [3, 2].into_iter().for_each(|page| kernel.write(page, 20)));
    discards.join().expect("no panic");
    writes.join().expect("no panic");
    let (end, kept) = model.finish();
    match end {
        Ok(()) => assert_eq!(kept, at_hold.map(Some)),
        Err(CopierError::Discarded { offset, .. }) => {
            assert_eq!((offset.0, kept[2]), (2 * PAGE, None));
        }
        Err(error) => panic!("{error}"),
    }
}

/// It is stopped while guests write.
pub fn an_end_at_any_time_leaves_nobody_waiting() {
    let mut model = Model::start(2, 0);
    let at_hold = model.hold(Vec::new());
    let guests = [[0, 1, 2], [2, 3, 0]]
        .map(|pages| model.guest(move |kernel| pages.into_iter().for_each(|page| kernel.write(page, 20))));
    let shared = model.shared.clone();
    let ends = thread::spawn(move || shared.end(Some(CopierError::Cancelled)));
    guests.into_iter().for_each(|guest| guest.join().expect("no writer waits"));
    ends.join().expect("no panic");
    let (end, kept) = model.finish();
    match end {
        Ok(()) => assert_eq!(kept, at_hold.map(Some)),
        // What was stored then is of no use: pages were writable while they were copied.
        Err(CopierError::Cancelled) => {}
        Err(error) => panic!("{error}"),
    }
}

/// Nothing is stored until all guests have written, also where a page was discarded that was copied before.
pub fn a_guest_never_waits_for_the_file() {
    let mut model = Model::with(2, 1 << 20, false, None);
    let at_hold = model.hold(Vec::new());
    let writes = model.guest(|kernel| [0, 3, 2].into_iter().for_each(|page| kernel.write(page, 20)));
    let discards = model.guest(|kernel| {
        kernel.write(1, 20);
        kernel.discard(1);
    });
    writes.join().expect("no panic");
    discards.join().expect("no panic");
    model.kept.open();
    let (end, kept) = model.finish();
    end.expect("complete");
    assert_eq!(kept, at_hold.map(Some));
}

/// A page that cannot be stored is never a part of a complete copy, whichever thread stores it.
pub fn a_page_that_is_not_stored_is_the_reason_of_the_end() {
    let mut model = Model::with(1, 0, true, Some(2));
    model.hold(Vec::new());
    let guest = model.guest(|kernel| [2, 3, 1].into_iter().for_each(|page| kernel.write(page, 20)));
    guest.join().expect("no writer waits");
    let (end, _) = model.finish();
    match end {
        Err(CopierError::Store { .. }) => {}
        other => panic!("{other:?}"),
    }
}
