//! The source: a machine goes to another process while its guest runs.

use std::{sync::Arc, time::Duration};

use multifd::{
    Error, Result, SendOptions, Sender,
    channel::{Address, Connect, Stop, Stream},
    live::{MigrateOptions, Migration, MigrationInfo, ZeroPageDetection},
    ram::{AtomicBitmapLog, BlockIndex, BlockOffset, KvmDirtyLog, KvmSlot, MergedLog, PageSize, blocks_of},
};
use qemu_stream::{
    format::{Configuration, MachineType},
    outgoing::{MainStream, Options, Outgoing},
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

/// Moves the machine. If that fails, or `stop` cancels it, the guest runs on here, and another try may follow.
#[expect(unsafe_code, reason = "the log switches a memory slot")]
pub(crate) fn migrate(machine: &Machine, wish: &Wish, stop: &Stop) -> Result<MigrationInfo> {
    // 1. Memory: each region is a block.
    let blocks = Arc::new(blocks_of(&machine.memory, PageSize::KIB_4)?);

    // 2. The main stream: the first connection.
    let link = wish.address.connect(stop, CONNECT_TIMEOUT);
    let main = Stream::new(link.map_err(|error| Error::io(format!("connect to {}", wish.address), error))?);
    let _watch = stop.watch_failure(main.waker());
    let machine_type = MachineType::new(MACHINE).map_err(|error| Error::other("name the machine", error))?;
    let outgoing = Outgoing::new(main, Options::new(Configuration::new(machine_type)));
    let mut main =
        MainStream::of_guest(outgoing.map_err(|error| Error::other("open the main stream", error))?);

    // 3. The channels.
    let mut sender = Sender::new(SendOptions::new().channels(wish.channels), blocks.clone(), stop.clone())?;
    sender.set_up(Arc::new(wish.address.clone()))?;

    // 4. What writes to memory: the vCPU, logged by the kernel, and the device, which goes through `vm-memory`. The
    //    kernel's log is on from here to the end of this function.
    let slot = KvmSlot { region: machine.region, block: BlockIndex(0), offset: BlockOffset(0) };
    // SAFETY: this is the machine's one slot, which nobody sets while the machine is borrowed.
    let vcpus = unsafe { KvmDirtyLog::start(&machine.vm, vec![slot], &blocks) };
    let vcpus = vcpus.map_err(|error| Error::io("switch dirty logging on", error))?;
    let devices = AtomicBitmapLog::new(&machine.memory, &blocks)?;
    let mut log = MergedLog::new().with("the vCPUs", vcpus).with("the devices", devices);

    // 5. Passes, switchover, device state. Whatever goes wrong, the guest is resumed.
    let options = MigrateOptions::new()
        .downtime_limit(wish.downtime_limit)
        .max_bandwidth(Some(wish.max_bandwidth))
        .auto_converge(wish.auto_converge)
        .zero_page_detection(ZeroPageDetection::Multifd);
    let mut guest = machine;
    Migration::new(options, blocks, stop.clone()).run(Some(sender), &mut main, &mut log, &mut guest)
}

const MACHINE: &str = "multifd-microvm";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
