//! `cargo xtask fuzz`: every target for a while, from the seeds that are kept in `fuzz/seeds`.
//!
//! It needs a nightly compiler and cargo-fuzz, and says so where they are missing. With the address sanitizer no input may
//! allocate more than 64 MiB at once, or take more than ten seconds.

use std::{fs, process::Command};

use crate::{
    Failure,
    step::{output, run, step},
    workspace_root,
};

/// Runs the targets named, or all, for `seconds` each.
///
/// # Errors
/// If there is no such target, no nightly compiler or cargo-fuzz, or an input was found that fails.
pub(crate) fn run_targets(seconds: u32, named: &[String]) -> Result<(), Failure> {
    let listed = output(&mut fuzz(&["list"])).map_err(|error| {
        format!("{error}\nfuzzing needs a nightly compiler (rustup toolchain install nightly) and cargo install cargo-fuzz")
    })?;
    let all: Vec<&str> = listed.split_whitespace().collect();
    if let Some(unknown) = named.iter().find(|name| !all.contains(&name.as_str())) {
        return Err(format!("expected a target of {}, met {unknown:?}", all.join(", ")).into());
    }
    for target in all.iter().filter(|target| named.is_empty() || named.iter().any(|name| name == *target)) {
        step(&format!("fuzz {target}"), || run_target(target, seconds))?;
    }
    Ok(())
}

fn run_target(target: &str, seconds: u32) -> Result<(), Failure> {
    let folder = workspace_root().join("fuzz");
    let corpus = folder.join("corpus").join(target);
    fs::create_dir_all(&corpus)?;
    let mut command = fuzz(&["run", target]);
    command.arg(corpus);
    let seeds = folder.join("seeds").join(target);
    if seeds.exists() {
        command.arg(seeds);
    }
    command.args(["--", "-malloc_limit_mb=64", "-rss_limit_mb=2048", "-timeout=10", "-print_final_stats=1"]);
    run(command.arg(format!("-max_total_time={seconds}")))
}

fn fuzz(arguments: &[&str]) -> Command {
    // By rustup's name: the cargo that runs this task is another toolchain's.
    let mut command = Command::new("cargo");
    command.current_dir(workspace_root()).args(["+nightly", "fuzz"]).args(arguments);
    // What it was started with would choose the compiler.
    command.env_remove("RUSTUP_TOOLCHAIN").env_remove("CARGO").env_remove("RUSTC");
    command
}
