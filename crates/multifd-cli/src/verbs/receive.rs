//! `multifd receive`: receives a running QEMU guest and stores it in a file.

use std::{
    fmt::Display,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use indicatif::HumanCount;
use multifd::{
    Error, Fault, ReceiveOptions,
    channel::{Listener, Stop},
    ram::BlockName,
    wire::VmUuid,
};
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions, ArrivalProgress, Listening},
    incoming::{Expected, LeftOut},
};

use super::{
    arrived::{Numbers, Receiving, report},
    tls,
};
use crate::{
    about::About,
    args::{MissingPagesArg, OutputArgs, ProgressArg, ReceiveArgs},
    capture::{Capture, Complete},
    combinations,
    direct_io::DirectIo,
    file_address::FileAddress,
    interrupt,
    listen_address::{ListenAddress, Opened},
    output::{
        display::Display as Progress,
        outcome::{Failure, While},
        outlet::{print_json, say, say_lines},
        report::Report,
    },
    runs::Run,
    service,
};

/// What arrived.
struct Received {
    numbers: Numbers,
    return_path: bool,
    complete: Complete,
    /// Why the source, which waits for it, did not get the confirmation.
    untold: Option<Error>,
}

pub(crate) fn run(args: &ReceiveArgs) -> Result<(), Failure> {
    let Some(file) = &args.file else {
        return Err(Failure::Usage("FILE is missing: give a FILE, or --dir DIR".into()));
    };
    let listen = args.listen.open()?;
    combinations::of_receive(args, &listen.address, file.path())?;
    let stop = Stop::new();
    interrupt::cancels(&stop)?;
    interrupt::spares_large_files();
    let run = Run::start("receive", file.to_string(), args.listen.to_string(), &args.run, &stop)?;
    let ended = receive(args, file, &listen, &stop, &run);
    run.end(ended)
}

fn receive(
    args: &ReceiveArgs,
    file: &FileAddress,
    listen: &Opened,
    stop: &Stop,
    run: &Run,
) -> Result<(), Failure> {
    let credentials = tls::credentials(args)?;
    let direct_io = DirectIo { wanted: args.direct_io, quiet: args.output.quiet, address: file };
    let capture = Capture::create(file, args.force, &direct_io, args.base.as_ref())?;
    let listener = Listener::bind(&listen.address)
        .map_err(|error| While::new(format!("cannot listen at {}", args.listen), error))?;
    let address = match &args.listen {
        ListenAddress::Address(_) => listener.local_address().to_string(),
        ListenAddress::StandardInput | ListenAddress::Systemd => args.listen.to_string(),
    };
    let listener = tls::listen(credentials, listener);
    let listening = Arrival::listen(listener, options(args), stop).map_err(Failure::of)?;
    say(&format!("listening on {address}"));
    service::ready();
    if !args.output.quiet {
        args.listen.note_unread_pipe();
    }
    let reception = Reception {
        run: Some(run),
        about: &|peer| About::received(peer, args.label.as_ref()),
        ..Reception::into(file, "receive", args.output)
    };
    let stored = reception.run(listening, capture, stop)?;
    if stored.has_pages_of_main() {
        direct_io.without_channels();
    }
    reception.report(&stored, &stored.report(), "received")?;
    match stored.untold() {
        None => Ok(()),
        Some(error) => {
            let told = format!("{file} is complete, but {UNTOLD}");
            Err(Failure::SourceNotTold(While::new(told, error).into()))
        }
    }
}

/// How every source is received.
pub(super) fn options(args: &ReceiveArgs) -> ArrivalOptions {
    let receive = ReceiveOptions::new()
        .channels(args.multifd_channels)
        .channels_from(args.channels_from.clone())
        .method(args.multifd_compression.0)
        .decompression_memory(args.decompression_memory())
        .accept_timeout(args.accept_timeout())
        .max_refused(Some(args.max_refused));
    ArrivalOptions::new(Expected::AnyMachine)
        .receive(receive)
        .channels_may_break(args.channels_may_break)
        .left_out(match args.missing_pages {
            // With x-ignore-shared, the file omits the blocks of which no page has arrived.
            MissingPagesArg::Refuse => LeftOut::SharedBlocks,
            MissingPagesArg::Zero => LeftOut::Pages,
        })
        .stall_timeout(args.stall_timeout())
        .pause_timeout(args.pause_timeout())
        .switchover_ack(args.switchover_ack)
        // The guest does not run here, so its last pages may come after its devices.
        .postcopy(true)
        .suppress_vmdesc(args.suppress_vmdesc)
}

