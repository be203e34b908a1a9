//! A guest and a log that fail where the plan says so, and actions at certain moments.
//!
//! Each call is counted; the call in the plan returns an error or panics. The moments are reported at which the plan
//! cancels, or a destination closes its connections.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use fastrand::Rng;
use multifd::{
    channel::Stop,
    live::{DeviceInfo, DeviceName, DeviceSection, Guest, Percent, RunState},
    ram::{BlockIndex, DirtyBitmaps, DirtyLog, DirtyPages, PageBitmap, RamBlocks},
};

use crate::{
    machine::{Machine, World, random_write},
    network::Taken,
    trouble::{Action, Call, Devices, Fault, How, Log, Moment, Trouble},
};

/// What is done, and when.
#[derive(Clone)]
pub(crate) struct Moments {
    action: Option<(Action, Moment)>,
    pub(crate) source: Stop,
    pub(crate) destination: Stop,
    taken: Taken,
}

impl Moments {
    pub(crate) fn new(trouble: &Trouble, taken: Taken) -> Self {
        Self { action: trouble.action, source: Stop::new(), destination: Stop::new(), taken }
    }

    /// Does the action of this moment, if there is one.
    pub(crate) fn pass(&self, moment: Moment) {
        if self.action.is_some_and(|(_, at)| at == moment) {
            self.act();
        }
    }

    pub(crate) fn act(&self) {
        match self.action {
            Some((Action::CancelSource, _)) => self.source.cancel(),
            Some((Action::CancelDestination, _)) => self.destination.cancel(),
            Some((Action::Close, _)) => self.taken.close(),
            None => {}
        }
    }
}

/// The faults in the calls of one migration.
pub(crate) struct Faults {
    pub(crate) trouble: Trouble,
    pub(crate) moments: Moments,
    calls: Mutex<BTreeMap<Call, u32>>,
}

impl Faults {
    pub(crate) fn new(trouble: &Trouble, moments: &Moments) -> Self {
        Self { trouble: trouble.clone(), moments: moments.clone(), calls: Mutex::default() }
    }

    /// Counts a call, and runs `done` unless it is the call that fails.
    fn call<T>(&self, call: Call, done: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let nth = {
            let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
            let nth = calls.entry(call).or_default();
            *nth += 1;
            *nth - 1
        };
        match self.trouble.fault {
            Some(Fault { call: wrong, nth: at, how }) if wrong == call && at == nth => match how {
                How::Error => Err(io::Error::other(ON_PURPOSE)),
                How::Panic => panic!("{ON_PURPOSE}"),
                How::PanicAfter => {
                    let _ = done();
                    panic!("{ON_PURPOSE}")
                }
            },
            _ => done(),
        }
    }

    fn taken(&self) -> u32 {
        self.calls
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&Call::Take)
            .copied()
            .unwrap_or_default()
    }
}

/// The guest as the engine sees it.
pub(crate) struct FaultyGuest<'a> {
    pub(crate) machine: &'a mut Machine,
    pub(crate) faults: &'a Faults,
    /// Writes to memory as it saves its device.
    pub(crate) world: Arc<World>,
    pub(crate) random: Rng,
}

/// A device that the machine does not have.
const GHOST: DeviceName = DeviceName::from_static("ghost");

impl Guest for FaultyGuest<'_> {
    fn devices(&self) -> Vec<DeviceInfo> {
        let devices = self.faults.call(Call::Devices, || {
            let mut devices = self.machine.devices();
            match self.faults.trouble.devices {
                Devices::Twice => devices.push(devices[0].clone()),
                Devices::TooLarge => devices.push(DeviceInfo::new(DeviceName::from_static("disk"), 1 << 40)),
                Devices::NotGiven => devices.push(DeviceInfo::new(GHOST, 4)),
                Devices::Right | Devices::NotAnnounced | Devices::LongerThanAnnounced => {}
            }
            Ok(devices)
        });
        devices.expect("it panics, or gives devices")
    }

    fn run_state(&mut self) -> RunState {
        // Its operator acts before the migration does.
        if self.random.u8(..10) == 0 {
            self.machine.state = match self.machine.state {
                RunState::Running => RunState::Paused,
                RunState::Paused => RunState::Running,
            };
            self.machine.as_wanted();
        }
        let state = self.faults.call(Call::RunState, || Ok(self.machine.run_state()));
        state.expect("it panics, or knows")
    }

    fn stop(&mut self) -> io::Result<()> {
        let stopped = self.faults.call(Call::Stop, || self.machine.stop());
        self.faults.moments.pass(Moment::Stop);
        stopped
    }

    fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
        let (machine, world, random) = (&mut *self.machine, &self.world, &mut self.random);
        let saved = self.faults.call(Call::Save, || {
            if random.bool() {
                let block = random.usize(..machine.blocks.len());
                world.write(&machine.blocks, &machine.marks, random_write(random, &machine.blocks, block));
            }
            machine.save()
        });
        self.faults.moments.pass(Moment::Save);
        let mut saved = saved?;
        match self.faults.trouble.devices {
            Devices::NotAnnounced => saved.push(DeviceSection { name: GHOST, ..saved[0].clone() }),
            Devices::LongerThanAnnounced => saved[0].data.push(0),
            _ => {}
        }
        Ok(saved)
    }

    fn resume(&mut self) {
        let machine = &mut *self.machine;
        if machine.state == RunState::Paused {
            self.world.wrong("a guest was resumed that its operator had paused".into());
        }
        let resumed = self.faults.call(Call::Resume, || {
            machine.as_wanted();
            Ok(())
        });
        resumed.expect("it panics, or resumes");
    }

    fn can_throttle(&self) -> bool {
        true
    }

    fn throttle(&mut self, stand: Percent) -> io::Result<()> {
        self.faults.call(Call::Throttle, || self.machine.throttle(stand))
    }
}

/// The log as the engine sees it.
pub(crate) struct FaultyLog<'a> {
    pub(crate) log: Box<dyn DirtyLog>,
    pub(crate) faults: &'a Faults,
    pub(crate) blocks: Arc<RamBlocks>,
    pub(crate) marks: DirtyBitmaps,
    pub(crate) world: Arc<World>,
    pub(crate) random: Rng,
    /// The number of takes since the guest was stopped.
    pub(crate) late: u32,
}

impl FaultyLog<'_> {
    /// Simulates a device that was not stopped: it writes and marks.
    fn write_late(&mut self, block: BlockIndex) {
        let stopped =
            self.faults.calls.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&Call::Save);
        let Log::WrittenLate(at) = self.faults.trouble.log else { return };
        if stopped {
            if self.late == at {
                let write = random_write(&mut self.random, &self.blocks, block.0);
                self.world.write(&self.blocks, &self.marks, write);
            }
            self.late += 1;
        }
    }
}

impl DirtyLog for FaultyLog<'_> {
    fn begin(&mut self, blocks: &RamBlocks) -> io::Result<()> {
        self.faults.call(Call::Begin, || self.log.begin(blocks))
    }

    fn take(&mut self, block: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()> {
        self.faults.moments.pass(Moment::Take(self.faults.taken()));
        self.write_late(block);
        self.faults.call(Call::Take, || self.log.take(block, into))
    }

    fn put_back(&mut self, block: BlockIndex, from: &PageBitmap) {
        let put = self.faults.call(Call::PutBack, || {
            self.log.put_back(block, from);
            Ok(())
        });
        put.expect("it panics, or puts back");
    }
}

/// The text of the errors and panics that are made here.
pub(crate) const ON_PURPOSE: &str = "on purpose, by the soak";
