//! A guest from a file that runs before its RAM is there: for `send` and `restore`.
//!
//! ```text
//! start ─▶ SHUT 0: done
//!   └────▶ broken: the guest waits at the destination ─▶ --retry: resume, until it is done or the destination has ended
//! ```

use std::{sync::Arc, time::Duration};

use indicatif::HumanCount;
use multifd::{
    channel::{Connect, Stop},
    error::chain,
    live::Status,
};
use qemu_stream::{
    mapped_ram::StoredMachine,
    outgoing::postcopy::{
        GuestAt, PostcopyControl, PostcopyError, PostcopyInfo, PostcopyOptions, PostcopyProgress,
        PostcopySource,
    },
};

use crate::{
    args::{OutputArgs, PostcopyArgs},
    file_address::FileAddress,
    output::{
        display::{Display, PAUSED, Shown},
        outcome::{Failure, While},
        outlet::{print_json, say_lines},
        progress::Look,
        report::Report,
    },
    runs::{Adjust, Limits, Run},
    working_set::WorkingSet,
};

/// A file's guest on its way, as `send` and `restore` show it.
pub(super) struct Running<'a> {
    /// The name of the command, for the progress.
    pub(super) verb: &'static str,
    pub(super) file: &'a FileAddress,
    pub(super) args: &'a PostcopyArgs,
    pub(super) output: OutputArgs,
    pub(super) run: &'a Run,
    /// The destination.
    pub(super) to: String,
    pub(super) stop: &'a Stop,
    /// Whether the pages that the guest needs are recorded.
    pub(super) records: bool,
}

/// The options of the command line.
pub(super) fn options(args: &PostcopyArgs, preempt: bool) -> PostcopyOptions {
    let options =
        PostcopyOptions::new().preempt(preempt).max_postcopy_bandwidth(args.max_postcopy_bandwidth());
    args.host_page_size.iter().fold(options, |options, page| match &page.block {
        Some(block) => options.block_page_size(block.clone(), page.bytes),
        None => options.host_page_size(page.bytes),
    })
}

impl Running<'_> {
    /// Sends the guest, and prints the report. `again` makes the destination accept new connections after a broken one,
    /// and returns how to connect to it.
    pub(super) fn run(
        &self,
        mut source: PostcopySource,
        file: &StoredMachine,
        connector: Arc<dyn Connect>,
        mut again: impl FnMut() -> Result<Arc<dyn Connect>, Failure>,
    ) -> Result<PostcopyInfo, Failure> {
        let working_set = Some(WorkingSet::of(self.file)).filter(|_| !self.args.no_working_set);
        if let Some(set) = working_set.as_ref().filter(|_| !self.args.resume) {
            let pages = set.apply(&mut source, file.blocks());
            tracing::debug!(pages, "sent before the guest starts");
        }
        let progress = source.progress();
        let total = file.blocks().total();
        let page_size = file.blocks().page_size().bytes() as u64;
        let sending = Arc::new(Sending { progress: progress.clone(), total, page_size });
        self.run.show(sending.clone());
        self.run.adjusts(Some(Arc::new(Walk(source.control()))));
        let display = Display::start(self.verb, self.output.progress(), sending.clone());
        let mut sent = match self.args.resume {
            true => source.resume(&*connector, self.stop),
            false => source.start(&*connector, self.stop),
        };
        while let Err(error) = &sent
            && self.args.retry
            && error.guest == GuestAt::Destination
            && progress.info().unreadable == 0
            && !self.stop.is_stopped()
        {
            tracing::warn!("interrupted, resuming: {}", chain(&error.error));
            if self.stop.pause(RETRY).is_err() {
                break;
            }
            let connector = again()?;
            sent = source.resume(&*connector, self.stop);
        }
        drop(display);
        // A guest that has been resumed was needing other pages when it started.
        if let Some(set) = working_set.filter(|_| self.records && !self.args.resume && sent.is_ok()) {
            set.record(&source, file.blocks());
        }
        let info = progress.info();
        match sent {
            Ok(()) => Ok(info),
            Err(error) => Err(self.failed(error, &sending)),
        }
    }

    fn failed(&self, error: PostcopyError, sending: &Sending) -> Failure {
        let cancelled = error.error.is_cancelled();
        let status = match (error.guest, cancelled) {
            (GuestAt::Destination, _) => PAUSED,
            (GuestAt::Source, true) => Status::Cancelled.as_str(),
            (GuestAt::Source, false) => Status::Failed.as_str(),
        };
        let report = sending.report().ended(status, &error);
        self.run.reported(&report);
        if self.output.json
            && let Err(full) = print_json(&report)
        {
            tracing::error!(error = %full, "cannot print the report");
        }
        if cancelled && error.guest == GuestAt::Source {
            return Failure::Interrupted;
        }
        let what = match error.guest {
            GuestAt::Source => format!("the migration of {} to {} failed", self.file, self.to),
            GuestAt::Destination => format!("the migration of {} to {} was interrupted", self.file, self.to),
        };
        While::new(what, error).into()
    }

    /// Prints the report of a success.
    pub(super) fn report(
        &self,
        info: &PostcopyInfo,
        file: &StoredMachine,
        done: &str,
    ) -> Result<(), Failure> {
        let page_size = file.blocks().page_size().bytes() as u64;
        let report = Report::of_postcopy(info, Status::Completed.as_str(), file.blocks().total(), page_size);
        self.run.reported(&report);
        if self.output.json {
            print_json(&report)?;
        } else if !self.output.quiet {
            let mut lines = report.lines(&format!("{done} {} to {}", self.file, self.to));
            lines.extend(summary(info));
            say_lines(&lines);
        }
        Ok(())
    }
}

