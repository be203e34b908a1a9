//! `cargo xtask check`: all checks that do not run the project.

use std::process::Command;

use crate::step::{cargo, run as run_command, step};
use crate::{
    Failure, advisories, api, arrows, deny, deps, length, licences, modules, publish, words, workspace_root,
};

/// Runs all checks, fast ones first; the first failure ends the task.
///
/// # Errors
///
/// The complaint of the failing check.
pub(crate) fn run() -> Result<(), Failure> {
    step("format", || {
        run_command(cargo().args(["fmt", "--all", "--check"]))?;
        let fuzz = workspace_root().join("fuzz/Cargo.toml");
        if fuzz.exists() {
            run_command(cargo().arg("fmt").arg("--check").arg("--manifest-path").arg(fuzz))
        } else {
            Ok(())
        }
    })?;
    step("file lengths", length::check)?;
    step("plain words", words::check)?;
    step("module files", modules::check)?;
    step("dependencies point one way (sources)", arrows::check)?;
    step("no circles of imports", arrows::circles::check)?;
    let metadata = step("lock file", deps::metadata)?;
    step("dependencies point one way (packages)", || deps::check(&metadata))?;
    step("licences", || licences::check(&metadata))?;
    step("advisories", advisories::check)?;
    step("cargo deny", deny::check)?;
    for (name, features) in FEATURE_SETS {
        step(&format!("clippy, {name}"), || {
            run_command(clippy().args(features).args(["--", "-D", "warnings"]))
        })?;
    }
    step("rustdoc", || {
        let mut doc = cargo();
        doc.args(["doc", "--workspace", "--no-deps", "--all-features"]).env("RUSTDOCFLAGS", "-D warnings");
        run_command(&mut doc)
    })?;
    api::run_task(false)?;
    step("packages", || publish::check(false))
}

fn clippy() -> Command {
    let mut clippy = cargo();
    clippy.args(["clippy", "--all-targets"]);
    clippy
}

/// Feature sets that are also checked alone, as an embedder builds them. In a run over the workspace, the program
/// enables features of the libraries.
const FEATURE_SETS: [(&str, &[&str]); 12] = [
    ("default features", &["--workspace"]),
    ("no features", &["--workspace", "--no-default-features"]),
    ("all features", &["--workspace", "--all-features"]),
    ("guest RAM alone", &["-p", "guest-ram"]),
    ("guest RAM with kvm", &["-p", "guest-ram", "--features", "kvm"]),
    ("guest RAM with vm-memory", &["-p", "guest-ram", "--features", "vm-memory"]),
    ("guest RAM with pagemap", &["-p", "guest-ram", "--features", "pagemap"]),
    ("the engine alone", &["-p", "multifd"]),
    ("the engine with serde", &["-p", "multifd", "--features", "serde"]),
    ("the engine with zlib", &["-p", "multifd", "--features", "zlib"]),
    ("the engine with zstd", &["-p", "multifd", "--features", "zstd"]),
    ("the main stream alone", &["-p", "qemu-stream"]),
];
