//! The demo's destination: takes the guest in and says what it got.

use multifd::{
    Error, ReceiveOptions, Receiver,
    channel::{Listener, Stop},
    ram::{RamBlock, RamBlocks},
};
use qemu_stream::incoming::{Expected, Incoming, Loader, Outcome};

use super::{Arrived, block, guest, hash};
use crate::{
    args::DemoDestinationArgs,
    interrupt,
    outcome::{Failure, While, print},
};

/// Runs in the second process.
pub(crate) fn destination(args: &DemoDestinationArgs) -> Result<(), Failure> {
    let stop = Stop::new();
    interrupt::cancels(&stop)?;
    let listener = Listener::bind(&args.listen)
        .map_err(|error| While::new(format!("cannot listen at {}", args.listen), error))?;
    print(&listener.local_address().to_string())?;
    let mut receiver = Receiver::new(ReceiveOptions::new(), stop.clone());
    receiver.listen(Box::new(listener)).map_err(Failure::of)?;
    let mut incoming = Incoming::new(receiver.wait_main().map_err(Failure::of)?);
    let mut loader = Loader::new(&receiver, Expected::AnyMachine, |_, list| {
        let fresh = list.entries().iter().map(|entry| {
            block(entry.used_length, RamBlock::new)
                .map_err(|_| Error::other("map the guest's memory", "refused"))
        });
        RamBlocks::new(fresh.collect::<Result<_, Error>>()?)
    });
    let loaded = incoming.run(&mut loader);
    let loaded =
        loaded.map_err(|error| Failure::of(stop.fail(Error::other("the migration broke off", error))))?;
    let blocks = loader.finish().map_err(|error| Failure::of(stop.fail(error)))?;
    let main = incoming.finish(Outcome::Loaded)?;
    receiver.finish().map_err(Failure::of)?;
    drop(main);

    let beyond_ram = guest::peak_beyond(&blocks)?;
    let device =
        loaded.devices.sections().iter().find(|section| section.name.as_bytes() == guest::DEVICE.as_bytes());
    let state = device.and_then(|section| loaded.devices.body(section)).and_then(|body| body.try_into().ok());
    let rounds =
        u64::from_be_bytes(state.ok_or_else(|| While::new("the guest's device is missing", "a bug"))?);
    let arrived = Arrived { hash: hash(&blocks)?, rounds, beyond_ram };
    print(&serde_json::to_string(&arrived)?)?;
    Ok(())
}
