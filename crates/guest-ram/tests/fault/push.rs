//! Pages that another side sends: in place, then pushed into a pager.

use std::{
    sync::{Arc, Mutex, mpsc},
    thread,
    time::Duration,
};

use guest_ram::{
    BlockIndex, FaultsFrom, Landing, PageBitmap, PageIndex, PageRun, Pager, PagerError, PagerOptions,
    RamBlocks, RequestPages,
};

use crate::kit::{self, BLOCK, LIMIT, pattern};

/// Keeps what was requested.
struct Requests(Mutex<mpsc::Sender<PageRun>>);

impl RequestPages for Requests {
    fn request(&self, run: PageRun) {
        let _ = self.0.lock().expect("whole").send(run);
    }
}

fn run(first: u64, count: u64) -> PageRun {
    PageRun { block: BLOCK, first: PageIndex(first), count }
}

fn bytes(run: PageRun, add: u8) -> Vec<u8> {
    (run.first.0..run.first.0 + run.count).flat_map(|page| [pattern(page).wrapping_add(add); 4096]).collect()
}

/// Memory in which all pages were written in place, with old bytes, and those of `stale` host pages were dropped.
struct Begun {
    pager: Pager,
    requests: mpsc::Receiver<PageRun>,
    /// It allows huge pages again when it is dropped.
    _landing: Landing,
}

fn begin(blocks: &Arc<RamBlocks>, host_page: u64, stale: &[u64], options: PagerOptions) -> Option<Begun> {
    // Otherwise the test is skipped, with the reason.
    drop(kit::open(Pager::NEEDS)?);
    let mut landing = Landing::prepare(blocks.clone(), FaultsFrom::Everything).expect("prepared");
    let pages = host_page >> 12;
    assert_eq!(landing.host_page(BLOCK), pages);
    let block = blocks.block(BLOCK).expect("there");
    for page in 0..block.pages() {
        block.store(PageIndex(page), &[0xee; 4096]).expect("stored");
    }
    let missing = PageBitmap::new(block.pages());
    for first in stale {
        landing.discard(BLOCK, PageIndex(first * pages), pages).expect("dropped");
        missing.set_run(PageIndex(first * pages), pages);
    }
    let (sender, requests) = mpsc::channel();
    let armed = landing.arm().expect("armed");
    let requested = Arc::new(Requests(Mutex::new(sender)));
    let pager = Pager::pushed(armed, &[missing], requested, options).expect("started");
    Some(Begun { pager, requests, _landing: landing })
}

#[test]
fn what_a_thread_waits_for_is_requested_and_what_comes_twice_is_dropped() {
    for kind in kit::kinds(6) {
        let (blocks, pages) = (kind.blocks.clone(), kind.host_page >> 12);
        let Some(begun) = begin(&blocks, kind.host_page, &[1, 2, 4], PagerOptions::new()) else { return };
        let Begun { pager, requests, .. } = &begun;
        assert_eq!(kit::read_page(&blocks, 0), [0xee; 4096], "{}: what is not dropped stays", kind.name);
        let waits = kit::reader(&blocks, pages + pages / 2);
        assert_eq!(requests.recv_timeout(LIMIT), Ok(run(pages, pages)), "{}", kind.name);
        assert!(waits.is_waiting());
        pager.request_again();
        assert_eq!(requests.recv_timeout(LIMIT), Ok(run(pages, pages)), "{}: requested again", kind.name);
        // The walk brings it with its neighbour, and with one that is there.
        let three = run(0, 3 * pages);
        pager.push(three, &bytes(three, 0)).expect("placed");
        let expected = [pattern(pages + pages / 2); 4096];
        assert_eq!(waits.result(), expected, "{}", kind.name);
        assert_eq!(kit::read_page(&blocks, 0), [0xee; 4096], "{}: a page that is there stays", kind.name);
        // The guest has written it since; an older page of the network comes once more.
        let block = blocks.block(BLOCK).expect("there");
        block.store(PageIndex(pages), &[0x11; 4096]).expect("written by the guest");
        pager.push(run(pages, pages), &bytes(run(pages, pages), 1)).expect("dropped");
        assert_eq!(kit::read_page(&blocks, pages), [0x11; 4096], "{}", kind.name);
        assert_eq!(pager.missing(), pages);
        pager.push_zero(run(4 * pages, pages)).expect("placed");
        let stats = pager.finish(Some(LIMIT)).expect("complete");
        assert_eq!(kit::read_page(&blocks, 4 * pages), [0; 4096], "{}", kind.name);
        assert_eq!(stats.missing, 0);
        assert!(stats.p50.is_some(), "the wait of one thread is known");
        assert!(requests.try_recv().is_err(), "{}: nothing else was requested", kind.name);
    }
}

