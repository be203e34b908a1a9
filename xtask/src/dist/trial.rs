//! Tries a package in an empty folder.
//!
//! ```text
//! this machine's architecture   dpkg installs it; the program runs there as the only file of its file system; dpkg removes it
//! another architecture          dpkg-deb unpacks it; an emulator runs the program
//! ```

use std::{env::consts::ARCH, fs, path::Path, process::Command};

use super::{Made, cross};
use crate::{
    Failure,
    step::{output, step},
};

/// Tries the package of `made`.
///
/// # Errors
/// If a step fails, or something is left.
pub(super) fn run(made: &Made) -> Result<(), Failure> {
    let Some(package) = &made.package else {
        return Err("the package cannot be tried: dpkg-deb is missing".into());
    };
    let clean = made.folder.join("clean");
    if made.arch == ARCH { native(package, &clean) } else { emulated(package, &clean, made.arch) }
}

/// Runs the program of another architecture.
fn emulated(package: &Path, clean: &Path, arch: &str) -> Result<(), Failure> {
    let Some(emulator) = cross::emulator(arch) else {
        eprintln!(
            "   SKIPPED: THE PROGRAM FOR {arch} WAS NOT TRIED: there is no qemu-{arch} on this machine; install it, on \
                   Debian with `apt-get install qemu-user`"
        );
        return Ok(());
    };
    step(&format!("use for {arch}"), || {
        output(Command::new("dpkg-deb").arg("--extract").arg(package).arg(clean))?;
        let program = clean.join("usr/bin/multifd");
        // The demo starts its program again, so the kernel must know the emulator: in namespaces of its own.
        let known = |command: &str| {
            let script = format!(
                "mount -t binfmt_misc none {BINFMT} && echo '{}' > {BINFMT}/register && {command}",
                registration(arch, &emulator)
            );
            output(&mut in_namespaces(&script))
        };
        match known("true") {
            Ok(_) => {
                use_it(|args| known(&format!("exec {} {}", program.display(), args.join(" "))))?;
            }
            Err(error) => {
                eprintln!(
                    "   SKIPPED: THE DEMO FOR {arch} WAS NOT TRIED: a namespace cannot have a binfmt_misc of its own (Linux \
                     6.7 and later): {error}"
                );
                report_version(&|args| output(Command::new(&emulator).arg(&program).args(args)))?;
            }
        }
        other_files(clean)?;
        Ok(fs::remove_dir_all(clean)?)
    })
}

/// What binfmt_misc reads: programs of ELF whose `e_machine` is `arch` are run by `emulator`.
fn registration(arch: &str, emulator: &Path) -> String {
    let machine = if arch == "aarch64" { 0xb7 } else { 0x3e };
    let ignored = r"\x00".repeat(14);
    let path = emulator.display();
    format!(r":multifd:M::\x7fELF{ignored}\x{machine:02x}\x00:\xff\xff\xff\xff{ignored}\xff\xff:{path}:")
}

/// Runs `script` in namespaces of its own, so that no mount is left; as root of its own if this is not root.
fn in_namespaces(script: &str) -> Command {
    let mut command = Command::new("unshare");
    // In bash, `echo` leaves backslashes alone.
    command.args(["--map-root-user", "--mount", "--pid", "--fork", "bash", "-c", script]);
    command
}

/// Has the program report its version and move memory.
fn use_it(multifd: impl Fn(&[&str]) -> Result<String, Failure>) -> Result<(), Failure> {
    report_version(&multifd)?;
    for method in ["none", "zlib", "zstd"] {
        // Under an emulator, compression is slower than the demo's guest writes by default.
        let slow = ["demo", "--size", "64M", "--dirty-rate", "4M", "--max-total-time", "2m"];
        let reported = multifd(&[&slow[..], &["--multifd-compression", method]].concat())?;
        if !reported.contains("RAM is equal") {
            return Err(format!("the demo with compression {method} found a difference: {reported}").into());
        }
    }
    Ok(())
}

fn report_version(multifd: &impl Fn(&[&str]) -> Result<String, Failure>) -> Result<(), Failure> {
    let reported = multifd(&["--version", "-v"])?;
    print!("{reported}");
    if reported.contains("commit") { Ok(()) } else { Err("the program does not report its commit".into()) }
}

/// Looks for a file of each other kind.
fn other_files(clean: &Path) -> Result<(), Failure> {
    for file in [
        "share/man/man1/multifd-capture.1.gz",
        "share/bash-completion/completions/multifd",
        "lib/systemd/system/multifd-receive@.socket",
    ] {
        fs::metadata(clean.join("usr").join(file)).map_err(|error| format!("{file}: {error}"))?;
    }
    Ok(())
}

/// Installs the package, runs the program and removes the package.
fn native(package: &Path, clean: &Path) -> Result<(), Failure> {
    let dpkg = |args: &[&str]| {
        let mut command = Command::new("dpkg");
        // Nothing of this machine is used: no database, no scripts, no configuration.
        command
            .arg(format!("--root={}", clean.display()))
            .args(["--force-not-root", "--force-bad-path"])
            .args(args);
        command
    };
    step("install", || {
        fs::create_dir_all(clean.join("var/lib/dpkg/updates"))?;
        fs::create_dir_all(clean.join("var/lib/dpkg/info"))?;
        fs::write(clean.join("var/lib/dpkg/status"), "")?;
        output(dpkg(&["--install"]).arg(package)).map(drop)
    })?;
    step("use", || {
        for folder in ["proc", "dev", "tmp"] {
            fs::create_dir_all(clean.join(folder))?;
        }
        let inside = |command: &str| {
            let script = format!(
                "mount -t proc proc {0}/proc && mount --rbind /dev {0}/dev && exec chroot {0} {command}",
                clean.display()
            );
            output(&mut in_namespaces(&script))
        };
        use_it(|args| inside(&format!("/usr/bin/multifd {}", args.join(" "))))?;
        other_files(clean)
    })?;
    step("remove", || {
        output(&mut dpkg(&["--purge", "multifd"]))?;
        match clean.join("usr/bin/multifd").exists() || clean.join("usr/share/doc/multifd").exists() {
            true => Err("the package has left files".into()),
            false => Ok(fs::remove_dir_all(clean)?),
        }
    })
}

const BINFMT: &str = "/proc/sys/fs/binfmt_misc";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_recognised_by_their_machine_alone() {
        let line = registration("aarch64", Path::new("/usr/bin/qemu-aarch64"));
        let fields: Vec<&str> = line.split(':').collect();
        let ["", "multifd", "M", "", magic, mask, "/usr/bin/qemu-aarch64", ""] = fields[..] else {
            panic!("unexpected fields: {fields:?}")
        };
        // `ELF` is written as itself, so the other 17 bytes are in hex.
        assert_eq!((magic.matches(r"\x").count(), mask.matches(r"\x").count()), (17, 20));
        assert!(magic.starts_with(r"\x7fELF") && magic.ends_with(r"\xb7\x00"));
        assert!(mask.starts_with(r"\xff\xff\xff\xff\x00") && mask.ends_with(r"\x00\xff\xff"));
    }
}
