//! `cargo xtask publish-check`: checks that the libraries can be published, each from the contents of its package.
//!
//! All are packaged together, so that each finds the others although they are not in a registry yet. Each is then built
//! from its package. No network is needed: the packages in the lock file are downloaded already.

use crate::{
    Failure,
    step::{cargo, run},
};

/// Packages the libraries; with `build`, builds them from their packages, which takes as long as a normal build.
///
/// # Errors
///
/// When a manifest lacks a field that a registry requires, or a package does not build by itself.
pub(crate) fn check(build: bool) -> Result<(), Failure> {
    let mut publish = cargo();
    // The working tree is checked, whether it is committed or not.
    publish.args(["package", "--quiet", "--offline", "--locked", "--allow-dirty", "--all-features"]);
    publish.args(["-p", "guest-ram", "-p", "multifd", "-p", "qemu-stream"]);
    if !build {
        publish.arg("--no-verify");
    }
    run(&mut publish)
}
