//! `multifd send`: sends a guest from a file to a waiting QEMU.

use std::{fs::File, io, sync::Arc};

use multifd::{
    Error, Fault, SendOptions,
    channel::{Address, Connect, Stop},
    live::{
        Control, DeviceInfo, DeviceSection, Guest, MigrateOptions, MigrationInfo, Progress, RunState,
        ZeroPageDetection,
    },
    ram::{self, NeverDirty, RamBlocks},
    wire::VmUuid,
};
use qemu_stream::{
    format::{Configuration, SyncMode},
    mapped_ram::{ChainFile, ReadPath, StoredMachine},
    outgoing::{Options, postcopy::PostcopySource},
    source::{Source, SourceOptions},
};

use super::{
    postcopy::{self, Running},
    tls,
};
use crate::{
    args::{OutputArgs, ReturnPathArg, SendArgs, SyncModeArg},
    combinations,
    direct_io::DirectIo,
    file_address::FileAddress,
    identity::Identity,
    interrupt,
    output::{
        display::{Display, Shown},
        outcome::{Failure, While},
        outlet::{print_json, say, say_lines},
        progress::Look,
        report::Report,
    },
    remedy::READS_DAMAGED,
    runs::{Adjust, Limits, Run},
    stored::Open,
};

pub(crate) fn run(args: &SendArgs) -> Result<(), Failure> {
    combinations::of_send(args).map_err(|refused| Failure::Usage(refused.into()))?;
    combinations::of_channels_that_may_break(args)?;
    if args.postcopy.is_on() && args.address.is_single() {
        let why = format!(
            "post-copy needs the replies of the destination, and {} has none: use tcp, unix or vsock",
            args.address
        );
        return Err(Failure::Usage(why.into()));
    }
    let connector = tls::connector(args)?;
    let stop = Stop::new();
    interrupt::cancels(&stop)?;
    let run = Run::start("send", args.file.to_string(), args.address.to_string(), &args.run, &stop)?;
    let ended = send(args, connector, &stop, &run);
    run.end(ended)
}

fn send(args: &SendArgs, connector: Arc<dyn Connect>, stop: &Stop, run: &Run) -> Result<(), Failure> {
    let opened = Open::new(stop).quiet(args.output.quiet).no_verify(args.no_verify).machine(&args.file)?;
    let file = &*opened;
    if args.postcopy.is_on() {
        return send_running(args, file, connector, stop, run);
    }
    let at_rest = AtRest::of(file).map_err(|error| args.file.unreadable(error))?;
    let reading = Reading {
        channels: args.multifd_channels,
        // For compression or encryption, pages are read into this process.
        packs: args.compression.packs() || args.tls.encrypts(),
        direct_io: DirectIo { wanted: args.direct_io, quiet: args.output.quiet, address: &args.file },
    };
    let blocks = Arc::new(reading.blocks(file)?);
    let options = at_rest_options(args.max_bandwidth)
        .zero_page_detection(args.zero_page_detection.or(understood(file)));
    note_missing_uuid(args, file);
    if args.channels_may_break && sync_mode(args, file) != Some(SyncMode::Round) {
        return Err(Failure::Usage(format!("{} cannot be sent so: {NEEDS_ROUND}", args.file).into()));
    }
    let source =
        Source::new(blocks, source_options(args, file).migrate(options), stop).map_err(Failure::of)?;
    let (to, hint) = (args.address.to_string(), compare(args, file));
    let delivery = Delivery { verb: "send", file: &args.file, output: args.output, run, to, hint };
    let info = delivery.run(source, connector, at_rest)?;
    delivery.report(&Report::of_source(&info), "sent")
}

