//! How long a fault takes, as the thread that causes it sees it: a pager beside a loop that only reads faults and places pages.
//!
//! ```text
//! thread ── random page, each once ── waits ── next
//! pages from memory: bare loop, pager;   pages from a file: bare loop with pread, lazy restore with digests
//! ```

use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use multifd::ram::{
    Armed, BlockIndex, FaultEvent, FaultsFrom, LoadError, NeverDirty, PageBitmap, PageIndex, PageRun,
    PageSource, Pager, PagerOptions, Protection, RamBlocks, Userfault,
};
use qemu_stream::mapped_ram::{Restore, StoredMachine};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{
    args::SnapshotsArgs,
    memory::{Kind, Ram, block},
    table::{Row, Table, median, quantile, time},
};
use crate::{Result, delta, free};

/// The same page again and again.
struct Constant;

impl PageSource for Constant {
    fn contents(&self, _: BlockIndex) -> std::result::Result<Option<PageBitmap>, LoadError> {
        Ok(None)
    }

    fn load(&self, _: PageRun, into: &mut [u8]) -> std::result::Result<(), LoadError> {
        into.fill(1);
        Ok(())
    }
}

/// The median and the 99th percentile.
type Spread = (Duration, Duration);

pub(super) fn measure(args: &SnapshotsArgs, table: &mut Table) -> Result<()> {
    let folder = tempfile::tempdir_in(&args.folder)?;
    let path = folder.path().join("machine");
    {
        let ram = Ram::filled(Kind::Anonymous, BYTES)?;
        delta::capture(&ram.blocks, &path, None, &mut NeverDirty, true, 2)?;
    }
    free::warm(2 * BYTES)?;
    let file = File::open(&path)?;
    // Where a page lies makes no difference to its time.
    let from_file = |page: u64, bytes: &mut [u8]| file.read_exact_at(bytes, (1 << 20) + page % 1000 * 4096);
    let options = || PagerOptions::new().prefetch_threads(0);
    let mut all: [Vec<Spread>; 4] = Default::default();
    for _ in 0..args.rounds {
        let [bare, pager, bare_file, lazy] = &mut all;
        bare.push(bare_loop(&|_, bytes| {
            bytes.fill(1);
            Ok(())
        })?);
        pager.push(served(|ram| {
            let userfault = Userfault::open(Pager::NEEDS, FaultsFrom::Everything)?;
            Ok(Pager::start(Armed::arm_empty(userfault, ram.clone())?, Arc::new(Constant), options())?)
        })?);
        bare_file.push(bare_loop(&from_file)?);
        let machine = StoredMachine::open(&path, 0)?;
        lazy.push(served(|ram| Ok(Restore::new(&machine).lazy(ram, options())?))?);
    }
    let [bare, pager, bare_file, lazy] = all.map(|spreads| {
        let (half, most): (Vec<_>, Vec<_>) = spreads.into_iter().unzip();
        (median(half), median(most))
    });
    let setting = format!("{} MiB, anonymous, {ACCESSES} accesses", BYTES >> 20);
    for (what, ours, theirs) in [
        ("pages from memory, pager against a bare loop", pager, bare),
        ("pages from a file, lazy restore against a bare loop with `pread`", lazy, bare_file),
    ] {
        for (name, ours, theirs) in [("fault, p50", ours.0, theirs.0), ("fault, p99", ours.1, theirs.1)] {
            let note = format!("{} against {}", time(ours), time(theirs));
            let row = Row::new(name, &format!("{setting}, {what}"));
            table.add(row.times(ours.as_secs_f64() / theirs.as_secs_f64(), 1.3).note(note));
        }
    }
    Ok(())
}

/// Accesses to memory that a pager serves.
fn served(start: impl FnOnce(&Arc<RamBlocks>) -> Result<Pager>) -> Result<Spread> {
    let ram = Ram::new(Kind::Anonymous, BYTES)?;
    let pager = start(&ram.blocks)?;
    let spread = accesses(&ram.blocks)?;
    drop(pager);
    Ok(spread)
}

/// Accesses to memory that a thread serves which does nothing else.
fn bare_loop(load: &(dyn Fn(u64, &mut [u8]) -> std::io::Result<()> + Sync)) -> Result<Spread> {
    let ram = Ram::new(Kind::Anonymous, BYTES)?;
    let armed = Armed::arm_empty(Userfault::open(Pager::NEEDS, FaultsFrom::Everything)?, ram.blocks.clone())?;
    let is_done = AtomicBool::new(false);
    thread::scope(|threads| {
        let serves = threads.spawn(|| -> std::result::Result<(), String> {
            let (mut events, mut bytes) = (Vec::new(), vec![0; 4096]);
            let tick = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
            while !is_done.load(Ordering::Relaxed) {
                poll(&mut [PollFd::new(&armed, PollFlags::IN)], Some(&tick))
                    .map_err(|error| error.to_string())?;
                armed.read_events(&mut events).map_err(|error| error.to_string())?;
                for event in events.drain(..) {
                    let FaultEvent::Fault { block, offset, .. } = event else { continue };
                    load(offset.0 / 4096, &mut bytes).map_err(|error| error.to_string())?;
                    let placed = armed.copy(block, offset, &bytes, Protection::Writable);
                    placed.map_err(|error| error.to_string())?;
                }
            }
            Ok(())
        });
        let spread = accesses(&ram.blocks);
        is_done.store(true, Ordering::Relaxed);
        serves.join().map_err(|_| "the loop panicked")??;
        spread
    })
}

/// Reads pages in a random order, each once.
fn accesses(blocks: &RamBlocks) -> Result<Spread> {
    let block = block(blocks);
    let mut order: Vec<u64> = (0..block.pages()).collect();
    fastrand::Rng::with_seed(3).shuffle(&mut order);
    let mut bytes = [0; 4096];
    let mut times = Vec::with_capacity(ACCESSES);
    for page in order.into_iter().take(ACCESSES) {
        let slice = block.slice(PageIndex(page), 1).ok_or("a page of the block")?;
        let begun = Instant::now();
        slice.copy_to(&mut bytes);
        times.push(begun.elapsed());
    }
    Ok((median(times.clone()), quantile(times, 0.99)))
}

const BYTES: u64 = 512 << 20;
const ACCESSES: usize = 50_000;