/// One arrival into a file, as `receive` and `capture` show it.
pub(super) struct Reception<'a> {
    /// The name of the command, for the progress.
    pub(super) verb: String,
    /// Where the machine goes, for messages.
    pub(super) into: &'a dyn Display,
    pub(super) output: OutputArgs,
    pub(super) progress: ProgressArg,
    /// What other programs see of it, if they can see it.
    pub(super) run: Option<&'a Run>,
    /// The job that runs it, if there are several.
    pub(super) job: Option<u64>,
    /// Called with the machine's UUID when the file is complete, before the source is informed.
    pub(super) before_confirmation: &'a dyn Fn(Option<VmUuid>) -> Result<(), While>,
    /// Called when everything has arrived and the file cannot be completed, before the source is informed.
    pub(super) before_refusal: &'a dyn Fn(&Error),
    /// What is recorded about the capture; called with the source's address when everything has arrived.
    pub(super) about: &'a dyn Fn(&str) -> About,
}

/// A machine that has arrived and is in its file.
pub(super) struct Stored {
    received: Received,
    time: Duration,
}

impl Stored {
    /// Whether pages arrived on main, which direct I/O does not cover.
    pub(super) fn has_pages_of_main(&self) -> bool {
        self.received.numbers.main_pages.normal > 0
    }

    /// Why the source, which waits for it, did not get the confirmation.
    pub(super) fn untold(&self) -> Option<Error> {
        self.received.untold.clone()
    }

    pub(super) fn report(&self) -> Report {
        let mut report = report(&self.received.numbers, self.time);
        report.status = "completed";
        report.source_told = self.received.return_path.then_some(self.received.untold.is_none());
        report.ram.remaining = Some(0);
        report
    }

    /// What the file lacks, because it is useless without.
    pub(super) fn warnings(&self) -> Vec<String> {
        let warning = |name: &BlockName| {
            format!(
                "WARNING: block {name:?} is shared memory and is not in the file: the file can only be restored while that \
                 memory is unchanged"
            )
        };
        self.received.complete.ignored.iter().map(warning).collect()
    }

    /// How much of a delta differs from its base.
    fn differing(&self) -> Option<String> {
        let (pages, all) = self.received.complete.differing?;
        Some(format!("{} of {} pages differ from the base", HumanCount(pages), HumanCount(all)))
    }
}

impl<'a> Reception<'a> {
    /// One arrival of this verb, without anything to be called.
    pub(super) fn into(into: &'a dyn Display, verb: impl Into<String>, output: OutputArgs) -> Self {
        Self {
            verb: verb.into(),
            into,
            output,
            progress: output.progress(),
            run: None,
            job: None,
            before_confirmation: &|_| Ok(()),
            before_refusal: &|_| {},
            about: &|peer| About::received(peer, None),
        }
    }

    /// Accepts a source and stores its machine.
    ///
    /// # Errors
    /// If nothing was stored; then there is no file. With `--json`, the report was printed.
    pub(super) fn run(&self, listening: Listening, capture: Capture, stop: &Stop) -> Result<Stored, Failure> {
        let start = Instant::now();
        let shown = self.shown(listening.progress());
        let display = self.display(&shown);
        match listening.accept() {
            Ok(arrival) => self.take(arrival, capture, &shown, display, stop),
            Err(error) => {
                drop(display);
                Err(self.failed(None, &shown.progress, start, error))
            }
        }
    }

