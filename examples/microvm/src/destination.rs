//! The destination: receives a machine and continues it.

use multifd::{
    Error,
    channel::{Listener, Stop},
    live::RunState,
};
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions},
    format::MachineType,
    incoming::Expected,
};

use crate::{
    Failure,
    machine::{self, Machine},
    source::MACHINE,
};

/// Receives one machine. Its guest runs as soon as the source has the confirmation that everything has arrived.
pub(crate) fn receive(listener: Listener, stop: &Stop) -> Result<Machine, Failure> {
    // 1. A source of the same kind: main, and any number of channels.
    let options = ArrivalOptions::new(Expected::Type(MachineType::new(MACHINE)?));
    let arrival = Arrival::listen(Box::new(listener), options, stop)?.accept()?;

    // 2. Memory, after the source has sent its size.
    let mut memory = None;
    let pending = arrival.load(|_, list| {
        let made = machine::memory(list.total());
        let made = made.map_err(|error| Error::other("make the guest's memory", error))?;
        Ok(machine::blocks(memory.insert(made))?)
    })?;

    // 3. Devices. A device that cannot be restored is refused now, while the guest can still continue on the source.
    let section = |name: &str| Some(pending.device(name, 0)?.1.to_vec());
    let restored = memory
        .ok_or_else(|| Failure::from("no memory arrived"))
        .and_then(|memory| Machine::restore(memory, pending.blocks().clone(), section));
    let machine = match restored {
        Ok(machine) => machine,
        Err(error) => return Err(pending.refuse(Error::other("restore the machine", error)).into()),
    };

    // 4. The confirmation that the guest is ours. If the source does not get it, the guest must not run here.
    let confirmed = pending.confirm()?;
    if confirmed.run_state() == RunState::Running {
        machine.run();
    }
    confirmed.finish();
    Ok(machine)
}
