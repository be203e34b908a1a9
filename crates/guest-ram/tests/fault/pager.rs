//! Pagers: every page comes once, and what does not come is somebody's decision.

use std::{
    collections::HashMap,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use guest_ram::{
    Armed, BlockIndex, Decision, FaultError, Features, LoadError, Modes, PageBitmap, PageIndex, PageRun,
    PageSource, Pager, PagerError, PagerOptions, RamBlocks, TroubleKind,
};

use crate::kit::{self, BLOCK, LIMIT, pattern};

type OnLoad = Box<dyn Fn(PageRun, u32) -> Result<(), LoadError> + Send + Sync>;

/// Pages with the bytes of their [pattern]; every fifth one is zero.
pub(crate) struct Source {
    pages: u64,
    /// Whether every page has contents.
    is_full: bool,
    /// How often each page was loaded.
    loads: Mutex<HashMap<u64, u32>>,
    on_load: OnLoad,
    on_stop: Box<dyn Fn() + Send + Sync>,
}

impl Source {
    pub(crate) fn new(pages: u64) -> Self {
        let (on_load, on_stop): (OnLoad, _) = (Box::new(|_, _| Ok(())), Box::new(|| {}));
        Self { pages, is_full: false, loads: Mutex::default(), on_load, on_stop }
    }

    /// Called before pages are loaded, with how often the first of them was.
    pub(crate) fn on_load(
        mut self,
        call: impl Fn(PageRun, u32) -> Result<(), LoadError> + Send + Sync + 'static,
    ) -> Self {
        self.on_load = Box::new(call);
        self
    }

    fn loads(&self) -> HashMap<u64, u32> {
        self.loads.lock().expect("whole").clone()
    }
}

fn is_zero(page: u64) -> bool {
    page % 5 == 3
}

pub(crate) fn expected(page: u64) -> u8 {
    if is_zero(page) { 0 } else { pattern(page) }
}

impl PageSource for Source {
    fn contents(&self, _: BlockIndex) -> Result<Option<PageBitmap>, LoadError> {
        let contents = PageBitmap::new(self.pages);
        (0..self.pages)
            .filter(|page| self.is_full || !is_zero(*page))
            .for_each(|page| contents.set_run(PageIndex(page), 1));
        Ok(Some(contents))
    }

    fn load(&self, run: PageRun, into: &mut [u8]) -> Result<(), LoadError> {
        let times = {
            let mut loads = self.loads.lock().expect("whole");
            (run.first.0..run.first.0 + run.count).for_each(|page| *loads.entry(page).or_default() += 1);
            loads[&run.first.0] - 1
        };
        (self.on_load)(run, times)?;
        for (page, bytes) in (run.first.0..).zip(into.chunks_mut(4096)) {
            bytes.fill(if self.is_full { pattern(page) } else { expected(page) });
        }
        Ok(())
    }

    fn stop(&self) {
        (self.on_stop)();
    }
}

fn arm(blocks: &Arc<RamBlocks>) -> Option<Armed> {
    Some(Armed::arm_empty(kit::open(Pager::NEEDS)?, blocks.clone()).expect("armed"))
}

fn start(blocks: &Arc<RamBlocks>, source: &Arc<Source>, options: PagerOptions) -> Option<Pager> {
    Some(Pager::start(arm(blocks)?, source.clone(), options).expect("started"))
}

/// A pager of `pages` anonymous pages.
fn pager(pages: u64, source: Source, options: PagerOptions) -> Option<(Arc<RamBlocks>, Arc<Source>, Pager)> {
    let (blocks, source) = (kit::anonymous(pages), Arc::new(source));
    let pager = start(&blocks, &source, options)?;
    Some((blocks, source, pager))
}

fn assert_all(blocks: &RamBlocks, pages: u64, what: &str) {
    for page in 0..pages {
        assert_eq!(kit::read_page(blocks, page), [expected(page); 4096], "{what}: page {page}");
    }
}

#[test]
fn every_page_comes_once_while_threads_read_memory_of_each_kind() {
    for kind in kit::kinds(8) {
        let pages = (kind.host_page >> 12) * 8;
        let (blocks, source) = (kind.blocks.clone(), Arc::new(Source::new(pages)));
        let options = PagerOptions::new().fault_threads(3).prefetch_bytes(3 << 12);
        let Some(pager) = start(&blocks, &source, options) else { return };
        let readers: Vec<_> = (0..4_u64)
            .map(|seed| {
                let blocks = blocks.clone();
                thread::spawn(move || {
                    for step in 0..pages {
                        let page = (step * 7919 + seed * 31) % pages;
                        assert_eq!(kit::read_page(&blocks, page), [expected(page); 4096], "page {page}");
                    }
                })
            })
            .collect();
        readers.into_iter().for_each(|reader| reader.join().expect("no wrong byte"));
        let stats = pager.finish(Some(LIMIT)).expect("all there");
        assert!(source.loads().values().all(|loads| *loads == 1), "{}", kind.name);
        assert_eq!(
            (stats.missing, stats.poisoned, stats.retries, stats.existed, stats.gone),
            (0, 0, 0, 0, 0)
        );
        assert_eq!(stats.loaded + stats.prefetched, source.loads().len() as u64, "{}: {stats:?}", kind.name);
        assert_eq!(pager.finish(None).expect("a second time"), stats);
        assert_all(&blocks, pages, kind.name);
        // It is no longer armed, and is asked for its pages as before.
        drop(pager);
        assert_all(&blocks, pages, kind.name);
    }
}

/// Private memory of which no page is zero: the kernel moves huge pages into it, where no page is there yet.
#[test]
fn huge_pages_are_moved_into_private_memory_and_none_over_what_is_there() {
    const PAGES: u64 = 16 << 9;
    for is_busy in [false, true] {
        let (blocks, mut source) = (kit::anonymous(PAGES), Source::new(PAGES));
        source.is_full = true;
        let Some(armed) = arm(&blocks) else { return };
        let can_move = armed.features().contains(Features::MOVE);
        let pager = Pager::start(armed, Arc::new(source), PagerOptions::new()).expect("started");
        let guests: Vec<_> = (0..if is_busy { 3_u64 } else { 0 })
            .map(|number| {
                let blocks = blocks.clone();
                thread::spawn(move || {
                    // Each page has one guest. It writes to some, and discards others.
                    for page in (0..PAGES / 3).map(|step| step * 7919 % (PAGES / 3) * 3 + number) {
                        match page % 8 {
                            0 => kit::page_of(&blocks, page).copy_from(&[251; 4096]),
                            1 => kit::discard(&blocks, page, 1, libc::MADV_DONTNEED),
                            2 => assert_eq!(kit::read_page(&blocks, page), [pattern(page); 4096]),
                            _ => {}
                        }
                    }
                })
            })
            .collect();
        guests.into_iter().for_each(|guest| guest.join().expect("no wrong page"));
        let stats = pager.finish(Some(LIMIT)).expect("all there");
        for page in 0..PAGES {
            let bytes = kit::read_page(&blocks, page);
            let right = match page % 8 {
                0 if is_busy && page < PAGES / 3 * 3 => [251; 4096],
                1 if is_busy && page < PAGES / 3 * 3 => [0; 4096],
                _ => [pattern(page); 4096],
            };
            assert!(bytes == right, "page {page}: {} instead of {}, {stats:?}", bytes[0], right[0]);
        }
        let huge = kit::huge_bytes(&blocks);
        if !is_busy && can_move && huge < PAGES << 11 {
            multifd_testkit::lacks("transparent huge pages, or memory for them");
        }
    }
}

#[test]
fn many_threads_that_need_one_page_cause_one_load() {
    let source = Source::new(4).on_load(|_, _| {
        thread::sleep(Duration::from_millis(50));
        Ok(())
    });
    let Some((blocks, source, pager)) = pager(4, source, PagerOptions::new().prefetch_threads(0)) else {
        return;
    };
    let readers: Vec<_> = (0..8).map(|_| kit::reader(&blocks, 2)).collect();
    for reader in readers {
        assert_eq!(reader.result(), [pattern(2); 4096]);
    }
    assert_eq!(source.loads(), HashMap::from([(2, 1)]));
    // A thread of the guest continues before its page is counted; after the end, everything is.
    pager.stop();
    let stats = pager.stats();
    assert_eq!((stats.loaded, stats.poisoned), (1, 2));
    assert!(
        stats.blocked >= Duration::from_millis(40) && stats.p99 >= Some(Duration::from_millis(40)),
        "{stats:?}"
    );
}

#[test]
fn waits_are_counted_for_each_thread() {
    let source = Source::new(16).on_load(|_, _| {
        thread::sleep(Duration::from_millis(10));
        Ok(())
    });
    let Some((blocks, _, pager)) = pager(16, source, PagerOptions::new().prefetch_threads(0)) else { return };
    let reads = |pages: &'static [u64]| {
        let blocks = blocks.clone();
        thread::spawn(move || {
            pages.iter().for_each(|page| assert_eq!(kit::read_page(&blocks, *page), [pattern(*page); 4096]));
            u32::try_from(rustix::thread::gettid().as_raw_nonzero().get()).expect("a number")
        })
    };
    let threads = [reads(&[1, 2]), reads(&[5, 6, 7])].map(|thread| thread.join().expect("no wrong byte"));
    pager.stop();
    let found = pager.threads();
    assert_eq!(found.len(), 2, "{found:?}");
    for (thread, waits) in threads.into_iter().zip([2, 3]) {
        let of = found.iter().find(|of| of.thread == thread).expect("named");
        assert_eq!(of.waits, waits, "{found:?}");
        assert!(of.blocked >= Duration::from_millis(8 * waits) && of.p50.is_some(), "{found:?}");
    }
    assert_eq!(found.iter().map(|of| of.blocked).sum::<Duration>(), pager.stats().blocked);
}

