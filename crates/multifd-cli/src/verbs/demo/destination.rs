//! The demo's destination: receives the guest and reports what it got.

use multifd::{
    Error,
    channel::{Listener, Stop},
};
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions, Listening},
    format::MachineType,
    incoming::Expected,
};

use super::{Arrived, MACHINE, guest, hash};
use crate::{
    args::DemoDestinationArgs,
    interrupt,
    output::{
        outcome::{Failure, While},
        outlet::{reply, reply_json},
    },
};

/// Runs in the second process.
pub(crate) fn destination(args: &DemoDestinationArgs) -> Result<(), Failure> {
    let stop = Stop::new();
    interrupt::cancels(&stop)?;
    let listener = Listener::bind(&args.listen)
        .map_err(|error| While::new(format!("cannot listen at {}", args.listen), error))?;
    reply(&listener.local_address().to_string())?;
    let options = ArrivalOptions::new(Expected::Type(MachineType::new(MACHINE)?));
    let arrival =
        Arrival::listen(listener, options, &stop).and_then(Listening::accept).map_err(Failure::of)?;
    let pending = arrival.load(|_, list| list.in_new_memory());
    let pending = pending.map_err(Failure::of)?;
    let state = pending.device(guest::DEVICE.as_str(), 0).and_then(|(_, body)| body.try_into().ok());
    let Some(rounds) = state.map(u64::from_be_bytes) else {
        return Err(Failure::of(pending.refuse(Error::other("the guest's device is missing", "a bug"))));
    };
    let confirmed = pending.confirm().map_err(Failure::of)?;
    let blocks = confirmed.blocks().clone();
    confirmed.finish();

    let beyond_ram = guest::peak_beyond(&blocks)?;
    let arrived = Arrived { hash: hash(&blocks)?, rounds, beyond_ram };
    reply_json(&arrived)?;
    Ok(())
}
