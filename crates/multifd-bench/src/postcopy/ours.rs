//! The library's post-copy, both sides in this process.

use std::{
    thread,
    time::{Duration, Instant},
};

use multifd::{
    channel::{Address, Listener, Stop},
    live::{MigrateOptions, PostcopyWhen, ZeroPageDetection},
};
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions, EarlyOptions, Finished, Landing},
    format::{Configuration, MachineType},
    incoming::Expected,
    outgoing::postcopy::Moved,
    source::{Source, SourceOptions},
};

use super::{
    machine::{DEVICE, Machine, Rewrites, blocks},
    sample::Sample,
};
use crate::Result;

/// What is sent before the switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Passes {
    /// Nothing.
    First,
    Two,
    /// There is no switch; it is cancelled after this time.
    Endless(Duration),
}

/// Moves a guest.
pub(super) fn measure(rewrites: Rewrites, channels: u8, passes: Passes) -> Result<Sample> {
    let mut machine = Machine::new(blocks(rewrites.memory)?.into(), rewrites, 0);
    machine.run()?;
    while machine.written() < 2 * (rewrites.memory << 8) {
        thread::sleep(Duration::from_millis(5));
    }
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse()?)?;
    let address = listener.local_address().clone();
    let arrives = thread::spawn(move || arrive(listener, rewrites));
    let left = leave(&mut machine, &address, channels, passes);
    let arrived = arrives.join().map_err(|_| "the destination panicked")?;
    if matches!(passes, Passes::Endless(_)) {
        return left;
    }
    let (sample, finished) = (left?, arrived?);
    Ok(Sample {
        faults: finished.faults.faults,
        p50: finished.faults.p50.unwrap_or_default(),
        p99: finished.faults.p99.unwrap_or_default(),
        blocked: finished.faults.blocked,
        ..sample
    })
}

fn leave(machine: &mut Machine, address: &Address, channels: u8, passes: Passes) -> Result<Sample> {
    let when = match passes {
        Passes::First => PostcopyWhen::Start,
        Passes::Two => PostcopyWhen::Passes(2),
        Passes::Endless(_) => PostcopyWhen::Never,
    };
    let migrate = MigrateOptions::new().postcopy(when).zero_page_detection(ZeroPageDetection::Multifd);
    let options = SourceOptions::new(Configuration::new(MachineType::new("multifd-bench")?));
    let options = options.channels(channels).migrate(migrate.downtime_limit(Duration::from_millis(50)));
    let stop = Stop::new();
    let source = Source::new(machine.blocks.clone(), options, &stop)?;
    let progress = source.progress();
    let mut log = machine.writes.clone().reader()?;
    let begun = Instant::now();
    let cancels = match passes {
        Passes::Endless(limit) => Some(thread::spawn({
            let stop = stop.clone();
            move || {
                thread::sleep(limit);
                stop.cancel();
            }
        })),
        _ => None,
    };
    let moved = source.run(address.clone(), &mut log, machine);
    let total = begun.elapsed();
    if let Some(cancels) = cancels {
        cancels.join().map_err(|_| "a thread panicked")?;
        if moved.is_ok() {
            return Err("pre-copy has ended: the line is too fast for this guest".into());
        }
        return Ok(Sample { total, bytes: progress.info().ram.transferred, ..Sample::default() });
    }
    let Moved::Completed { info, postcopy } = moved? else { return Err("the line was cut".into()) };
    let postcopy = postcopy.ok_or("pre-copy has ended: the line is too fast for this guest")?;
    // Those of the channels include what they have sent after the switch.
    let bytes = match postcopy.over_channels {
        true => info.ram.transferred,
        false => info.ram.transferred + postcopy.transferred,
    };
    Ok(Sample { total, bytes, downtime: info.downtime.unwrap_or_default(), ..Sample::default() })
}

fn arrive(listener: Listener, rewrites: Rewrites) -> Result<Finished> {
    let options = ArrivalOptions::new(Expected::Type(MachineType::new("multifd-bench")?)).run_early(true);
    let announced = Arrival::listen(listener, options, &Stop::new())?.accept()?.announced()?;
    let Landing::Early(early) = announced.load_early(blocks(rewrites.memory)?, EarlyOptions::new())? else {
        return Err("it did not switch".into());
    };
    let (_, state) = early.device(DEVICE.as_str(), 0).ok_or("expected a vCPU")?;
    let written = u64::from_be_bytes(state.try_into()?);
    let mut machine = Machine::new(early.blocks().clone(), rewrites, written);
    let mut running = early.confirm()?;
    machine.run()?;
    running.wait(None);
    let finished = running.finish()?;
    // All of it was checked once more.
    let at = machine.written();
    while machine.written() < at + (rewrites.memory << 8) {
        thread::sleep(Duration::from_millis(5));
        if machine.is_ended() {
            break;
        }
    }
    machine.halt()?;
    Ok(finished)
}
