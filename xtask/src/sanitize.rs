//! `cargo xtask sanitize`: runs the tests of the libraries under tools that find errors which a test cannot.
//!
//! ```text
//! address   AddressSanitizer, with its search for leaks
//! thread    ThreadSanitizer, with a standard library built for it; it would report a normal one
//! miri      two atomics used by two threads, interpreted with delayed stores; copies of guest memory that race
//! valgrind  memcheck, on the tests of the loopback as the stable compiler builds them
//! ```
//!
//! The first three need a nightly compiler. If it lacks a component, the step prints the command that installs it and
//! is skipped. Valgrind runs if one of the sanitizers cannot run, or if it is named. Its helgrind and drd are not
//! usable here, because they report atomics as races. The only suppression is that the tests' guests write while the
//! engine reads, see `thread-sanitizer.supp`.
//!
//! The last line on standard output sums up.

use std::{path::PathBuf, process::Command};

use crate::{
    Failure,
    step::{by_rustup, cargo, output, run, step},
    workspace_root,
};

/// Runs the named tools, or those that the toolchain supports.
///
/// # Errors
/// If there is no such tool, or one reports something or cannot run although it is installed.
pub(crate) fn run_tools(named: &[String]) -> Result<(), Failure> {
    if let Some(unknown) = named.iter().find(|name| !TOOLS.contains(&name.as_str())) {
        return Err(format!("expected a tool of {}, found {unknown:?}", TOOLS.join(", ")).into());
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
    // It is slow and finds less: it runs instead of a sanitizer, or if named.
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
        return Err("no tool could be run".into());
    }
    println!("nothing reported by {}; {} skipped", ran.join(", "), skipped.len());
    Ok(())
}

fn address() -> Result<(), Failure> {
    let mut command = sanitized("address");
    // Leaks are searched for at the end of each process.
    command.env("ASAN_OPTIONS", "detect_leaks=1:strict_string_checks=1");
    run(&mut command)
}

fn thread() -> Result<(), Failure> {
    let mut command = sanitized("thread");
    let suppressed = workspace_root().join("xtask/thread-sanitizer.supp");
    command
        .env("TSAN_OPTIONS", format!("suppressions={}", suppressed.display()))
        .arg("-Zbuild-std")
        .arg("--");
    for (test, why) in NOT_UNDER_THREAD {
        eprintln!("SKIPPED {test}: {why}");
        command.args(["--skip", test]);
    }
    run(&mut command)
}

/// The tests of the libraries, built with a sanitizer. Documentation tests are built in a different way, without one.
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
    run(&mut command)?;
    let mut command = nightly("cargo");
    command
        .env("MIRIFLAGS", "-Zmiri-many-seeds=0..8")
        .args(["miri", "test", "-p", "guest-ram", "--lib", "--target-dir"])
        .arg(workspace_root().join("target/sanitize/miri"))
        .args(["--", "do_not_race", "looked_at_without_harm"]);
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
            command.arg(program).args(["--test-threads=1", "loopback::"]);
            for (test, why) in NOT_UNDER_VALGRIND {
                eprintln!("SKIPPED {test}: {why}");
                command.args(["--skip", test]);
            }
            run(&mut command)
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

/// Tests that cannot run under ThreadSanitizer, each with the reason. They run under the other tools.
const NOT_UNDER_THREAD: [(&str, &str); 2] = [
    ("terabytes_that_are_announced_and_do_not_come", "the sanitizer has no address space for terabytes"),
    ("a_process_without_privileges_finds_its_writes", "its child may not read the sanitizer's suppressions"),
];
/// The same, for memcheck.
const NOT_UNDER_VALGRIND: [(&str, &str); 2] = [
    ("a_guest_that_keeps_writing_arrives", "memcheck never reaches its downtime limit of 2 ms"),
    ("the_last_page_of_terabytes_arrives", "memcheck has no address space for terabytes"),
];
const TOOLS: [&str; 4] = ["address", "thread", "miri", "valgrind"];
/// The target is named, so that build scripts and macros are built without the sanitizer.
const TARGET: &str = "x86_64-unknown-linux-gnu";
