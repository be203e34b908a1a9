//! `multifd`: the source or the destination of a QEMU migration, with a file at the other end.
//!
//! ```text
//! args/ ─▶ verbs/receive   QEMU ═══ channels ═══▶ file        capture   the file being written
//!          verbs/send      file ═══ channels ═══▶ QEMU
//!          verbs/inspect   file ─▶ a table, or (extract) one block's RAM
//!          verbs/demo      this process ═══ channels ═══▶ a second one
//!                            └── interrupt (Ctrl-C)   output/  progress, and the end as text or JSON
//! ```
//!
//! Standard output is for results, standard error for messages. Exit codes: 0 success, 1 failure, 2 wrong usage, 3 the file
//! is complete but the source did not get the confirmation, 130 interrupted.

mod args;
mod capture;
mod combinations;
mod direct_io;
mod file_address;
mod identity;
mod interrupt;
mod new_file;
mod output;
mod verbs;

use std::{ffi::OsString, process::ExitCode};

use args::{Args, Verb};
use clap::Parser;
use output::outcome;
use verbs::{demo, inspect, receive, send};

/// Does what a command line asks for, its first word the program's own name, and says how the process is to end.
///
/// It belongs to a process of its own: it writes to standard output and error, may take over Ctrl-C, and only the first
/// call chooses what is logged. A library so that whatever a command line can be is tried on it.
pub fn run(command_line: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = match Args::try_parse_from(command_line) {
        Ok(args) => args,
        Err(refused) => {
            // Whoever closed the output does not want it.
            let _ = refused.print();
            return ExitCode::from(u8::try_from(refused.exit_code()).unwrap_or(2));
        }
    };
    outcome::trace(args.verb.quiet());
    interrupt::keeps_ends_of_children();
    let ended = match args.verb {
        Verb::Receive(args) => receive::run(&args),
        Verb::Send(args) => send::run(&args),
        Verb::Inspect(args) => inspect::run(&args),
        Verb::Demo(args) => demo::run(&args),
        Verb::DemoDestination(args) => demo::destination(&args),
    };
    outcome::exit_code(ended)
}
