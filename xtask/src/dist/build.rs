//! Builds the program for one architecture.
//!
//! ```text
//! ARCH-unknown-linux-musl   if its standard library is installed, or rustup can add it, and a C compiler for it is found
//!                           (zstd and ring are C) or fetched
//! this machine's target     otherwise, with `crt-static`; of other architectures there is no program then
//! ```
//!
//! Both contain their C library. That of GNU loads parts of itself when it resolves a host's name, and those must be of
//! the same version; that of musl does not, so it is preferred.

use std::{
    env::{self, consts::ARCH},
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use super::cross;
use crate::{
    Failure,
    step::{cargo, output, run},
    workspace_root,
};

/// A program that can be built here.
pub(super) struct Program {
    /// Rust's name of its architecture.
    pub(super) arch: &'static str,
    target: String,
    linker_flag: &'static str,
    /// The compiler and the linker, as variables of cargo's environment.
    tools: Vec<(String, OsString)>,
}

impl Program {
    /// The program for this machine.
    ///
    /// # Errors
    /// If rustc does not report its target.
    pub(super) fn native() -> Result<Self, Failure> {
        let missing = match Self::musl(ARCH) {
            Ok(program) => return Ok(program),
            Err(missing) => missing,
        };
        let target = host()?;
        eprintln!("   WARNING: not for musl: {missing}");
        eprintln!(
            "   The program is for {target}, with crt-static. It may not resolve hosts' names on other systems."
        );
        Ok(Self { arch: ARCH, target, linker_flag: FOR_CC, tools: Vec::new() })
    }

    /// The program of `arch` for musl.
    ///
    /// # Errors
    /// What is missing, and how to install it.
    pub(super) fn musl(arch: &'static str) -> Result<Self, Failure> {
        cross::debian(arch)?;
        let target = format!("{arch}-unknown-linux-musl");
        add_target(&target)?;
        let variable = target.replace('-', "_");
        let mut tools = Vec::new();
        if env::var_os(format!("CC_{variable}")).is_none() {
            tools.push((format!("CC_{variable}"), compiler(arch)?.into_os_string()));
        }
        if arch == ARCH {
            return Ok(Self { arch, target, linker_flag: FOR_CC, tools });
        }
        // Rust's own linker, with Rust's own start files of musl: no part of a C compiler is needed.
        tools.push((format!("CARGO_TARGET_{}_LINKER", variable.to_uppercase()), "rust-lld".into()));
        Ok(Self { arch, target, linker_flag: FOR_LLD, tools })
    }

    /// Builds the program without debug information, copies it to `to`, and returns its size in bytes.
    ///
    /// # Errors
    /// If it cannot be built, needs shared libraries, or is larger than a release may be.
    pub(super) fn build(&self, to: &Path) -> Result<u64, Failure> {
        let commit = output(Command::new("git").current_dir(workspace_root()).args([
            "rev-parse",
            "--short=12",
            "HEAD",
        ]));
        run(cargo()
            .args([
                "build",
                "--quiet",
                "--locked",
                "--profile",
                "dist",
                "-p",
                "multifd-cli",
                "--bin",
                "multifd",
            ])
            .args(["--target", &self.target])
            .env("RUSTFLAGS", format!("-C target-feature=+crt-static -C link-arg={}", self.linker_flag))
            .env("MULTIFD_COMMIT", commit.as_deref().map_or("unknown", str::trim))
            .envs(self.tools.iter().map(|(name, value)| (name, value))))?;
        let built = workspace_root().join("target").join(&self.target).join("dist/multifd");
        super::copy(&built, to, 0o755)?;
        let size = fs::metadata(to)?.len();
        if size > LARGEST {
            return Err(format!("the program has {size} bytes, expected at most {LARGEST}").into());
        }
        let needed = output(Command::new("readelf").arg("-d").arg(to));
        if needed.is_ok_and(|dynamic| dynamic.contains("(NEEDED)")) {
            return Err("the program needs shared libraries".into());
        }
        Ok(size)
    }
}

/// Has rustup install the standard library of `target`, unless it is installed.
fn add_target(target: &str) -> Result<(), Failure> {
    let folder = output(Command::new("rustc").args(["--print", "target-libdir", "--target", target]))?;
    if Path::new(folder.trim()).is_dir() {
        return Ok(());
    }
    output(Command::new("rustup").args(["target", "add", target])).map(drop).map_err(|error| {
        format!(
            "Rust's standard library for it is missing; install it with `rustup target add {target}`: {error}"
        )
        .into()
    })
}

/// A C compiler for musl on `arch`: one that is installed, or a fetched one.
fn compiler(arch: &str) -> Result<PathBuf, Failure> {
    let is_native = arch == ARCH;
    let own = format!("{arch}-linux-musl-gcc");
    for program in [own.as_str()].into_iter().chain(is_native.then_some("musl-gcc")) {
        if output(Command::new(program).arg("--version")).is_ok() {
            return Ok(program.into());
        }
    }
    if is_native { cross::native(arch) } else { cross::aarch64() }.map_err(|error| {
        let install = if is_native { ", on Debian with `apt-get install musl-tools`" } else { "" };
        format!(
            "there is no C compiler for it; install {own}{install}, or name another one in CC_{arch}_unknown_linux_musl: \
             {error}"
        )
        .into()
    })
}

/// The target triple of this machine.
fn host() -> Result<String, Failure> {
    let reported = output(Command::new("rustc").arg("-vV"))?;
    let host = reported.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.ok_or("rustc -vV has no host")?.to_owned())
}

/// Relocations in their short form are 300 KB less.
const FOR_CC: &str = "-Wl,-z,pack-relative-relocs";
const FOR_LLD: &str = "-zpack-relative-relocs";
/// The most bytes that a program without debug information may have.
const LARGEST: u64 = 8_000_000;