#[test]
fn the_working_set_comes_first_and_then_what_follows_the_last_fault() {
    let (sender, order) = mpsc::channel();
    let (gate, opened) = (Arc::new((Mutex::new(false), Condvar::new())), Arc::new(AtomicBool::new(false)));
    let waits = gate.clone();
    let source = Source::new(64).on_load(move |run, _| {
        sender.send(run.first.0).expect("awaited");
        // The prefetch waits at its first page, until a fault has moved it.
        if run.first.0 == 20 && !opened.swap(true, Ordering::Relaxed) {
            let (open, changed) = &*waits;
            let open = open.lock().expect("whole");
            drop(changed.wait_while(open, |open| !*open).expect("whole"));
        }
        Ok(())
    });
    let set =
        [(20, 1), (50, 2)].map(|(first, count)| PageRun { block: BLOCK, first: PageIndex(first), count });
    let options = PagerOptions::new()
        .fault_threads(1)
        .prefetch_threads(1)
        .prefetch_bytes(4096)
        .working_set(set.to_vec());
    let Some((blocks, _, pager)) = pager(64, source, options) else { return };
    assert_eq!(order.recv_timeout(LIMIT).expect("a load"), 20);
    assert_eq!(kit::reader(&blocks, 40).result(), [pattern(40); 4096]);
    *gate.0.lock().expect("whole") = true;
    gate.1.notify_all();
    pager.finish(Some(LIMIT)).expect("all there");
    let order: Vec<u64> = order.try_iter().collect();
    // The rest of the set, then around.
    assert_eq!(order[..6], [40, 50, 51, 52, 54, 55]);
    assert_eq!(order.last(), Some(&49));
}

