//! A machine at one host: its blocks for its time there, its guest's threads, its one device.
//!
//! Each thread writes its own pages and keeps a list of its writes, which the shadow applies after the threads were
//! joined. A guest that starts is registered with its host in the [`World`], which notices when two run.

use std::{
    collections::BTreeSet,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use fastrand::Rng;
use multifd::{
    channel::Stop,
    live::{DeviceInfo, DeviceName, DeviceSection, Guest, Percent, RunState},
    ram::{BlockIndex, DirtyBitmaps, DirtyLog, MergedLog, PageIndex, PagemapLog, RamBlocks},
};

use qemu_stream::format::DevicePart;

use crate::{
    memory::{Pool, perform},
    shadow::{Shadow, What, Write, contents},
};

/// The state that all hosts of one life share.
#[derive(Debug, Default)]
pub(crate) struct World {
    shadow: Mutex<Shadow>,
    running: Mutex<BTreeSet<u64>>,
    wrong: Mutex<Vec<String>>,
    pool: Mutex<Pool>,
}

impl World {
    pub(crate) fn shadow(&self) -> MutexGuard<'_, Shadow> {
        self.shadow.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records an error of the engine.
    pub(crate) fn wrong(&self, text: String) {
        self.wrong.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    }

    pub(crate) fn take_wrong(&self) -> Option<String> {
        self.wrong.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    fn running(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn starts(&self, host: u64) {
        let mut running = self.running();
        running.insert(host);
        if running.len() > 1 {
            self.wrong(format!("the guest runs at hosts {running:?} at once"));
        }
    }

    /// Writes like a device, while no thread of the guest runs: the shadow applies it at once.
    pub(crate) fn write(&self, blocks: &RamBlocks, marks: &DirtyBitmaps, write: Write) {
        let block = blocks.block(BlockIndex(write.block)).expect("a block of the machine");
        perform(block, write.page, write.what);
        marks.mark(BlockIndex(write.block), PageIndex(write.page));
        self.shadow().apply(&block.name().to_string(), write.page, write.what);
    }
}

/// The behaviour of a guest, on every host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) writers: u64,
    /// The number of writes of each thread until it rests, so that every migration ends.
    pub(crate) budget: u64,
    /// Whether nobody marks what the threads write, because the page-table log finds it.
    pub(crate) pagemap: bool,
    pub(crate) seed: u64,
}

pub(crate) struct Machine {
    pub(crate) host: u64,
    pub(crate) blocks: Arc<RamBlocks>,
    /// Marked by all writers; with a page-table log, only by devices and the balloon.
    pub(crate) marks: DirtyBitmaps,
    /// What its operator wants.
    pub(crate) state: RunState,
    /// The present throttle.
    pub(crate) throttled: Percent,
    load: Load,
    world: Arc<World>,
    count: Arc<AtomicU64>,
    running: bool,
    runs: u64,
    power: Stop,
    vcpus: Vec<JoinHandle<Vec<Write>>>,
}

impl Machine {
    /// A stopped machine.
    pub(crate) fn new(host: u64, blocks: Arc<RamBlocks>, count: u64, load: Load, world: Arc<World>) -> Self {
        let (marks, count) = (DirtyBitmaps::new(&blocks), Arc::new(AtomicU64::new(count)));
        let (state, throttled, running, runs) = (RunState::Paused, Percent::NONE, false, 0);
        let (power, vcpus) = (Stop::new(), Vec::new());
        Self { host, blocks, marks, state, throttled, load, world, count, running, runs, power, vcpus }
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running
    }

    pub(crate) fn load(&self) -> Load {
        self.load
    }

    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }

    /// Starts the guest, unless it runs already.
    pub(crate) fn run(&mut self) {
        if std::mem::replace(&mut self.running, true) {
            return;
        }
        self.world.starts(self.host);
        self.power = Stop::new();
        self.runs += 1;
        for writer in 0..self.load.writers {
            let seed = self.load.seed ^ self.host << 40 ^ self.runs << 20 ^ writer;
            let vcpu = Vcpu {
                blocks: self.blocks.clone(),
                marks: self.marks.clone(),
                power: self.power.clone(),
                count: self.count.clone(),
                load: self.load,
                writer,
                random: Rng::with_seed(seed),
            };
            let thread = thread::Builder::new().name(format!("vcpu_{writer}"));
            self.vcpus.push(thread.spawn(move || vcpu.run()).expect("a thread"));
        }
    }

    /// Stops it between two writes; the shadow applies them.
    pub(crate) fn halt(&mut self) {
        self.power.cancel();
        for vcpu in self.vcpus.drain(..) {
            let writes = vcpu.join().expect("a guest does not panic");
            let mut shadow = self.world.shadow();
            for write in writes {
                let block = self.blocks.block(BlockIndex(write.block)).expect("a block of the machine");
                shadow.apply(&block.name().to_string(), write.page, write.what);
                shadow.count += 1;
            }
        }
        if std::mem::take(&mut self.running) {
            self.world.running().remove(&self.host);
        }
    }

    /// As its operator wants it.
    pub(crate) fn as_wanted(&mut self) {
        match self.state {
            RunState::Running => self.run(),
            RunState::Paused => self.halt(),
        }
    }

    /// The dirty log for one migration of these blocks, which may or may not be the machine's own.
    ///
    /// # Errors
    /// If there is none.
    pub(crate) fn log_of(
        &self,
        marks: &DirtyBitmaps,
        blocks: &Arc<RamBlocks>,
    ) -> io::Result<Box<dyn DirtyLog>> {
        let marks = marks.reader()?;
        if !self.load.pagemap {
            return Ok(Box::new(marks));
        }
        let threads = PagemapLog::start(blocks.clone())?;
        Ok(Box::new(MergedLog::new().with("the threads", threads).with("devices and balloon", marks)))
    }
}

impl Guest for Machine {
    fn devices(&self) -> Vec<DeviceInfo> {
        vec![DeviceInfo::new(COUNTER, 8), DeviceInfo::new(DISK, MOST_OF_DISK).instance(7)]
    }

    fn run_state(&mut self) -> RunState {
        if self.running { RunState::Running } else { RunState::Paused }
    }

    fn stop(&mut self) -> io::Result<()> {
        self.halt();
        Ok(())
    }

    fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
        let count = self.count();
        let data = count.to_be_bytes().to_vec();
        let counter = DeviceSection { name: COUNTER, instance_id: 0, version: 1, data };
        let disk = DeviceSection { name: DISK, instance_id: 7, version: 3, data: disk(count) };
        Ok(vec![counter, disk])
    }

    fn resume(&mut self) {
        self.run();
    }

    fn can_throttle(&self) -> bool {
        true
    }

    fn throttle(&mut self, stand: Percent) -> io::Result<()> {
        self.throttled = stand;
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.halt();
    }
}

