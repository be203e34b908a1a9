//! `multifd receive`: receives a running QEMU guest and stores it in a file.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use multifd::{
    Error, Fault, ReceiveOptions,
    channel::{Listener, Stop},
    ram::BlockName,
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
    args::{MissingPagesArg, OutputArgs, ReceiveArgs},
    capture::{Capture, Channels},
    combinations,
    direct_io::DirectIo,
    file_address::FileAddress,
    interrupt,
    listen_address::{ListenAddress, Opened},
    output::{
        display::Display,
        outcome::{Failure, While},
        outlet::{print_json, say, say_lines},
        report::Report,
    },
    run::Run,
};

/// What arrived.
struct Received {
    numbers: Numbers,
    return_path: bool,
    /// Shared blocks, whose memory was not sent.
    ignored: Vec<BlockName>,
    /// Why the source, which waits for it, did not get the confirmation.
    untold: Option<Error>,
}

pub(crate) fn run(args: &ReceiveArgs) -> Result<(), Failure> {
    let listen = args.listen.open()?;
    combinations::of_receive(args, &listen.address)?;
    let stop = Stop::new();
    interrupt::cancels(&stop)?;
    interrupt::spares_large_files();
    let (file, address) = (args.file.to_string(), args.listen.to_string());
    let run = Run::start("receive", file, address, &args.run, &stop)?;
    let ended = receive(args, &listen, &stop, &run);
    run.end(ended)
}

fn receive(args: &ReceiveArgs, listen: &Opened, stop: &Stop, run: &Run) -> Result<(), Failure> {
    let credentials = tls::credentials(args)?;
    let direct_io = DirectIo { wanted: args.direct_io, quiet: args.output.quiet, address: &args.file };
    let capture = Capture::create(&args.file, args.force, &direct_io)?;
    let listener = Listener::bind(&listen.address)
        .map_err(|error| While::new(format!("cannot listen at {}", args.listen), error))?;
    let address = match &args.listen {
        ListenAddress::Address(_) => listener.local_address().to_string(),
        ListenAddress::StandardInput => args.listen.to_string(),
    };
    let listener = tls::listen(credentials, listener);
    let receive = ReceiveOptions::new()
        .channels(args.multifd_channels)
        .channels_from(args.channels_from.clone())
        .method(args.multifd_compression.0)
        .decompression_memory(args.decompression_memory())
        .accept_timeout(args.accept_timeout())
        .max_refused(Some(args.max_refused));
    let options = ArrivalOptions::new(Expected::AnyMachine)
        .receive(receive)
        .left_out(match args.missing_pages {
            // With x-ignore-shared, the file omits the blocks of which no page has arrived.
            MissingPagesArg::Refuse => LeftOut::SharedBlocks,
            MissingPagesArg::Zero => LeftOut::Pages,
        })
        .stall_timeout(args.stall_timeout())
        .pause_timeout(args.pause_timeout())
        .switchover_ack(args.switchover_ack)
        .suppress_vmdesc(args.suppress_vmdesc);
    let listening = Arrival::listen(listener, options, stop).map_err(Failure::of)?;
    say(&format!("listening on {address}"));
    if !args.output.quiet {
        args.listen.note_unread_pipe();
    }
    let reception = Reception {
        verb: "receive",
        file: &args.file,
        output: args.output,
        run,
        before_refusal: &|_| {},
        about: &|peer| About { source: Some(peer.to_owned()), ..About::new("receive", args.label.as_ref()) },
    };
    let stored = reception.run(listening, capture, stop)?;
    if stored.has_pages_of_main() {
        direct_io.without_channels();
    }
    reception.report(&stored, &stored.report(), "received")?;
    match stored.untold() {
        None => Ok(()),
        Some(error) => {
            let told = format!("{} is complete, but {UNTOLD}", args.file);
            Err(Failure::SourceNotTold(While::new(told, error).into()))
        }
    }
}

/// One arrival into a file, as `receive` and `capture` show it.
pub(super) struct Reception<'a> {
    /// The name of the command, for the progress.
    pub(super) verb: &'static str,
    pub(super) file: &'a FileAddress,
    pub(super) output: OutputArgs,
    pub(super) run: &'a Run,
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
        completed(&self.received, self.time)
    }
}

