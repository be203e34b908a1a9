//! The command line.
//!
//! There is one file for each verb; `shared` has what several verbs use.

mod capture;
mod compression;
mod ctl;
mod demo;
mod inspect;
mod look;
mod many;
mod merge;
mod physical;
mod postcopy;
mod receive;
mod record;
mod restore;
mod run;
mod send;
mod shared;
mod verify;

use clap::{Parser, Subcommand};

pub(crate) use self::{
    capture::CaptureArgs,
    ctl::{CtlArgs, CtlCommand, LimitArg},
    demo::{DemoArgs, DemoDestinationArgs},
    inspect::InspectArgs,
    look::{DiffArgs, ExportArgs, FindArgs, FormatArg, ReadArgs},
    merge::MergeArgs,
    physical::PhysicalArgs,
    postcopy::PostcopyArgs,
    receive::{MissingPagesArg, ReceiveArgs},
    record::{RecordArgs, ReplayArgs},
    restore::RestoreArgs,
    run::RunArgs,
    send::{ReturnPathArg, SendArgs, SyncModeArg},
    shared::{OutputArgs, PLAIN, ProgressArg, listen_address},
    verify::VerifyArgs,
};

/// Live migration of virtual machines over many connections, in QEMU's format
///
/// Set the environment variable MULTIFD_LOG to debug or trace to log the events of every channel. `multifd --version -v`
/// shows what this build can do.
#[derive(Debug, Parser)]
// Otherwise the help shows the name of the program as the caller has chosen it.
#[command(
    name = "multifd",
    bin_name = "multifd",
    version,
    max_term_width = 100,
    arg_required_else_help = true
)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Capture a QEMU guest into a file through QMP; the guest continues
    ///
    /// Connects to QMP, lets QEMU migrate into FILE while the guest runs, and lets the guest continue. FILE is a mapped-ram
    /// file with RAM and device state: restore it with `multifd restore`. If the capture fails, the guest runs as before,
    /// its migration settings are as before, and there is no FILE.
    ///
    /// WARNING: FILE does not contain the disks. A guest that continues writes to them, and then they no longer fit to FILE.
    /// Take a snapshot of the disks while the guest is stopped: --before-continue runs a command at this moment.
    Capture(CaptureArgs),
    /// Restore a guest from a file into a waiting QEMU through QMP
    ///
    /// QEMU was started with the same options as the captured one, and with -incoming defer. Its machine type, RAM,
    /// processors and PCI devices are compared with FILE before anything is sent.
    ///
    /// WARNING: the disks must be in the state in which they were when FILE was captured. The guest's file systems are
    /// damaged otherwise.
    Restore(RestoreArgs),
    /// Receive a running QEMU guest and keep it in a file
    ///
    /// Accepts one migration, writes the guest to FILE, and exits. FILE is a mapped-ram file. Restore it with
    /// `multifd send`, or load it with QEMU 9.0 or later (capability mapped-ram).
    ///
    /// FILE appears when it is complete and on the disk. It holds the guest's memory, so only its owner can read it.
    ///
    /// With --dir, it takes one machine after another until it is ended by a signal.
    ///
    /// WARNING: Exit code 3 means that FILE is complete, but the source did not get the confirmation and may still
    /// run the guest. Check the source before you restore FILE: the guest must not run twice.
    Receive(ReceiveArgs),
    /// Send a guest from a file to a waiting QEMU
    ///
    /// FILE was written by `multifd receive`, or by QEMU 9.0 or later with capability mapped-ram. It is not changed.
    Send(SendArgs),
    /// Show the machine type, RAM blocks and devices in a file, or extract the RAM of a block
    Inspect(InspectArgs),
    /// Compare a file with the digests in it, and name what is damaged
    ///
    /// `multifd receive` and `multifd capture` store a digest of every page. Prints every place that differs, with block and
    /// offset. The bases of a delta are compared, too. A machine in another form (a stream, an image
    /// of libvirt or a disk, a recording) is read to its end, which shows that it is complete; its pages cannot be compared. Exit code
    /// 0: FILE is intact or complete; 1: it is damaged, is a mapped-ram file without digests, or a base cannot be read.
    Verify(VerifyArgs),
    /// Make a whole file of a delta and its bases
    ///
    /// A delta was written with --base. OUT is the file that would have been written without it: QEMU 9.0 and later load it, and
    /// it needs no base. FILEs are not changed. OUT appears when it is complete and on the disk.
    Merge(MergeArgs),
    /// Show what differs between the machines in two files
    ///
    /// Machine type, blocks, pages, devices and their fields. Exit code 0: they are equal; 1: they differ; 2: it failed.
    Diff(DiffArgs),
    /// Show the memory of a guest in a file, by guest-physical addresses
    Read(ReadArgs),
    /// Find bytes or a text in the memory of a guest in a file
    ///
    /// Prints the guest-physical address of each place, and the first bytes there. Searches each range of RAM for itself. Exit code
    /// 0: found; 1: not found; 2: it failed.
    Find(FindArgs),
    /// Write the memory of a guest in a file in a format that other tools read
    ///
    /// Memory is laid out by guest-physical addresses. What is zero becomes a hole of OUT.
    Export(ExportArgs),
    /// Record a migration between two QEMUs while it runs
    ///
    /// Listens at LISTEN, connects each connection to TARGET, and passes everything on unchanged, in both directions. OUT gets the
    /// bytes and their times. `multifd inspect OUT` shows the time line, `multifd replay OUT ADDRESS` plays the source.
    ///
    /// The run ends when all connections are closed. If OUT cannot be written any more, the recording ends and the migration
    /// continues; exit code 1. The first Ctrl-C does the same; exit code 130.
    ///
    /// WARNING: a second Ctrl-C closes the connections. The migration fails or, in post-copy, pauses.
    Record(RecordArgs),
    /// Play the source of a recorded migration to a waiting destination
    ///
    /// The destination can be a QEMU with the options of the recorded one, or `multifd receive`, which makes a file of the machine.
    /// Bytes are sent as they were; what the destination replies is read and not compared.
    ///
    /// WARNING: the destination runs the guest as it was recorded. Its disks must be copies.
    Replay(ReplayArgs),
    /// Ask a run for its status, cancel it, or change its limits
    ///
    /// For a run of receive, send, capture or restore that was started with --control SOCKET.
    Ctl(CtlArgs),
    /// Migrate a busy guest to a second process on this machine and compare both memories
    ///
    /// Needs no QEMU: the guest is memory and two threads that write to it all the time.
    Demo(DemoArgs),
    #[command(hide = true)]
    DemoDestination(DemoDestinationArgs),
}

impl Verb {
    /// Whether only errors are printed.
    pub(crate) fn quiet(&self) -> bool {
        match self {
            Self::Capture(args) => args.output.quiet,
            Self::Restore(args) => args.output.quiet,
            Self::Receive(args) => args.output.quiet,
            Self::Send(args) => args.output.quiet,
            Self::Verify(args) => args.output.quiet,
            Self::Merge(args) => args.output.quiet,
            Self::Export(args) => args.quiet,
            Self::Record(args) => args.quiet,
            Self::Replay(args) => args.quiet,
            Self::Diff(_)
            | Self::Read(_)
            | Self::Find(_)
            | Self::Inspect(_)
            | Self::Ctl(_)
            | Self::Demo(_)
            | Self::DemoDestination(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }
}
