//! Memory that is copied as it is at one moment, with real faults of threads that write to it all the time.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Barrier, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use guest_ram::{
    Copier, CopierError, CopierOptions, FaultError, PageRun, PageSink, Prepared, RamBlocks, StoreError,
};

use crate::kit::{self, Access1, LIMIT, pattern};

/// Keeps the pages, and refuses those that come twice.
#[derive(Default)]
pub(crate) struct Kept(Mutex<BTreeMap<u64, Vec<u8>>>);

impl Kept {
    pub(crate) fn pages(&self) -> BTreeMap<u64, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl PageSink for Kept {
    fn store(&self, run: PageRun, bytes: &[u8]) -> Result<(), StoreError> {
        if bytes.len() as u64 != run.count << 12 {
            return Err("other bytes than the pages'".into());
        }
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (page, bytes) in (run.first.0..).zip(bytes.chunks(4096)) {
            if kept.insert(page, bytes.to_vec()).is_some() {
                return Err(format!("page {page} came twice").into());
            }
        }
        Ok(())
    }
}

/// A sink that does what a closure says.
struct Does<F>(F);

impl<F: Fn(PageRun) -> Result<(), StoreError> + Send + Sync> PageSink for Does<F> {
    fn store(&self, run: PageRun, _: &[u8]) -> Result<(), StoreError> {
        (self.0)(run)
    }
}

pub(crate) fn options() -> CopierOptions {
    CopierOptions::new().sole_writer(true)
}

/// `None` if this system does not let a process serve page faults.
pub(crate) fn prepare(
    blocks: &Arc<RamBlocks>,
    sink: Arc<dyn PageSink>,
    options: CopierOptions,
) -> Option<Prepared> {
    match Copier::prepare(blocks, sink, options) {
        Ok(prepared) => Some(prepared),
        Err(CopierError::Fault(error @ (FaultError::NotPermitted { .. } | FaultError::Lacks { .. }))) => {
            multifd_testkit::lacks(&error.to_string());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

pub(crate) fn write_page(blocks: &RamBlocks, page: u64, stamp: u64) {
    let bytes = stamp.to_be_bytes().repeat(512);
    kit::page_of(blocks, page).copy_from(&bytes);
}

fn writer(blocks: &Arc<RamBlocks>, page: u64) -> Access1 {
    let blocks = blocks.clone();
    Access1::start(move || {
        kit::page_of(&blocks, page).copy_from(&[9; 4096]);
        [9; 4096]
    })
}

/// Threads that write a new stamp to all of a page, page after page in a random order, and stand still when they are told.
struct Stampers {
    stand: Arc<AtomicBool>,
    quit: Arc<AtomicBool>,
    met: Arc<Barrier>,
    stamps: Arc<AtomicU64>,
    threads: Vec<thread::JoinHandle<BTreeMap<u64, u64>>>,
}

const STAMPERS: u64 = 2;

impl Stampers {
    fn start(blocks: &Arc<RamBlocks>, pages: u64, seed: u64) -> Self {
        let (stand, quit) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let met = Arc::new(Barrier::new(usize::try_from(STAMPERS).expect("few") + 1));
        let stamps = Arc::new(AtomicU64::new(1 << 32));
        let start = |number: u64| {
            let (blocks, stand, quit, met, stamps) =
                (blocks.clone(), stand.clone(), quit.clone(), met.clone(), stamps.clone());
            thread::spawn(move || {
                let mut last = BTreeMap::new();
                let mut random = seed * 7919 + number + 1;
                while !quit.load(Ordering::SeqCst) {
                    if stand.load(Ordering::SeqCst) {
                        met.wait();
                        met.wait();
                    }
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    // Each page has one writer.
                    let page = (random % (pages / STAMPERS)) * STAMPERS + number;
                    let stamp = stamps.fetch_add(1, Ordering::SeqCst);
                    write_page(&blocks, page, stamp);
                    last.insert(page, stamp);
                }
                last
            })
        };
        let threads = (0..STAMPERS).map(start).collect();
        Self { stand, quit, met, stamps, threads }
    }

    /// Calls `while_still` while all threads stand still.
    fn still<T>(&self, while_still: impl FnOnce() -> T) -> T {
        self.stand.store(true, Ordering::SeqCst);
        self.met.wait();
        let result = while_still();
        self.stand.store(false, Ordering::SeqCst);
        self.met.wait();
        result
    }

    /// Waits until this many more stamps were given.
    fn more(&self, stamps: u64) {
        let until = self.stamps.load(Ordering::SeqCst) + stamps;
        let limit = Instant::now() + LIMIT;
        while self.stamps.load(Ordering::SeqCst) < until {
            assert!(Instant::now() < limit, "the writers hang");
            thread::yield_now();
        }
    }

    /// Ends them. Returns the last stamp of each page.
    fn end(self) -> BTreeMap<u64, u64> {
        self.quit.store(true, Ordering::SeqCst);
        self.threads.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect()
    }
}

fn all_pages(blocks: &RamBlocks, pages: u64) -> Vec<[u8; 4096]> {
    (0..pages).map(|page| kit::read_page(blocks, page)).collect()
}

#[test]
fn every_page_is_stored_once_as_it_was_at_the_hold_while_others_write_to_it() {
    let kinds = kit::kinds(8);
    let mut memories: Vec<_> = kinds.iter().map(|kind| (kind.name, kind.blocks.clone())).collect();
    memories.push(("more anonymous memory", kit::anonymous(4096)));
    for (name, blocks) in &memories {
        let pages = blocks.total() >> 12;
        for seed in 0..6 {
            let kept = Arc::new(Kept::default());
            let stampers = Stampers::start(blocks, pages, seed);
            stampers.more(50);
            let options =
                options().fault_threads(1 + usize::try_from(seed % 2).expect("small")).bytes(64 << 10);
            let Some(prepared) = prepare(blocks, kept.clone(), options) else {
                stampers.end();
                return;
            };
            stampers.more(50);
            let (expected, copier) = stampers.still(|| {
                let expected = all_pages(blocks, pages);
                (expected, prepared.hold().expect("held"))
            });
            stampers.more(200);
            let stats = copier.finish(Some(LIMIT)).expect("complete");
            stampers.more(50);
            let last = stampers.end();
            let kept = kept.pages();
            assert_eq!(stats.stored + stats.holes, pages, "{name}: {stats:?}");
            for (page, expected) in (0..).zip(&expected) {
                let found = kept.get(&page).map_or(&[0; 4096][..], |bytes| bytes);
                assert!(found == expected, "{name}: page {page} is not as it was at the hold");
            }
            for (page, stamp) in last {
                let found = kit::read_page(blocks, page);
                assert!(found == *stamp.to_be_bytes().repeat(512), "{}: a write to {page} is lost", name);
            }
        }
    }
}

#[test]
fn a_write_before_the_hold_is_noted_and_goes_through() {
    for kind in kit::kinds(4) {
        let kept = Arc::new(Kept::default());
        let Some(prepared) = prepare(&kind.blocks, kept.clone(), options()) else { return };
        assert_eq!(writer(&kind.blocks, 1).result(), [9; 4096]);
        // It is noted before the write goes through, and counted after that.
        let copier = prepared.hold().expect("held");
        let stats = copier.finish(Some(LIMIT)).expect("complete");
        assert_eq!((stats.noted, stats.held), (1, kind.host_page >> 12), "{}", kind.name);
        assert_eq!(kept.pages().get(&1).map(|page| page[0]), Some(9), "{}", kind.name);
    }
}

#[test]
fn holes_of_shared_memory_are_neither_read_nor_stored() {
    let len = 1024 << 12;
    let file = kit::memfd(len, rustix::fs::MemfdFlags::empty()).expect("a memfd");
    let map = guest_ram::Mapping::of_file(&file, 0, len, guest_ram::Access::ReadWrite).expect("mapped");
    let blocks = kit::blocks(len, map);
    write_page(&blocks, 700, 7);
    let kept = Arc::new(Kept::default());
    let Some(prepared) = prepare(&blocks, kept.clone(), options()) else { return };
    let copier = prepared.hold().expect("held");
    assert_eq!(writer(&blocks, 300).result(), [9; 4096], "a write to a hole");
    let stats = copier.finish(Some(LIMIT)).expect("complete");
    assert!(stats.holes >= 1022 && stats.holes + stats.stored == 1024, "{stats:?}");
    let kept = kept.pages();
    assert_eq!(kept.get(&700).map(|page| page[7]), Some(7));
    assert!(kept.get(&300).is_none_or(|page| page == &[0; 4096]));
    use std::os::unix::fs::MetadataExt;
    assert!(file.metadata().expect("its size").blocks() <= 2 * 8, "holes were allocated");
}

/// A guest that writes, and a copier that ends early: the guest continues.
fn ends_early(
    sink: Arc<dyn PageSink>,
    options: CopierOptions,
    end: impl FnOnce(&Copier),
) -> Option<CopierError> {
    let blocks = kit::anonymous(4096);
    (0..4096).for_each(|page| write_page(&blocks, page, page + 1));
    let stampers = Stampers::start(&blocks, 4096, 3);
    let Some(prepared) = prepare(&blocks, sink, options) else {
        stampers.end();
        return None;
    };
    let copier = stampers.still(|| prepared.hold()).expect("held");
    end(&copier);
    let error = copier.finish(Some(LIMIT)).expect_err("not complete");
    stampers.more(10_000);
    stampers.end();
    assert_eq!(copier.left(), copier.left());
    // Nothing is protected any more, without the copier's help.
    assert_eq!(writer(&blocks, 4095).result(), [9; 4096]);
    Some(error)
}

#[test]
fn a_sink_that_fails_ends_the_copy_and_the_guest_continues() {
    let count = AtomicU64::new(0);
    let full = Does(move |_: PageRun| match count.fetch_add(1, Ordering::SeqCst) {
        3.. => Err(std::io::Error::from(std::io::ErrorKind::StorageFull).into()),
        _ => Ok(()),
    });
    let Some(error) = ends_early(Arc::new(full), options(), |_| {}) else { return };
    assert!(matches!(error, CopierError::Store { .. }), "{error}");
}

#[test]
fn a_sink_that_panics_ends_the_copy_and_the_guest_continues() {
    let panics = Does(|_: PageRun| panic!("no sink today"));
    let Some(error) = ends_early(Arc::new(panics), options(), |_| {}) else { return };
    assert!(matches!(&error, CopierError::Panicked(why) if why.contains("today")), "{error}");
}

#[test]
fn a_sink_that_is_silent_ends_the_copy_and_the_guest_continues() {
    let (release, wait) = mpsc::channel::<()>();
    let wait = Mutex::new(wait);
    let silent = Does(move |_: PageRun| {
        // Ends with the test.
        let _ = wait.lock().unwrap_or_else(PoisonError::into_inner).recv();
        Ok(())
    });
    let options =
        options().silence(Duration::from_millis(200)).end_limit(Duration::from_millis(50)).ahead(64 << 10);
    let error = ends_early(Arc::new(silent), options, |_| {});
    drop(release);
    let Some(error) = error else { return };
    assert!(matches!(error, CopierError::Silent(_)), "{error}");
}

#[test]
fn a_copier_that_is_stopped_or_dropped_leaves_writable_memory() {
    let slow = || {
        Arc::new(Does(|_: PageRun| {
            thread::sleep(Duration::from_millis(1));
            Ok(())
        }))
    };
    let Some(error) = ends_early(slow(), options(), Copier::stop) else { return };
    assert!(matches!(error, CopierError::Cancelled), "{error}");
    let blocks = kit::anonymous(64);
    drop(prepare(&blocks, slow(), options()));
    assert_eq!(writer(&blocks, 0).result(), [9; 4096]);
    drop(prepare(&blocks, slow(), options()).expect("prepared").hold());
    assert_eq!(writer(&blocks, 1).result(), [9; 4096]);
}

#[test]
fn memory_that_is_discarded_before_it_was_copied_ends_the_copy() {
    for is_held in [false, true] {
        let blocks = kit::anonymous(64);
        (0..64).for_each(|page| write_page(&blocks, page, page + 1));
        let kept = Arc::new(Kept::default());
        let (release, wait) = mpsc::channel::<()>();
        let (kept_too, wait) = (kept.clone(), Mutex::new(wait));
        struct Waits(Arc<Kept>, Mutex<mpsc::Receiver<()>>);
        impl PageSink for Waits {
            fn store(&self, run: PageRun, bytes: &[u8]) -> Result<(), StoreError> {
                let _ = self.1.lock().unwrap_or_else(PoisonError::into_inner).recv();
                self.0.store(run, bytes)
            }
        }
        let options = options().threads(1).bytes(4096);
        let Some(prepared) = prepare(&blocks, Arc::new(Waits(kept_too, wait)), options) else { return };
        let discard = |blocks: Arc<RamBlocks>| {
            Access1::start(move || {
                kit::discard(&blocks, 60, 1, libc::MADV_DONTNEED);
                [0; 4096]
            })
        };
        if is_held {
            let copier = prepared.hold().expect("held");
            discard(blocks.clone()).result();
            let error = loop {
                match copier.finish(Some(Duration::from_millis(10))) {
                    Err(CopierError::Incomplete { .. }) => {}
                    Err(error) => break error,
                    Ok(stats) => panic!("complete: {stats:?}"),
                }
            };
            drop(release);
            let CopierError::Discarded { offset, .. } = error else { panic!("{error}") };
            assert_eq!(offset.0, 60 << 12);
        } else {
            discard(blocks.clone()).result();
            // It is protected again: this write waits for a copy of zeros.
            let copier = prepared.hold().expect("held");
            assert_eq!(writer(&blocks, 60).result(), [9; 4096]);
            drop(release);
            copier.finish(Some(LIMIT)).expect("complete");
            assert_eq!(kept.pages().get(&60).map(Vec::as_slice), Some(&[0; 4096][..]));
            assert_eq!(pattern(0), 1);
        }
    }
}

#[test]
fn shared_memory_is_refused_unless_nobody_else_writes_to_it() {
    for kind in kit::kinds(2).into_iter().filter(|kind| kind.name != "anonymous") {
        match Copier::prepare(&kind.blocks, Arc::new(Kept::default()), CopierOptions::new()) {
            Err(CopierError::Shared { name }) => assert_eq!(name.as_bytes(), b"ram", "{}", kind.name),
            Err(CopierError::Fault(_)) => return,
            other => panic!("{other:?}"),
        }
        assert_eq!(writer(&kind.blocks, 0).result(), [9; 4096]);
    }
}

#[cfg(feature = "pagemap")]
#[test]
fn memory_with_a_dirty_log_of_the_page_table_is_refused_by_name() {
    let blocks = kit::anonymous(4);
    let Ok(log) = guest_ram::PagemapLog::start(blocks.clone()) else { return };
    match Copier::prepare(&blocks, Arc::new(Kept::default()), options()) {
        Err(CopierError::Fault(FaultError::Watched { name })) => assert_eq!(name.as_bytes(), b"ram"),
        Err(CopierError::Fault(_)) => {}
        other => panic!("{other:?}"),
    }
    drop(log);
    let Some(prepared) = prepare(&blocks, Arc::new(Kept::default()), options()) else { return };
    assert!(guest_ram::PagemapLog::start(blocks.clone()).is_err(), "the other way round");
    drop(prepared);
    assert!(guest_ram::PagemapLog::start(blocks).is_ok());
}

/// The kernel lets one of them have the memory.
#[test]
fn a_second_copier_of_the_same_memory_is_refused_by_name_and_the_first_completes() {
    for kind in kit::kinds(4) {
        let pages = kind.blocks.total() >> 12;
        (0..pages).for_each(|page| write_page(&kind.blocks, page, page + 1));
        let refused = || match Copier::prepare(&kind.blocks, Arc::new(Kept::default()), options()) {
            Err(CopierError::Fault(FaultError::Watched { name })) => assert_eq!(name.as_bytes(), b"ram"),
            other => panic!("{}: {other:?}", kind.name),
        };
        let kept = Arc::new(Kept::default());
        let Some(prepared) = prepare(&kind.blocks, kept.clone(), options()) else { return };
        refused();
        let copier = prepared.hold().expect("held");
        copier.finish(Some(LIMIT)).expect("complete");
        assert_eq!(kept.pages().len() as u64, pages, "{}", kind.name);
        // Memory is free for the next one then.
        let next = prepare(&kind.blocks, Arc::new(Kept::default()), options()).expect("allowed");
        next.hold().expect("held").finish(Some(LIMIT)).expect("complete");
    }
}