impl Reception<'_> {
    /// Accepts a source and stores its machine.
    ///
    /// # Errors
    /// If nothing was stored; then there is no file. With `--json`, the report was printed.
    pub(super) fn run(&self, listening: Listening, capture: Capture, stop: &Stop) -> Result<Stored, Failure> {
        let start = Instant::now();
        let (progress, completing) = (listening.progress(), Arc::new(AtomicBool::new(false)));
        let connected = Arc::new(OnceLock::new());
        let shown = Arc::new(Receiving {
            progress: progress.clone(),
            completing: completing.clone(),
            connected: connected.clone(),
        });
        self.run.show(shown.clone());
        let display = Display::start(self.verb, self.output.progress(), shown);
        let arrival = match listening.accept() {
            Ok(arrival) => arrival,
            Err(error) => {
                drop(display);
                return Err(self.failed(None, &progress, start, error));
            }
        };
        let start = *connected.get_or_init(Instant::now);
        let peer = arrival.peer().to_owned();
        let received = self.take_in(arrival, &peer, capture, &progress, &completing, stop);
        drop(display);
        match received {
            Ok(received) => Ok(Stored { received, time: start.elapsed() }),
            Err(error) => Err(self.failed(Some(&peer), &progress, start, error)),
        }
    }

    /// Prints the report of a success in the requested form; `done` is its first words.
    pub(super) fn report(&self, stored: &Stored, report: &Report, done: &str) -> Result<(), Failure> {
        self.run.reported(report);
        if self.output.json {
            print_json(report)?;
        } else if !self.output.quiet {
            say_lines(&report.lines(&format!("{done} {}", self.file)));
            ignored(&stored.received);
        }
        Ok(())
    }

    /// Receives the whole migration, stores it, and informs the source.
    fn take_in(
        &self,
        arrival: Arrival,
        peer: &str,
        capture: Capture,
        progress: &ArrivalProgress,
        completing: &AtomicBool,
        stop: &Stop,
    ) -> Result<Received, Error> {
        let mut pending = arrival.load(|configuration, list| capture.blocks(configuration, list))?;
        // Relaxed: it orders nothing.
        completing.store(true, Ordering::Relaxed);
        let kept = stop.check().and_then(|()| pending.check_source()).and_then(|()| {
            let channels = Channels { any: !pending.channels().is_empty(), uuid: pending.uuid() };
            let about = (self.about)(peer);
            let kept = capture.complete(pending.loaded(), pending.arrived(), &channels, about, stop);
            kept.map_err(|error| {
                Error::other("all data was received, but the file cannot be completed", error)
            })
        });
        let ignored = match kept {
            Ok(ignored) => ignored,
            Err(error) => {
                (self.before_refusal)(&error);
                return Err(pending.refuse(error));
            }
        };
        // The file has its name by now and stays on every path from here on: it may be the only copy.
        let mut received = Received {
            numbers: Numbers::of(progress),
            return_path: pending.loaded().return_path,
            ignored,
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
    fn failed(
        &self,
        source: Option<&str>,
        progress: &ArrivalProgress,
        start: Instant,
        error: Error,
    ) -> Failure {
        let report = report(&Numbers::of(progress), start.elapsed()).failed(&error);
        self.run.reported(&report);
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
                format!("the migration from {peer} into {} failed{}", self.file, likely(&error))
            }
            None => format!("no migration into {} has begun", self.file),
        };
        While::new(what, error).into()
    }
}

/// Prints what the file lacks, because it is useless without.
fn ignored(received: &Received) {
    for name in &received.ignored {
        say(&format!(
            "WARNING: block {name:?} is shared memory and is not in the file: the file can only be restored while that memory \
             is unchanged"
        ));
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

const UNTOLD: &str = "the source did not get the confirmation (it was cancelled, or its process ended) and may still run the \
                      guest: check the source before you restore the file, the guest must not run twice";
/// The time limit for a source to close main after the confirmation.
const SOURCE_CLOSES: Duration = Duration::from_secs(5);

fn completed(received: &Received, time: Duration) -> Report {
    let mut report = report(&received.numbers, time);
    report.status = "completed";
    report.source_told = received.return_path.then_some(received.untold.is_none());
    report.ram.remaining = Some(0);
    report
}
