use std::error::Error as StdError;

use multifd::{
    Error, ReceiveOptions, Receiver,
    channel::{Listener, Stop},
    ram::{Mapping, Memory, PageSize, RamBlock, RamBlocks},
};
use qemu_stream::incoming::{Expected, Incoming, Loader, Outcome};

use crate::machine::Machine;

/// Takes one machine in, whose device has the layout of `version`. It runs when this returns.
pub fn arrive(
    listener: Listener,
    stop: &Stop,
    version: u32,
) -> Result<Machine, Box<dyn StdError + Send + Sync>> {
    // 1. Connections. One of them is main; how many the others are, the receiver finds out.
    let mut receiver = Receiver::new(ReceiveOptions::new(), stop.clone());
    receiver.listen(Box::new(listener))?;
    let mut incoming = Incoming::new(receiver.wait_main()?);

    // 2. RAM. The source says what blocks there are; what they are made of is up to us, and so is to refuse them.
    let mut loader = Loader::new(&receiver, Expected::AnyMachine, |_configuration, list| {
        let block = |entry: &qemu_stream::format::BlockEntry| {
            let memory = Mapping::anonymous(entry.used_length);
            let memory = memory.map_err(|error| Error::io("make the guest's memory", error))?;
            RamBlock::new(entry.name.clone(), entry.used_length, PageSize::KIB_4, Memory::Mapped(memory))
        };
        RamBlocks::new(list.entries().iter().map(block).collect::<Result<_, _>>()?)
    });
    let loaded = incoming.run(&mut loader);
    let loaded = loaded.map_err(|error| stop.fail(Error::other("the migration broke off", error)))?;
    let blocks = loader.finish().map_err(|error| stop.fail(error))?; // every page of it has come

    // 3. Devices: whatever cannot be restored is refused now, while the guest can go on at the source.
    let sections = loaded.devices.sections();
    let counter = sections.iter().find(|section| section.name.as_bytes() == b"counter");
    let state = counter.filter(|counter| counter.version == version);
    let state = state.and_then(|counter| loaded.devices.body(counter));
    let Some(count) = state.and_then(|bytes| bytes.try_into().ok()).map(u64::from_be_bytes) else {
        incoming.finish(Outcome::Failed)?;
        return Err(format!("expected a counter of version {version}").into());
    };
    let mut machine = Machine::new(blocks, count);

    // 4. The word. Behind this line the guest is ours; before it, it is the source's.
    let main = incoming.finish(Outcome::Loaded)?;
    machine.run();
    if let Err(error) = receiver.finish() {
        eprintln!("the channels did not end in order: {error}"); // which changes nothing any more
    }
    drop(main);
    Ok(machine)
}
