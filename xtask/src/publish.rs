//! `cargo xtask publish-check`: the libraries can be published, each from what its package holds alone.
//!
//! All are packaged together, so that each finds the others though no registry has it yet; each is then built from
//! its package. No network is needed: what the lock file names is there by now.

use crate::{
    Failure,
    step::{cargo, run},
};

/// Packages the libraries; if told so, builds them from their packages, which takes as long as a build does.
///
/// # Errors
///
/// When a manifest lacks what a registry asks for, or a package does not build by itself.
pub(crate) fn check(build: bool) -> Result<(), Failure> {
    let mut publish = cargo();
    // What is being changed is looked at, committed or not.
    publish.args(["package", "--quiet", "--offline", "--locked", "--allow-dirty", "--all-features"]);
    publish.args(["-p", "guest-ram", "-p", "multifd", "-p", "qemu-stream"]);
    if !build {
        publish.arg("--no-verify");
    }
    run(&mut publish)
}
