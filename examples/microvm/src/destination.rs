//! The destination: receives a machine and continues it.

use multifd::{
    channel::{Listener, Stop},
    live::RunState,
};
use qemu_stream::arrival::{Arrival, ArrivalOptions};

use crate::{Failure, machine::Machine, memory};

/// Receives one machine. Its guest runs as soon as the source has the confirmation that everything has arrived.
pub(crate) fn receive(listener: Listener, options: ArrivalOptions, stop: &Stop) -> Result<Machine, Failure> {
    // 1. A source has announced the size of its memory. After an error from here on, the source keeps the guest.
    let announced = Arrival::listen(listener, options, stop)?.accept()?.announced()?;
    let memory = memory::new(announced.list().total())?;

    // 2. RAM and devices. A device that cannot be restored is an error here.
    let pending = announced.load(memory::blocks(&memory)?)?;
    let section = |name: &str| Some(pending.device(name, 0)?.1.to_vec());
    let machine = Machine::restore(memory, pending.blocks().clone(), section)?;

    // 3. The confirmation that the guest is ours. If the source does not get it, the guest must not run here.
    let confirmed = pending.confirm()?;
    if confirmed.run_state() == RunState::Running {
        machine.run();
    }
    confirmed.finish();
    Ok(machine)
}
