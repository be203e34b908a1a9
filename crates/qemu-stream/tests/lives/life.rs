//! A life: a machine, the expected contents of its memory, and one step after the other.
//!
//! After each step one machine has the guest: its memory equals the shadow's byte by byte, its device has counted every
//! write, it runs or is paused as its operator wants, and nothing else of the step is left in this process.

use std::{sync::Arc, thread, time::Duration};

use fastrand::Rng;
use multifd::{
    live::RunState,
    ram::{BlockName, PageSize, RamBlock, RamBlocks},
};
use multifd_testkit::{in_use, in_use_after};

use crate::{
    hop::Outcome,
    machine::{Machine, World, random_write},
    memory::Kind,
    network::Means,
    plan::{Do, Plan, Step},
    shadow::What,
    snapshot::Snapshot,
};

pub(crate) struct Life {
    pub(crate) world: Arc<World>,
    pub(crate) machine: Machine,
    pub(crate) page_size: PageSize,
    pub(crate) snapshot: Option<Snapshot>,
    /// Blocks of hosts that the machine has left.
    pub(crate) former: Vec<Arc<RamBlocks>>,
    hosts: u64,
    names: u64,
    before: (usize, usize),
}

impl Life {
    pub(crate) fn begin(plan: &Plan) -> Self {
        let before = in_use();
        let world = Arc::new(World::default());
        world.shadow().page = plan.page_size.bytes();
        let mut random = Rng::with_seed(!plan.seed);
        let mut names = 0;
        let blocks = plan.blocks.iter().map(|pages| {
            names += 1;
            new_block(&world, plan.page_size, names, *pages, Kind::any(&mut random))
        });
        let blocks = Arc::new(RamBlocks::new(blocks.collect()).expect("distinct"));
        let mut machine = Machine::new(1, blocks, 0, plan.load, world.clone());
        machine.state = if plan.runs { RunState::Running } else { RunState::Paused };
        let (page_size, snapshot, former, hosts) = (plan.page_size, None, Vec::new(), 1);
        let mut life = Self { world, machine, page_size, snapshot, former, hosts, names, before };
        life.write(random.u64(..256), &mut random);
        life.machine.as_wanted();
        life
    }

    pub(crate) fn next_host(&mut self) -> u64 {
        self.hosts += 1;
        self.hosts
    }

    /// Makes a step. Returns its kind and its outcome.
    ///
    /// # Errors
    /// What is not allowed to happen.
    pub(crate) fn step(&mut self, step: &Step, means: &Means) -> Result<Vec<(String, Outcome)>, String> {
        let mut random = Rng::with_seed(step.seed);
        let mut made = Vec::new();
        match &step.what {
            Do::Wait(micros) => thread::sleep(Duration::from_micros(*micros)),
            Do::Write(pages) => {
                self.machine.halt();
                self.write(*pages, &mut random);
                self.machine.as_wanted();
            }
            Do::Pause(pause) => {
                self.machine.state = if *pause { RunState::Paused } else { RunState::Running };
                self.machine.as_wanted();
            }
            Do::Plug(pages) => self.rebuild(|life, blocks| {
                if blocks.len() < 6 {
                    life.names += 1;
                    let kind = Kind::any(&mut random);
                    let block = new_block(&life.world, life.page_size, life.names, *pages, kind);
                    blocks.insert(random.usize(..=blocks.len()), block);
                }
            })?,
            Do::Unplug => self.rebuild(|life, blocks| {
                if blocks.len() > 1 {
                    let gone = blocks.remove(random.usize(..blocks.len()));
                    life.world.shadow().blocks.remove(&gone.name().to_string());
                }
            })?,
            Do::Hop(hop) => {
                let outcome = self.hop(hop, step.seed, means)?;
                made.push((format!("hop, {}", hop.kind()), outcome));
                // After a failure, the machine can move at once.
                if outcome == Outcome::Stayed && random.bool() {
                    self.check().map_err(|text| format!("before it is tried again: {text}"))?;
                    let again = self.hop(&hop.without_trouble(), !step.seed, means);
                    let again = again.map_err(|text| format!("tried again: {text}"))?;
                    made.push(("hop, tried again".into(), again));
                }
            }
            Do::Capture(capture) => {
                let outcome = self.capture(capture, step.seed)?;
                made.push((format!("capture, {}", capture.trouble.kind()), outcome));
            }
            Do::Restore(restore) => {
                let outcome = self.restore(restore, step.seed)?;
                made.push((format!("restore, cancelled first: {}", restore.cancelled.is_some()), outcome));
            }
        }
        self.check()?;
        Ok(made)
    }

