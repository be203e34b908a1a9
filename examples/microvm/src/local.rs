//! Moves a machine to another process of this host without copying its memory.

use std::sync::Arc;

use multifd::{
    Result,
    channel::{
        Address, Stop,
        hand_over::{HandOver, HandOverListener, HandedOver},
    },
    live::{MigrationInfo, RunState},
    ram::NeverDirty,
};
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions},
    format::Configuration,
    source::{Source, SourceOptions},
};

use crate::{Failure, machine::Machine, memory};

/// Hands the machine over. If that fails, or `stop` cancels it, the guest continues here.
pub(crate) fn hand_over(
    mut machine: &Machine,
    address: &Address,
    stop: &Stop,
) -> Result<MigrationInfo, Failure> {
    // 1. The memory as ignored blocks: no page of it is sent, so no log of written pages is needed.
    let (blocks, memory) = machine.shared()?;
    let connector = HandOver::new(address, &blocks, memory)?;

    // 2. A migration of the devices.
    let configuration = Configuration { ignore_shared: true, ..Configuration::new(Machine::machine_type()?) };
    let options = SourceOptions::new(configuration).channels(0);
    let source = Source::new(Arc::new(blocks), options, stop)?;
    Ok(source.migrate(connector, &mut NeverDirty, &mut machine)?)
}

/// Takes a machine over. Its guest runs as soon as the source has the confirmation.
pub(crate) fn take_over(
    listener: HandOverListener,
    handed: &HandedOver,
    options: ArrivalOptions,
    stop: &Stop,
) -> Result<Machine, Failure> {
    let announced = Arrival::listen(listener, options, stop)?.accept()?.announced()?;
    // Until the confirmation, the source may continue with this memory: nothing is written to it.
    let shared = match handed.take() {
        Ok(shared) => shared,
        Err(error) => return Err(announced.refuse(error).into()),
    };
    let blocks = announced.list().in_memory_of(&shared)?;
    let pending = announced.load(blocks)?;

    let [shared] = <[_; 1]>::try_from(shared).map_err(|_| "expected one block of memory")?;
    let memory = memory::in_file(shared.file, shared.length)?;
    let section = |name: &str| Some(pending.device(name, 0)?.1.to_vec());
    // Blocks that are not ignored, for the next migration.
    let blocks = Arc::new(memory::blocks(&memory)?);
    let machine = Machine::restore(memory, blocks, section)?;

    let confirmed = pending.confirm()?;
    if confirmed.run_state() == RunState::Running {
        machine.run();
    }
    confirmed.finish();
    Ok(machine)
}
