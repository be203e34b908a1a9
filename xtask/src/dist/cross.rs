//! Fetches what a program for musl needs besides Rust, from Debian's packages, without root.
//!
//! ```text
//! target/cross/amd64/cc             this machine's C compiler with the headers of musl
//! target/cross/arm64/cc             a launcher: starts the cross compiler with its own loader and libraries
//! target/cross/arm64/qemu-aarch64   a launcher of the emulator that runs its programs
//! target/cross/…/root/              the packages, unpacked
//! target/cross/…/stamp              what was unpacked; written last, so the folder is complete if it exists
//! ```
//!
//! Only the headers of musl are used: its library is a part of Rust's target. Possible errors are those of [`crate::apt`].

use std::{
    env,
    fs::{self, File},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    Failure,
    apt::{Apt, Package},
    step::{output, step},
    workspace_root,
};

/// Fetches the C compiler for musl on this machine's architecture `arch`, and returns its path.
///
/// # Errors
/// If there is no C compiler, or the headers cannot be fetched.
pub(super) fn native(arch: &str) -> Result<PathBuf, Failure> {
    output(Command::new("cc").arg("--version"))?;
    let launcher = NATIVE.replace("ARCH", arch);
    let home = fetch(debian(arch)?, None, &["musl-dev"], &[], &[("cc", launcher)])?;
    Ok(home.join("cc"))
}

/// Fetches the C compiler for musl on aarch64, and the emulator that runs its programs.
///
/// # Errors
/// If this machine is not x86-64, or a package cannot be fetched.
pub(super) fn aarch64() -> Result<PathBuf, Failure> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return Err("Debian's cross compiler is only fetched on x86-64 Linux".into());
    }
    let launchers = [("cc", CROSS.to_owned()), ("qemu-aarch64", EMULATE.to_owned())];
    let home = fetch(
        "arm64",
        Some("arm64"),
        &["musl-dev:arm64"],
        &["gcc-aarch64-linux-gnu", "qemu-user"],
        &launchers,
    )?;
    Ok(home.join("cc"))
}

/// The path of the emulator that runs programs of `arch`: the one of this machine, or the fetched one.
pub(super) fn emulator(arch: &str) -> Option<PathBuf> {
    let name = format!("qemu-{arch}");
    let fetched = workspace_root().join("target/cross").join(debian(arch).ok()?);
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .flat_map(|folder| [folder.join(&name), folder.join(format!("{name}-static"))])
        .chain([fetched.join(&name)])
        .find(|program| output(Command::new(program).arg("--version")).is_ok())
}

/// Debian's name of an architecture.
///
/// # Errors
/// If it is unknown here.
pub(super) fn debian(arch: &str) -> Result<&'static str, Failure> {
    match arch {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        other => Err(format!("the name of the architecture {other} in Debian is unknown").into()),
    }
}

/// Unpacks `alone`, and `whole` with all they depend on, unless they are present already. Returns their folder.
fn fetch(
    name: &str,
    foreign: Option<&str>,
    alone: &[&str],
    whole: &[&str],
    launchers: &[(&str, String)],
) -> Result<PathBuf, Failure> {
    let home = workspace_root().join("target/cross").join(name);
    fs::create_dir_all(&home)?;
    // Two tasks may run at once: the second one waits and finds the work done.
    let lock = File::create(home.join("lock"))?;
    lock.lock()?;
    let wanted = format!("{SUITE} {alone:?} {whole:?} {launchers:?}\n");
    let stamp = home.join("stamp");
    if fs::read_to_string(&stamp).is_ok_and(|stamp| stamp.starts_with(&wanted)) {
        return Ok(home);
    }
    step(&format!("fetch the C compiler for {name}"), || {
        let _ = fs::remove_file(&stamp);
        let root = home.join("root");
        if root.exists() {
            fs::remove_dir_all(&root)?;
        }
        fs::create_dir_all(&root)?;
        let apt_home = home.join("apt");
        let apt = Apt::new(&apt_home, &[SUITE], foreign)?;
        let mut unpacked = wanted;
        let mut unpack = |packages: Vec<Package>| -> Result<(), Failure> {
            for package in packages {
                package.unpack(&root)?;
                unpacked.push_str(&package.name);
                unpacked.push('\n');
            }
            Ok(())
        };
        // Each download empties the cache, so it is unpacked before the next one.
        unpack(apt.download_alone(SUITE, alone)?)?;
        if !whole.is_empty() {
            unpack(apt.download(SUITE, whole)?)?;
        }
        for (name, text) in launchers {
            write_launcher(&home.join(name), text)?;
        }
        fs::write(&stamp, unpacked)?;
        let _ = fs::remove_dir_all(&apt_home);
        Ok(())
    })?;
    Ok(home)
}

/// Writes a launcher. It uses relative paths only, so the folder may be moved.
fn write_launcher(path: &Path, text: &str) -> Result<(), Failure> {
    fs::write(path, text)?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

/// The compiler's version, below, is the one of this suite.
const SUITE: &str = "bookworm";
const NATIVE: &str = r#"#!/bin/sh
# Starts this machine's C compiler with the headers of musl instead of those of the system.
root=$(dirname "$(readlink -f "$0")")/root
exec cc -nostdinc -isystem "$(cc -print-file-name=include)" -isystem "$root/usr/include/ARCH-linux-musl" "$@"
"#;
const CROSS: &str = r#"#!/bin/sh
# Starts the cross compiler, and by it the programs of each stage, with the loader and the libraries of its packages.
# The headers are those of musl instead of those of the GNU C library.
root=$(dirname "$(readlink -f "$0")")/root
lib=x86_64-linux-gnu
libraries=$root/lib/$lib:$root/usr/lib/$lib
loader=$root/lib64/ld-linux-x86-64.so.2
unset LD_LIBRARY_PATH LD_PRELOAD
exec "$loader" --library-path "$libraries" \
    "$root/usr/bin/aarch64-linux-gnu-gcc" -wrapper "$loader,--library-path,$libraries" \
    -nostdinc -isystem "$root/usr/lib/gcc-cross/aarch64-linux-gnu/12/include" \
    -isystem "$root/usr/include/aarch64-linux-musl" "$@"
"#;
const EMULATE: &str = r#"#!/bin/sh
# Starts the emulator with the loader and the libraries of its packages.
root=$(dirname "$(readlink -f "$0")")/root
lib=x86_64-linux-gnu
unset LD_LIBRARY_PATH LD_PRELOAD
exec "$root/lib64/ld-linux-x86-64.so.2" --library-path "$root/lib/$lib:$root/usr/lib/$lib" \
    "$root/usr/bin/qemu-aarch64" "$@"
"#;