    /// Ends the life, and checks what is left of it.
    ///
    /// # Errors
    /// What is not allowed to happen.
    pub(crate) fn end(self) -> Result<(), String> {
        let (world, (threads, descriptors)) = (self.world.clone(), self.before);
        drop(self);
        if world.pool().in_use() > 0 {
            return Err(format!("{} pieces of memory are still in use", world.pool().in_use()));
        }
        let files = world.pool().files();
        left_behind((threads, descriptors + files))
    }

    /// Checks that the machine is as expected, and that nothing else is left in the process.
    fn check(&mut self) -> Result<(), String> {
        let runs = self.machine.is_running();
        if runs != (self.machine.state == RunState::Running) {
            return Err(format!("the guest is to be {}, runs: {runs}", self.machine.state));
        }
        self.machine.halt();
        if let Some(wrong) = self.world.take_wrong() {
            return Err(wrong);
        }
        let shadow = self.world.shadow();
        if let Some(difference) = shadow.difference(&self.machine.blocks) {
            return Err(difference);
        }
        if shadow.count != self.machine.count() {
            return Err(format!(
                "the device has counted {}, expected {}",
                self.machine.count(),
                shadow.count
            ));
        }
        drop(shadow);
        let (threads, descriptors) = self.before;
        let files = self.world.pool().files() + usize::from(self.snapshot.is_some());
        left_behind((threads, descriptors + files))?;
        self.machine.as_wanted();
        Ok(())
    }

    /// Writes to pages, while the guest is stopped.
    fn write(&mut self, pages: u64, random: &mut Rng) {
        let machine = &self.machine;
        let most = random.u8(..4);
        for _ in 0..pages {
            let block = random.usize(..machine.blocks.len());
            let mut write = random_write(random, &machine.blocks, block);
            // Sometimes most of it becomes zero.
            match most {
                0 => write.what = What::Zero,
                1 => write.what = What::Discard,
                _ => {}
            }
            self.world.write(&machine.blocks, &machine.marks, write);
        }
    }

    /// Gives the machine other blocks. Those that it keeps are the same as before.
    fn rebuild(&mut self, change: impl FnOnce(&mut Self, &mut Vec<RamBlock>)) -> Result<(), String> {
        self.machine.halt();
        let nothing = Arc::new(RamBlocks::default());
        let (count, load, state) = (self.machine.count(), self.machine.load(), self.machine.state);
        let (host, world) = (self.machine.host, self.world.clone());
        let standing = Machine::new(host, nothing, count, load, world.clone());
        let old = std::mem::replace(&mut self.machine, standing);
        let blocks = old.blocks.clone();
        drop(old);
        let blocks = Arc::try_unwrap(blocks).map_err(|_| "something still holds the machine's blocks")?;
        let mut blocks = blocks.into_iter().collect();
        change(self, &mut blocks);
        let blocks = Arc::new(RamBlocks::new(blocks).expect("distinct"));
        self.machine = Machine::new(host, blocks, count, load, world);
        self.machine.state = state;
        self.machine.as_wanted();
        Ok(())
    }

    /// The blocks of a host that the machine has left, to be used again.
    pub(crate) fn take_former(&mut self) -> Option<RamBlocks> {
        let former = std::mem::take(&mut self.former).pop()?;
        match Arc::try_unwrap(former) {
            Ok(blocks) => Some(blocks),
            Err(_) => {
                self.world.wrong("something still holds the blocks of a former host".into());
                None
            }
        }
    }
}

fn new_block(world: &World, page_size: PageSize, number: u64, pages: u64, kind: Kind) -> RamBlock {
    let length = pages * page_size.bytes() as u64;
    let name = BlockName::new(format!("ram.{number}")).expect("a name");
    world.shadow().blocks.insert(name.to_string(), vec![0; usize::try_from(length).expect("small")]);
    // New memory: what the machine has never written is zero.
    world.pool().block(&name, length, page_size, false, kind)
}

/// Checks that nothing of an ended step is left in the process.
fn left_behind(before: (usize, usize)) -> Result<(), String> {
    match in_use_after(before) {
        now if now == before => Ok(()),
        now => Err(format!("threads and descriptors: {before:?} before, {now:?} afterwards")),
    }
}
