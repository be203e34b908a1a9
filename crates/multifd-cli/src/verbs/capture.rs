//! `multifd capture`: a running QEMU migrates into a file, by commands through QMP, and its guest continues.
//!
//! ```text
//! Qmp ─▶ settings changed ─▶ migrate ─▶ Reception (as `receive`) ─▶ command of the user ─▶ settings put back ─▶ cont
//!                              └── a thread asks query-migrate, so that a failure of QEMU ends the reception
//! ```
//!
//! Between the end of the migration and `cont` the guest is stopped, and only this program lets it continue. So no error of
//! this program ends it in between, and an interrupt is heeded before and not after.

use std::{
    process::Command,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    thread,
    time::{Duration, Instant},
};

use multifd::{
    ChannelCount, Error, ReceiveOptions,
    channel::{Address, Listener, Stop, Wake},
};
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions, Listening},
    incoming::{Expected, LeftOut},
};
use serde_json::{Map, Value, json};

use super::receive::{Reception, Stored};
use crate::{
    about::About,
    args::CaptureArgs,
    capture::Capture,
    direct_io::DirectIo,
    interrupt,
    output::{
        outcome::{Failure, While},
        outlet::say,
        report::millis,
    },
    qmp::{
        Changed, Listens, Machine, Meeting, Migration, MigrationStatus, Qmp, QmpError, RUNNING, Settings,
        Version, Wanted, resume, run_state,
    },
    runs::{Adjust, Limits, Run},
};

pub(crate) fn run(args: &CaptureArgs) -> Result<(), Failure> {
    let stop = Stop::new();
    interrupt::cancels(&stop)?;
    interrupt::spares_large_files();
    let run = Run::start("capture", args.file.to_string(), args.qmp.to_string(), &args.run, &stop)?;
    let ended = capture(args, &stop, &run);
    run.end(ended)
}

fn capture(args: &CaptureArgs, stop: &Stop, run: &Run) -> Result<(), Failure> {
    let mut qmp = Qmp::connect(&args.qmp, stop)?;
    let was = run_state(&mut qmp)?;
    refuse_others(&mut qmp, &was, args)?;
    if args.no_return_path {
        tracing::warn!(
            "without the return path, QEMU stops the guest for good even if the file cannot be completed"
        );
    }
    let direct_io = DirectIo { wanted: args.direct_io, quiet: args.output.quiet, address: &args.file };
    let capture = Capture::create(&args.file, args.force, &direct_io, args.base.as_ref())?;
    let meeting = Meeting::arrange(&qmp, Listens::Here, args.listen.as_ref())?;
    let settings = Settings::of(&mut qmp)?;
    let known = known(args, &mut qmp, &was)?;
    let wanted = wanted(args);

    // The first to be woken at a failure, before connections are closed.
    let source = Arc::new(Controlled { qmp: Mutex::new(qmp), switched: AtomicBool::new(false) });
    let _first = stop.watch_failure(source.clone());
    let (listening, address) = listen(args, &source, &meeting, stop)?;
    let mut changed = settings.change(&mut source.lock(), &wanted)?;
    if args.run.control.is_some() {
        settings.put_back_also(&mut changed, &["max-bandwidth", "downtime-limit"]);
    }
    run.adjusts(Some(source.clone()));
    let cancel = |error: &Error| drop(stop.fail(error.clone()));
    let reception = Reception {
        run: Some(run),
        before_refusal: &cancel,
        about: &|_| About { stopped_for: stopped_for(&mut source.lock()), ..known.clone() },
        ..Reception::into(&args.file, "capture", args.output)
    };
    let switch_after = args.postcopy_after;
    let ended = migrate(&source, &address, switch_after, stop, || reception.run(listening, capture, stop));
    // From here on the guest is stopped, and only this program lets it continue.
    run.handed_over();
    run.adjusts(None);
    match ended {
        Ok(stored) => {
            if stored.has_pages_of_main() {
                direct_io.without_channels();
            }
            finish(args, &mut source.lock(), changed, &was, &reception, &stored)
        }
        Err(failure) => Err(restore(&mut source.lock(), changed, &was, failure)),
    }
}

/// The QEMU whose guest is captured. At a failure of this side its migration is cancelled first: a QEMU whose connections are
/// closed under it can end with its guest.
struct Controlled {
    qmp: Mutex<Qmp>,
    /// It was asked to switch to post-copy. Relaxed: it orders nothing.
    switched: AtomicBool,
}