/// Sends a guest that runs before its RAM is there.
fn send_running(
    args: &SendArgs,
    file: &StoredMachine,
    connector: Arc<dyn Connect>,
    stop: &Stop,
    run: &Run,
) -> Result<(), Failure> {
    let direct_io = DirectIo { wanted: args.direct_io, quiet: args.output.quiet, address: &args.file };
    let blocks = Arc::new(Reading { channels: 1, packs: true, direct_io }.blocks(file)?);
    let options = postcopy::options(&args.postcopy, args.postcopy_preempt)
        .connect_timeout(args.connect_timeout())
        .stall_timeout(args.stall_timeout())
        .end_timeout(args.end_timeout());
    let source = PostcopySource::of_file(file, blocks, options)
        .map_err(|refused| While::new(format!("{} cannot be sent with post-copy", args.file), refused))?;
    let running = Running {
        verb: "send",
        file: &args.file,
        args: &args.postcopy,
        output: args.output,
        run,
        to: args.address.to_string(),
        stop,
        records: args.record_working_set,
    };
    let info = running.run(source, file, connector.clone(), || Ok(connector.clone()))?;
    running.report(&info, file, "sent")
}

/// A file's guest on its way to a QEMU, as `send` and `restore` show it.
pub(super) struct Delivery<'a> {
    /// The name of the command, for the progress.
    pub(super) verb: &'static str,
    pub(super) file: &'a FileAddress,
    pub(super) output: OutputArgs,
    pub(super) run: &'a Run,
    /// The destination.
    pub(super) to: String,
    /// What to compare if the destination accepts no data.
    pub(super) hint: String,
}

impl Delivery<'_> {
    /// Sends the guest.
    ///
    /// # Errors
    /// If the destination does not have it. With `--json`, the report was printed.
    pub(super) fn run(
        &self,
        source: Source,
        connector: Arc<dyn Connect>,
        mut guest: AtRest,
    ) -> Result<MigrationInfo, Failure> {
        let progress = source.progress();
        self.run.adjusts(Some(Arc::new(Bandwidth(source.control()))));
        let sending = Arc::new(Sending { progress: progress.clone(), hint: self.hint.clone() });
        self.run.show(sending.clone());
        let display = Display::start(self.verb, self.output.progress(), sending);
        let sent = source.migrate(connector, &mut NeverDirty, &mut guest);
        drop(display);
        sent.map_err(|error| {
            let report = Report::of_source(&progress.info()).failed(&error);
            self.run.reported(&report);
            if self.output.json
                && let Err(full) = print_json(&report)
            {
                tracing::error!(error = %full, "cannot print the report");
            }
            if error.is_cancelled() {
                return Failure::Interrupted;
            }
            let mut what =
                format!("the migration of {} to {} failed{}", self.file, self.to, not_taken(&error));
            if is_of_damage(&error) {
                what += &format!("; {} is damaged: {READS_DAMAGED}", self.file);
            }
            While::new(what, error).into()
        })
    }

    /// Prints the report of a success in the requested form; `done` is its first word.
    pub(super) fn report(&self, report: &Report, done: &str) -> Result<(), Failure> {
        self.run.reported(report);
        if self.output.json {
            print_json(report)?;
        } else if !self.output.quiet {
            say_lines(&report.lines(&format!("{done} {} to {}", self.file, self.to)));
        }
        Ok(())
    }
}

/// What the display shows.
struct Sending {
    progress: Progress,
    hint: String,
}

impl Shown for Sending {
    fn look(&self) -> Look {
        Look { hint: Some(self.hint.clone()), ..Look::of(&self.progress) }
    }

    fn report(&self) -> Report {
        Report::of_source(&self.progress.info())
    }
}

/// The limit of a guest in a file that can be changed.
struct Bandwidth(Control);

impl Adjust for Bandwidth {
    fn adjust(&self, limits: &Limits) -> Result<(), String> {
        let useless = limits.downtime_limit.map(|_| "downtime-limit");
        if let Some(name) = useless.or(limits.max_postcopy_bandwidth.map(|_| "max-postcopy-bandwidth")) {
            return Err(format!(
                "the guest in a file does not run, so {name} has no effect: only max-bandwidth can be set"
            ));
        }
        if let Some(bytes) = limits.max_bandwidth {
            self.0.set_max_bandwidth(Some(bytes));
        }
        Ok(())
    }
}

/// The options of a guest in a file. The file knows its zero pages. A search for more would read a mapping that another
/// process may be truncating. No guest is stopped in the meantime, so there is no time limit for a slow destination.
pub(super) fn at_rest_options(max_bandwidth: u64) -> MigrateOptions {
    MigrateOptions::new()
        .switchover_timeout(None)
        .max_bandwidth(Some(max_bandwidth))
        .look_for_zero_pages(false)
}

