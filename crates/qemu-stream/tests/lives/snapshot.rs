//! Captures a machine into a file, and restores it.

use std::{fs::File, io::Write as _, os::unix::fs::FileExt, sync::Arc, thread, time::Duration};

use fastrand::Rng;
use multifd::{
    SendOptions, Sender,
    channel::Stop,
    error::chain,
    live::{MigrateOptions, Migration, RunState, Status},
    ram::{RamBlock, RamBlocks},
};
use qemu_stream::mapped_ram::{self, CaptureOptions, MappedRamFile};

use crate::{
    faults::Moments,
    hop::{Outcome, configuration, first_cause},
    life::Life,
    machine::{Machine, count_in},
    memory::Kind,
    network::Taken,
    plan::{Capture, Place, Restore},
    shadow::Shadow,
    trouble::Moment,
};

/// A machine in a file, and its former state.
pub(crate) struct Snapshot {
    file: File,
    offset: u64,
    shadow: Shadow,
    state: RunState,
}

impl Life {
    /// Captures the machine, and checks the result.
    ///
    /// # Errors
    /// What is not allowed to happen.
    pub(crate) fn capture(&mut self, plan: &Capture, seed: u64) -> Result<Outcome, String> {
        let mut random = Rng::with_seed(seed);
        let mut file = tempfile::tempfile().expect("a file");
        let junk = vec![0xa5; usize::try_from(plan.offset).expect("small") + (1 << 16)];
        file.write_all(&junk).expect("written");
        let moments = Moments::new(&plan.trouble, Taken::default());
        moments.pass(Moment::BeforeConnecting);
        let (blocks, stop) = (self.machine.blocks.clone(), moments.source.clone());
        let options = CaptureOptions::new().offset(plan.offset).direct_io(plan.direct);
        let machine = configuration(plan.machine, self.page_size);
        let into = file.try_clone().expect("the same file");
        let capture = mapped_ram::Capture::of_guest(into, machine, &blocks, &options);
        let mut capture = capture.map_err(|error| format!("begin the capture: {}", chain(&error)))?;
        let options =
            MigrateOptions::new().zero_page_detection(plan.detection).pause_before_switchover(plan.pauses);
        let migration = if plan.channels > 0 {
            let send = SendOptions::new().channels(plan.channels);
            Sender::new(send, blocks, stop).and_then(|mut sender| {
                sender.set_up_into(capture.blocks().clone())?;
                Migration::new(options, sender)
            })
        } else {
            Migration::over_main(options, blocks, stop)
        };
        let migration = match migration {
            Ok(migration) => migration,
            Err(error) if error.is_cancelled() && plan.trouble.cancels_source() => {
                return Ok(Outcome::Stayed);
            }
            Err(error) => return Err(format!("prepare the capture: {}", chain(&error))),
        };
        let (progress, control) = (migration.progress(), migration.control());
        let operator = plan.pauses.then(|| {
            let moments = moments.clone();
            thread::spawn(move || {
                if control.wait_pre_switchover() {
                    moments.pass(Moment::PreSwitchover);
                    let _ = control.proceed();
                }
            })
        });
        let attempt = self.attempt(&plan.trouble, &moments, &mut random, |log, guest| {
            migration.run(&mut capture, log, guest)
        })?;
        drop(capture);
        let result = attempt.join();
        if let Some(operator) = operator {
            operator.join().map_err(|_| "the operator's thread panicked".to_owned())?;
        }
        let mut before = vec![0; junk.len() - (1 << 16)];
        file.read_exact_at(&mut before, 0).map_err(|error| format!("what stood before is gone: {error}"))?;
        if before[..] != junk[..before.len()] {
            return Err("what stood in the file before the machine has changed".into());
        }
        match result {
            Ok(info) => {
                if plan.trouble.must_fail() {
                    return Err("it completed, though it cannot be".into());
                }
                let was = self.machine.state;
                if self.machine.is_running() || info.guest_was != Some(was) {
                    let runs = self.machine.is_running();
                    return Err(format!("captured; was {:?}, expected {was}; runs: {runs}", info.guest_was));
                }
                let shadow = self.world.shadow().clone();
                self.snapshot = Some(Snapshot { file, offset: plan.offset, shadow, state: was });
                self.machine.as_wanted();
                Ok(Outcome::Done)
            }
            Err(error) => {
                if plan.trouble.is_none() {
                    return Err(format!("the capture failed without a cause: {}", chain(&error)));
                }
                let status = progress.status();
                // Only a file could have it.
                if matches!(error.kind(), multifd::Error::OwnerUnknown(_)) {
                    return Err(format!("nobody knows whether a file has the guest: {}", chain(&error)));
                }
                if status == Status::None {
                    return Err(format!("the capture did not end: {}", chain(&error)));
                }
                first_cause(&plan.trouble, &error)?;
                self.stays(&plan.trouble, false, &error, status)?;
                self.machine.as_wanted();
                if MappedRamFile::open(file, plan.offset).is_ok() {
                    return Err(format!(
                        "a machine is in the file of a capture that failed: {}",
                        chain(&error)
                    ));
                }
                Ok(Outcome::Stayed)
            }
        }
    }

