//! `cargo xtask fuzz`: runs every target for a while, from the seeds in `fuzz/seeds`.
//!
//! The targets are built here with the coverage that libFuzzer needs. Besides the toolchain only a C++ compiler is
//! needed. If a nightly compiler is installed, the targets include the address sanitizer, which other compilers do not
//! offer. No input may take more than ten seconds. With the sanitizer, no input may allocate more than 64 MiB at once;
//! `fuzz/src/lib.rs` has the limits for small inputs.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    Failure,
    step::{by_rustup, output, run, step},
    workspace_root,
};

/// Runs the named targets, or all, for `seconds` each.
///
/// # Errors
/// If there is no such target, they cannot be built, or an input fails: libFuzzer prints the name of its file.
pub(crate) fn run_targets(seconds: u32, named: &[String]) -> Result<(), Failure> {
    let all = targets()?;
    if let Some(unknown) = named.iter().find(|name| !all.contains(name)) {
        return Err(format!("expected a target of {}, found {unknown:?}", all.join(", ")).into());
    }
    let targets: Vec<String> =
        all.into_iter().filter(|target| named.is_empty() || named.contains(target)).collect();
    let sanitized = output(by_rustup("cargo", Some("nightly")).arg("--version")).is_ok();
    if !sanitized {
        eprintln!("   no nightly compiler: fuzzing without the address sanitizer");
    }
    let built = step("build the fuzz targets", || build(&targets, sanitized))?;
    for target in &targets {
        step(&format!("fuzz {target}"), || run_target(&built, target, seconds))?;
    }
    Ok(())
}

fn folder() -> PathBuf {
    workspace_root().join("fuzz")
}

fn targets() -> Result<Vec<String>, Failure> {
    let mut targets = Vec::new();
    for entry in fs::read_dir(folder().join("fuzz_targets"))? {
        let path = entry?.path();
        if path.extension() == Some(OsStr::new("rs")) {
            targets.extend(path.file_stem().and_then(OsStr::to_str).map(str::to_owned));
        }
    }
    targets.sort();
    Ok(targets)
}

/// Builds the targets and returns the folder of the programs.
fn build(targets: &[String], sanitized: bool) -> Result<PathBuf, Failure> {
    let (kind, toolchain) = if sanitized { ("address", Some("nightly")) } else { ("plain", None) };
    let host = output(by_rustup("rustc", toolchain).args(["--print", "host-tuple"]))?;
    let host = host.trim();
    let built = folder().join("target").join(kind);
    let mut command = by_rustup("cargo", toolchain);
    command
        .current_dir(folder())
        .args(["build", "--release", "--locked", "--target", host, "--target-dir"])
        .arg(&built);
    for target in targets {
        command.args(["--bin", target]);
    }
    let flags = COVERAGE.join(" ") + if sanitized { " -Zsanitizer=address" } else { "" };
    run(command.env("RUSTFLAGS", flags))?;
    Ok(built.join(host).join("release"))
}

fn run_target(built: &Path, target: &str, seconds: u32) -> Result<(), Failure> {
    let (corpus, found) = (folder().join("corpus").join(target), folder().join("artifacts").join(target));
    fs::create_dir_all(&corpus)?;
    fs::create_dir_all(&found)?;
    let mut command = Command::new(built.join(target));
    command.arg(corpus);
    let seeds = folder().join("seeds").join(target);
    if seeds.exists() {
        command.arg(seeds);
    }
    if target == SAYS_MUCH {
        command.arg("-close_fd_mask=3");
    }
    command.args(LIMITS).arg(format!("-artifact_prefix={}/", found.display()));
    run(command.arg(format!("-max_total_time={seconds}")))
}

/// The coverage that libFuzzer uses: edges taken and values compared.
const COVERAGE: [&str; 8] = [
    "--cfg fuzzing",
    "-Cdebug-assertions",
    "-Ccodegen-units=1",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// A target that runs a whole program. Its standard output and error are discarded, except when it runs on the file of
/// a finding.
const SAYS_MUCH: &str = "inspect";
/// A file of QEMU is at least 1 MiB, however small its machine.
const LIMITS: [&str; 5] =
    ["-max_len=1200000", "-malloc_limit_mb=64", "-rss_limit_mb=2048", "-timeout=10", "-print_final_stats=1"];
