//! The demo's guest: memory, and threads that write to it continuously at a given rate.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
    thread::{self, Builder, JoinHandle},
    time::{Duration, Instant},
};

use fastrand::Rng;
use multifd::{
    channel::Stop,
    live::{DeviceInfo, DeviceName, DeviceSection, Guest, Percent, RunState},
    ram::{BlockIndex, DirtyBitmaps, DirtyReader, PageIndex, RamBlock, RamBlocks},
};

use crate::output::outcome::{Failure, While};

pub(super) const DEVICE: DeviceName = DeviceName::from_static("demo-guest");

/// A simulated guest; only its memory is real.
pub(super) struct DemoGuest {
    blocks: Arc<RamBlocks>,
    log: DirtyBitmaps,
    rate: u64,
    rounds: Arc<AtomicU64>,
    /// Percentage of time for which the writers pause. Relaxed: it orders nothing.
    throttle: Arc<AtomicU8>,
    /// Whether the writers shall end. Relaxed: it orders nothing, and they are joined.
    off: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl DemoGuest {
    /// Fills RAM, leaves an eighth of it zero, and starts the writers, unless `stop` happens first.
    pub(super) fn boot(blocks: Arc<RamBlocks>, rate: u64, stop: &Stop) -> Result<Self, Failure> {
        let log = DirtyBitmaps::new(&blocks);
        let (rounds, throttle, off) = (Arc::default(), Arc::default(), Arc::default());
        let mut guest = Self { blocks, log, rate, rounds, throttle, off, threads: Vec::new() };
        guest.fill(stop).map_err(Failure::of)?;
        guest.run().map_err(|error| While::new("cannot start the guest", error))?;
        Ok(guest)
    }

    /// The dirty log that the writers update.
    pub(super) fn dirty_log(&self) -> io::Result<DirtyReader> {
        self.log.reader()
    }

    /// The number of pages that the writers have written.
    pub(super) fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Acquire)
    }

    fn fill(&self, stop: &Stop) -> multifd::Result<()> {
        let mut random = Rng::with_seed(0);
        for (_, block) in self.blocks.iter() {
            for page in 0..block.pages() {
                match page % 8 {
                    7 => stop.check()?,
                    _ => write(&self.blocks, PageIndex(page), random.u64(..)),
                }
            }
        }
        Ok(())
    }

    fn run(&mut self) -> io::Result<()> {
        self.off = Arc::default();
        for writer in 0..WRITERS {
            let writer = Writer {
                blocks: self.blocks.clone(),
                log: self.log.clone(),
                rounds: self.rounds.clone(),
                throttle: self.throttle.clone(),
                off: self.off.clone(),
                rate: self.rate / WRITERS,
                number: writer,
                random: Rng::with_seed(1 + writer),
            };
            let name = format!("vcpu_{}", writer.number);
            let thread = Builder::new().name(name).spawn(move || writer.keep_writing())?;
            self.threads.push(thread);
        }
        Ok(())
    }
}

impl DemoGuest {
    /// Ends the writers, and waits for them.
    fn switch_off(&mut self) -> Vec<thread::Result<()>> {
        self.off.store(true, Ordering::Relaxed);
        let end = |thread: JoinHandle<()>| {
            // It may pause.
            thread.thread().unpark();
            thread.join()
        };
        self.threads.drain(..).map(end).collect()
    }
}

/// A thread that acts as a processor.
struct Writer {
    blocks: Arc<RamBlocks>,
    log: DirtyBitmaps,
    rounds: Arc<AtomicU64>,
    throttle: Arc<AtomicU8>,
    off: Arc<AtomicBool>,
    /// Bytes per second of the time that it runs.
    rate: u64,
    number: u64,
    random: Rng,
}

