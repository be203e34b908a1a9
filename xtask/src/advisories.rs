//! Known vulnerabilities of the dependencies: checks the lock files against the local copy of RustSec's database.
//!
//! Nothing is fetched: a check must have the same result without a network. If `cargo-audit` or the database is
//! missing, the step prints this and is skipped.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    Failure,
    step::{output, run},
    workspace_root,
};

/// Searches for advisories on the packages in the lock files.
///
/// # Errors
/// If there is one; `cargo-audit` has printed which.
pub(crate) fn check() -> Result<(), Failure> {
    if output(Command::new("cargo-audit").args(["audit", "--version"])).is_err() {
        eprintln!("   SKIPPED: no cargo-audit on this machine (cargo install cargo-audit)");
        return Ok(());
    }
    let database = database();
    let Some(database) = database.filter(|database| database.join("crates").is_dir()) else {
        eprintln!(
            "   SKIPPED: no advisory database on this machine (`cargo audit fetch`, or its folder in {VARIABLE})"
        );
        return Ok(());
    };
    for lock in LOCKS {
        run(&mut audit(&database, &workspace_root().join(lock)))?;
    }
    Ok(())
}

/// The configured or the usual path of the database.
fn database() -> Option<PathBuf> {
    let told = env::var_os(VARIABLE).map(PathBuf::from);
    let cargo = env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo = cargo.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")));
    told.or_else(|| Some(cargo?.join("advisory-db")))
}

fn audit(database: &Path, lock: &Path) -> Command {
    let mut audit = Command::new("cargo-audit");
    audit
        .args(["audit", "--no-fetch", "--stale", "--deny", "unsound", "--db"])
        .arg(database)
        .arg("--file")
        .arg(lock);
    audit
}

const VARIABLE: &str = "MULTIFD_ADVISORY_DB";
/// The lock file of the workspace, and that of the fuzz targets.
const LOCKS: [&str; 2] = ["Cargo.lock", "fuzz/Cargo.lock"];
