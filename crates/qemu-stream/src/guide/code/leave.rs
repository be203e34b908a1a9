use std::{sync::Arc, time::Duration};

use multifd::{
    Error, Result,
    channel::{Address, Connect, Stop},
    live::{MigrateOptions, MigrationInfo},
};
use qemu_stream::{
    format::{Configuration, MachineType},
    source::{Source, SourceOptions},
};

use crate::machine::Machine;

/// Moves the machine to `address`. Where that fails, or `stop` cancels it, the guest is here as it was before.
pub fn leave(machine: &mut Machine, address: &Address, stop: &Stop) -> Result<MigrationInfo> {
    // 1. What is chosen. The destination compares the machine's type with its own.
    let machine_type =
        MachineType::new("my-vmm-1").map_err(|error| Error::other("name the machine", error))?;
    let options = SourceOptions::new(Configuration::new(machine_type))
        .channels(4)
        .migrate(MigrateOptions::new().downtime_limit(Duration::from_millis(300)));

    // 2. The blocks are the machine's own, those that it has arrived in if it came from elsewhere.
    let source = Source::new(machine.blocks.clone(), options, stop)?;

    // 3. The dirty log: nobody else reads it meanwhile. One that costs the guest something is made here and dropped at the
    //    end of this function.
    let log = machine.writes.reader();
    let mut log = log.map_err(|error| Error::io("read what the guest writes", error))?;

    // 4. Connections, passes, switchover, devices, and the destination's word.
    let connector: Arc<dyn Connect> = Arc::new(address.clone());
    source.migrate(&connector, &mut log, machine)
}