impl Writer {
    /// Writes one page at a time, as many as the rate allows, until the end. Runs in turns and pauses in between
    /// according to the throttle.
    fn keep_writing(mut self) {
        let Some(block) = self.blocks.get(BlockIndex(0)) else { return };
        let (page_size, pages) = (block.page_size().bytes() as u64, block.pages());
        let (mut ran, mut written) = (Duration::ZERO, 0);
        while !self.is_off() {
            let turn = Instant::now();
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a rate times seconds"
            )]
            let due = (self.rate as f64 * ran.as_secs_f64()) as u64 / page_size;
            if written >= due {
                thread::park_timeout(TICK);
            }
            while written < due && turn.elapsed() < TURN && !self.is_off() {
                let some = LOOK_EVERY.min(due - written);
                (0..some).for_each(|_| self.write_one(pages));
                written += some;
            }
            let took = turn.elapsed();
            ran += took;
            let stand = Percent::new(self.throttle.load(Ordering::Relaxed)).pause_after(took);
            self.pause(stand);
        }
    }

    fn is_off(&self) -> bool {
        self.off.load(Ordering::Relaxed)
    }

    /// Pauses for this time, or until the guest is switched off.
    fn pause(&self, time: Duration) {
        let begun = Instant::now();
        while !self.is_off()
            && let Some(rest) = time.checked_sub(begun.elapsed()).filter(|rest| !rest.is_zero())
        {
            thread::park_timeout(rest);
        }
    }

    fn write_one(&mut self, pages: u64) {
        // Each writer has its own pages, so that no page is a mixture of two.
        let page = PageIndex(self.random.u64(..(pages / WRITERS).max(1)) * WRITERS + self.number);
        write(&self.blocks, page, self.random.u64(..));
        self.log.mark(BlockIndex(0), page);
        self.rounds.fetch_add(1, Ordering::AcqRel);
    }
}

/// Fills a page from one random word: a quarter noise, then that word repeatedly. It compresses like the pages of many
/// guests.
fn write(blocks: &RamBlocks, page: PageIndex, seed: u64) {
    let slice = blocks.get(BlockIndex(0)).and_then(|block| block.slice(page, 1));
    let Some(slice) = slice else { return };
    let (mut bytes, mut random) = ([0; 4096], Rng::with_seed(seed));
    for (word, at) in bytes.chunks_exact_mut(8).zip(0_u64..) {
        let noise = if at < NOISE_WORDS { random.u64(..) } else { 0 };
        word.copy_from_slice(&(seed ^ noise).to_be_bytes());
    }
    slice.copy_from(&bytes);
}

impl Guest for DemoGuest {
    fn devices(&self) -> Vec<DeviceInfo> {
        vec![DeviceInfo::new(DEVICE, 8)]
    }

    fn run_state(&mut self) -> RunState {
        RunState::Running
    }

    fn stop(&mut self) -> io::Result<()> {
        let panicked = self.switch_off().into_iter().any(|ended| ended.is_err());
        if panicked { Err(io::Error::other("a writer panicked")) } else { Ok(()) }
    }

    fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
        let data = self.rounds().to_be_bytes().to_vec();
        Ok(vec![DeviceSection { name: DEVICE, instance_id: 0, version: 1, data }])
    }

    fn resume(&mut self) {
        if let Err(error) = self.run() {
            tracing::error!(%error, "the demo's guest cannot continue");
        }
    }

    fn can_throttle(&self) -> bool {
        true
    }

    fn throttle(&mut self, stand: Percent) -> io::Result<()> {
        self.throttle.store(stand.get(), Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for DemoGuest {
    fn drop(&mut self) {
        drop(self.switch_off());
    }
}

/// The peak resident memory of this process beyond the guest's RAM, in bytes.
pub(super) fn peak_beyond(blocks: &RamBlocks) -> Result<u64, Failure> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak =
        status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
    let kib: u64 = peak.ok_or_else(|| While::new("cannot find this process's memory", "no VmHWM"))?;
    let ram = blocks.iter().map(|(_, block)| resident(block)).sum::<io::Result<u64>>()?;
    Ok((kib << 10).saturating_sub(ram))
}

/// The bytes of a block that are in memory: with huge pages, more than were ever written.
fn resident(block: &RamBlock) -> io::Result<u64> {
    let Some(slice) = block.slice(PageIndex(0), block.pages()) else { return Ok(0) };
    let page_size = block.page_size().bytes();
    let first = slice.as_ptr().addr() / page_size;
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut entries = vec![0; slice.len() / page_size * PAGEMAP_ENTRY];
    pagemap.read_exact_at(&mut entries, (first * PAGEMAP_ENTRY) as u64)?;
    // Entries are words in host order; the top bit means that the page is in memory.
    let present = |entry: &&[u8]| entry.last().is_some_and(|top| top & 0x80 != 0);
    Ok((entries.chunks_exact(PAGEMAP_ENTRY).filter(present).count() * page_size) as u64)
}

/// Bytes of an entry in `/proc/self/pagemap`.
const PAGEMAP_ENTRY: usize = 8;
/// The number of words in a page, of 512, that no method compresses.
const NOISE_WORDS: u64 = 128;
const WRITERS: u64 = 2;
const TICK: Duration = Duration::from_millis(1);
/// How long a writer runs before it may have to pause.
const TURN: Duration = Duration::from_millis(10);
const LOOK_EVERY: u64 = 64;
