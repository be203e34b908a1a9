use std::time::Duration;

use multifd::{
    Error, Result,
    channel::{Address, Stop},
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
    let options = SourceOptions::new(Configuration::new(MachineType::new("my-vmm-1")?))
        .channels(4)
        .migrate(MigrateOptions::new().downtime_limit(Duration::from_millis(300)));

    // 2. The machine's blocks. A machine that arrived from another host keeps the blocks that it arrived in.
    let source = Source::new(machine.blocks.clone(), options, stop)?;

    // 3. The dirty log. It has one reader. A log that slows the guest down is created here and dropped at the end of this
    //    function.
    let log = machine.writes.reader();
    let mut log = log.map_err(|error| Error::io("read what the guest writes", error))?;

    // 4. Connections, passes, switchover, devices, and the confirmation of the destination.
    source.migrate(address.clone(), &mut log, machine)
}
