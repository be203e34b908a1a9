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

use multifd::{
    Method, SendOptions,
    channel::{Address, Connect, Stop},
    wire::VmUuid,
};
use qemu_stream::{
    mapped_ram::StoredMachine,
    outgoing::postcopy::PostcopySource,
    source::{Source, SourceOptions},
};
use serde_json::json;

use super::{
    postcopy::{self, Running},
    send::{AtRest, Delivery, Reading, at_rest_options, understood},
};
use crate::{
    args::RestoreArgs,
    direct_io::DirectIo,
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
    stored::Open,
};

pub(crate) fn run(args: &RestoreArgs) -> Result<(), Failure> {
    let stop = Stop::new();
    interrupt::cancels(&stop)?;
    let run = Run::start("restore", args.file.to_string(), args.qmp.to_string(), &args.run, &stop)?;
    let ended = restore(args, &stop, &run);
    run.end(ended)
}

fn restore(args: &RestoreArgs, stop: &Stop, run: &Run) -> Result<(), Failure> {
    let opened = Open::new(stop).quiet(args.output.quiet).no_verify(args.no_verify).machine(&args.file)?;
    let file = &*opened;
    let guest = AtRest::of(file).map_err(|error| args.file.unreadable(error))?;
    let mut qmp = Qmp::connect(&args.qmp, stop)?;
    if args.postcopy.resume {
        return restore_running(args, file, qmp, stop, run);
    }
    let state = run_state(&mut qmp)?;
    if state != "inmigrate" {
        let why = format!("its guest is {state}: start QEMU with -incoming defer");
        return Err(While::new(format!("cannot restore into the QEMU at {}", args.qmp), why).into());
    }
    let machine = Machine::of(&mut qmp)?;
    compare(args, &machine, file)?;
    if args.postcopy.is_on() {
        return restore_running(args, file, qmp, stop, run);
    }

    let reading = Reading {
        channels: args.multifd_channels,
        packs: false,
        direct_io: DirectIo { wanted: args.direct_io, quiet: args.output.quiet, address: &args.file },
    };
    let blocks = Arc::new(reading.blocks(file)?);
    let options = at_rest_options(args.max_bandwidth).zero_page_detection(understood(file));
    let options = SourceOptions::of_file(file)
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

/// Restores a guest that runs before its RAM is there, or continues that.
fn restore_running(
    args: &RestoreArgs,
    file: &StoredMachine,
    mut qmp: Qmp,
    stop: &Stop,
    run: &Run,
) -> Result<(), Failure> {
    let direct_io = DirectIo { wanted: args.direct_io, quiet: args.output.quiet, address: &args.file };
    let blocks = Arc::new(Reading { channels: 1, packs: true, direct_io }.blocks(file)?);
    let settings = Settings::of(&mut qmp)?;
    // Both sides are known here, so it is used wherever QEMU has it. A resumed migration is as it was begun.
    let preempt = match settings.capability("postcopy-preempt") {
        Some(on) => on || !args.postcopy.resume,
        None => false,
    };
    let options = postcopy::options(&args.postcopy, preempt).stall_timeout(args.stall_timeout());
    let source = PostcopySource::of_file(file, blocks, options)
        .map_err(|refused| While::new(format!("{} cannot be restored with post-copy", args.file), refused))?;
    let running = Running {
        verb: "restore",
        file: &args.file,
        args: &args.postcopy,
        output: args.output,
        run,
        to: format!("the QEMU at {}", args.qmp),
        stop,
        records: true,
    };
    let mut target = Target { qmp, listen: args.listen.as_ref(), meetings: Vec::new() };
    let (changed, connector) = if args.postcopy.resume {
        (None, target.recover()?)
    } else {
        let changed = settings.change(&mut target.qmp, &Wanted::postcopy(preempt))?;
        (Some(changed), target.listen("migrate-incoming")?)
    };
    let info = running.run(source, file, connector, || target.recover());
    let info = info.map_err(|failure| explained(&mut target.qmp, failure))?;
    loaded(&mut target.qmp, false)?;
    if let Some(changed) = changed
        && let Err(error) = changed.put_back(&mut target.qmp)
    {
        tracing::warn!("QEMU's migration settings could not be put back: {error}");
    }
    running.report(&info, file, "restored")
}

/// A QEMU that listens for this program.
struct Target<'a> {
    qmp: Qmp,
    /// The address that the user has given.
    listen: Option<&'a Address>,
    /// Kept until the end, because sockets are removed with them.
    meetings: Vec<Meeting>,
}

impl Target<'_> {
    /// Makes it listen by this command. Returns where.
    fn listen(&mut self, command: &str) -> Result<Arc<dyn Connect>, Failure> {
        let meeting = Meeting::arrange(&self.qmp, Listens::Qemu, self.listen)?;
        self.qmp.execute(command, json!({ "uri": meeting.address().to_string() }))?;
        let address = listening_at(&mut self.qmp, meeting.address())?;
        self.meetings.push(meeting);
        Ok(Arc::new(address))
    }

    /// Makes it listen again after a connection has broken.
    fn recover(&mut self) -> Result<Arc<dyn Connect>, Failure> {
        interrupted(&mut self.qmp)?;
        self.listen("migrate-recover")
    }
}

/// Waits until a QEMU has noticed that post-copy was interrupted.
fn interrupted(qmp: &mut Qmp) -> Result<(), Failure> {
    let end = Instant::now() + PAUSES;
    loop {
        let now = Migration::query(qmp)?;
        if now.is_paused() {
            return Ok(());
        }
        if now.status != MigrationStatus::Active || Instant::now() >= end {
            let why =
                format!("its migration is {}, and only one in postcopy-paused can be resumed", now.state());
            return Err(While::new("cannot resume post-copy".to_owned(), why).into());
        }
        sleep(LOOK);
    }
}

/// Refuses a machine that differs from the file, because QEMU would refuse it later, with the reason in its log only.
fn compare(args: &RestoreArgs, machine: &Machine, file: &StoredMachine) -> Result<(), Failure> {
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
        // It has loaded the devices, and the guest is its own.
        Ok(now) if now.is_paused() => Failure::Failed(error),
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
/// The time limit for a QEMU to notice that a connection has broken.
const PAUSES: Duration = Duration::from_secs(30);
/// How often QEMU is asked.
const LOOK: Duration = Duration::from_millis(20);
