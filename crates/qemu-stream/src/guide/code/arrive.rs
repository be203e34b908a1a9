use std::error::Error as StdError;

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

use crate::machine::Machine;

/// Receives one machine whose device has the layout of `version`. On `Ok` the machine is ours, and runs if it ran before.
pub fn arrive(
    listener: Listener,
    stop: &Stop,
    version: u32,
) -> Result<Machine, Box<dyn StdError + Send + Sync>> {
    // 1. Wait for a source. Machines of other types are refused.
    let expected = Expected::Type(MachineType::new("my-vmm-1")?);
    let arrival = Arrival::listen(listener, ArrivalOptions::new(expected), stop)?.accept()?;

    // 2. RAM. The source announces the blocks. We choose their memory, or refuse them. They belong to the machine for its
    //    whole life.
    let pending = arrival.load(|_configuration, list| list.in_new_memory())?;

    // 3. Devices. Refuse now what cannot be restored: the guest can still continue at the source.
    let state = pending.device("counter", 0).filter(|(section, _)| section.version == version);
    let count = state.and_then(|(_, bytes)| bytes.try_into().ok()).map(u64::from_be_bytes);
    let Some(count) = count else {
        let why = format!("expected the device \"counter\" of version {version}");
        return Err(pending.refuse(Error::text(why)).into()); // the source reports this text
    };
    let mut machine = Machine::new(pending.blocks().clone(), count);

    // 4. Confirm. After this line the guest is ours; before it, the source owns it.
    let confirmed = pending.confirm()?;
    if confirmed.run_state() == RunState::Running {
        machine.run(); // a guest that was paused there stays paused here
    }
    confirmed.finish(); // closes the channels; errors no longer matter
    Ok(machine)
}
