//! A machine whose threads check each page before they write it: a stale, missing or foreign page is found at once.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use multifd::{
    live::{DeviceInfo, DeviceName, DeviceSection, Guest, RunState},
    ram::{BlockName, DirtyBitmaps, Mapping, Memory, PageIndex, PageSize, RamBlock, RamBlocks},
};

pub(crate) const DEVICE: DeviceName = DeviceName::from_static("clock");
/// What the device's state contains: bytes that look like its own footer.
pub(crate) const STATE: [u8; 12] = [0x7e, 0, 0, 0, 2, 0x7e, 0, 0, 0, 3, 1, 2];

/// The blocks, and the number of their pages.
pub(crate) const BLOCKS: [(&str, u64); 2] = [("ram", 2048), ("low", 40)];

pub(crate) fn memory() -> RamBlocks {
    memory_of(&|_, length| Mapping::anonymous(length).expect("memory"))
}

pub(crate) fn memory_of(mapping: &dyn Fn(&str, u64) -> Mapping) -> RamBlocks {
    let block = |(name, pages): (&str, u64)| {
        let (name, mapping) = (BlockName::new(name).expect("a name"), mapping(name, pages << 12));
        RamBlock::new(name, pages << 12, PageSize::KIB_4, Memory::Mapped(mapping)).expect("a block")
    };
    RamBlocks::new(BLOCKS.map(block).into()).expect("distinct")
}

/// What the guest has written. It belongs to the guest, wherever that runs.
#[derive(Clone)]
pub(crate) struct Shadow {
    /// For each page, how often it was written.
    versions: Arc<[AtomicU64]>,
    wrong: Arc<Mutex<Option<String>>>,
    /// How many places run the guest.
    running: Arc<AtomicU64>,
}

impl Shadow {
    pub(crate) fn new() -> Self {
        let pages: u64 = BLOCKS.iter().map(|(_, pages)| pages).sum();
        let versions = (0..pages).map(|_| AtomicU64::new(0)).collect();
        Self { versions, wrong: Arc::default(), running: Arc::default() }
    }

    /// Waits until the guest has written this number of times.
    pub(crate) fn wait_written(&self, times: u64) {
        while self.versions.iter().map(|version| version.load(Ordering::Relaxed)).sum::<u64>() < times {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// What was found wrong so far.
    pub(crate) fn wrong(&self) -> Option<String> {
        self.wrong.lock().expect("whole").clone()
    }

    fn is_right(&self, blocks: &RamBlocks, number: u64) -> Result<(), String> {
        let (name, block, page) = place(blocks, number);
        let version = self.versions[usize::try_from(number).expect("small")].load(Ordering::Relaxed);
        let mut bytes = [0; 4096];
        block.slice(page, 1).expect("mapped").copy_to(&mut bytes);
        if bytes == contents(number, version) {
            return Ok(());
        }
        let found = u64::from_be_bytes(bytes[..8].try_into().expect("eight"));
        let last = u64::from_be_bytes(bytes[4088..].try_into().expect("eight"));
        Err(format!(
            "page {page} of {name}: expected version {version}, found {:#x} … {:#x} ({:#x})",
            found,
            last,
            number << 32
        ))
    }

    /// The first page that is wrong.
    pub(crate) fn check(&self, blocks: &RamBlocks) -> Result<(), String> {
        (0..self.versions.len() as u64).try_for_each(|number| self.is_right(blocks, number))
    }
}

fn contents(number: u64, version: u64) -> [u8; 4096] {
    let mut bytes = [0; 4096];
    if version > 0 {
        bytes.chunks_mut(8).for_each(|word| word.copy_from_slice(&(number << 32 | version).to_be_bytes()));
    }
    bytes
}

fn place(blocks: &RamBlocks, number: u64) -> (&'static str, &RamBlock, PageIndex) {
    let mut page = number;
    for (name, pages) in BLOCKS {
        if page < pages {
            let index = blocks.find(name.as_bytes()).expect("there");
            return (name, blocks.get(index).expect("there"), PageIndex(page));
        }
        page -= pages;
    }
    panic!("there is no page {number}")
}

/// A machine in this process.
pub(crate) struct Machine {
    pub(crate) blocks: Arc<RamBlocks>,
    pub(crate) writes: DirtyBitmaps,
    pub(crate) shadow: Shadow,
    pub(crate) stops: u64,
    pub(crate) resumes: u64,
    /// The time between two writes of a thread.
    pub(crate) pace: Duration,
    halt: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Machine {
    pub(crate) fn new(blocks: Arc<RamBlocks>, shadow: Shadow) -> Self {
        let writes = DirtyBitmaps::new(&blocks);
        let (halt, threads, pace) = (Arc::default(), Vec::new(), Duration::ZERO);
        Self { blocks, writes, shadow, stops: 0, resumes: 0, pace, halt, threads }
    }

    /// Runs the guest, which writes pages in an order that `seed` determines.
    pub(crate) fn run(&mut self, seed: u64) {
        assert!(self.threads.is_empty(), "it runs already");
        let others = self.shadow.running.fetch_add(1, Ordering::SeqCst);
        assert_eq!(others, 0, "the guest runs in two places");
        self.halt = Arc::default();
        for thread in 0..THREADS {
            let (blocks, writes, shadow) = (self.blocks.clone(), self.writes.clone(), self.shadow.clone());
            let (halt, pace) = (self.halt.clone(), self.pace);
            self.threads.push(thread::spawn(move || {
                let pages = shadow.versions.len() as u64;
                let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(thread) | 1;
                while !halt.load(Ordering::Relaxed) {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    // Each thread has pages of its own. A third of them is never written.
                    let number = random % pages / THREADS * THREADS + thread;
                    if number >= pages {
                        continue;
                    }
                    if let Err(wrong) = shadow.is_right(&blocks, number) {
                        shadow.wrong.lock().expect("whole").get_or_insert(wrong);
                        return;
                    }
                    if number % 3 == 2 {
                        continue;
                    }
                    let version = &shadow.versions[usize::try_from(number).expect("small")];
                    let next = version.load(Ordering::Relaxed) + 1;
                    let (name, block, page) = place(&blocks, number);
                    block.slice(page, 1).expect("mapped").copy_from(&contents(number, next));
                    version.store(next, Ordering::Relaxed);
                    writes.mark(blocks.find(name.as_bytes()).expect("there"), page);
                    if !pace.is_zero() {
                        thread::sleep(pace);
                    }
                }
            }));
        }
    }

    pub(crate) fn halt(&mut self) {
        self.halt.store(true, Ordering::Relaxed);
        if self.threads.is_empty() {
            return;
        }
        self.threads.drain(..).for_each(|thread| thread.join().expect("no panic"));
        self.shadow.running.fetch_sub(1, Ordering::SeqCst);
    }

    pub(crate) fn is_running(&self) -> bool {
        !self.threads.is_empty()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.halt();
    }
}

impl Guest for Machine {
    fn devices(&self) -> Vec<DeviceInfo> {
        vec![DeviceInfo::new(DEVICE, 16)]
    }

    fn run_state(&mut self) -> RunState {
        if self.is_running() { RunState::Running } else { RunState::Paused }
    }

    fn stop(&mut self) -> io::Result<()> {
        self.halt();
        self.stops += 1;
        Ok(())
    }

    fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
        Ok(vec![DeviceSection { name: DEVICE, instance_id: 0, version: 1, data: STATE.to_vec() }])
    }

    fn resume(&mut self) {
        self.resumes += 1;
        self.run(7);
    }
}

const THREADS: u64 = 2;
