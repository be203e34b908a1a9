//! Post-copy: a guest that runs at its destination before its memory is there.

use std::{fs, sync::Arc, thread, time::Duration};

use multifd::{
    Error, Result,
    channel::{Address, Listener, Stop},
    live::{Guest, MigrationInfo, RunState},
    ram::ThreadWaits,
};
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions, EarlyOptions, Landing, Running},
    outgoing::postcopy::{Moved, PostcopyInfo},
    source::{Source, SourceOptions},
};

use crate::{Failure, control, machine::Machine, memory, tell};

/// Moves the machine, which may switch to post-copy. After an error, the guest is here.
pub(crate) fn migrate(
    mut machine: &Machine,
    address: Address,
    options: SourceOptions,
    stop: &Stop,
) -> Result<(MigrationInfo, Option<PostcopyInfo>)> {
    let source = Source::new(machine.blocks.clone(), options, stop)?;
    let log = machine.dirty_log();
    let mut log = log.map_err(|error| Error::io("switch dirty logging on", error))?;
    match source.run(address.clone(), &mut log, &mut machine)? {
        Moved::Completed { info, postcopy } => Ok((*info, postcopy)),
        Moved::Interrupted(interrupted) => {
            // The guest runs there, and needs the pages that are here. Only the end of this process gives that up.
            tell(&format!("post-copy is interrupted: {}", control::chain(interrupted.error())));
            let again = interrupted.resume_within(RETURNS, address, &Stop::new(), &mut log, &mut machine)?;
            match again {
                Moved::Completed { info, postcopy } => Ok((*info, postcopy)),
                Moved::Interrupted(interrupted) => Err(interrupted.error().clone()),
            }
        }
    }
}

/// A machine that has arrived, or whose memory follows.
pub(crate) struct Arrived {
    machine: Machine,
    running: Option<Running>,
}

/// Receives one machine. If its source switches to post-copy, its guest runs before its memory is there.
pub(crate) fn receive(listener: Listener, options: ArrivalOptions, stop: &Stop) -> Result<Arrived, Failure> {
    let options = options.run_early(true);
    let announced = Arrival::listen(listener, options, stop)?.accept()?.announced()?;
    let memory = memory::new(announced.list().total())?;
    match announced.load_early(memory::blocks(&memory)?, EarlyOptions::new())? {
        // The source did not switch: as in `destination.rs`.
        Landing::Complete(pending) => {
            let section = |name: &str| Some(pending.device(name, 0)?.1.to_vec());
            let machine = Machine::restore(memory, pending.blocks().clone(), section)?;
            let confirmed = pending.confirm()?;
            if confirmed.run_state() == RunState::Running {
                machine.run();
            }
            confirmed.finish();
            Ok(Arrived { machine, running: None })
        }
        Landing::Early(early) => {
            // A device that cannot be restored is an error here, and the guest stays at the source.
            let section = |name: &str| Some(early.device(name, 0)?.1.to_vec());
            let machine = Machine::restore(memory, early.blocks().clone(), section)?;
            // From here on the guest is ours, whatever happens to the connection.
            let running = early.confirm()?;
            if running.run_state() == RunState::Running {
                machine.run();
            }
            Ok(Arrived { machine, running: Some(running) })
        }
    }
}

impl Arrived {
    /// Calls `serve` with the machine, and says when all of its memory is there.
    pub(crate) fn serve(self, serve: impl FnOnce(&Machine) -> Result<(), Failure>) -> Result<(), Failure> {
        let Self { machine, running } = self;
        let Some(mut running) = running else { return serve(&machine) };
        let ends = Arc::new(Stop::new());
        thread::scope(|scope| {
            let follows = ends.clone();
            let machine = &machine;
            scope.spawn(move || {
                while !running.wait(Some(LOOK)) && !follows.is_stopped() {}
                if follows.is_stopped() && running.stats().missing > 0 {
                    // The vCPU must not run when missing pages are poisoned.
                    let _ = { machine }.stop();
                    return;
                }
                match running.finish() {
                    Ok(finished) => {
                        let faults = finished.faults;
                        tell(&format!(
                            "all memory is there: faults={} loaded={} pushed={} blocked_us={} p50_us={} p99_us={}{}",
                            faults.faults,
                            faults.loaded,
                            faults.prefetched,
                            faults.blocked.as_micros(),
                            faults.p50.unwrap_or_default().as_micros(),
                            faults.p99.unwrap_or_default().as_micros(),
                            finished.threads.iter().map(of_thread).collect::<String>(),
                        ));
                    }
                    Err(error) => {
                        tell(&format!("memory is missing: {}", control::chain(&error)));
                        let _ = { machine }.stop();
                    }
                }
            });
            let served = serve(machine);
            ends.cancel();
            served
        })
    }
}

/// How long the source tries to return.
const RETURNS: Duration = Duration::from_secs(600);
const LOOK: Duration = Duration::from_millis(100);

/// How long a thread has waited, with its name if it still runs.
fn of_thread(waits: &ThreadWaits) -> String {
    let name = fs::read_to_string(format!("/proc/self/task/{}/comm", waits.thread)).unwrap_or_default();
    format!(
        " | {} ({}): waits={} blocked_us={} p50_us={} p99_us={}",
        name.trim_end(),
        waits.thread,
        waits.waits,
        waits.blocked.as_micros(),
        waits.p50.unwrap_or_default().as_micros(),
        waits.p99.unwrap_or_default().as_micros(),
    )
}