#[test]
fn a_host_page_comes_in_pieces_from_several_threads() {
    let Some((blocks, _reserved)) = kit::huge(3) else { return };
    let Some(begun) = begin(&blocks, kit::HUGE, &[0, 1, 2], PagerOptions::new()) else { return };
    let waits = kit::reader(&blocks, 512 + 300);
    assert_eq!(begun.requests.recv_timeout(LIMIT), Ok(run(512, 512)));
    thread::scope(|scope| {
        for quarter in 0..4 {
            let pager = &begun.pager;
            scope.spawn(move || {
                // Each run begins and ends within a host page.
                for huge in 0..3 {
                    let piece = run(huge * 512 + quarter * 128, 128);
                    pager.push(piece, &bytes(piece, 0)).expect("kept or placed");
                }
            });
        }
    });
    assert_eq!(waits.result(), [pattern(512 + 300); 4096]);
    begun.pager.finish(Some(LIMIT)).expect("complete");
    for page in 0..3 * 512 {
        assert_eq!(kit::read_page(&blocks, page), [pattern(page); 4096], "page {page}");
    }
}

#[test]
fn a_page_that_was_discarded_while_it_was_requested_is_zero() {
    let blocks = kit::anonymous(4);
    let Some(begun) = begin(&blocks, 4096, &[1, 2], PagerOptions::new()) else { return };
    let waits = kit::reader(&blocks, 1);
    assert_eq!(begun.requests.recv_timeout(LIMIT), Ok(run(1, 1)));
    kit::discard(&blocks, 1, 2, libc::MADV_DONTNEED);
    begun.pager.push(run(1, 2), &bytes(run(1, 2), 0)).expect("placed");
    assert_eq!(waits.result(), [0; 4096]);
    assert_eq!(kit::read_page(&blocks, 2), [0; 4096]);
    begun.pager.finish(Some(LIMIT)).expect("complete");
}

#[test]
fn an_early_end_poisons_what_has_not_come() {
    let blocks = kit::anonymous(3);
    let Some(begun) = begin(&blocks, 4096, &[1], PagerOptions::new()) else { return };
    assert!(matches!(
        begun.pager.finish(Some(Duration::from_millis(1))),
        Err(PagerError::Incomplete { missing: 1 })
    ));
    begun.pager.stop();
    begun.pager.push(run(1, 1), &bytes(run(1, 1), 0)).expect("nothing is placed");
    assert!(kit::peek(&blocks, 1).is_err(), "it never reads as zero");
    assert!(kit::peek(&blocks, 0).is_ok());
}

#[test]
fn what_is_not_whole_pages_of_armed_memory_is_refused() {
    let blocks = kit::anonymous(3);
    let Some(begun) = begin(&blocks, 4096, &[1], PagerOptions::new()) else { return };
    let refused = |run: PageRun, len: usize| match begun.pager.push(run, &vec![0; len]) {
        Err(PagerError::Pushed { why }) => why,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(run(1, 1), 4095), "4095 bytes are not 1 pages");
    assert_eq!(refused(run(2, 2), 8192), "pages 2 to 4 are not in block \"ram\"");
    assert_eq!(
        refused(run(u64::MAX, 2), 8192),
        "pages 18446744073709551615 to 18446744073709551615 are not in block \"ram\""
    );
    assert_eq!(refused(PageRun { block: BlockIndex(1), ..run(0, 1) }, 4096), "block 1 is not armed");
}
