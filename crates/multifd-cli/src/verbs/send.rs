//! `multifd send`: sends a guest from a file to a waiting QEMU.

use std::{fs::File, io, sync::Arc};

use multifd::{
    Error, Fault, SendOptions,
    channel::{Address, Stop},
    live::{DeviceInfo, DeviceSection, Guest, MigrateOptions, RunState, ZeroPageDetection},
    ram::{NeverDirty, RamBlocks},
    wire::VmUuid,
};
use qemu_stream::{
    format::SyncMode,
    mapped_ram::{MappedRamFile, ReadPath},
    source::{Source, SourceOptions},
};

use super::tls;
use crate::{
    args::{ReturnPathArg, SendArgs, SyncModeArg},
    combinations,
    direct_io::DirectIo,
    identity::Identity,
    interrupt,
    output::{
        display::Display,
        outcome::{Failure, While, print, say},
        progress::Look,
        report::Report,
    },
};

pub(crate) fn run(args: &SendArgs) -> Result<(), Failure> {
    combinations::of_send(args).map_err(|refused| Failure::Usage(refused.into()))?;
    let connector = tls::connector(args)?;
    let stop = Stop::new();
    interrupt::cancels(&stop)?;
    let file = args.file.open()?;
    let mut at_rest = AtRest::of(&file).map_err(|error| args.file.unreadable(error))?;
    let blocks = Arc::new(blocks(&file, args)?);
    // The file knows its zero pages. A search for more would read a mapping that another process may be truncating. No
    // guest is stopped in the meantime, so there is no time limit for a slow destination.
    let options = MigrateOptions::new()
        .switchover_timeout(None)
        .max_bandwidth(Some(args.max_bandwidth))
        .zero_page_detection(args.zero_page_detection.or(understood(&file)))
        .look_for_zero_pages(false);
    let source =
        Source::new(blocks, source_options(args, &file).migrate(options), &stop).map_err(Failure::of)?;
    let progress = source.progress();
    let display = {
        let (progress, hint) = (progress.clone(), compare(args, &file));
        Display::start("send", args.output.quiet || args.output.json, move || Look {
            hint: Some(hint.clone()),
            ..Look::of(&progress)
        })
    };
    let sent = source.migrate(connector, &mut NeverDirty, &mut at_rest);
    drop(display);
    match sent {
        Ok(info) => {
            let report = Report::of_source(&info);
            if args.output.json {
                print(&report.json())?;
            } else if !args.output.quiet {
                say(&report.text(&format!("sent {} to {}", args.file, args.address)));
            }
            Ok(())
        }
        Err(error) => {
            if args.output.json {
                let report = Report::of_source(&progress.info()).failed(&error);
                if let Err(full) = print(&report.json()) {
                    tracing::error!(error = %full, "cannot print the report");
                }
            }
            if error.is_cancelled() {
                return Err(Failure::Interrupted);
            }
            let what =
                format!("the migration of {} to {} failed{}", args.file, args.address, not_taken(&error));
            Err(While::new(what, error).into())
        }
    }
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

/// What both sides must have in common for the destination to accept data.
fn compare(args: &SendArgs, file: &MappedRamFile) -> String {
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

/// How zero pages are sent so that every possible destination of this machine understands them.
fn understood(file: &MappedRamFile) -> ZeroPageDetection {
    match file.configuration().and_then(|configuration| configuration.machine.has_zero_pages_on_main()) {
        // No QEMU before 9.0 knows the type, and every later one understands the entries.
        Some(false) => ZeroPageDetection::Multifd,
        _ => ZeroPageDetection::Legacy,
    }
}

/// The file's blocks. Channels send from a mapping, with system calls only. If pages must be read into this process
/// (over main, for compression or encryption, or with direct I/O), they are read from the file, which another process
/// may be truncating.
fn blocks(file: &MappedRamFile, args: &SendArgs) -> Result<RamBlocks, Failure> {
    let direct_io = DirectIo { wanted: args.direct_io, quiet: args.output.quiet, address: &args.file };
    let over_main = args.multifd_channels == 0;
    let direct = if over_main {
        direct_io.without_channels();
        None
    } else {
        direct_io.open(file.file())
    };
    let reads = over_main || direct.is_some() || args.compression.packs() || args.tls.encrypts();
    let blocks = file.ram_blocks(|entry, place| match &direct {
        Some(direct) => {
            direct_io.check(direct, &entry.name, place.pages_offset);
            ReadPath::Direct(direct.clone())
        }
        None if reads => ReadPath::Cached,
        None => ReadPath::Mapped,
    });
    Ok(blocks.map_err(|error| args.file.unreadable(error))?)
}

/// The options for the machine in the file, as its destination expects it.
fn source_options(args: &SendArgs, file: &MappedRamFile) -> SourceOptions {
    let uuid = args.uuid.or(file.configuration().and_then(|c| c.uuid)).unwrap_or(VmUuid::NIL);
    let send = args.compression.apply(SendOptions::new().uuid(uuid)).zero_copy_send(args.zero_copy_send);
    let options = SourceOptions::of_file(file)
        .channels(args.multifd_channels)
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

/// A guest in a file. It does not run, unless another process writes to the file.
struct AtRest {
    file: File,
    identity: Identity,
}

impl AtRest {
    fn of(file: &MappedRamFile) -> io::Result<Self> {
        let file = file.file().try_clone()?;
        Ok(Self { identity: Identity::of(&file.metadata()?), file })
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
        if Identity::of(&self.file.metadata()?) == self.identity {
            return Ok(());
        }
        Err(io::Error::other(
            "the file was changed while it was sent, so the transferred guest is inconsistent: copy the file, and send \
             a copy that no program changes",
        ))
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
