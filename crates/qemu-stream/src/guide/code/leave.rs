use std::{sync::Arc, time::Duration};

use multifd::{
    Error, Result, SendOptions, Sender,
    channel::{Address, Connect, Stop, Stream},
    live::{MigrateOptions, Migration, MigrationInfo},
};
use qemu_stream::{
    format::{Configuration, MachineType},
    outgoing::{MainStream, Options, Outgoing},
};

use crate::machine::Machine;

/// Moves the machine to `address`. Where that fails, or `stop` cancels it, the guest runs on here.
pub fn leave(machine: &mut Machine, address: &Address, stop: &Stop) -> Result<MigrationInfo> {
    // 1. Main: the first connection. The destination compares the machine's type with its own.
    let link = address.connect(stop, Duration::from_secs(30));
    let main = Stream::new(link.map_err(|error| Error::io(format!("connect to {address}"), error))?);
    let _watch = stop.watch_failure(main.waker()); // a cancel ends waits on main as well
    let machine_type =
        MachineType::new("my-vmm-1").map_err(|error| Error::other("name the machine", error))?;
    let outgoing = Outgoing::new(main, Options::new(Configuration::new(machine_type)));
    let mut main = MainStream::of_guest(outgoing.map_err(|error| Error::other("open main", error))?);

    // 2. The channels.
    let mut sender = Sender::new(SendOptions::new().channels(4), machine.blocks.clone(), stop.clone())?;
    sender.set_up(Arc::new(address.clone()))?;

    // 3. The dirty log. It is on before the first pass. One that costs the guest something is made here and
    //    dropped at the end of this function.
    let mut log = machine.writes.clone();

    // 4. Passes, switchover, devices, and the destination's word.
    let options = MigrateOptions::new().downtime_limit(Duration::from_millis(300));
    let blocks = machine.blocks.clone();
    Migration::new(options, blocks, stop.clone()).run(Some(sender), &mut main, &mut log, machine)
}
