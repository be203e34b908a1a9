//! One job of `receive --dir`: a thread that receives one machine after another at its address.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use multifd::{
    Error,
    channel::{Listen, Stop},
};
use qemu_stream::arrival::Arrival;

use super::{
    super::receive::{Reception, Stored, UNTOLD, options},
    crew::Crew,
    lent::{Lent, lend},
    target::Target,
};
use crate::{
    about::About,
    args::{PLAIN, ProgressArg, ReceiveArgs},
    capture::Capture,
    direct_io::DirectIo,
    file_address::FileAddress,
    output::{
        outcome::{Failure, While, lines},
        outlet::{print_json, say_lines, shown},
        report::Report,
    },
};

/// A job, ready to run.
pub(super) struct Job<'a> {
    /// From 1.
    pub(super) number: u64,
    pub(super) args: &'a ReceiveArgs,
    pub(super) dir: &'a Path,
    pub(super) crew: Arc<Crew>,
    pub(super) listener: Box<dyn Listen>,
}

/// The part of a job that stays while its listener is lent.
struct Receives<'a> {
    number: u64,
    args: &'a ReceiveArgs,
    dir: &'a Path,
    crew: Arc<Crew>,
}

/// Why a job has no machine.
enum Ended {
    /// No source has connected.
    Alone(Failure),
    /// The migration has failed, or the source was not informed.
    Machine(Failure),
}

impl Job<'_> {
    /// Receives machines until the end begins.
    ///
    /// # Errors
    /// If the job cannot continue.
    pub(super) fn run(self) -> Result<(), Failure> {
        let Self { number, args, dir, crew, mut listener } = self;
        let job = Receives { number, args, dir, crew };
        // The libraries' threads inherit it: their warnings show the job.
        let _span = tracing::error_span!("receive", job = number).entered();
        let mut pause = PAUSE;
        loop {
            let stop = Stop::new();
            if !job.crew.waits(number, &stop) {
                return Ok(());
            }
            let (lent, back) = lend(listener);
            let ended = job.receive(lent, &stop);
            // The migration has ended, and with it the thread that has accepted its connections.
            listener =
                back.recv().map_err(|_| While::new("cannot listen any more", "the listener is lost"))?;
            match ended {
                Ok(()) => pause = PAUSE,
                Err(Ended::Machine(failure)) => {
                    pause = PAUSE;
                    job.tell(&failure);
                }
                Err(Ended::Alone(_)) if job.crew.is_closing() => return Ok(()),
                // What prevents every connection, such as a lack of descriptors, may pass.
                Err(Ended::Alone(failure)) => {
                    job.tell(&failure);
                    job.crew.pause(pause);
                    pause = LONGEST_PAUSE.min(pause * 2);
                }
            }
        }
    }
}

impl Receives<'_> {
    /// Receives one machine.
    fn receive(&self, listener: Lent, stop: &Stop) -> Result<(), Ended> {
        let alone = |error| Ended::Alone(Failure::of(error));
        let arrival = Arrival::listen(listener, options(self.args), stop)
            .and_then(|here| here.accept())
            .map_err(alone)?;
        let target = Target::new(self.dir, &self.args.many.name, self.crew.receives(self.number, stop));
        let stored = self.store(arrival, &target, stop);
        let told = match &stored {
            Ok(stored) => self.report(stored, &target),
            Err(_) => Ok(()),
        };
        self.crew.ended(self.number, stored.is_ok());
        let stored = stored.map_err(Ended::Machine)?;
        told.map_err(Ended::Machine)?;
        match stored.untold() {
            None => Ok(()),
            Some(error) => {
                let file = target.named().map(shown).unwrap_or_default();
                let what = format!("{file} is complete, but {UNTOLD}");
                Err(Ended::Machine(Failure::SourceNotTold(While::new(what, error).into())))
            }
        }
    }

    /// Stores the machine of a source that is here.
    fn store(&self, arrival: Arrival, target: &Target<'_>, stop: &Stop) -> Result<Stored, Failure> {
        let start = Instant::now();
        let hidden = FileAddress::of(target.hidden().to_owned());
        let output = self.args.output;
        let direct_io = DirectIo { wanted: self.args.direct_io, quiet: output.quiet, address: &hidden };
        let dir = shown(self.dir);
        let name = |uuid| target.name(uuid);
        let reception = Reception {
            // Several bars would overwrite each other.
            progress: match output.progress() {
                ProgressArg::Auto | ProgressArg::Bar => ProgressArg::Plain(PLAIN),
                other => other,
            },
            job: Some(self.number),
            before_confirmation: &name,
            about: &|peer| About::received(peer, self.args.label.as_ref()),
            ..Reception::into(&dir, format!("job {}", self.number), output)
        };
        let capture = match Capture::create(&hidden, false, &direct_io, None) {
            Ok(capture) => capture,
            Err(error) => {
                let (peer, progress) = (arrival.peer().to_owned(), arrival.progress());
                // The source is informed, and keeps the guest.
                drop(arrival);
                let error = Error::other("there can be no file", error);
                return Err(reception.failed(Some(&peer), &progress, start, error));
            }
        };
        let stored = reception.store(arrival, capture, stop)?;
        if stored.has_pages_of_main() {
            direct_io.without_channels();
        }
        Ok(stored)
    }

    /// Prints the report of a machine.
    fn report(&self, stored: &Stored, target: &Target<'_>) -> Result<(), Failure> {
        let file = target.named().map(shown);
        let report = Report { job: Some(self.number), file: file.clone(), ..stored.report() };
        let output = self.args.output;
        if output.json {
            print_json(&report)?;
        } else if !output.quiet {
            let mut told = report.lines(&format!("received {}", file.unwrap_or_default()));
            told.extend(stored.warnings());
            self.say(told);
        }
        Ok(())
    }

    /// Prints why there is no machine, or what is wrong with it, and the exit code of `receive` in this case.
    fn tell(&self, failure: &Failure) {
        let told = match failure {
            Failure::Failed(error) | Failure::Usage(error) => lines("failed (1)", &**error),
            Failure::SourceNotTold(error) => lines("failed (3)", &**error),
            // No job compares.
            Failure::Different => Vec::new(),
            Failure::Interrupted => vec!["failed (130): interrupted; the operation was cancelled".to_owned()],
        };
        self.say(told);
    }

    fn say(&self, lines: Vec<String>) {
        let number = self.number;
        say_lines(&lines.iter().map(|line| format!("job {number}: {line}")).collect::<Vec<_>>());
    }
}

/// The time after which a job that could not wait for a source waits again, at first and at most.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
