//! A named, timed step of a task, and the commands in steps.

use std::process::Command;
use std::time::Instant;

use crate::Failure;

/// Runs `body` under `name` and prints its duration.
///
/// # Errors
///
/// The failure of `body`, with the step named.
pub(crate) fn step<T>(name: &str, body: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    eprintln!("── {name}");
    let start = Instant::now();
    let outcome = body();
    let took = start.elapsed().as_secs_f64();
    match outcome {
        Ok(value) => {
            eprintln!("   {name}: done in {took:.1} s");
            Ok(value)
        }
        Err(failure) => Err(format!("{name}: failed after {took:.1} s: {failure}").into()),
    }
}

/// Runs `command` with our standard streams.
///
/// # Errors
///
/// When it cannot be started or does not succeed.
pub(crate) fn run(command: &mut Command) -> Result<(), Failure> {
    let status = command.status().map_err(|e| format!("cannot start {}: {e}", shown(command)))?;
    if status.success() { Ok(()) } else { Err(format!("{} ended with {status}", shown(command)).into()) }
}

/// Runs `command` and returns its standard output.
///
/// # Errors
///
/// When it cannot be started, does not succeed (its standard error is in the text) or does not write UTF-8.
pub(crate) fn output(command: &mut Command) -> Result<String, Failure> {
    let output = command.output().map_err(|e| format!("cannot start {}: {e}", shown(command)))?;
    if !output.status.success() {
        let talk = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{} ended with {}\n{}", shown(command), output.status, talk.trim_end()).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// The cargo that started this program.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(crate::workspace_root());
    command
}

/// A program by rustup's name, of `toolchain` or of rustup's default: not of the toolchain that started this task, and
/// without its flags.
pub(crate) fn by_rustup(program: &str, toolchain: Option<&str>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(crate::workspace_root()).args(toolchain.map(|name| format!("+{name}")));
    for name in ["RUSTUP_TOOLCHAIN", "CARGO", "RUSTC", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "RUSTDOC"] {
        command.env_remove(name);
    }
    command
}

fn shown(command: &Command) -> String {
    let program = command.get_program().to_string_lossy();
    let program = program.rsplit('/').next().unwrap_or_default();
    let args = command.get_args().map(|arg| format!(" {}", arg.to_string_lossy()));
    format!("`{program}{}`", args.collect::<String>())
}