/// When the guest ran, and how long it waited for pages.
fn summary(info: &PostcopyInfo) -> Option<String> {
    let started = info.guest_running_after?;
    let mut text = format!("guest running after {} ms; {}", started.as_millis(), requests(info));
    if info.recoveries > 0 {
        text += &format!("; resumed {} times", info.recoveries);
    }
    Some(text)
}

/// `1204 requests, p50 70 µs p99 0.9 ms`.
fn requests(info: &PostcopyInfo) -> String {
    let mut text = format!("{} requests", HumanCount(info.requests));
    if let Some((half, most)) = info.request_p50.zip(info.request_p99) {
        text += &format!(", p50 {} p99 {}", short(half), short(most));
    }
    text
}

/// A time of a request.
fn short(time: Duration) -> String {
    match time.as_micros() {
        micros @ ..500 => format!("{micros} µs"),
        _ => format!("{:.1} ms", time.as_secs_f64() * 1e3),
    }
}

/// What the display shows.
struct Sending {
    progress: PostcopyProgress,
    total: u64,
    page_size: u64,
}

impl Shown for Sending {
    fn look(&self) -> Look {
        let info = self.progress.info();
        let stage = match info.remaining {
            _ if info.transferred == 0 => Some("connecting"),
            None => Some("the destination loads the devices"),
            Some(0) => Some("all is sent; the destination completes"),
            Some(_) => None,
        };
        let mut note = format!("{} requests", info.requests);
        if let Some(most) = info.request_p99 {
            note += &format!(", p99 {}", short(most));
        }
        Look {
            stage,
            done: self.total.saturating_sub(info.remaining.unwrap_or_default() * self.page_size),
            total: self.total,
            transferred: info.transferred,
            note,
            check: "is postcopy-ram on at the destination?",
            ..Look::default()
        }
    }

    fn report(&self) -> Report {
        let info = self.progress.info();
        let status =
            if info.guest_running_after.is_some() { "postcopy-active" } else { Status::Setup.as_str() };
        Report::of_postcopy(&info, status, self.total, self.page_size)
    }
}

/// The limit of pages that the guest does not wait for.
struct Walk(PostcopyControl);

impl Adjust for Walk {
    fn adjust(&self, limits: &Limits) -> Result<(), String> {
        let useless = limits.max_bandwidth.map(|_| "max-bandwidth");
        if let Some(name) = useless.or(limits.downtime_limit.map(|_| "downtime-limit")) {
            return Err(format!(
                "with --postcopy-ram, {name} has no effect: only max-postcopy-bandwidth can be set"
            ));
        }
        self.0.set_max_postcopy_bandwidth(limits.max_postcopy_bandwidth);
        Ok(())
    }
}

/// The time before another attempt to resume.
const RETRY: Duration = Duration::from_millis(500);