#[test]
fn an_early_end_poisons_what_is_missing_and_nothing_else() {
    for kind in kit::kinds(4) {
        let pages = (kind.host_page >> 12) * 4;
        let (blocks, source) = (kind.blocks.clone(), Arc::new(Source::new(pages)));
        let Some(pager) = start(&blocks, &source, PagerOptions::new().prefetch_threads(0)) else { return };
        let there = kind.host_page >> 12;
        assert_eq!(kit::reader(&blocks, there).result(), [expected(there); 4096]);
        let limit = Some(Duration::from_millis(10));
        assert!(matches!(pager.finish(limit), Err(PagerError::Incomplete { .. })));
        let waits = kit::reader(&blocks, there);
        waits.result();
        pager.stop();
        assert!(matches!(pager.finish(None), Err(PagerError::Cancelled)));
        assert_eq!(kit::peek(&blocks, there).expect("there"), [expected(there); 64]);
        assert!(kit::peek(&blocks, 0).is_err(), "{}: a missing page", kind.name);
        assert!(pager.stats().poisoned > 0);
        if kind.host_page == 4096 {
            assert_eq!(kit::peek(&blocks, 3).expect("zero"), [0; 64], "{}: a page of zeros", kind.name);
        }
        drop(pager);
        assert!(kit::peek(&blocks, 0).is_err(), "{}: still", kind.name);
    }
}

