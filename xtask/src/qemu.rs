//! Provides the real QEMUs for the interop tests.
//!
//! The input is Debian's packages of each release in [`RELEASES`]. The output is a folder for each:
//!
//! ```text
//! target/qemu/10.0/qemu-system-x86_64   a launcher: starts the emulator with its own loader and libraries;
//!                                       beside it one for each other guest architecture
//! target/qemu/10.0/root/                the packages, unpacked
//! target/qemu/10.0/stamp                what was unpacked; written last, so the folder is complete if it exists
//! ```
//!
//! A folder contains all libraries, libc and loader included, so it runs on any distribution. If packages cannot be
//! downloaded, `$MULTIFD_QEMU` or a `qemu-system-x86_64` from `PATH` replaces the release, if its version allows it.

use std::env;
use std::fs::{self, File};
use std::iter;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Failure;
use crate::apt::Apt;
use crate::step::{output, step};

/// A release of QEMU that the tests use.
pub(crate) struct Release {
    /// Its series, as in `query-version` and in the folder's name.
    pub(crate) series: &'static str,
    /// The environment variable that passes its path to the tests.
    pub(crate) variable: &'static str,
    suite: &'static str,
    /// Emulators of other guest architectures. Those of 7.2 are in one package of 46 MB, so for 7.2 it is only Arm.
    others: &'static [Emulator],
}

/// The releases, oldest first.
pub(crate) const RELEASES: [Release; 2] = [
    Release { series: "7.2", variable: "MULTIFD_QEMU_7_2", suite: "bookworm", others: &[ARM] },
    Release {
        series: "10.0",
        variable: "MULTIFD_QEMU_10_0",
        suite: "bookworm-backports",
        others: &[
            ARM,
            Emulator { package: "qemu-system-ppc", program: "qemu-system-ppc64" },
            Emulator { package: "qemu-system-riscv", program: "qemu-system-riscv64" },
            Emulator { package: "qemu-system-s390x", program: "qemu-system-s390x" },
        ],
    },
];

/// An emulator: its package and its program.
pub(crate) struct Emulator {
    package: &'static str,
    program: &'static str,
}

/// The emulator that is used of each release, and that another QEMU can replace.
const X86: Emulator = Emulator { package: "qemu-system-x86", program: "qemu-system-x86_64" };
const ARM: Emulator = Emulator { package: "qemu-system-arm", program: "qemu-system-aarch64" };

impl Release {
    fn emulators(&self) -> impl Iterator<Item = &Emulator> {
        iter::once(&X86).chain(self.others)
    }

    /// Whether `stamp` belongs to a folder with everything that is wanted of this release.
    fn is_whole(&self, stamp: &str) -> bool {
        let mut lines = stamp.lines();
        lines.next() == Some(&recipe(self))
            && self
                .others
                .iter()
                .all(|other| stamp.lines().any(|line| line.split('_').next() == Some(other.package)))
    }
}

/// Fetches every release, or fails.
///
/// # Errors
///
/// When a release is not available.
pub(crate) fn run() -> Result<(), Failure> {
    for release in &RELEASES {
        println!("{} {}", release.series, fetch(release)?.display());
    }
    Ok(())
}

/// Finds a release: fetches it, or uses a replacement.
///
/// # Errors
///
/// Why neither is possible.
pub(crate) fn locate(release: &Release) -> Result<PathBuf, Failure> {
    if let Some(program) = env::var_os(release.variable) {
        return Ok(program.into());
    }
    let unfetched = match fetch(release) {
        Ok(program) => return Ok(program),
        Err(failure) => failure,
    };
    eprintln!("xtask: QEMU {} cannot be fetched: {unfetched}", release.series);
    let (program, from) = match env::var_os("MULTIFD_QEMU") {
        Some(program) => (PathBuf::from(program), "$MULTIFD_QEMU"),
        None => (PathBuf::from(X86.program), "PATH"),
    };
    let version = version_of(&program).map_err(|e| format!("{unfetched}; and {from} has none: {e}"))?;
    if can_replace(&version, release.series) {
        eprintln!("xtask: {} {version} from {from} replaces {}", program.display(), release.series);
        Ok(program)
    } else {
        Err(format!("{unfetched}; and {} {version} from {from} cannot replace it", program.display()).into())
    }
}