    /// Stores the machine of a source that is here.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub(super) fn store(&self, arrival: Arrival, capture: Capture, stop: &Stop) -> Result<Stored, Failure> {
        let shown = self.shown(arrival.progress());
        let display = self.display(&shown);
        self.take(arrival, capture, &shown, display, stop)
    }

    fn shown(&self, progress: ArrivalProgress) -> Arc<Receiving> {
        let shown = Arc::new(Receiving {
            progress,
            completing: Arc::new(AtomicBool::new(false)),
            connected: Arc::new(OnceLock::new()),
            job: self.job,
        });
        if let Some(run) = self.run {
            run.show(shown.clone());
        }
        shown
    }

    fn display(&self, shown: &Arc<Receiving>) -> Progress {
        Progress::start(&self.verb, self.progress, shown.clone())
    }

    fn take(
        &self,
        arrival: Arrival,
        capture: Capture,
        shown: &Receiving,
        display: Progress,
        stop: &Stop,
    ) -> Result<Stored, Failure> {
        let start = *shown.connected.get_or_init(Instant::now);
        let peer = arrival.peer().to_owned();
        let received = self.take_in(arrival, &peer, capture, shown, stop);
        drop(display);
        match received {
            Ok(received) => Ok(Stored { received, time: start.elapsed() }),
            Err(error) => Err(self.failed(Some(&peer), &shown.progress, start, error)),
        }
    }

    /// Prints the report of a success in the requested form; `done` is its first words.
    pub(super) fn report(&self, stored: &Stored, report: &Report, done: &str) -> Result<(), Failure> {
        if let Some(run) = self.run {
            run.reported(report);
        }
        if self.output.json {
            print_json(report)?;
        } else if !self.output.quiet {
            say_lines(&report.lines(&format!("{done} {}", self.into)));
            say_lines(&stored.differing().into_iter().collect::<Vec<_>>());
            say_lines(&stored.warnings());
        }
        Ok(())
    }

    /// Receives the whole migration, stores it, and informs the source.
    fn take_in(
        &self,
        arrival: Arrival,
        peer: &str,
        capture: Capture,
        shown: &Receiving,
        stop: &Stop,
    ) -> Result<Received, Error> {
        let mut pending = arrival.load(|configuration, list| capture.blocks(configuration, list))?;
        // Relaxed: it orders nothing.
        shown.completing.store(true, Ordering::Relaxed);
        let kept = stop.check().and_then(|()| pending.check_source()).and_then(|()| {
            let uuid = pending.uuid();
            let about = (self.about)(peer);
            let kept = capture.complete(pending.loaded(), pending.arrived(), uuid, about, stop);
            let announced =
                pending.loaded().configuration.as_ref().and_then(|configuration| configuration.uuid);
            let named =
                kept.and_then(|complete| (self.before_confirmation)(uuid.or(announced)).map(|()| complete));
            named.map_err(|error| {
                Error::other("all data was received, but the file cannot be completed", error)
            })
        });
        let complete = match kept {
            Ok(complete) => complete,
            Err(error) => {
                (self.before_refusal)(&error);
                return Err(pending.refuse(error));
            }
        };
        // The file has its name by now and stays on every path from here on: it may be the only copy.
        let mut received = Received {
            numbers: Numbers::of(&shown.progress),
            return_path: pending.loaded().return_path,
            complete,
            untold: None,
        };
        match pending.confirm() {
            Ok(mut confirmed) => {
                received.untold = confirmed.wait_closed(SOURCE_CLOSES).err();
                received.numbers.channels = confirmed.finish();
            }
            Err(error) => received.untold = Some(error),
        }
        Ok(received)
    }

    /// Reports a migration that failed, in the requested form.
    pub(super) fn failed(
        &self,
        source: Option<&str>,
        progress: &ArrivalProgress,
        start: Instant,
        error: Error,
    ) -> Failure {
        let report =
            Report { job: self.job, ..report(&Numbers::of(progress), start.elapsed()).failed(&error) };
        if let Some(run) = self.run {
            run.reported(&report);
        }
        if self.output.json
            && let Err(full) = print_json(&report)
        {
            tracing::error!(error = %full, "cannot print the report");
        }
        if error.is_cancelled() {
            return Failure::Interrupted;
        }
        let what = match source {
            Some(peer) => {
                format!("the migration from {peer} into {} failed{}", self.into, likely(&error))
            }
            None => format!("no migration into {} has begun", self.into),
        };
        While::new(what, error).into()
    }
}

/// The likely cause at the other end, printed before the details of the stream.
fn likely(error: &Error) -> &'static str {
    match error.fault() {
        Fault::Connection => ": the connection to the source ended early",
        Fault::Stalled => ": the source sends no data",
        Fault::Protocol => ": the stream from the source is invalid, incomplete or not supported",
        _ => "",
    }
}

pub(super) const UNTOLD: &str = "the source did not get the confirmation (it was cancelled, or its process ended) and may still run the \
                      guest: check the source before you restore the file, the guest must not run twice";
/// The time limit for a source to close main after the confirmation.
const SOURCE_CLOSES: Duration = Duration::from_secs(5);