impl Controlled {
    fn lock(&self) -> MutexGuard<'_, Qmp> {
        self.qmp.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cancel(&self) {
        if let Err(error) = Migration::cancel(&mut self.lock()) {
            tracing::debug!(%error, "QEMU's migration could not be cancelled");
        }
    }
}

impl Wake for Controlled {
    fn wake(&self) {
        self.cancel();
        // QEMU 10.0 does not cancel after the switch to post-copy. It takes its guest back when this side reports its failure, which
        // it does at the end of the stream. If the connections were closed before, the guest would stay stopped.
        if self.switched.load(Ordering::Relaxed) {
            let end = Instant::now() + SWITCHED;
            while Migration::query(&mut self.lock()).is_ok_and(|now| now.status == MigrationStatus::Active)
                && Instant::now() < end
            {
                thread::sleep(LOOK);
            }
        }
    }
}

/// The limits are those of QEMU. They are put back at the end of the capture.
impl Adjust for Controlled {
    fn adjust(&self, limits: &Limits) -> Result<(), String> {
        if limits.max_postcopy_bandwidth.is_some() {
            return Err("the guest is stopped while the pages that remain are captured, so max-postcopy-bandwidth would \
                        only keep it stopped: only max-bandwidth and downtime-limit can be set"
                .into());
        }
        let bandwidth = limits.max_bandwidth.map(|bytes| ("max-bandwidth", json!(bytes)));
        let downtime = limits.downtime_limit.map(|time| ("downtime-limit", json!(millis(time))));
        let parameters: Map<_, _> =
            bandwidth.into_iter().chain(downtime).map(|(name, value)| (name.to_owned(), value)).collect();
        let set = self.lock().execute("migrate-set-parameters", Value::Object(parameters));
        set.map(drop).map_err(|error| error.to_string())
    }
}

/// Refuses a QEMU whose guest cannot be captured now.
fn refuse_others(qmp: &mut Qmp, was: &str, args: &CaptureArgs) -> Result<(), Failure> {
    let refused =
        |why: &str| Err(While::new(format!("cannot capture the guest at {}", args.qmp), why).into());
    if qmp.version() < Version::FIRST && args.multifd_channels > 0 {
        let why = format!(
            "this is QEMU {}, and channels need QEMU {}: use --multifd-channels 0",
            qmp.version(),
            Version::FIRST
        );
        return refused(&why);
    }
    if args.postcopy_after.is_some()
        && qmp.version() < Version::MULTIFD_AND_POSTCOPY
        && args.multifd_channels > 0
    {
        let why = format!(
            "this is QEMU {}, and channels together with --postcopy-after need QEMU {}: use --multifd-channels 0",
            qmp.version(),
            Version::MULTIFD_AND_POSTCOPY
        );
        return refused(&why);
    }
    if was == "inmigrate" {
        return refused("this QEMU waits for an incoming migration: use multifd restore");
    }
    if was == "postmigrate" {
        return refused(
            "an earlier migration has stopped its guest, and QEMU can migrate it again only after cont",
        );
    }
    match Migration::query(qmp)?.status {
        MigrationStatus::Active => return refused("another migration is in progress (query-migrate)"),
        MigrationStatus::Failed => tracing::warn!(
            "an earlier migration of this QEMU has failed; QEMU 10.0 can end, with its guest, in the next one"
        ),
        _ => {}
    }
    // Of an earlier migration.
    Migration::settle(qmp)?;
    Ok(())
}

/// What is recorded about the capture.
fn known(args: &CaptureArgs, qmp: &mut Qmp, was: &str) -> Result<About, QmpError> {
    let machine = Machine::of(qmp)?;
    Ok(About {
        source: Some(args.qmp.to_string()),
        qemu: Some(qmp.version().to_string()),
        guest_name: machine.name,
        guest_state: Some(was.to_owned()),
        processors: machine.processors,
        command_line: qmp.command_line().unwrap_or_default(),
        ..About::new("capture", args.label.as_ref())
    })
}

/// How long the guest has been stopped, in milliseconds, if its host is this one.
fn stopped_for(qmp: &mut Qmp) -> Option<u64> {
    // The reply comes after the event of the stop.
    run_state(qmp).ok().filter(|state| state != RUNNING)?;
    qmp.stopped_for().map(millis)
}

