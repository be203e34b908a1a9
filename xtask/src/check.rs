//! `cargo xtask check`: all checks that do not run the project.

use std::process::Command;

use cargo_metadata::Metadata;

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
    step("dependencies of modules", arrows::check)?;
    step("no import cycles", arrows::circles::check)?;
    let metadata = step("lock file", deps::metadata)?;
    step("dependencies of packages", || deps::check(&metadata))?;
    step("licences", || licences::check(&metadata))?;
    step("advisories", advisories::check)?;
    step("cargo deny", deny::check)?;
    for sets in [WORKSPACE.map(<[&str]>::to_vec).to_vec(), alone(&metadata)] {
        for set in sets {
            step(&format!("clippy {}", set.join(" ")), || {
                run_command(clippy().args(&set).args(["--", "-D", "warnings"]))
            })?;
        }
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

/// In a run over the workspace the program switches features of the libraries on, so each library is also checked alone,
/// without features and with each one: as an embedder builds it.
fn alone(metadata: &Metadata) -> Vec<Vec<&str>> {
    let mut sets = Vec::new();
    for library in api::LIBRARIES {
        sets.push(vec!["-p", library]);
        let package =
            metadata.workspace_packages().into_iter().find(|package| package.name.as_str() == library);
        let features = package.into_iter().flat_map(|package| package.features.keys());
        // Those of a name like this belong to others.
        for feature in features.filter(|feature| *feature != "default" && !feature.starts_with('_')) {
            sets.push(vec!["-p", library, "--features", feature]);
        }
    }
    sets
}

const WORKSPACE: [&[&str]; 3] =
    [&["--workspace"], &["--workspace", "--no-default-features"], &["--workspace", "--all-features"]];