#[test]
fn a_page_that_cannot_be_had_is_poisoned_alone_and_reported_at_the_end() {
    let source =
        Source::new(64).on_load(|run, _| match (run.first.0..run.first.0 + run.count).contains(&22) {
            true => Err("damaged".into()),
            false => Ok(()),
        });
    let Some((blocks, _, pager)) = pager(64, source, PagerOptions::new()) else { return };
    let text = match pager.finish(Some(LIMIT)) {
        Err(error @ PagerError::Poisoned { pages: 1, .. }) => error.to_string(),
        other => panic!("{other:?}"),
    };
    assert!(text.contains("the first at offset 0x16000 of block \"ram\""), "{text}");
    for page in (0..64).filter(|page| *page != 22) {
        assert_eq!(kit::read_page(&blocks, page), [expected(page); 4096]);
    }
    assert!(kit::peek(&blocks, 22).is_err());
}

#[test]
fn a_load_that_has_failed_is_repeated_for_as_long_as_the_judge_waits() {
    let decided = Arc::new(AtomicU64::new(0));
    let seen = decided.clone();
    let source = Source::new(16).on_load(|run, times| match (run.first.0, times) {
        (6, 0..3) => Err("not yet".into()),
        (7, 0) => panic!("a defect"),
        _ => Ok(()),
    });
    let options =
        PagerOptions::new().retry(Duration::from_millis(5)).prefetch_bytes(4096).judge(move |trouble| {
            match &trouble.kind {
                TroubleKind::Panicked(message) => assert_eq!(message, "a defect"),
                TroubleKind::Failed(error) => assert_eq!(error.to_string(), "not yet"),
                other => panic!("{other:?}"),
            }
            if trouble.run.first.0 == 6 {
                assert_eq!(seen.fetch_add(1, Ordering::Relaxed), u64::from(trouble.decided));
            }
            Decision::Wait
        });
    let Some((blocks, source, pager)) = pager(16, source, options) else { return };
    assert_eq!(kit::reader(&blocks, 6).result(), [pattern(6); 4096]);
    let stats = pager.finish(Some(LIMIT)).expect("all there");
    assert_eq!((stats.retries, decided.load(Ordering::Relaxed)), (4, 3));
    assert_eq!((source.loads()[&6], source.loads()[&7]), (4, 2));
    assert_all(&blocks, 16, "at last");
}

