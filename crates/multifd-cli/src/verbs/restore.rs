//! `multifd restore`: a QEMU that waits with `-incoming defer` gets a guest from a file, by commands through QMP.
//!
//! ```text
//! Qmp ─▶ machines compared ─▶ settings ─▶ migrate-incoming ─▶ Delivery (as `send`) ─▶ the guest runs, or is paused
//! ```

use std::{
    sync::Arc,
    thread::sleep,
    time::{Duration, Instant},
};

use multifd::{Method, SendOptions, channel::Stop, wire::VmUuid};
use qemu_stream::{
    mapped_ram::MappedRamFile,
    source::{Source, SourceOptions},
};
use serde_json::json;

use super::send::{AtRest, Delivery, Reading, at_rest_options, understood};
use crate::{
    args::RestoreArgs,
    direct_io::DirectIo,
    file_address::Digests,
    interrupt,
    output::{
        outcome::{Failure, While},
        outlet::say,
        report::Report,
    },
    qmp::{
        Listens, Machine, Meeting, Migration, MigrationStatus, Qmp, QmpError, RUNNING, Settings, Wanted,
        listening_at, resume, run_state,
    },
    runs::Run,
};

pub(crate) fn run(args: &RestoreArgs) -> Result<(), Failure> {
    let stop = Stop::new();
    interrupt::cancels(&stop)?;
    let run = Run::start("restore", args.file.to_string(), args.qmp.to_string(), &args.run, &stop)?;
    let ended = restore(args, &stop, &run);
    run.end(ended)
}

fn restore(args: &RestoreArgs, stop: &Stop, run: &Run) -> Result<(), Failure> {
    let file = args.file.open(Digests::unless(args.no_verify))?;
    let guest = AtRest::of(&file).map_err(|error| args.file.unreadable(error))?;
    let mut qmp = Qmp::connect(&args.qmp, stop)?;
    let state = run_state(&mut qmp)?;
    if state != "inmigrate" {
        let why = format!("its guest is {state}: start QEMU with -incoming defer");
        return Err(While::new(format!("cannot restore into the QEMU at {}", args.qmp), why).into());
    }
    let machine = Machine::of(&mut qmp)?;
    compare(args, &machine, &file)?;

    let reading = Reading {
        channels: args.multifd_channels,
        packs: false,
        direct_io: DirectIo { wanted: args.direct_io, quiet: args.output.quiet, address: &args.file },
    };
    let blocks = Arc::new(reading.blocks(&file)?);
    let options = at_rest_options(args.max_bandwidth).zero_page_detection(understood(&file));
    let options = SourceOptions::of_file(&file)
        .channels(args.multifd_channels)
        // The channels compare it with that of the destination, which is known here.
        .send(SendOptions::new().uuid(machine.uuid))
        .stall_timeout(args.stall_timeout())
        .migrate(options);
    let source = Source::new(blocks, options, stop).map_err(Failure::of)?;

    let settings = Settings::of(&mut qmp)?;
    let changed = settings.change(&mut qmp, &Wanted::over(args.multifd_channels, Method::None, true))?;
    // Whether the guest runs after loading is decided by the last of these commands, as at the start by -S.
    qmp.execute(if args.paused { "stop" } else { "cont" }, json!({}))?;
    let meeting = Meeting::arrange(&qmp, Listens::Qemu, args.listen.as_ref())?;
    qmp.execute("migrate-incoming", json!({ "uri": meeting.address().to_string() }))?;
    let address = listening_at(&mut qmp, meeting.address())?;
    let hint = "QEMU accepts no data: check query-migrate and its standard error".to_owned();
    let to = format!("the QEMU at {}", args.qmp);
    let delivery = Delivery { verb: "restore", file: &args.file, output: args.output, run, to, hint };
    let info = match delivery.run(source, Arc::new(address), guest) {
        Ok(info) => info,
        Err(failure) => return Err(explained(&mut qmp, failure)),
    };
    let state = loaded(&mut qmp, args.paused)?;
    if let Err(error) = changed.put_back(&mut qmp) {
        tracing::warn!("QEMU's migration settings could not be put back: {error}");
    }
    delivery.report(&Report::of_source(&info), "restored")?;
    if !args.output.quiet && !args.output.json {
        say(if state == RUNNING { "the guest runs" } else { "the guest is paused; cont lets it run" });
    }
    Ok(())
}

/// Refuses a machine that differs from the file, because QEMU would refuse it later, with the reason in its log only.
fn compare(args: &RestoreArgs, machine: &Machine, file: &MappedRamFile) -> Result<(), Failure> {
    let mut differences = machine.differences(file);
    let stored = file.configuration().and_then(|configuration| configuration.uuid);
    if let Some(stored) = stored
        && machine.uuid != VmUuid::NIL
        && stored != machine.uuid
    {
        differences.push(format!("UUID: {stored} in the file, {} in QEMU (-uuid)", machine.uuid));
    }
    if differences.is_empty() {
        return Ok(());
    }
    let all = differences.join("; ");
    if args.force {
        tracing::warn!("QEMU's machine differs from {}: {all}", args.file);
        return Ok(());
    }
    let what = format!("{} does not fit to the QEMU at {}; --force sends it anyway", args.file, args.qmp);
    Err(While::new(what, all).into())
}

/// Adds QEMU's own reason to a failure, if it has one.
fn explained(qmp: &mut Qmp, failure: Failure) -> Failure {
    let Failure::Failed(error) = failure else { return failure };
    match Migration::query(qmp) {
        Ok(now) => match now.reason() {
            Some(why) => While::new(format!("QEMU could not load the guest: {why}"), error).into(),
            None => Failure::Failed(error),
        },
        Err(QmpError::Closed { .. }) => {
            While::new("QEMU has ended; its standard error has the reason", error).into()
        }
        Err(_) => Failure::Failed(error),
    }
}

/// Waits until the guest runs, or is paused if that is wanted. Returns its state.
fn loaded(qmp: &mut Qmp, paused: bool) -> Result<String, Failure> {
    let migration = Migration::wait(qmp, LOADS)?;
    if migration.status == MigrationStatus::Failed {
        return Err(While::new("QEMU could not load the guest", migration.why()).into());
    }
    let end = Instant::now() + LOADS;
    loop {
        let state = run_state(qmp)?;
        if state == "inmigrate" && Instant::now() < end {
            sleep(LOOK);
        } else if state != RUNNING && !paused {
            // It was stopped when it was captured.
            resume(qmp)?;
            return Ok(RUNNING.to_owned());
        } else {
            return Ok(state);
        }
    }
}

/// The time limit for a QEMU that has everything to load it.
const LOADS: Duration = Duration::from_secs(120);
/// How often QEMU is asked.
const LOOK: Duration = Duration::from_millis(20);