/// The consequence for the guest if the destination does not have it: it stays in the file.
fn not_taken(error: &Error) -> &'static str {
    match error.fault() {
        _ if matches!(error.kind(), Error::OwnerUnknown(_)) => "",
        Fault::Peer | Fault::Connection | Fault::Protocol | Fault::Stalled => {
            "; the destination does not have the guest, the file is unchanged"
        }
        _ => "",
    }
}

/// Whether a page of the file differs from its digest.
pub(super) fn is_of_damage(error: &Error) -> bool {
    let Error::Io { source, .. } = error.kind() else { return false };
    let cause = source.get_ref().and_then(|cause| cause.downcast_ref());
    matches!(cause, Some(ram::Error::Damaged { .. }))
}

/// What both sides must have in common for the destination to accept data.
fn compare(args: &SendArgs, file: &StoredMachine) -> String {
    let channels = match args.multifd_channels {
        0 => "multifd off".to_owned(),
        channels => format!("multifd-channels {channels}"),
    };
    let compression = args.compression.name();
    let tls = if args.tls.encrypts() { "on" } else { "off" };
    let machine = file
        .configuration()
        .map_or("a type without a name in the stream".to_owned(), |known| known.machine.to_string());
    format!(
        "the destination accepts no data. Compare the settings of both sides; here: {channels}, multifd-compression \
         {compression}, TLS {tls}, machine type {machine}"
    )
}

/// The UUID that the channels send. [`NIL`](VmUuid::NIL) is that of a QEMU without `-uuid`.
fn uuid(args: &SendArgs, file: &StoredMachine) -> VmUuid {
    args.uuid.or(file.configuration().and_then(|known| known.uuid)).unwrap_or(VmUuid::NIL)
}

/// Reports, before anything is sent, that the channels will send no UUID: each QEMU compares it with its own, and ends if it
/// is another one.
fn note_missing_uuid(args: &SendArgs, file: &StoredMachine) {
    if args.output.quiet || args.multifd_channels == 0 || !uuid(args, file).is_nil() {
        return;
    }
    say(&format!(
        "{}: {} has no UUID. {NO_UUID}",
        if is_known(file) { "note" } else { "WARNING" },
        args.file
    ));
}

/// Whether the file was received over channels, which have the UUID of the source: then the source had none.
fn is_known(file: &StoredMachine) -> bool {
    file.sync_mode().is_some()
}

const NO_UUID: &str = "A destination that was started with -uuid, as libvirt starts every guest, refuses the channels, and \
                       its process ends. For such a destination give the UUID: --uuid UUID";

/// How zero pages are sent so that every possible destination of this machine understands them.
pub(super) fn understood(file: &StoredMachine) -> ZeroPageDetection {
    match file.configuration().and_then(|configuration| configuration.machine.has_zero_pages_on_main()) {
        // No QEMU before 9.0 knows the type, and every later one understands the entries.
        Some(false) => ZeroPageDetection::Multifd,
        _ => ZeroPageDetection::Legacy,
    }
}

/// How the file's pages are read.
pub(super) struct Reading<'a> {
    pub(super) channels: u8,
    /// Whether pages are changed on the way, by compression or encryption.
    pub(super) packs: bool,
    pub(super) direct_io: DirectIo<'a>,
}

impl Reading<'_> {
    /// The file's blocks. Channels send from a mapping, with system calls only. If pages must be read into this process
    /// (over main, for compression or encryption, or with direct I/O), they are read from the file, which another process
    /// may be truncating.
    pub(super) fn blocks(&self, file: &StoredMachine) -> Result<RamBlocks, Failure> {
        let over_main = self.channels == 0;
        let direct = if over_main {
            self.direct_io.without_channels();
            None
        } else {
            file.files().first().and_then(|newest| self.direct_io.open(newest.file()))
        };
        let reads = over_main || direct.is_some() || self.packs;
        let blocks = file.ram_blocks(|entry, place| match &direct {
            Some(direct) => {
                self.direct_io.check(direct, &entry.name, place.pages_offset);
                ReadPath::Direct(direct.clone())
            }
            None if reads => ReadPath::Cached,
            None => ReadPath::Mapped,
        });
        Ok(blocks.map_err(|error| self.direct_io.address.unreadable(error))?)
    }
}

