//! The destination: a machine comes in and runs on.

use multifd::{
    Error, ReceiveOptions, Receiver,
    channel::{Listener, Stop},
    ram::{PageSize, blocks_of},
};
use qemu_stream::incoming::{Expected, Incoming, Loader, Outcome};

use crate::{
    Failure,
    machine::{self, Machine},
};

/// Takes one machine in. Its guest runs as soon as the source has been told that all is here.
pub(crate) fn receive(listener: Listener, stop: &Stop) -> Result<Machine, Failure> {
    // 1. Connections: one is main, the others are channels, as many as the source likes.
    let mut receiver = Receiver::new(ReceiveOptions::new(), stop.clone());
    receiver.listen(Box::new(listener))?;
    let mut incoming = Incoming::new(receiver.wait_main()?);

    // 2. Memory, when the source has said how much. It is fresh, so zero pages are not written.
    let mut memory = None;
    let mut loader = Loader::new(&receiver, Expected::AnyMachine, |_, list| {
        let made = machine::memory(list.total());
        let made = made.map_err(|error| {
            Error::other("make the guest's memory", std::io::Error::other(error.to_string()))
        })?;
        blocks_of(memory.insert(made), PageSize::KIB_4)
    });
    let loaded = incoming.run(&mut loader);
    let loaded = loaded.map_err(|error| stop.fail(Error::other("the migration broke off", error)))?;
    loader.finish().map_err(|error| stop.fail(error))?;

    // 3. Devices. What cannot be restored is refused now, while the guest can still run on at the source.
    let section = |name: &str| {
        let devices = &loaded.devices;
        let section = devices.sections().iter().find(|section| section.name.as_bytes() == name.as_bytes())?;
        devices.body(section).map(<[u8]>::to_vec)
    };
    let restored = memory
        .ok_or_else(|| Failure::from("no memory came"))
        .and_then(|memory| Machine::restore(memory, section));
    let machine = match restored {
        Ok(machine) => machine,
        Err(error) => {
            incoming.finish(Outcome::Failed)?;
            return Err(error);
        }
    };

    // 4. The word that it is ours. If the source does not get it, the guest runs on there and must not run here.
    let main = incoming.finish(Outcome::Loaded)?;
    machine.run();
    if let Err(error) = receiver.finish() {
        // The guest is here; an error in taking leave changes nothing.
        crate::tell(&format!("the channels did not end in order: {error}"));
    }
    drop(main);
    Ok(machine)
}
