//! The source: moves a machine to another process while its guest runs.

use multifd::{
    Error, Result,
    channel::{Address, Stop},
    live::MigrationInfo,
};
use qemu_stream::source::{Source, SourceOptions};

use crate::machine::Machine;

/// Moves the machine. If that fails, or `stop` cancels it, the guest continues here, and another attempt is possible.
pub(crate) fn migrate(
    mut machine: &Machine,
    address: Address,
    options: SourceOptions,
    stop: &Stop,
) -> Result<MigrationInfo> {
    // 1. An invalid option is an error here: nothing is connected yet.
    let source = Source::new(machine.blocks.clone(), options, stop)?;

    // 2. What writes to memory. The kernel logs the writes of the vCPU until the end of this function.
    let log = machine.dirty_log();
    let mut log = log.map_err(|error| Error::io("switch dirty logging on", error))?;

    // 3. Connections, passes, switchover, device state. After any failure, the guest is resumed.
    source.migrate(address, &mut log, &mut machine)
}