/// The options for the machine in the file, as its destination expects it.
fn source_options(args: &SendArgs, file: &StoredMachine) -> SourceOptions {
    let send =
        args.compression.apply(SendOptions::new().uuid(uuid(args, file))).zero_copy_send(args.zero_copy_send);
    let options = SourceOptions::of_file(file)
        .channels(args.multifd_channels)
        .channels_may_break(args.channels_may_break)
        .send(send)
        .connect_timeout(args.connect_timeout())
        .stall_timeout(args.stall_timeout())
        .end_timeout(args.end_timeout());
    let options = match args.sync_mode {
        SyncModeArg::Legacy => options.sync_mode(SyncMode::Legacy),
        SyncModeArg::Round => options.sync_mode(SyncMode::Round),
        SyncModeArg::Auto => options,
    };
    match args.return_path {
        ReturnPathArg::Off => options.unconfirmed(),
        ReturnPathArg::Auto if matches!(args.address, Address::Exec(_)) => options.unconfirmed(),
        ReturnPathArg::On | ReturnPathArg::Auto => options,
    }
}

/// Where the sync points are in the stream.
fn sync_mode(args: &SendArgs, file: &StoredMachine) -> Option<SyncMode> {
    let of_type = |known: &Configuration| Options::new(known.clone()).chosen_sync_mode();
    match args.sync_mode {
        SyncModeArg::Legacy => Some(SyncMode::Legacy),
        SyncModeArg::Round => Some(SyncMode::Round),
        SyncModeArg::Auto => file.sync_mode().or_else(|| file.configuration().and_then(of_type)),
    }
}

const NEEDS_ROUND: &str = "with --channels-may-break, the destination is asked for lost channels between two passes, which the sync mode \
                           of this machine (legacy, machine types up to 8.0) does not allow: send it without this flag";

/// A guest in a file, or in several. It does not run, unless another process writes to a file.
pub(super) struct AtRest {
    files: Vec<(File, Identity)>,
}

impl AtRest {
    pub(super) fn of(file: &StoredMachine) -> io::Result<Self> {
        let files = file.files().iter().map(ChainFile::file).chain(file.stream()).map(|file| {
            let file = file.try_clone()?;
            let identity = Identity::of(&file.metadata()?);
            Ok((file, identity))
        });
        Ok(Self { files: files.collect::<io::Result<_>>()? })
    }
}

impl Guest for AtRest {
    fn devices(&self) -> Vec<DeviceInfo> {
        Vec::new()
    }
    fn run_state(&mut self) -> RunState {
        RunState::Running
    }
    /// All pages were sent. A file that ends inside a page is detected only here: the rest of that page reads as zeros
    /// in the mapping.
    fn stop(&mut self) -> io::Result<()> {
        for (file, identity) in &self.files {
            if Identity::of(&file.metadata()?) != *identity {
                return Err(io::Error::other(
                    "the file was changed while it was sent, so the transferred guest is inconsistent: copy the file, and \
                     send a copy that no program changes",
                ));
            }
        }
        Ok(())
    }
    fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
        Ok(Vec::new())
    }

    fn resume(&mut self) {}
}

#[cfg(test)]
mod tests {
    use qemu_stream::error::Reached;

    use super::*;

    #[test]
    fn file_is_said_to_be_unchanged_where_the_destination_has_not_taken_the_guest() {
        let refused = qemu_stream::Error::DestinationFailed { code: 1, reached: Reached::Ram, reason: None };
        let failed = Error::other("complete", refused).because(Fault::Peer);
        assert!(not_taken(&failed).contains("the file is unchanged"), "{failed:?}");
        assert!(not_taken(&failed.at("main")).contains("the file is unchanged"));
        assert_eq!(not_taken(&Error::OwnerUnknown(Box::new(Error::Cancelled))), "");
    }
}
