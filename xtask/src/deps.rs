//! Arrows point one way between the packages, and the engine has few dependencies.

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand};

use crate::Failure;
use crate::step::{cargo, output};

/// Cargo's metadata of the workspace, with the lock file as committed.
///
/// # Errors
///
/// When the lock file does not match the manifests.
pub(crate) fn metadata() -> Result<Metadata, Failure> {
    let manifest = crate::workspace_root().join("Cargo.toml");
    let options = ["--locked".to_owned(), "--all-features".to_owned()];
    Ok(MetadataCommand::new().manifest_path(manifest).other_options(options).exec()?)
}

/// Checks the dependencies between packages.
///
/// # Errors
///
/// Names each dependency that is not allowed.
pub(crate) fn check(metadata: &Metadata) -> Result<(), Failure> {
    let mut complaints = Vec::new();
    for package in metadata.workspace_packages() {
        for dependency in &package.dependencies {
            if let Some(why) = forbidden(package.name.as_str(), &dependency.name, dependency.kind) {
                complaints.push(format!("{} depends on {}: {why}", package.name, dependency.name));
            }
        }
    }
    let tree =
        output(cargo().args(["tree", "-p", "multifd", "-e", "normal", "--prefix", "none", "--locked"]))?;
    for line in tree.lines() {
        let name = line.split_ascii_whitespace().next().unwrap_or_default();
        if HEAVY.contains(&name) {
            complaints.push(format!(
                "multifd depends on {name} by default: its default features must not include it"
            ));
        }
    }
    let tree =
        output(cargo().args(["tree", "-p", "multifd-cli", "-e", "normal", "--prefix", "none", "--locked"]))?;
    for name in tree.lines().filter_map(|line| line.split_ascii_whitespace().next()) {
        if MONITORS.contains(&name) {
            complaints
                .push(format!("multifd-cli depends on {name}: the program does not run virtual machines"));
        }
    }
    if complaints.is_empty() { Ok(()) } else { Err(complaints.join("\n").into()) }
}

/// The reason why `package` may not depend on `dependency`, if there is one.
fn forbidden(package: &str, dependency: &str, kind: DependencyKind) -> Option<&'static str> {
    match (package, dependency) {
        ("multifd-bench", "multifd-testkit") => None,
        (_, "multifd-testkit") if kind != DependencyKind::Development => {
            Some("only tests may depend on the test kit")
        }
        (_, "multifd-models" | "guest-ram-models") => Some("no package may depend on the models"),
        (package, "shuttle") if !["multifd-models", "guest-ram-models"].contains(&package) => {
            Some("only the models may depend on the model checker")
        }
        (_, "multifd-cli") => Some("no package may depend on the program"),
        (_, "microvm") => Some("no package may depend on the example"),
        (_, "multifd-bench") => Some("no package may depend on the benchmark"),
        ("multifd", "qemu-stream") => Some("the engine must not depend on the main stream"),
        ("guest-ram", "multifd" | "qemu-stream") => Some("guest RAM must not depend on migrations"),
        ("multifd-testkit", "guest-ram" | "multifd" | "qemu-stream") => {
            Some("the test kit tests these crates, so it must not depend on them")
        }
        _ => None,
    }
}

/// Packages that an embedder with plain TCP must not have to compile.
const HEAVY: [&str; 14] = [
    "async-std",
    "aws-lc-rs",
    "clap",
    "flate2",
    "kvm-bindings",
    "kvm-ioctls",
    "ring",
    "rustls",
    "serde_json",
    "tokio",
    "userfaultfd",
    "vm-memory",
    "vmm-sys-util",
    "zstd",
];

/// Packages that only a virtual machine monitor needs.
const MONITORS: [&str; 3] = ["kvm-bindings", "kvm-ioctls", "vm-memory"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kit_is_for_tests_only() {
        assert!(forbidden("multifd", "multifd-testkit", DependencyKind::Normal).is_some());
        assert!(forbidden("multifd", "multifd-testkit", DependencyKind::Development).is_none());
        assert!(forbidden("multifd-bench", "multifd-testkit", DependencyKind::Normal).is_none());
    }

    #[test]
    fn nothing_knows_the_program() {
        assert!(forbidden("qemu-stream", "multifd-cli", DependencyKind::Development).is_some());
        assert!(forbidden("multifd", "microvm", DependencyKind::Development).is_some());
    }

    #[test]
    fn only_the_models_know_their_checker() {
        assert!(forbidden("multifd", "shuttle", DependencyKind::Development).is_some());
        assert!(forbidden("multifd-models", "shuttle", DependencyKind::Normal).is_none());
        assert!(forbidden("multifd", "multifd-models", DependencyKind::Development).is_some());
    }

    #[test]
    fn program_knows_both_libraries() {
        assert!(forbidden("multifd-cli", "multifd", DependencyKind::Normal).is_none());
        assert!(forbidden("multifd-cli", "qemu-stream", DependencyKind::Normal).is_none());
    }
}