fn listen(
    args: &CaptureArgs,
    source: &Arc<Controlled>,
    meeting: &Meeting,
    stop: &Stop,
) -> Result<(Listening, Address), Failure> {
    let listener = Listener::bind(meeting.address())
        .map_err(|error| While::new(format!("cannot listen at {}", meeting.address()), error))?;
    meeting.admit().map_err(|error| While::new("cannot let QEMU's user connect", error))?;
    let address = listener.local_address().clone();
    if let Address::Tcp { host, .. } = &address
        && !is_loopback(host)
    {
        tracing::warn!(
            "the guest's memory crosses the network without encryption; multifd receive can use TLS"
        );
    }
    let receive = ReceiveOptions::new()
        .channels(ChannelCount::Exact(args.multifd_channels))
        .method(Some(args.multifd_compression));
    let options = ArrivalOptions::new(Expected::AnyMachine)
        .receive(receive)
        .left_out(LeftOut::SharedBlocks)
        .stall_timeout(args.stall_timeout())
        .postcopy(args.postcopy_after.is_some())
        .before_postcopy_refusal({
            let source = source.clone();
            move || source.cancel()
        })
        // The source does not pause before its switchover.
        .pause_timeout(args.stall_timeout());
    let listening = Arrival::listen(listener, options, stop).map_err(Failure::of)?;
    Ok((listening, address))
}

fn is_loopback(host: &str) -> bool {
    host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The settings of a source that migrates into a file.
fn wanted(args: &CaptureArgs) -> Wanted {
    let mut wanted = Wanted::over(args.multifd_channels, args.multifd_compression, !args.no_return_path);
    if args.postcopy_after.is_some() {
        wanted = wanted.with_postcopy();
    }
    if args.auto_converge {
        wanted.capabilities.push(("auto-converge", true));
    }
    wanted.parameters.push(("max-bandwidth", json!(args.max_bandwidth)));
    if let Some(limit) = args.downtime_limit {
        wanted.parameters.push(("downtime-limit", json!(millis(limit))));
    }
    wanted
}

/// Starts the migration and receives it. A failure that QEMU reports ends the reception.
fn migrate(
    source: &Controlled,
    address: &Address,
    switch_after: Option<Duration>,
    stop: &Stop,
    receive: impl FnOnce() -> Result<Stored, Failure>,
) -> Result<Stored, Failure> {
    source.lock().execute("migrate", json!({ "uri": address.to_string() }))?;
    let (over, ended) = channel::<()>();
    thread::scope(|threads| {
        let builder = thread::Builder::new().name("qmp".into());
        let address = address.to_string();
        builder.spawn_scoped(threads, move || watch(source, &address, switch_after, stop, &ended))?;
        let stored = receive();
        drop(over);
        stored
    })
}

/// Fails `stop` if QEMU reports that the migration has failed, until `ended`. Lets QEMU switch to post-copy after some time, if that
/// is wanted, and connect to `address` again when the connection has broken after it.
fn watch(
    source: &Controlled,
    address: &str,
    mut switch_after: Option<Duration>,
    stop: &Stop,
    ended: &Receiver<()>,
) {
    let begun = Instant::now();
    let wait =
        |left: Option<Duration>| LOOK.min(left.map_or(LOOK, |after| after.saturating_sub(begun.elapsed())));
    while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(wait(switch_after)) {
        if switch_after.is_some_and(|after| begun.elapsed() >= after) {
            switch_after = None;
            match Migration::start_postcopy(&mut source.lock()) {
                Ok(()) => source.switched.store(true, Ordering::Relaxed),
                Err(error) => {
                    tracing::warn!(%error, "QEMU does not switch to post-copy; the capture continues without it");
                }
            }
        }
        let now = Migration::query(&mut source.lock());
        let error = match now {
            Ok(now) if now.status == MigrationStatus::Failed => {
                Error::other("QEMU reports that the migration failed", now.why())
            }
            Ok(now) if now.status == MigrationStatus::Cancelled => {
                Error::other("the migration was cancelled at QEMU", "migrate_cancel by another client")
            }
            Ok(now) if now.is_paused() => {
                match Migration::resume(&mut source.lock(), address) {
                    Ok(()) => tracing::info!("the capture was interrupted, QEMU resumes it"),
                    // It may be about to pause. If it cannot, the wait for it has an end.
                    Err(error) => tracing::debug!(%error, "QEMU does not resume the migration"),
                }
                continue;
            }
            Ok(_) => continue,
            Err(error) => Error::other("cannot control QEMU any more", error),
        };
        // The connections themselves may show why it failed.
        if ended.recv_timeout(LAST_WORD) == Err(RecvTimeoutError::Timeout) {
            stop.fail(error);
        }
        return;
    }
}

/// Ends a capture whose file is complete.
fn finish(
    args: &CaptureArgs,
    qmp: &mut Qmp,
    changed: Changed,
    was: &str,
    reception: &Reception<'_>,
    stored: &Stored,
) -> Result<(), Failure> {
    let complete = |what: &str, error: QmpError| {
        Failure::from(While::new(format!("{} is complete, but {what}", args.file), error))
    };
    let migration = Migration::wait(qmp, SETTLES).map_err(|error| complete(UNKNOWN, error))?;
    if migration.status != MigrationStatus::Completed {
        // The file has everything up to the stop, so it is a capture; QEMU lets the guest continue by itself.
        let why = migration.reason().map_or_else(String::new, |why| format!(": {why}"));
        tracing::warn!("QEMU did not get the confirmation that the file is complete{why}");
    }
    let ran = before_continue(args);
    let continues = if args.quit {
        quit(qmp).map_err(|error| complete("QEMU did not end", error))?;
        false
    } else {
        let put_back = Migration::settle(qmp).and_then(|_| changed.put_back(qmp));
        let continues = was == RUNNING && !args.leave_paused;
        if continues && run_state(qmp).ok().as_deref() != Some(RUNNING) {
            resume(qmp).map_err(|error| complete(STILL_STOPPED, error))?;
        }
        put_back.map_err(|error| complete("QEMU's migration settings could not be put back", error))?;
        continues
    };
    let mut report = stored.report();
    report.downtime = if continues { qmp.pause().map(millis) } else { None }.or(migration.downtime());
    report.ram.dirty_sync_count = migration.passes();
    reception.report(stored, &report, "captured")?;
    if !args.output.quiet && !args.output.json {
        say(match (continues, args.quit) {
            (true, _) => "the guest continues",
            (false, true) => "QEMU has ended",
            (false, false) => "the guest is stopped; cont lets it continue",
        });
    }
    ran
}

/// Runs the user's command, if there is one, while the guest is stopped.
fn before_continue(args: &CaptureArgs) -> Result<(), Failure> {
    let Some(command) = &args.before_continue else { return Ok(()) };
    let path = std::path::absolute(args.file.path()).unwrap_or_else(|_| args.file.path().to_owned());
    let failed = |why: String| {
        Err(While::new(format!("{} is complete, but the command before cont failed", args.file), why).into())
    };
    match Command::new("/bin/sh").args(["-c", command]).env("MULTIFD_FILE", path).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => failed(format!("{command:?}: {status}")),
        Err(error) => failed(error.to_string()),
    }
}