/// One thread of the guest, which writes to every n-th page.
struct Vcpu {
    blocks: Arc<RamBlocks>,
    marks: DirtyBitmaps,
    power: Stop,
    count: Arc<AtomicU64>,
    load: Load,
    writer: u64,
    random: Rng,
}

impl Vcpu {
    fn run(mut self) -> Vec<Write> {
        let mut written = Vec::new();
        for _ in 0..self.load.budget {
            if self.random.u8(..24) == 0 && self.power.pause(REST).is_err() || self.power.is_stopped() {
                break;
            }
            let block = self.random.usize(..self.blocks.len());
            let write = random_write(&mut self.random, &self.blocks, block);
            let page = write.page - write.page % self.load.writers + self.writer;
            let ram = self.blocks.block(BlockIndex(block)).expect("a block of the machine");
            if page >= ram.pages() {
                continue;
            }
            perform(ram, page, write.what);
            // For the page table, a discarded page is not a written one.
            if !self.load.pagemap || write.what == What::Discard {
                self.marks.mark(BlockIndex(block), PageIndex(page));
            }
            self.count.fetch_add(1, Ordering::SeqCst);
            written.push(Write { page, ..write });
        }
        written
    }
}

/// Any write to this block.
pub(crate) fn random_write(random: &mut Rng, blocks: &RamBlocks, block: usize) -> Write {
    let pages = blocks.block(BlockIndex(block)).expect("a block of the machine").pages();
    let what = match random.u8(..8) {
        0 => What::Zero,
        1 => What::Discard,
        2 | 3 => What::Patch(random.u64(..)),
        _ => What::Fill(random.u64(..)),
    };
    Write { block, page: random.u64(..pages), what }
}

/// The counter in the devices that have arrived, if it is as saved.
pub(crate) fn count_in(devices: &DevicePart) -> Option<u64> {
    let (_, counter) = devices.find(COUNTER.as_str(), 0)?;
    let count = u64::from_be_bytes(counter.try_into().ok()?);
    let (section, state) = devices.find(DISK.as_str(), 7)?;
    (section.version == 3 && state == disk(count)).then_some(count)
}

/// The larger state of a second device, computed from the counter.
fn disk(count: u64) -> Vec<u8> {
    let mut random = Rng::with_seed(count);
    let most = 1 << random.u32(0..=MOST_OF_DISK.ilog2());
    let length = random.u64(..=most);
    let mut state = vec![0; usize::try_from(length).expect("small")];
    contents(count, &mut state);
    state
}

const COUNTER: DeviceName = DeviceName::from_static("counter");
const DISK: DeviceName = DeviceName::from_static("disk");
const MOST_OF_DISK: u64 = 1 << 17;
const REST: Duration = Duration::from_micros(300);
