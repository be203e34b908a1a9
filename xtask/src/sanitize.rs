//! `cargo xtask sanitize`: the tests of the libraries under tools that see what a test cannot.
//!
//! ```text
//! address   AddressSanitizer, with its search for leaks
//! thread    ThreadSanitizer, with a standard library that is built for it, else it would report that
//! miri      the meeting of two atomics, interpreted with stores that arrive late
//! valgrind  memcheck, on the tests of the loopback as the stable compiler builds them
//! ```
//!
//! The first three need a nightly compiler; what it lacks is said, with the command that brings it, and skipped. Valgrind
//! is run where one of the sanitizers cannot, or when it is named; its helgrind and drd are of no use here, for they take
//! atomics for races. Nothing is suppressed but that the tests' guests write while the engine reads, see
//! `thread-sanitizer.supp`.
//!
//! The last line on standard output sums up.

use std::{path::PathBuf, process::Command};

use crate::{
    Failure,
    step::{by_rustup, cargo, output, run, step},
    workspace_root,
};

/// Runs the tools named, or those that the toolchain allows.
///
/// # Errors
/// If there is no such tool, or one reports something or cannot be run though it is there.
pub(crate) fn run_tools(named: &[String]) -> Result<(), Failure> {
    if let Some(unknown) = named.iter().find(|name| !TOOLS.contains(&name.as_str())) {
        return Err(format!("expected a tool of {}, met {unknown:?}", TOOLS.join(", ")).into());
    }
    let is_wanted = |tool: &str| named.is_empty() || named.iter().any(|name| name == tool);
    let (mut ran, mut skipped) = (Vec::new(), Vec::new());
    for (tool, missing, body) in [
        ("address", nightly_missing as fn() -> Option<String>, address as fn() -> Result<(), Failure>),
        ("thread", source_missing, thread),
        ("miri", miri_missing, miri),
    ] {
        if !is_wanted(tool) {
            continue;
        }
        match missing() {
            Some(reason) => skipped.push(format!("{tool} ({reason})")),
            None => {
                step(tool, body)?;
                ran.push(tool);
            }
        }
    }
    // Slow, and it sees less: in place of a sanitizer, or if wanted.
    let replaces = named.is_empty() && skipped.iter().any(|tool| !tool.starts_with("miri"));
    if replaces || named.iter().any(|name| name == "valgrind") {
        if output(Command::new("valgrind").arg("--version")).is_ok() {
            step("valgrind", valgrind)?;
            ran.push("valgrind");
        } else {
            skipped.push("valgrind (not installed)".into());
        }
    }
    for tool in &skipped {
        eprintln!("SKIPPED {tool}");
    }
    if ran.is_empty() {
        return Err("none of the tools could be run".into());
    }
    println!("nothing reported by {}; {} skipped", ran.join(", "), skipped.len());
    Ok(())
}

fn address() -> Result<(), Failure> {
    let mut command = sanitized("address");
    // A leak is looked for at the end of each process.
    command.env("ASAN_OPTIONS", "detect_leaks=1:strict_string_checks=1");
    run(&mut command)
}

fn thread() -> Result<(), Failure> {
    let mut command = sanitized("thread");
    let suppressed = workspace_root().join("xtask/thread-sanitizer.supp");
    command.env("TSAN_OPTIONS", format!("suppressions={}", suppressed.display())).arg("-Zbuild-std");
    run(&mut command)
}

/// The tests of the libraries, built with a sanitizer. Those of the documentation are built by another way, without.
fn sanitized(sanitizer: &str) -> Command {
    let mut command = nightly("cargo");
    command
        .env("RUSTFLAGS", format!("-Zsanitizer={sanitizer}"))
        .args([
            "test",
            "-p",
            "guest-ram",
            "-p",
            "multifd",
            "-p",
            "qemu-stream",
            "--all-features",
            "--lib",
            "--tests",
            "--no-fail-fast",
        ])
        .args(["--target", TARGET, "--target-dir"])
        .arg(workspace_root().join("target/sanitize").join(sanitizer));
    command
}

fn miri() -> Result<(), Failure> {
    let mut command = nightly("cargo");
    command
        .env("MIRIFLAGS", "-Zmiri-many-seeds=0..64")
        .args(["miri", "test", "-p", "multifd", "--lib", "--target-dir"])
        .arg(workspace_root().join("target/sanitize/miri"))
        .args(["--", "do_not_miss_each_other"]);
    run(&mut command)
}

fn valgrind() -> Result<(), Failure> {
    let mut built = cargo();
    built.args([
        "test",
        "-p",
        "multifd",
        "-p",
        "qemu-stream",
        "--test",
        "it",
        "--no-run",
        "--message-format=json",
    ]);
    let messages = output(&mut built)?;
    let programs: Vec<PathBuf> = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|message| message.get("executable")?.as_str().map(PathBuf::from))
        .collect();
    for program in &programs {
        step(&format!("memcheck, {}", program.display()), || {
            let mut command = Command::new("valgrind");
            command.args(["--tool=memcheck", "--error-exitcode=99", "--quiet"]);
            run(command.arg(program).args(["--test-threads=1", "loopback::"]))
        })?;
    }
    Ok(())
}

fn nightly_missing() -> Option<String> {
    output(nightly("rustc").arg("--version"))
        .err()
        .map(|_| "no nightly compiler: rustup toolchain install nightly".into())
}

fn source_missing() -> Option<String> {
    nightly_missing().or_else(|| {
        let root = output(nightly("rustc").args(["--print", "sysroot"])).unwrap_or_default();
        let library = PathBuf::from(root.trim()).join("lib/rustlib/src/rust/library/Cargo.lock");
        (!library.exists()).then(|| {
            "no source of the standard library: rustup component add rust-src --toolchain nightly".into()
        })
    })
}

fn miri_missing() -> Option<String> {
    source_missing().or_else(|| {
        let asked = output(nightly("cargo").args(["miri", "--version"]));
        asked.err().map(|_| "no Miri: rustup component add miri --toolchain nightly".into())
    })
}

fn nightly(program: &str) -> Command {
    by_rustup(program, Some("nightly"))
}

const TOOLS: [&str; 4] = ["address", "thread", "miri", "valgrind"];
/// Named, so that build scripts and macros are built without.
const TARGET: &str = "x86_64-unknown-linux-gnu";
