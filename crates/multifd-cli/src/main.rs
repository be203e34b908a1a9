//! The program `multifd`: a process around its library.

use std::{env, process::ExitCode};

fn main() -> ExitCode {
    multifd_cli::report_panics();
    multifd_cli::run(env::args_os())
}
