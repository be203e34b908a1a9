//! The guest: memory whose pages contain their position, and threads that rewrite it at a rate.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use fastrand::Rng;
use multifd::{
    channel::Stop,
    live::{DeviceInfo, DeviceName, DeviceSection, Guest, RunState},
    ram::{
        BlockIndex, BlockName, DirtyBitmaps, DirtyLog, DirtyPages, DirtyReader, Mapping, Memory, PageBitmap,
        PageIndex, RamBlock, RamBlocks,
    },
};
use multifd_testkit::pattern::{Origin, Pattern};

use crate::plan::{Load, Plan, STAYS_UP, UNREADABLE};

pub(crate) struct SoakGuest {
    pub(crate) blocks: Arc<RamBlocks>,
    pub(crate) log: DirtyBitmaps,
    pub(crate) stays_up: bool,
    pub(crate) stopped: bool,
    pub(crate) resumed: bool,
    seed: u64,
    load: Load,
    /// The total number of pages written: its device's state.
    written: Arc<AtomicU64>,
    power: Stop,
    threads: Vec<JoinHandle<()>>,
}

impl SoakGuest {
    pub(crate) fn boot(plan: &Plan) -> Self {
        let blocks = plan.blocks.iter().enumerate().map(|(index, pages)| {
            let length = pages * plan.page_size.bytes() as u64;
            let memory = Memory::Mapped(Mapping::anonymous(length).expect("memory"));
            RamBlock::new(name(index), length, plan.page_size, memory).expect("a block")
        });
        let blocks = Arc::new(RamBlocks::new(blocks.collect()).expect("blocks"));
        let (log, written) = (DirtyBitmaps::new(&blocks), Arc::new(AtomicU64::new(0)));
        let mut random = Rng::with_seed(plan.seed);
        for (index, block) in blocks.iter() {
            for page in 0..block.pages() {
                if random.u64(..8) >= plan.zero_eighths {
                    write(plan.seed, &blocks, index, PageIndex(page), 0);
                }
            }
        }
        let (stays_up, stopped, resumed) = (false, false, false);
        let (seed, load, power, threads) = (plan.seed, plan.guest, Stop::new(), Vec::new());
        let mut guest = Self { blocks, log, stays_up, stopped, resumed, seed, load, written, power, threads };
        guest.run();
        guest
    }

    /// The state of its device, as bytes.
    pub(crate) fn device(&self) -> Vec<u8> {
        self.written.load(Ordering::SeqCst).to_be_bytes().to_vec()
    }

    fn run(&mut self) {
        self.power = Stop::new();
        for writer in 0..self.load.writers {
            let (blocks, log, power) = (self.blocks.clone(), self.log.clone(), self.power.clone());
            let (written, load, seed) = (self.written.clone(), self.load, self.seed);
            let thread = thread::Builder::new().name(format!("vcpu_{writer}"));
            let writes = move || keep_writing(seed, writer, &blocks, &log, &written, load, &power);
            self.threads.push(thread.spawn(writes).expect("a thread"));
        }
    }

    fn halt(&mut self) {
        self.power.cancel();
        for thread in self.threads.drain(..) {
            thread.join().expect("a writer that does not panic");
        }
    }
}

impl Guest for SoakGuest {
    fn devices(&self) -> Vec<DeviceInfo> {
        vec![DeviceInfo::new(DEVICE, 8)]
    }

    fn run_state(&mut self) -> RunState {
        RunState::Running
    }

    fn stop(&mut self) -> io::Result<()> {
        if self.stays_up {
            return Err(io::Error::other(STAYS_UP));
        }
        self.stopped = true;
        // Its vCPUs continue for a while before they notice.
        thread::sleep(TICK * u32::try_from(self.seed % 4).unwrap_or_default());
        self.halt();
        Ok(())
    }

    fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
        let data = self.device();
        Ok(vec![DeviceSection { name: DEVICE, instance_id: 0, version: 1, data }])
    }

    fn resume(&mut self) {
        self.resumed = true;
        self.halt();
        self.run();
    }
}

impl Drop for SoakGuest {
    fn drop(&mut self) {
        self.halt();
    }
}

fn keep_writing(
    seed: u64,
    writer: u64,
    blocks: &RamBlocks,
    log: &DirtyBitmaps,
    written: &AtomicU64,
    load: Load,
    power: &Stop,
) {
    let mut random = Rng::with_seed(seed ^ writer << 32);
    let (start, mut done) = (Instant::now(), 0);
    while done < load.budget && power.pause(TICK).is_ok() {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate times seconds")]
        let due = (load.rate as f64 * start.elapsed().as_secs_f64()) as u64;
        while done < due.min(load.budget) && !power.is_stopped() {
            let index = BlockIndex(random.usize(..blocks.len()));
            let Ok(block) = blocks.block(index) else { return };
            let page = PageIndex(random.u64(..block.pages()));
            let generation = random.u16(1..0x400);
            match random.u8(..8) {
                0 => block.clear(page),
                _ => write(seed, blocks, index, page, generation),
            }
            log.mark(index, page);
            written.fetch_add(1, Ordering::SeqCst);
            done += 1;
        }
    }
}

fn write(seed: u64, blocks: &RamBlocks, index: BlockIndex, page: PageIndex, generation: u16) {
    let Some(slice) = blocks.get(index).and_then(|block| block.slice(page, 1)) else { return };
    let mut bytes = vec![0; slice.len()];
    let block = u16::try_from(index.0).expect("few blocks");
    Pattern::new(seed).fill(Origin { block, page: page.0, generation }, &mut bytes);
    slice.copy_from(&bytes);
}

/// A log that fails after some takes.
pub(crate) struct Unreadable {
    pub(crate) log: DirtyReader,
    pub(crate) left: Option<u32>,
}

impl DirtyLog for Unreadable {
    fn begin(&mut self, blocks: &RamBlocks) -> io::Result<()> {
        self.log.begin(blocks)
    }

    fn take(&mut self, block: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()> {
        match &mut self.left {
            Some(0) => return Err(io::Error::other(UNREADABLE)),
            Some(left) => *left -= 1,
            None => {}
        }
        self.log.take(block, into)
    }

    fn put_back(&mut self, block: BlockIndex, from: &PageBitmap) {
        self.log.put_back(block, from);
    }
}

/// The first page in which two machines differ, and its recognised contents.
pub(crate) fn difference(seed: u64, source: &RamBlocks, destination: &RamBlocks) -> Option<String> {
    if source.len() != destination.len() {
        return Some(format!("expected {} blocks, found {}", source.len(), destination.len()));
    }
    for (index, block) in source.iter() {
        let Some(other) = destination.get(index).filter(|other| other.pages() == block.pages()) else {
            return Some(format!("block {} is missing, or of another size", index.0));
        };
        let (mut here, mut there) = (vec![0; block.page_size().bytes()], vec![0; block.page_size().bytes()]);
        for page in (0..block.pages()).map(PageIndex) {
            block.load(page, &mut here).expect("mapped");
            other.load(page, &mut there).expect("readable");
            if here != there {
                let block = u16::try_from(index.0).expect("few blocks");
                let origin = Origin { block, page: page.0, generation: 0 };
                let told = Pattern::new(seed).check(origin, &there);
                return Some(format!("block {block} page {} differs: {told:?}", page.0));
            }
        }
    }
    None
}

pub(crate) fn name(index: usize) -> BlockName {
    BlockName::new(format!("soak.{index}")).expect("a name")
}

pub(crate) const DEVICE: DeviceName = DeviceName::from_static("soak");
const TICK: Duration = Duration::from_millis(1);