/// A source that does not return from page 2 before it is stopped; all else comes.
fn silent() -> (Source, Arc<AtomicBool>) {
    let (stopped, released) =
        (Arc::new((Mutex::new(false), Condvar::new())), Arc::new(AtomicBool::new(false)));
    let (ends, note) = (stopped.clone(), released.clone());
    let mut source = Source::new(16).on_load(move |run, _| {
        if run.first.0 == 2 {
            let (stopped, changed) = &*stopped;
            let stopped = stopped.lock().expect("whole");
            drop(changed.wait_while(stopped, |stopped| !*stopped).expect("whole"));
            note.store(true, Ordering::Relaxed);
        }
        Ok(())
    });
    source.on_stop = Box::new(move || {
        *ends.0.lock().expect("whole") = true;
        ends.1.notify_all();
    });
    (source, released)
}

#[test]
fn a_silent_source_is_decided_about_again_and_again_until_it_is_given_up() {
    let (source, released) = silent();
    let (sender, troubles) = mpsc::channel();
    let options =
        PagerOptions::new().silence(Duration::from_millis(30)).prefetch_bytes(4096).judge(move |trouble| {
            assert!(matches!(trouble.kind, TroubleKind::Silent) && trouble.run.first.0 == 2, "{trouble}");
            sender.send((trouble.decided, trouble.is_awaited)).expect("awaited");
            if trouble.decided < 3 { Decision::Wait } else { Decision::Poison }
        });
    let Some((blocks, _, pager)) = pager(16, source, options) else { return };
    let reads = blocks.clone();
    let reader = thread::spawn(move || kit::peek(&reads, 2).is_err());
    assert!(reader.join().expect("no panic"), "poison ends the wait");
    match pager.finish(Some(LIMIT)) {
        Err(PagerError::Poisoned { pages: 1, .. }) => {}
        other => panic!("{other:?}"),
    }
    let troubles: Vec<_> = troubles.try_iter().collect();
    assert_eq!(troubles.iter().map(|(decided, _)| *decided).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert!(troubles.last().expect("some").1, "a thread waits");
    // The end has stopped the source, so the thread has returned.
    assert!(released.load(Ordering::Relaxed));
    assert!(kit::peek(&blocks, 2).is_err(), "what came late is not placed");
    assert_eq!(kit::peek(&blocks, 1).expect("there"), [pattern(1); 64]);
}

#[test]
fn a_fault_that_no_thread_is_left_for_is_decided_about_too() {
    let (source, _) = silent();
    let options = PagerOptions::new()
        .silence(Duration::from_millis(30))
        .fault_threads(1)
        .prefetch_threads(0)
        .judge(|trouble| if trouble.run.first.0 == 2 { Decision::Wait } else { Decision::Poison });
    let Some((blocks, _, pager)) = pager(16, source, options) else { return };
    let stuck = {
        let blocks = blocks.clone();
        thread::spawn(move || kit::peek(&blocks, 2).is_err())
    };
    let started = Instant::now();
    while pager.stats().faults == 0 {
        assert!(started.elapsed() < LIMIT);
        thread::yield_now();
    }
    assert!(kit::peek(&blocks, 7).is_err(), "poisoned by the thread that watches");
    assert!(!stuck.is_finished());
    pager.stop();
    assert!(stuck.join().expect("no panic"));
}

#[test]
fn a_decision_to_stop_ends_everything_and_is_the_reason_that_is_reported() {
    for judge_panics in [false, true] {
        let source =
            Source::new(64).on_load(|run, _| if run.first.0 == 0 { Err("gone".into()) } else { Ok(()) });
        let options = PagerOptions::new().prefetch_threads(0).judge(move |_| {
            assert!(!judge_panics, "a defect of the judge");
            Decision::Stop
        });
        let Some((blocks, source, pager)) = pager(64, source, options) else { return };
        assert!(kit::peek(&blocks, 0).is_err());
        let error = pager.finish(Some(LIMIT)).expect_err("stopped");
        let text = "the pager was stopped, because 1 pages from page 0 of block 0 on cannot be loaded: gone";
        assert_eq!(error.to_string(), text);
        assert!(kit::peek(&blocks, 5).is_err());
        assert_eq!(source.loads().len(), 1);
        assert!(matches!(pager.finish(None), Err(PagerError::Cancelled)));
    }
}

#[test]
fn a_source_that_never_returns_does_not_keep_the_end() {
    let source = Source::new(4).on_load(|_, _| {
        thread::sleep(Duration::from_secs(3600));
        Ok(())
    });
    let options = PagerOptions::new().end_limit(Duration::from_millis(50));
    let Some((blocks, _, pager)) = pager(4, source, options) else { return };
    let started = Instant::now();
    drop(pager);
    assert!(started.elapsed() < LIMIT);
    assert!(kit::peek(&blocks, 0).is_err());
}

#[test]
fn discarded_private_memory_is_zero_whatever_is_being_placed() {
    const PAGES: u64 = 4096;
    // Slow enough that most pages are discarded before they come.
    let source = Source::new(PAGES).on_load(|_, _| {
        thread::sleep(Duration::from_micros(200));
        Ok(())
    });
    let options = PagerOptions::new().prefetch_threads(2).prefetch_bytes(16 << 12);
    let Some((blocks, _, pager)) = pager(PAGES, source, options) else { return };
    let discards: Vec<_> = (0..2_u64)
        .map(|half| {
            let blocks = blocks.clone();
            thread::spawn(move || {
                for step in 0..PAGES / 4 {
                    let page = (step * 1021 % (PAGES / 2)) + half * PAGES / 2;
                    kit::discard(&blocks, page, 1, libc::MADV_DONTNEED);
                    assert_eq!(kit::read_page(&blocks, page), [0; 4096], "page {page}");
                }
            })
        })
        .collect();
    discards.into_iter().for_each(|thread| thread.join().expect("no old page"));
    let stats = pager.finish(Some(LIMIT)).expect("all there");
    assert!(stats.removed > 0, "{stats:?}");
    let mut zero = 0;
    for page in 0..PAGES {
        let bytes = kit::read_page(&blocks, page);
        assert!(bytes == [0; 4096] || bytes == [expected(page); 4096], "page {page}");
        zero += u64::from(bytes == [0; 4096]);
    }
    assert!(zero >= PAGES / 2, "{zero}");
}

#[test]
fn discarded_shared_memory_comes_from_the_source_if_it_was_not_there() {
    let kind = kit::kinds(8).into_iter().find(|kind| kind.name == "shared").expect("always");
    let source = Arc::new(Source::new(8));
    let Some(pager) = start(&kind.blocks, &source, PagerOptions::new().prefetch_threads(0)) else { return };
    assert_eq!(kit::reader(&kind.blocks, 0).result(), [pattern(0); 4096]);
    kit::discard(&kind.blocks, 0, 2, libc::MADV_DONTNEED);
    assert_eq!(kit::reader(&kind.blocks, 0).result(), [pattern(0); 4096], "it is in the file");
    kit::discard(&kind.blocks, 0, 2, libc::MADV_REMOVE);
    assert_eq!(kit::reader(&kind.blocks, 0).result(), [0; 4096], "it was there, and was dropped");
    assert_eq!(kit::reader(&kind.blocks, 1).result(), [pattern(1); 4096], "it never was there");
    drop(pager);
}

#[test]
fn memory_without_what_a_pager_needs_is_refused() {
    let source = || Arc::new(Source::new(4));
    let Some(userfault) = kit::open(Features::NONE) else { return };
    let armed = Armed::arm_empty(userfault, kit::anonymous(4)).expect("armed");
    match Pager::start(armed, source(), PagerOptions::new()) {
        Err(PagerError::Fault(FaultError::Lacks { lacking, .. })) => assert_eq!(lacking, Pager::NEEDS),
        other => panic!("{other:?}"),
    }
    let Some(userfault) = kit::open(Pager::NEEDS | Features::PROTECT) else { return };
    let armed = Armed::arm(userfault, kit::anonymous(4), Modes::WRITES).expect("armed");
    assert!(Pager::start(armed, source(), PagerOptions::new()).is_err());
}

/// A pager in another process is killed. The monitor sees its socket close; its guest waits, and a pager of the monitor goes on.
#[test]
fn a_pager_of_this_process_takes_over_from_one_that_was_killed() {
    const PAGES: u64 = 256;
    let blocks = kit::anonymous(PAGES);
    let Some(armed) = arm(&blocks) else { return };
    let (mut other, socket) = crate::handover::start("pager::killed");
    armed.hand_over(&socket, LIMIT).expect("handed over");
    for page in 0..10 {
        assert_eq!(kit::reader(&blocks, page).result(), [expected(page); 4096]);
    }
    // The other pager has read this fault and never answers.
    let waits = kit::reader(&blocks, 200);
    std::io::Read::read_exact(&mut &socket, &mut [0]).expect("it has the fault");
    other.kill().expect("killed");
    other.wait().expect("ended");
    assert_eq!(std::io::Read::read(&mut &socket, &mut [0]).expect("closed"), 0, "the monitor sees the end");
    let next = kit::reader(&blocks, 201);
    assert!(waits.is_waiting() && next.is_waiting(), "nobody reads zeros");
    let pager = Pager::start(armed, Arc::new(Source::new(PAGES)), PagerOptions::new()).expect("started");
    assert_eq!(waits.result(), [expected(200); 4096]);
    assert_eq!(next.result(), [expected(201); 4096]);
    let stats = pager.finish(Some(LIMIT)).expect("all there");
    assert_eq!(stats.existed, 8, "what the first one had placed; two of its pages are zero");
    assert_all(&blocks, PAGES, "taken over");
}

/// Not a separate test: the test above starts it.
#[test]
#[ignore = "the other process of a test"]
fn killed() {
    let Some(socket) = crate::handover::socket() else { return };
    let armed = Armed::receive(&socket, LIMIT).expect("handed over");
    let source = Source::new(256).on_load(move |run, _| {
        if run.first.0 >= 200 {
            std::io::Write::write_all(&mut &socket, b"!").expect("told");
            thread::sleep(Duration::from_secs(3600));
        }
        Ok(())
    });
    let pager =
        Pager::start(armed, Arc::new(source), PagerOptions::new().prefetch_threads(0)).expect("started");
    let _ = pager.finish(None);
}

/// Random moments: before the first page, between any two steps of a load, after the last page.
#[test]
fn a_pager_that_is_killed_at_any_moment_never_leaves_a_wrong_page_or_a_thread_that_waits() {
    const PAGES: u64 = 512;
    for round in 0..20_u64 {
        let blocks = kit::anonymous(PAGES);
        let Some(armed) = arm(&blocks) else { return };
        let (mut other, socket) = crate::handover::start("pager::slow");
        armed.hand_over(&socket, LIMIT).expect("handed over");
        let readers: Vec<_> = (0..3_u64)
            .map(|seed| {
                let blocks = blocks.clone();
                thread::spawn(move || {
                    for step in 0..PAGES {
                        let page = (step * 7919 + seed * 131) % PAGES;
                        assert_eq!(kit::read_page(&blocks, page), [expected(page); 4096], "page {page}");
                    }
                })
            })
            .collect();
        // It has begun.
        std::io::Read::read_exact(&mut &socket, &mut [0]).expect("told");
        thread::sleep(Duration::from_micros(round * round * 100));
        other.kill().expect("killed");
        other.wait().expect("ended");
        let mut left = Vec::new();
        std::io::Read::read_to_end(&mut &socket, &mut left).expect("the monitor sees the end");
        let pager = Pager::start(armed, Arc::new(Source::new(PAGES)), PagerOptions::new()).expect("started");
        for reader in readers {
            reader.join().expect("no wrong page");
        }
        let stats = pager.finish(Some(LIMIT)).expect("all there");
        assert_eq!((stats.missing, stats.poisoned), (0, 0), "round {round}");
    }
}

/// Not a separate test: the test above starts it.
#[test]
#[ignore = "the other process of a test"]
fn slow() {
    let Some(socket) = crate::handover::socket() else { return };
    let armed = Armed::receive(&socket, LIMIT).expect("handed over");
    let source = Source::new(512).on_load(|_, _| {
        thread::sleep(Duration::from_micros(100));
        Ok(())
    });
    let options = PagerOptions::new().prefetch_bytes(8 << 12);
    let pager = Pager::start(armed, Arc::new(source), options).expect("started");
    std::io::Write::write_all(&mut &socket, b"!").expect("told");
    let _ = pager.finish(None);
    thread::sleep(LIMIT);
}

/// The other direction: a pager of this process serves the memory of another one, which ends meanwhile.
#[test]
fn a_pager_ends_with_an_error_when_the_process_that_it_serves_has_ended() {
    let (mut monitor, socket) = crate::handover::start("pager::monitor");
    let Ok(armed) = Armed::receive(&socket, LIMIT) else {
        multifd_testkit::lacks("a userfaultfd");
        return;
    };
    let (sender, gone) = mpsc::channel::<()>();
    let gone = Mutex::new(gone);
    let source = Source::new(64).on_load(move |run, _| {
        if run.first.0 >= 16 {
            let _ = gone.lock().expect("whole").recv_timeout(LIMIT);
        }
        Ok(())
    });
    let options = PagerOptions::new().prefetch_bytes(16 << 12);
    let pager = Pager::start(armed, Arc::new(source), options).expect("started");
    // The other process has found one of its pages.
    std::io::Read::read_exact(&mut &socket, &mut [0]).expect("told");
    monitor.kill().expect("killed");
    monitor.wait().expect("ended");
    drop(sender);
    match pager.finish(Some(LIMIT)) {
        Err(PagerError::Fault(FaultError::ProcessEnded)) => {}
        other => panic!("{other:?}"),
    }
}

/// Not a separate test: the test above starts it.
#[test]
#[ignore = "the other process of a test"]
fn monitor() {
    let Some(socket) = crate::handover::socket() else { return };
    let blocks = kit::anonymous(64);
    let Some(armed) = arm(&blocks) else { return };
    armed.hand_over(&socket, LIMIT).expect("handed over");
    assert_eq!(kit::read_page(&blocks, 5), [expected(5); 4096]);
    std::io::Write::write_all(&mut &socket, b"!").expect("told");
    thread::sleep(LIMIT);
}

#[test]
fn a_pager_of_another_process_completes_and_disarms_the_memory() {
    const PAGES: u64 = 256;
    let blocks = kit::anonymous(PAGES);
    let Some(armed) = arm(&blocks) else { return };
    let (mut other, socket) = crate::handover::start("pager::completes");
    armed.hand_over(&socket, LIMIT).expect("handed over");
    assert_all(&blocks, PAGES, "while they come");
    assert!(other.wait().expect("ended").success());
    assert_all(&blocks, PAGES, "disarmed by the other process");
    drop(armed);
    assert_all(&blocks, PAGES, "disarmed here, too");
}

/// Not a separate test: the test above starts it.
#[test]
#[ignore = "the other process of a test"]
fn completes() {
    let Some(socket) = crate::handover::socket() else { return };
    let armed = Armed::receive(&socket, LIMIT).expect("handed over");
    let pager = Pager::start(armed, Arc::new(Source::new(256)), PagerOptions::new()).expect("started");
    pager.finish(Some(LIMIT)).expect("all there");
}
