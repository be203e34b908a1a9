//! `cargo xtask bench`: measures the engine, QEMU and iperf3 side by side; with `--micro`, only the engine's parts.
//!
//! It builds the programs in release mode, fetches QEMU 10.0, and runs `crates/multifd-bench` with the remaining
//! arguments. Without iperf3 its rows say so.

use std::process::Command;

use crate::step::{cargo, run as run_command, step};
use crate::{Failure, qemu, workspace_root};

/// Measures; `args` are passed to `multifd-bench run`.
///
/// # Errors
///
/// When something cannot be built, or the run fails.
pub(crate) fn run(args: &[String]) -> Result<(), Failure> {
    let target = workspace_root().join("target");
    step("build the programs", || {
        run_command(cargo().args(["build", "--release", "-p", "multifd-cli", "-p", "multifd-bench"]))
    })?;
    let mut bench = Command::new(target.join("release/multifd-bench"));
    let args = match args.split_first() {
        Some((verb, rest)) if OTHERS.contains(&verb.as_str()) => {
            bench.arg(verb);
            rest
        }
        _ => {
            bench.arg("run").arg("--out").arg(target.join("bench"));
            args
        }
    };
    bench.arg("--program").arg(target.join("release/multifd")).args(args);
    if let Some(newest) = qemu::RELEASES.last() {
        bench.env(newest.variable, qemu::locate(newest)?);
    }
    step("measure", || run_command(&mut bench))
}

/// The benchmarks with a table of their own: of guests that run before their RAM is there, of deltas, of looking
/// into stored guests.
const OTHERS: [&str; 6] = ["first-instruction", "requests", "postcopy", "delta", "snapshots", "look"];

/// Measures the parts; `args` are passed to criterion.
///
/// # Errors
///
/// When they cannot be built, or one fails.
pub(crate) fn run_micro(args: &[String]) -> Result<(), Failure> {
    let mut bench = cargo();
    bench.args(["bench", "-p", "multifd", "--features", "zlib,zstd", "--bench", "parts", "--"]).args(args);
    step("measure the parts", || run_command(&mut bench))
}
