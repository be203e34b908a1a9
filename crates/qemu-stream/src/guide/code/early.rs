use std::{error::Error as StdError, time::Duration};

use multifd::{
    channel::{Address, Listener, Stop},
    live::{MigrateOptions, PostcopyWhen, RunState, ZeroPageDetection},
    ram::{Mapping, Memory, RamBlock, RamBlocks},
};
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions, EarlyOptions, Landing, Running},
    format::{BlockEntry, Configuration, MachineType},
    incoming::Expected,
    outgoing::postcopy::Moved,
    source::{Source, SourceOptions},
};

use crate::machine::{COUNTER, Machine};

type Result<T> = std::result::Result<T, Box<dyn StdError + Send + Sync>>;

/// Moves the machine. If no end can be predicted, its guest goes first, and the rest of its memory follows.
pub fn leave_early(machine: &mut Machine, address: &Address, when: PostcopyWhen, stop: &Stop) -> Result<()> {
    let passes = MigrateOptions::new().postcopy(when).zero_page_detection(ZeroPageDetection::Multifd);
    let options = SourceOptions::new(Configuration::new(MachineType::new("counter-1")?)).migrate(passes);
    let source = Source::new(machine.blocks.clone(), options, stop)?;
    let mut log = machine.writes.clone().reader()?;
    // An error means that the guest is here, and runs if it ran.
    let mut moved = source.run(address.clone(), &mut log, machine)?;
    // The guest is there, and needs pages that only this process has.
    while let Moved::Interrupted(interrupted) = moved {
        let limit = Duration::from_secs(60);
        moved = interrupted.resume_within(limit, address.clone(), &Stop::new(), &mut log, machine)?;
    }
    Ok(())
}

/// Receives a machine. `Running` brings the rest of its memory, if its source has switched.
pub fn arrive_early(listener: Listener, stop: &Stop) -> Result<(Machine, Option<Running>)> {
    let options = ArrivalOptions::new(Expected::Type(MachineType::new("counter-1")?)).run_early(true);
    let announced = Arrival::listen(listener, options, stop)?.accept()?.announced()?;
    let page_size = announced.list().page_size();
    let block = |entry: &BlockEntry| -> Result<RamBlock> {
        let memory = Memory::Mapped(Mapping::anonymous(entry.used_length)?);
        Ok(RamBlock::new(entry.name.clone(), entry.used_length, page_size, memory)?)
    };
    let blocks = announced.list().entries().iter().map(block).collect::<Result<_>>()?;
    let count = |state: &[u8]| -> Result<u64> { Ok(u64::from_be_bytes(state.try_into()?)) };
    match announced.load_early(RamBlocks::new(blocks)?, EarlyOptions::new())? {
        // The source did not switch: all memory is here.
        Landing::Complete(pending) => {
            let (_, state) = pending.device(COUNTER.as_str(), 0).ok_or("expected a counter")?;
            let mut machine = Machine::new(pending.blocks().clone(), count(state)?);
            let confirmed = pending.confirm()?;
            if confirmed.run_state() == RunState::Running {
                machine.run();
            }
            confirmed.finish();
            Ok((machine, None))
        }
        Landing::Early(early) => {
            // Until `confirm`, an error or a panic gives the guest back to its source.
            let (_, state) = early.device(COUNTER.as_str(), 0).ok_or("expected a counter")?;
            let mut machine = Machine::new(early.blocks().clone(), count(state)?);
            let running = early.confirm()?;
            // From here on the guest is ours. It waits where it needs a page that has not arrived.
            if running.run_state() == RunState::Running {
                machine.run();
            }
            Ok((machine, Some(running)))
        }
    }
}
