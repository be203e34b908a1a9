//! The command line.
//!
//! A file a verb; what several verbs take is in `shared`.

mod demo;
mod inspect;
mod receive;
mod send;
mod shared;

use clap::{Parser, Subcommand};

pub(crate) use self::{
    demo::{DemoArgs, DemoDestinationArgs},
    inspect::InspectArgs,
    receive::{MissingPagesArg, ReceiveArgs, ReceiveTlsArgs},
    send::{ReturnPathArg, SendArgs, SyncModeArg},
};

/// Moves running virtual machines over many channels, in QEMU's own wire format.
///
/// Set MULTIFD_LOG to debug or trace to see what happens on every channel.
#[derive(Debug, Parser)]
#[command(name = "multifd", version, max_term_width = 100, arg_required_else_help = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Take a running QEMU guest in and keep it as a file
    ///
    /// Waits for one migration, stores it, and ends. The file is a mapped-ram file: send it on with `multifd
    /// send`, or let QEMU 9.0 and later load it itself with capability mapped-ram and `-incoming file:FILE`.
    ///
    /// The file appears under its name only when it is complete and on the disk. It is readable by its owner
    /// alone, for it holds the guest's memory. In a container, `file:PATH,offset=N`, the first N bytes are kept.
    ///
    /// Exit code 3: the guest is kept whole, but its source was not told, and may run it on. Look there before the file
    /// is restored.
    Receive(ReceiveArgs),
    /// Send a file that holds a guest into a waiting QEMU
    ///
    /// Takes files written by `multifd receive`, and by QEMU 9.0 and later with capability mapped-ram.
    Send(SendArgs),
    /// Show what a file holds: machine, RAM blocks, devices; or take the RAM of a block out
    Inspect(InspectArgs),
    /// Migrate a busy guest between two processes of this machine, and prove that nothing was lost
    ///
    /// Needs no QEMU: the guest is memory and threads that keep writing to it.
    Demo(DemoArgs),
    #[command(hide = true)]
    DemoDestination(DemoDestinationArgs),
}

impl Verb {
    /// Whether nothing but errors is to be said.
    pub(crate) fn quiet(&self) -> bool {
        match self {
            Self::Receive(args) => args.output.quiet,
            Self::Send(args) => args.output.quiet,
            Self::Inspect(_) | Self::Demo(_) | Self::DemoDestination(_) => false,
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
