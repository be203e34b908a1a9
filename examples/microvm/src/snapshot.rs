//! A machine in a file: captured while its guest runs, and restored, also while its guest runs already.

use std::{
    fs::{self, File},
    path::Path,
    sync::Arc,
    thread,
    time::Duration,
};

use multifd::{
    SendOptions, Sender,
    channel::Stop,
    live::{Guest, MigrateOptions, Migration, MigrationInfo, RunState, ZeroPageDetection},
    ram::{CopierOptions, CopierStats, Pager, PagerOptions},
};
use qemu_stream::{
    format::Configuration,
    mapped_ram::{Base, Capture, CaptureOptions, Restore, StoredMachine},
};

use crate::{Failure, control, machine::Machine, memory, tell};

/// Captures the machine, or what differs from the machine in the file `base`. Its guest runs meanwhile, and continues afterwards.
pub(crate) fn save(
    mut machine: &Machine,
    path: &Path,
    base: Option<&Path>,
) -> Result<MigrationInfo, Failure> {
    // 1. The base is opened before the file is created, which must not be one of its files.
    let base = match base {
        None => None,
        Some(base) => {
            let stored = StoredMachine::open(base, 0)?;
            let base = Base::new(&stored, Base::relative(path, base)?)?;
            // The complete file replaces the one that is there.
            if path.exists() && base.has(&File::open(path)?)? {
                return Err(format!("{} is a file of the base", path.display()).into());
            }
            Some(base)
        }
    };
    // A file with a temporary name until it is complete.
    let unfinished = path.with_extension("unfinished");
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&unfinished)?;
    let options = CaptureOptions::new().digests(true);
    let configuration = Configuration::new(Machine::machine_type()?);
    let mut capture = match &base {
        None => Capture::of_guest(file, configuration, &machine.blocks, &options)?,
        // Without a dirty log that was kept, all memory is compared with the base.
        Some(base) => Capture::since(base, file, configuration, &machine.blocks, &options)?,
    };

    // 2. Like a migration whose channels copy.
    let mut sender = Sender::new(SendOptions::new(), machine.blocks.clone(), Stop::new())?;
    sender.set_up_into(capture.blocks().clone())?;
    let passes = MigrateOptions::new().zero_page_detection(ZeroPageDetection::Multifd);
    let captured = {
        let mut log = machine.dirty_log()?;
        Migration::new(passes, sender)?.run(&mut capture, &mut log, &mut machine)
    };

    // 3. The guest is stopped. No other process runs it, so it may continue here.
    let info = captured?;
    machine.run();
    fs::rename(unfinished, path)?;
    Ok(info)
}

/// Captures the machine as it is at one moment: its guest is stopped while its devices are saved, and runs while its memory is copied.
/// Returns also how long the guest was stopped.
pub(crate) fn save_moment(mut machine: &Machine, path: &Path) -> Result<(CopierStats, Duration), Failure> {
    let unfinished = path.with_extension("unfinished");
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&unfinished)?;
    let options = CaptureOptions::new().digests(true);
    let configuration = Configuration::new(Machine::machine_type()?);
    let capture = Capture::of_guest(file, configuration, &machine.blocks, &options)?;

    // The vCPU, and the device through `vm-memory`, write to memory of this process: no dirty log is needed. Memory that another process
    // may take over is not written by it before this one has ended with it.
    let options = CopierOptions::new().sole_writer(true);
    let mut capture = capture.at_moment(&machine.blocks, &mut machine, options)?;

    // The guest runs already. It waits only for pages that it writes to before they were copied.
    let stats = capture.finish(None)?;
    fs::rename(unfinished, path)?;
    Ok((stats, capture.pause()))
}

/// A machine out of a file.
pub(crate) struct Restored {
    machine: Machine,
    /// Brings the rest of the memory; `None` if all of it is there.
    pager: Option<Arc<Pager>>,
}

/// Restores the machine, and runs its guest if it ran when it was captured. With `lazy`, its memory follows.
pub(crate) fn restore(path: &Path, lazy: bool) -> Result<Restored, Failure> {
    // 1. Everything but the pages is read and checked: of the file, and of its base if it is a delta.
    let file = StoredMachine::open(path, 0)?;
    let found = file.configuration().map(|configuration| &configuration.machine);
    if found != Some(&Machine::machine_type()?) {
        return Err(format!("{} contains a machine of another type", path.display()).into());
    }

    // 2. Memory: all of it now, or each page when it is needed.
    let memory = memory::new(file.blocks().total())?;
    let blocks = Arc::new(memory::blocks(&memory)?);
    let pager = match lazy {
        true => Some(Arc::new(Restore::new(&file).lazy(&blocks, PagerOptions::new())?)),
        false => {
            Restore::new(&file).run(&blocks, &Stop::new())?;
            None
        }
    };

    // 3. Devices. None of them accesses memory before the guest runs.
    let section = |name: &str| Some(file.devices().find(name, 0)?.1.to_vec());
    let machine = Machine::restore(memory, blocks, section)?;
    if file.devices().run_state().unwrap_or(RunState::Running) == RunState::Running {
        machine.run();
    }
    Ok(Restored { machine, pager })
}

impl Restored {
    /// Calls `serve` with the machine, and says when all of its memory is there.
    pub(crate) fn serve(&self, serve: impl FnOnce(&Machine) -> Result<(), Failure>) -> Result<(), Failure> {
        let Some(pager) = &self.pager else { return serve(&self.machine) };
        thread::scope(|scope| {
            scope.spawn(|| match pager.finish(None) {
                Ok(stats) => tell(&format!(
                    "all memory is there: faults={} loaded={} prefetched={} blocked_us={} p99_us={}",
                    stats.faults,
                    stats.loaded,
                    stats.prefetched,
                    stats.blocked.as_micros(),
                    stats.p99.unwrap_or_default().as_micros(),
                )),
                Err(error) => tell(&format!("memory is missing: {}", control::chain(&error))),
            });
            let served = serve(&self.machine);
            // The machine has moved, or is to end. Its vCPU must not run when missing pages are poisoned.
            if let Err(error) = (&self.machine).stop() {
                tell(&format!("the guest had stopped: {error}"));
            }
            pager.stop();
            served
        })
    }
}
