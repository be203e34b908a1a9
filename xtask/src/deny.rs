//! `cargo deny`: licences, bans and sources of all dependencies, and advisories, by the rules in `deny.toml`.
//!
//! Nothing is fetched: a check must have the same result without a network. If `cargo-deny` or its advisory database is
//! missing, the step prints this and skips that part.

use std::{env, path::PathBuf, process::Command};

use crate::{
    Failure,
    step::{output, run},
    workspace_root,
};

/// Runs `cargo deny check`.
///
/// # Errors
/// If a rule is violated; `cargo-deny` has printed which.
pub(crate) fn check() -> Result<(), Failure> {
    if output(Command::new("cargo-deny").arg("--version")).is_err() {
        eprintln!("   SKIPPED: no cargo-deny on this machine (cargo install cargo-deny)");
        return Ok(());
    }
    let mut deny = Command::new("cargo-deny");
    deny.current_dir(workspace_root()).args([
        "--offline",
        "--locked",
        "check",
        "licenses",
        "bans",
        "sources",
    ]);
    if has_database() {
        deny.arg("advisories");
    } else {
        eprintln!("   SKIPPED: advisories: no database on this machine (cargo deny fetch)");
    }
    run(&mut deny)
}

/// Whether cargo-deny has fetched an advisory database; if that has failed, it leaves the folder empty.
fn has_database() -> bool {
    let cargo = env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo = cargo.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")));
    let databases = cargo.and_then(|cargo| cargo.join("advisory-dbs").read_dir().ok());
    databases
        .is_some_and(|mut databases| databases.any(|entry| entry.is_ok_and(|entry| entry.path().is_dir())))
}
