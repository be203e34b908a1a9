use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use multifd::{
    live::{DeviceInfo, DeviceName, DeviceSection, Guest, RunState},
    ram::{BlockIndex, DirtyBitmaps, PageIndex, RamBlocks},
};

/// Its only device. The compiler refuses a name that cannot be sent.
pub const COUNTER: DeviceName = DeviceName::from_static("counter");

/// A guest that counts, and writes each number to the next page.
pub struct Machine {
    pub blocks: Arc<RamBlocks>,
    /// The pages that it has written since the last take.
    pub writes: DirtyBitmaps,
    /// The state of its only device: the last number.
    pub count: u64,
    halt: Arc<AtomicBool>,
    vcpu: Option<JoinHandle<u64>>,
}

impl Machine {
    pub fn new(blocks: Arc<RamBlocks>, count: u64) -> Self {
        let writes = DirtyBitmaps::new(&blocks);
        Self { blocks, writes, count, halt: Arc::default(), vcpu: None }
    }

    /// Runs the guest in a thread of its own, unless it runs already.
    pub fn run(&mut self) {
        if self.is_running() {
            return;
        }
        let (blocks, writes) = (self.blocks.clone(), self.writes.clone());
        let (halt, mut count) = (Arc::new(AtomicBool::new(false)), self.count);
        self.halt = halt.clone();
        self.vcpu = Some(thread::spawn(move || {
            let ram = blocks.block(BlockIndex(0)).expect("the machine's one block");
            while !halt.load(Ordering::Relaxed) {
                count += 1;
                let page = PageIndex(count % ram.pages());
                let mut bytes = [0; 4096];
                bytes[..8].copy_from_slice(&count.to_be_bytes());
                ram.slice(page, 1).expect("mapped").copy_from(&bytes);
                writes.mark(BlockIndex(0), page); // after the write, never before
            }
            count
        }));
    }

    /// Stops the guest between two writes.
    pub fn halt(&mut self) {
        self.halt.store(true, Ordering::Relaxed);
        if let Some(vcpu) = self.vcpu.take() {
            self.count = vcpu.join().expect("the guest does not panic");
        }
    }

    pub fn is_running(&self) -> bool {
        self.vcpu.is_some()
    }

    /// Whether every page has the last number written to it, so that no write is missing.
    pub fn is_whole(&self) -> bool {
        let ram = self.blocks.block(BlockIndex(0)).expect("the machine's one block");
        (0..ram.pages()).all(|page| {
            let expected = if page > self.count { 0 } else { self.count - (self.count - page) % ram.pages() };
            let mut bytes = [0; 4096];
            ram.slice(PageIndex(page), 1).expect("mapped").copy_to(&mut bytes);
            bytes[..8] == expected.to_be_bytes()
        })
    }
}

impl Guest for Machine {
    /// The devices that `save` will return, with their greatest sizes.
    fn devices(&self) -> Vec<DeviceInfo> {
        vec![DeviceInfo::new(COUNTER, 8)]
    }

    /// Called before `stop`: a paused guest stays paused at the destination.
    fn run_state(&mut self) -> RunState {
        if self.is_running() { RunState::Running } else { RunState::Paused }
    }

    /// After this returns, nothing writes to RAM: no vCPU, no device thread, no pending request.
    fn stop(&mut self) -> io::Result<()> {
        self.halt();
        Ok(())
    }

    fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
        let data = self.count.to_be_bytes().to_vec();
        Ok(vec![DeviceSection { name: COUNTER, instance_id: 0, version: 1, data }])
    }

    /// The migration has failed: the guest, which ran before, continues here.
    fn resume(&mut self) {
        self.run();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.halt();
    }
}
