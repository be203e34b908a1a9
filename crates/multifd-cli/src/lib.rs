//! `multifd`: the source or the destination of a QEMU migration, with a file at the other end.
//!
//! ```text
//! args/ ─▶ verbs/capture   the same as receive, with QEMU controlled through qmp/; verbs/restore likewise as send
//!          verbs/receive   QEMU ═══ channels ═══▶ file        capture   the file being written
//!          verbs/many      receive --dir: one machine after another, several at a time; file_name has their names
//!          verbs/send      file ═══ channels ═══▶ QEMU
//!          stored/         any form of a stored machine ─▶ one reader, for all verbs that read one
//!          verbs/inspect   file ─▶ a table, or (extract) one block's RAM
//!          verbs/verify    file ─▶ compared with its digests
//!          verbs/merge     a delta and its bases ─▶ one file
//!          verbs/diff      two machines ─▶ what differs
//!          verbs/read, find, export   guest-physical memory: a table, places of bytes, a file for other tools
//!          verbs/record    QEMU ◀══ all connections ══▶ QEMU, and a file; verbs/replay   such a file ═══ connections ═══▶ QEMU
//!          verbs/ctl       commands to a run of another process, at the socket of its runs/control
//!          verbs/demo      this process ═══ channels ═══▶ a second one
//!                            └── interrupt (Ctrl-C)   service (systemd)   output/  progress, and the end as text or JSON
//!                                                                         runs/    limit, metrics, control
//! ```
//!
//! Standard output is for results, standard error for messages. Exit codes: 0 success, 1 failure, 2 wrong usage, 3 the file
//! is complete but the source did not get the confirmation, 130 interrupted.

mod about;
mod args;
mod capture;
mod combinations;
mod direct_io;
mod file_address;
mod file_name;
mod identity;
mod interrupt;
mod leftovers;
mod listen_address;
mod new_file;
mod output;
mod qmp;
mod remedy;
mod runs;
mod service;
mod stored;
mod verbs;
mod version;
mod working_set;

use std::{ffi::OsString, process::ExitCode};

use args::{Args, Verb};
use clap::{CommandFactory, Parser};
use output::{log, outcome, outlet};
use verbs::{ctl, demo, inspect, many, receive, restore, send};

/// The definition of the command line, for manual pages and completions.
pub fn command() -> clap::Command {
    Args::command()
}

/// Runs a command line, whose first word is the program's own name. Returns the exit code of the process.
///
/// It must have a process of its own: it writes to standard output and error, may handle Ctrl-C, and only the first
/// call sets up logging. It is a library so that tests can try every command line.
pub fn run(command_line: impl IntoIterator<Item = OsString>) -> ExitCode {
    let command_line: Vec<OsString> = command_line.into_iter().collect();
    if version::is_asked_in_detail(&command_line) {
        return outcome::exit_code(outlet::print_lines(&version::detailed()).map_err(Into::into));
    }
    let args = match Args::try_parse_from(command_line) {
        Ok(args) => args,
        Err(refused) => return outlet::refused(refused),
    };
    log::trace(args.verb.quiet());
    interrupt::keeps_ends_of_children();
    let ended = match args.verb {
        Verb::Capture(args) => verbs::capture::run(&args),
        Verb::Restore(args) => restore::run(&args),
        Verb::Receive(args) => match &args.many.dir {
            Some(dir) => many::run(&args, dir),
            None => receive::run(&args),
        },
        Verb::Send(args) => send::run(&args),
        Verb::Inspect(args) => inspect::run(&args),
        Verb::Verify(args) => verbs::verify::run(&args),
        Verb::Merge(args) => verbs::merge::run(&args),
        Verb::Diff(args) => verbs::diff::run(&args),
        Verb::Read(args) => verbs::read::run(&args),
        Verb::Find(args) => verbs::find::run(&args),
        Verb::Export(args) => verbs::export::run(&args),
        Verb::Record(args) => verbs::record::run(&args),
        Verb::Replay(args) => verbs::replay::run(&args),
        Verb::Ctl(args) => ctl::run(&args),
        Verb::Demo(args) => demo::run(&args),
        Verb::DemoDestination(args) => demo::destination(&args),
    };
    outcome::exit_code(ended)
}

/// Makes the process report a panic, which is a bug, in one line without control characters. For a process of its own only.
pub fn report_panics() {
    outlet::report_panics();
}
