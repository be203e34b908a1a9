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

/// Migrates the machine to `address`. If that fails, or `stop` cancels it, the guest is here as it was before.
pub fn leave(machine: &mut Machine, address: &Address, stop: &Stop) -> Result<MigrationInfo> {
    // 1. Options. The destination compares the machine type with its own.
    let machine_type =
        MachineType::new("my-vmm-1").map_err(|error| Error::other("name the machine", error))?;
    let options = SourceOptions::new(Configuration::new(machine_type))
        .channels(4)
        .migrate(MigrateOptions::new().downtime_limit(Duration::from_millis(300)));

    // 2. The machine's blocks. A machine that arrived from another host keeps the blocks that it arrived in.
    let source = Source::new(machine.blocks.clone(), options, stop)?;

    // 3. The dirty log. It has one reader. A log that slows the guest down is created here and dropped at the end of this
    //    function.
    let log = machine.writes.reader();
    let mut log = log.map_err(|error| Error::io("read what the guest writes", error))?;

    // 4. Connections, passes, switchover, devices, and the confirmation of the destination.
    let connector: Arc<dyn Connect> = Arc::new(address.clone());
    source.migrate(&connector, &mut log, machine)
}