/// Ends QEMU. Its connection may end before its reply.
fn quit(qmp: &mut Qmp) -> Result<(), QmpError> {
    match qmp.execute("quit", json!({})) {
        Ok(_) | Err(QmpError::Closed { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Brings QEMU back to where it was after a failure, and returns the failure, or the failure to do so.
fn restore(qmp: &mut Qmp, changed: Changed, was: &str, failure: Failure) -> Failure {
    match bring_back(qmp, changed, was) {
        Ok(()) => failure,
        // QEMU has ended, which is the reason of the failure.
        Err(QmpError::Closed { .. }) => failure,
        Err(error) => {
            if let Failure::Failed(error) = failure {
                tracing::error!("{}", multifd::error::chain(&*error));
            }
            While::new(
                "the capture failed, and QEMU is not as before: check query-status and query-migrate",
                error,
            )
            .into()
        }
    }
}

fn bring_back(qmp: &mut Qmp, changed: Changed, was: &str) -> Result<(), QmpError> {
    let ended = Migration::settle(qmp)?;
    tracing::debug!(status = ?ended.status, "the migration at QEMU has ended");
    if was == RUNNING && run_state(qmp)? != RUNNING {
        resume(qmp)?;
    }
    changed.put_back(qmp)
}

const UNKNOWN: &str =
    "the state of the guest is not known: check query-status, and enter cont if it is stopped";
const STILL_STOPPED: &str = "the guest is still stopped: enter cont at its monitor";
/// The time limit for the rest of a migration that has switched to post-copy, and is to be ended.
const SWITCHED: Duration = Duration::from_secs(120);
/// How often QEMU is asked for failures.
const LOOK: Duration = Duration::from_millis(250);
/// The time in which the connections themselves show why a migration failed.
const LAST_WORD: Duration = Duration::from_millis(500);
/// The time limit for QEMU to end a migration whose connections are closed.
const SETTLES: Duration = Duration::from_secs(60);
