//! The source: moves a machine to another process while its guest runs.

use std::{sync::Arc, time::Duration};

use multifd::{
    Error, Result,
    channel::{Address, Connect, Stop},
    live::{MigrateOptions, MigrationInfo, ZeroPageDetection},
    ram::{AtomicBitmapLog, KvmDirtyLog, MergedLog},
};
use qemu_stream::{
    format::{Configuration, MachineType},
    source::{Source, SourceOptions},
};

use crate::machine::Machine;

/// How to migrate.
pub(crate) struct Wish {
    pub(crate) address: Address,
    pub(crate) channels: u8,
    pub(crate) downtime_limit: Duration,
    pub(crate) max_bandwidth: u64,
    pub(crate) auto_converge: bool,
}

/// Moves the machine. If that fails, or `stop` cancels it, the guest continues here, and another attempt is possible.
#[expect(unsafe_code, reason = "the log switches a memory slot")]
pub(crate) fn migrate(machine: &Machine, wish: &Wish, stop: &Stop) -> Result<MigrationInfo> {
    // 1. Options, checked before anything is connected.
    let machine_type = MachineType::new(MACHINE).map_err(|error| Error::other("name the machine", error))?;
    let migrate = MigrateOptions::new()
        .downtime_limit(wish.downtime_limit)
        .max_bandwidth(Some(wish.max_bandwidth))
        .auto_converge(wish.auto_converge)
        .zero_page_detection(ZeroPageDetection::Multifd);
    let options =
        SourceOptions::new(Configuration::new(machine_type)).channels(wish.channels).migrate(migrate);
    let source = Source::new(machine.blocks.clone(), options, stop)?;

    // 2. What writes to memory: the vCPU, logged by the kernel, and the device, which goes through `vm-memory`. The
    //    kernel's log is on from here to the end of this function.
    // SAFETY: this is the machine's one slot, which nobody sets while the machine is borrowed.
    let vcpus = unsafe { KvmDirtyLog::start(&machine.vm, vec![machine.region], &machine.blocks) };
    let devices = AtomicBitmapLog::new(&machine.memory, &machine.blocks);
    let refused = |error| Error::io("switch dirty logging on", error);
    let log = MergedLog::new().with("the vCPUs", vcpus.map_err(refused)?);
    let mut log = log.with("the devices", devices.map_err(refused)?);

    // 3. Connections, passes, switchover, device state. After any failure, the guest is resumed.
    let connector: Arc<dyn Connect> = Arc::new(wish.address.clone());
    let mut guest = machine;
    source.migrate(&connector, &mut log, &mut guest)
}

/// The machine's type, which source and destination compare.
pub(crate) const MACHINE: &str = "multifd-microvm";