/// Fetches a release unless it is present already, and returns the path of its launcher.
fn fetch(release: &Release) -> Result<PathBuf, Failure> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return Err("Debian's packages are only fetched on x86-64 Linux".into());
    }
    let base = crate::workspace_root().join("target/qemu");
    let home = base.join(release.series);
    let launcher = home.join(X86.program);
    fs::create_dir_all(&home)?;
    // Two tasks may run at once: the second one waits and finds the work done.
    let lock = File::create(base.join("lock"))?;
    lock.lock()?;
    if fs::read_to_string(home.join("stamp")).is_ok_and(|stamp| release.is_whole(&stamp)) {
        return Ok(launcher);
    }
    step(&format!("fetch QEMU {}", release.series), || {
        let apt_home = base.join("apt");
        let suites: Vec<&str> = RELEASES.iter().map(|release| release.suite).collect();
        let apt = Apt::new(&apt_home, &suites, None)?;
        let names: Vec<&str> = release.emulators().map(|emulator| emulator.package).collect();
        let packages = apt.download(release.suite, &names)?;
        // Unpacked next to the folder that tests may be using, until it is complete.
        let (root, new, old) = (home.join("root"), home.join("root.new"), home.join("root.old"));
        for leftover in [&new, &old] {
            if leftover.exists() {
                fs::remove_dir_all(leftover)?;
            }
        }
        fs::create_dir_all(&new)?;
        let mut stamp = recipe(release) + "\n";
        for package in &packages {
            package.unpack(&new)?;
            stamp.push_str(&package.name);
            stamp.push('\n');
        }
        let _ = fs::remove_file(home.join("stamp"));
        if root.exists() {
            fs::rename(&root, &old)?;
        }
        fs::rename(&new, &root)?;
        for emulator in release.emulators() {
            write_launcher(&home.join(emulator.program), emulator.program)?;
        }
        let version = version_of(&launcher)?;
        if !version.starts_with(release.series) {
            return Err(
                format!("expected version {} of {}, found {version}", release.series, release.suite).into()
            );
        }
        fs::write(home.join("stamp"), stamp)?;
        for leftover in [&apt_home, &old] {
            let _ = fs::remove_dir_all(leftover);
        }
        eprintln!("   QEMU {version}, {} packages, in {}", packages.len(), home.display());
        Ok(())
    })?;
    Ok(launcher)
}

/// The head of a stamp: a folder made by a different recipe is rebuilt.
fn recipe(release: &Release) -> String {
    format!("recipe 1: {} {}", release.suite, X86.package)
}

/// Writes a launcher that uses relative paths only, so the folder may be moved.
fn write_launcher(path: &Path, program: &str) -> Result<(), Failure> {
    fs::write(path, LAUNCHER.replace("PROGRAM", program))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// The version that `program --version` reports.
fn version_of(program: &Path) -> Result<String, Failure> {
    let text = output(Command::new(program).arg("--version"))?;
    let version = text.split_ascii_whitespace().skip_while(|word| *word != "version").nth(1);
    Ok(version.ok_or_else(|| format!("{} reports no version: {text:?}", program.display()))?.to_owned())
}

/// Whether a QEMU of `version` can replace `series`: the same series can, and so can every version newer than the
/// newest series, because it still has the machine type of that series.
fn can_replace(version: &str, series: &str) -> bool {
    let numbers =
        |text: &str| -> Vec<u32> { text.split('.').map_while(|part| part.parse().ok()).take(2).collect() };
    let newest = RELEASES.last().map_or("", |release| release.series);
    let (have, want) = (numbers(version), numbers(series));
    have == want || (series == newest && have > want)
}

const LAUNCHER: &str = r#"#!/bin/sh
# Starts QEMU with the loader, the libraries, the modules and the firmware it was packaged with.
here=$(dirname "$(readlink -f "$0")")
root=$here/root
lib=x86_64-linux-gnu
unset LD_LIBRARY_PATH LD_PRELOAD
export QEMU_MODULE_DIR="$root/usr/lib/$lib/qemu"
exec "$root/lib64/ld-linux-x86-64.so.2" \
    --library-path "$root/lib/$lib:$root/usr/lib/$lib:$root/usr/lib/$lib/pulseaudio" \
    "$root/usr/bin/PROGRAM" \
    -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" -L "$root/usr/lib/ipxe/qemu" \
    -L "$root/usr/share/slof" -L "$root/usr/lib/riscv64-linux-gnu/opensbi/generic" "$@"
"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folder_without_a_wanted_emulator_is_not_whole() {
        let [old, _] = &RELEASES;
        let x86 = "recipe 1: bookworm qemu-system-x86\nqemu-system-x86_7.2.deb\n";
        assert!(!old.is_whole(x86));
        assert!(old.is_whole(&format!("{x86}qemu-system-arm_7.2.deb\n")));
        assert!(!old.is_whole("recipe 0: bookworm qemu-system-x86\nqemu-system-arm_7.2.deb\n"));
    }

    #[test]
    fn same_series_stands_in() {
        assert!(can_replace("7.2.22", "7.2"));
        assert!(can_replace("10.0.2", "10.0"));
    }

    #[test]
    fn newer_release_stands_in_for_the_newest_only() {
        assert!(can_replace("10.1.0", "10.0"));
        assert!(!can_replace("10.1.0", "7.2"));
    }

    #[test]
    fn release_between_stands_in_for_none() {
        assert!(!can_replace("8.2.1", "7.2"));
        assert!(!can_replace("8.2.1", "10.0"));
    }
}
