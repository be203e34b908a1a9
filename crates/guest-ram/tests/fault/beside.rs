//! Copiers beside others that write to the memory: system calls, and `vm-memory` with its log.

use std::{
    fs::File,
    io::Write,
    sync::{Arc, Mutex, mpsc},
    thread,
};

use guest_ram::{PageRun, PageSink, StoreError};

use crate::{
    copier::{Kept, options, prepare, write_page},
    kit::{self, LIMIT},
};

const PAGES: u64 = 2048;

/// A file whose pages have stamps from `first` on.
fn file(pages: u64, first: u64) -> File {
    let mut file = tempfile::tempfile().expect("a file");
    for page in 0..pages {
        file.write_all(&(first + page).to_be_bytes().repeat(512)).expect("written");
    }
    file
}

/// Stores nothing until the other end of the channel is gone.
struct Waits(Arc<Kept>, Mutex<mpsc::Receiver<()>>);

impl PageSink for Waits {
    fn store(&self, run: PageRun, bytes: &[u8]) -> Result<(), StoreError> {
        let _ = self.1.lock().expect("whole").recv();
        self.0.store(run, bytes)
    }
}

/// A monitor's device reads from its disk into guest memory: the system call waits for the copier as a thread does.
#[test]
fn system_calls_that_write_to_memory_wait_until_it_was_copied() {
    let mut memories = vec![("small pages", kit::anonymous(PAGES), None)];
    if let Some((blocks, reserved)) = kit::huge(4) {
        memories.push(("huge pages", blocks, Some(reserved)));
    }
    for (name, blocks, _reserved) in &memories {
        let pages = blocks.total() >> 12;
        (0..pages).for_each(|page| write_page(blocks, page, page + 1));
        let (before, after) = (file(pages, 1 << 32), file(pages, 1 << 33));
        let kept = Arc::new(Kept::default());
        // Nothing is stored, and nearly nothing is copied by the walk, until all system calls have returned.
        let (release, wait) = mpsc::channel();
        let sink = Arc::new(Waits(kept.clone(), Mutex::new(wait)));
        let options = options().threads(1).bytes(4096).silence(LIMIT);
        let read_all = |file: &File| {
            thread::scope(|threads| {
                for half in 0..2 {
                    threads.spawn(move || {
                        (half..pages).step_by(2).for_each(|step| {
                            let page = step * 7919 % pages;
                            kit::read_into(file, page << 12, blocks, page);
                        });
                    });
                }
            });
        };
        let prepared = thread::scope(|threads| {
            threads.spawn(|| read_all(&before));
            prepare(blocks, sink, options)
        });
        let Some(prepared) = prepared else { return };
        let copier = prepared.hold().expect("held");
        read_all(&after);
        drop(release);
        let stats = copier.finish(Some(LIMIT)).expect("complete");
        assert!(stats.faults > 0, "{name}: {stats:?}");
        let kept = kept.pages();
        assert_eq!(kept.len() as u64, pages, "{name}: {stats:?}");
        for page in 0..pages {
            let stamp = |first: u64| (first + page).to_be_bytes().repeat(512);
            assert!(kept[&page] == stamp(1 << 32), "{name}: page {page} is not as it was at the hold");
            assert!(
                kit::read_page(blocks, page)[..] == stamp(1 << 33),
                "{name}: page {page} has lost a write"
            );
        }
    }
}

#[cfg(feature = "vm-memory")]
#[test]
fn devices_that_write_through_vm_memory_are_copied_and_logged() {
    use guest_ram::{
        AtomicBitmapLog, Copier, CopierError, CopierOptions, DirtyLog, DirtyPages, FaultError, PageBitmap,
        PageIndex, PageSize, blocks_of,
    };
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, bitmap::AtomicBitmap};

    let ranges = [(GuestAddress(0), 1024 << 12), (GuestAddress(1 << 32), 1024 << 12)];
    let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges).expect("memory");
    let blocks = Arc::new(blocks_of(&memory, PageSize::KIB_4).expect("blocks"));
    let mut log = AtomicBitmapLog::new(&memory, &blocks).expect("a log");
    let write_all = |stamp: u64| {
        for page in 0..PAGES {
            let page = page * 7919 % PAGES;
            let address =
                GuestAddress(if page < 1024 { page << 12 } else { (1 << 32) + ((page - 1024) << 12) });
            let bytes = (stamp + page).to_be_bytes().repeat(512);
            memory.write_slice(&bytes, address).expect("written");
        }
    };
    let mut logged = |when: &str| {
        for (index, block) in blocks.iter() {
            let pages = PageBitmap::new(block.pages());
            log.take(index, &mut DirtyPages::new(&pages)).expect("taken");
            assert_eq!(pages.count(), block.pages(), "{when}: the log has missed a write");
            assert!(pages.contains(PageIndex(0)));
        }
    };
    let kept = Arc::new(Sums::default());
    let options = CopierOptions::new().threads(1).bytes(4096);
    let prepared = thread::scope(|threads| {
        threads.spawn(|| write_all(1 << 20));
        Copier::prepare(&blocks, kept.clone(), options)
    });
    let prepared = match prepared {
        Ok(prepared) => prepared,
        Err(CopierError::Fault(error @ (FaultError::NotPermitted { .. } | FaultError::Lacks { .. }))) => {
            return multifd_testkit::lacks(&error.to_string());
        }
        Err(error) => panic!("{error}"),
    };
    logged("before the hold");
    let copier = prepared.hold().expect("held");
    write_all(1 << 30);
    copier.finish(Some(LIMIT)).expect("complete");
    logged("after the hold");
    let kept = kept.0.lock().expect("whole");
    for page in 0..PAGES {
        let at = (guest_ram::BlockIndex(usize::from(page >= 1024)), page % 1024);
        assert_eq!(kept.get(&at), Some(&((1 << 20) + page)), "page {page} is not as it was at the hold");
    }

    /// The stamp of each page.
    #[derive(Default)]
    struct Sums(Mutex<std::collections::BTreeMap<(guest_ram::BlockIndex, u64), u64>>);

    impl PageSink for Sums {
        fn store(&self, run: PageRun, bytes: &[u8]) -> Result<(), StoreError> {
            for (page, bytes) in (run.first.0..).zip(bytes.chunks(4096)) {
                let stamp: [u8; 8] = bytes[..8].try_into()?;
                if bytes.chunks(8).any(|word| word != stamp) {
                    return Err(format!("page {page} is torn").into());
                }
                self.0.lock().expect("whole").insert((run.block, page), u64::from_be_bytes(stamp));
            }
            Ok(())
        }
    }
}
