//! A model of pages that another side sends: by itself, and when they are requested.

use std::{collections::VecDeque, sync::Arc};

use shuttle::thread;

use super::{
    super::{
        counts::Counts,
        options::PagerOptions,
        pages::Pages,
        supply::{RequestPages, Supply},
        work::Shared,
    },
    BLOCK, Kernel, Memory, PAGES, Page, contents, memory,
};
use crate::{
    PageIndex, PageRun,
    sync_types::{Mutex, RwLock},
};

/// Requests that the other side has not seen yet.
#[derive(Default)]
struct Requests(Mutex<VecDeque<usize>>);

impl RequestPages for Requests {
    fn request(&self, run: PageRun) {
        self.0.lock().expect("whole").push_back(usize::try_from(run.first.0).expect("small"));
    }
}

/// The other side sends each page once, requested ones first; a request for a page that was sent is ignored, as by a source. The
/// guest accesses all pages meanwhile.
pub fn every_fault_is_answered_however_pages_and_requests_meet() {
    let (kernel, requests) = (Arc::new(Kernel::new()), Arc::new(Requests::default()));
    let (walk, regions) = memory();
    let shared = Arc::new(Shared {
        memory: Box::new(Memory(kernel.clone())),
        source: Supply::Pushed { requests: requests.clone(), parts: Default::default() },
        pages: Pages::new(walk, &regions),
        regions,
        options: PagerOptions::new().fault_threads(1),
        gate: RwLock::new(()),
        counts: Counts::default(),
    });
    shared.pages.thread_starts();
    let serves = thread::spawn({
        let shared = shared.clone();
        move || shared.run(Shared::serve)
    });
    let sends = thread::spawn({
        let shared = shared.clone();
        move || {
            let mut walk: VecDeque<usize> = (0..super::ZERO).collect();
            let mut sent = [false; PAGES];
            loop {
                let requested = requests.0.lock().expect("whole").pop_front();
                let Some(page) = requested.or_else(|| walk.pop_front()) else { return };
                if std::mem::replace(&mut sent[page], true) {
                    continue;
                }
                thread::yield_now();
                let run = PageRun { block: BLOCK, first: PageIndex(page as u64), count: 1 };
                shared.push_bytes(run, &[1; 4096]).expect("placed");
            }
        }
    });
    let guests = [[1, 0, 3, 2], [2, 1, 0, 3]].map(|order| {
        let kernel = kernel.clone();
        thread::spawn(move || order.map(|page| assert_eq!(kernel.access(page), contents(page))))
    });
    for guest in guests {
        guest.join().expect("the right contents");
    }
    sends.join().expect("no panic");
    assert!(shared.pages.wait_until_done(None));
    shared.end(None);
    serves.join().expect("no panic");
    assert_eq!(kernel.lock().pages[..super::ZERO], [Page::Contents; super::ZERO]);
}