    /// Takes the machine back to its state at the capture.
    ///
    /// # Errors
    /// What is not allowed to happen.
    pub(crate) fn restore(&mut self, plan: &Restore, seed: u64) -> Result<Outcome, String> {
        if self.snapshot.is_none() {
            self.capture(&plan.capture, seed)?;
        }
        let snapshot = self.snapshot.take().ok_or("captured, and no file is there")?;
        let restored = self.restore_from(&snapshot, plan, seed);
        self.snapshot = Some(snapshot);
        restored
    }

    fn restore_from(&mut self, snapshot: &Snapshot, plan: &Restore, seed: u64) -> Result<Outcome, String> {
        let mut random = Rng::with_seed(seed);
        let file = snapshot.file.try_clone().expect("the same file");
        let file = MappedRamFile::open(file, snapshot.offset);
        let file = file.map_err(|error| format!("open the file: {}", chain(&error)))?;
        let alike = |blocks: &RamBlocks| {
            let same = |block: &RamBlock| {
                let of_file = snapshot.shadow.blocks.get(&block.name().to_string());
                of_file.is_some_and(|bytes| bytes.len() as u64 == block.used_length())
            };
            blocks.len() == snapshot.shadow.blocks.len() && blocks.iter().all(|(_, block)| same(block))
        };
        self.machine.halt();
        let in_place = plan.in_place && alike(&self.machine.blocks);
        let blocks = if in_place {
            self.machine.blocks.clone()
        } else {
            let former = if plan.memory == Place::Former { self.take_former() } else { None };
            let mut blocks: Vec<RamBlock> = match former.filter(|former| alike(former)) {
                Some(former) => former.into_iter().collect(),
                None => {
                    let list = file.blocks();
                    let mut pool = self.world.pool();
                    let used = plan.memory != Place::New;
                    let entries = list.entries().iter();
                    entries
                        .map(|entry| {
                            let kind = Kind::any(&mut random);
                            pool.block(&entry.name, entry.used_length, list.page_size(), used, kind)
                        })
                        .collect()
                }
            };
            random.shuffle(&mut blocks);
            Arc::new(RamBlocks::new(blocks).expect("distinct"))
        };
        let restore = mapped_ram::Restore::new(&file).channels(plan.channels).direct_io(plan.direct);
        if let Some(micros) = plan.cancelled {
            let stop = Stop::new();
            let canceller = stop.clone();
            let canceller = thread::spawn(move || {
                thread::sleep(Duration::from_micros(micros));
                canceller.cancel();
            });
            let first = restore.run(&blocks, &stop);
            canceller.join().expect("it does not panic");
            if let Some(error) = first.err().filter(|error| !error.is_cancelled()) {
                return Err(format!("a cancelled restore failed otherwise: {}", chain(&error)));
            }
        }
        restore.run(&blocks, &Stop::new()).map_err(|error| format!("restore: {}", chain(&error)))?;
        *self.world.shadow() = snapshot.shadow.clone();
        let devices = file.devices();
        if devices.run_state() != Some(snapshot.state) {
            return Err(format!("captured {}, in the file {:?}", snapshot.state, devices.run_state()));
        }
        let count = count_in(devices).ok_or("the file has not the machine's devices")?;
        let (host, load, world) = (self.next_host(), self.machine.load(), self.world.clone());
        let mut machine = Machine::new(host, blocks, count, load, world);
        machine.state = snapshot.state;
        let old = std::mem::replace(&mut self.machine, machine);
        if !in_place {
            self.former.push(old.blocks.clone());
        }
        drop(old);
        self.machine.as_wanted();
        Ok(Outcome::Done)
    }
}
