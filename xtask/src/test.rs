//! `cargo xtask test`: runs the tests, including those with real QEMUs.
//!
//! It fetches the QEMUs and a kernel, passes their paths to the tests, runs `cargo test` and sums up the counts of its binaries. A
//! test that lacks its QEMU writes its name and the reason to a file that this task provides; these tests are listed at
//! the end. In CI a missing QEMU or kernel is a failure.
//!
//! A slow test is marked `#[ignore = "slow: …"]` and runs only with `--all`: soaks, and those cells of the interop
//! tables whose differences from the quick run are covered by other cells.
//!
//! The last line on standard output is the sum: `N passed, N failed, N skipped`.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write, stdout};
use std::process::Stdio;

use crate::Failure;
use crate::kernel::Kernel;
use crate::qemu;
use crate::step::{cargo, step};

/// Runs the tests, with `slow` also the slow ones; `args` are passed to `cargo test`.
///
/// # Errors
///
/// When a test fails, cannot be built, or is skipped in CI.
pub(crate) fn run(slow: bool, args: &[String]) -> Result<(), Failure> {
    let skip_file = crate::workspace_root().join("target/skipped-tests");
    fs::create_dir_all(crate::workspace_root().join("target"))?;
    fs::write(&skip_file, "")?;
    let mut command = cargo();
    command.args(["test", "--workspace", "--all-features", "--no-fail-fast"]).args(args);
    if slow {
        let separator = if args.iter().any(|arg| arg == "--") { None } else { Some("--") };
        command.args(separator).arg("--include-ignored");
    }
    command.env("MULTIFD_SKIP_FILE", &skip_file);

    let mut missing = Vec::new();
    for release in &qemu::RELEASES {
        match qemu::locate(release) {
            Ok(program) => {
                command.env(release.variable, program);
            }
            Err(reason) => missing.push(format!("no QEMU {}: {reason}", release.series)),
        }
    }
    match Kernel::locate() {
        Ok(kernel) => kernel.pass_to(&mut command),
        Err(reason) => missing.push(format!("no kernel of Linux: {reason}")),
    }
    if crate::in_ci() && !missing.is_empty() {
        return Err(format!("in CI no interop test may be skipped: {}", missing.join("; ")).into());
    }

    let mut sum = Sum::default();
    let outcome = step("cargo test", || {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let lines = child.stdout.take().map(BufReader::new).ok_or("no pipe from `cargo test`")?;
        for line in lines.split(b'\n') {
            let line = line?;
            sum.add(&String::from_utf8_lossy(&line));
            let mut out = stdout().lock();
            out.write_all(&line)?;
            out.write_all(b"\n")?;
        }
        let status = child.wait()?;
        if status.success() { Ok(()) } else { Err(format!("`cargo test` ended with {status}").into()) }
    });

    let talk = fs::read_to_string(&skip_file)?;
    let skipped: BTreeSet<&str> = talk.lines().collect();
    if !skipped.is_empty() || !missing.is_empty() {
        eprintln!("\nSKIPPED {} tests:", skipped.len());
        missing.iter().for_each(|line| eprintln!("  {line}"));
        skipped.iter().for_each(|line| eprintln!("  {line}"));
    }
    if sum.ignored > 0 {
        eprintln!("\n{} slow tests were not run; `cargo xtask test --all` runs them", sum.ignored);
    }
    // The test runner counts a test that skips itself as passed.
    let passed = sum.passed.saturating_sub(skipped.len());
    println!("{passed} passed, {} failed, {} skipped", sum.failed, sum.ignored + skipped.len());
    outcome
}

/// The sum of the counts of all test binaries.
#[derive(Debug, Default, PartialEq, Eq)]
struct Sum {
    passed: usize,
    failed: usize,
    ignored: usize,
}

impl Sum {
    /// Adds the counts in a line, if it is one of the runner's closing lines.
    fn add(&mut self, line: &str) {
        let Some(counts) = line.trim().strip_prefix("test result: ") else { return };
        for count in counts.split(['.', ';']) {
            let mut words = count.split_ascii_whitespace();
            let (Some(number), Some(kind), None) = (words.next(), words.next(), words.next()) else {
                continue;
            };
            let Ok(number) = number.parse::<usize>() else { continue };
            match kind {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_added_up() {
        let mut sum = Sum::default();
        sum.add("running 3 tests");
        sum.add(
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.01s",
        );
        sum.add("test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.50s");
        assert_eq!(sum, Sum { passed: 13, failed: 2, ignored: 1 });
    }
}
