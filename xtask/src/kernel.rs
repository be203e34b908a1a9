//! Provides a Linux kernel for the guests of the tests, and its symbols if they are wanted.
//!
//! The input is Debian's cloud kernel. The output is a folder:
//!
//! ```text
//! target/kernel/vmlinuz   the kernel
//! target/kernel/vmlinux   its symbols (580 MB; 280 MB are downloaded), only with MULTIFD_FETCH_SYMBOLS=1
//! target/kernel/stamp     what was unpacked; written last
//! ```
//!
//! `$MULTIFD_KERNEL` and `$MULTIFD_VMLINUX` replace them. If the package cannot be downloaded, there is no kernel.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Failure;
use crate::apt::{Apt, Package};
use crate::step::step;

/// A kernel.
pub(crate) struct Kernel {
    /// What a machine starts.
    pub(crate) image: PathBuf,
    /// Its symbols, for debuggers.
    pub(crate) symbols: Option<PathBuf>,
}

impl Kernel {
    /// Finds a kernel: fetches it, or uses the replacement.
    ///
    /// # Errors
    ///
    /// Why it cannot be fetched.
    pub(crate) fn locate() -> Result<Self, Failure> {
        let given = |variable| env::var_os(variable).map(PathBuf::from);
        if let Some(image) = given(IMAGE_VARIABLE) {
            return Ok(Self { image, symbols: given(SYMBOLS_VARIABLE) });
        }
        let wanted = env::var_os("MULTIFD_FETCH_SYMBOLS").is_some_and(|value| value == "1");
        let fetched = fetch(wanted)?;
        Ok(Self { symbols: given(SYMBOLS_VARIABLE).or(fetched.symbols), ..fetched })
    }

    /// Passes it to the tests.
    pub(crate) fn pass_to(&self, command: &mut Command) {
        command.env(IMAGE_VARIABLE, &self.image);
        if let Some(symbols) = &self.symbols {
            command.env(SYMBOLS_VARIABLE, symbols);
        }
    }
}

/// Fetches the kernel unless it is present already.
fn fetch(with_symbols: bool) -> Result<Kernel, Failure> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return Err("Debian's packages are only fetched on x86-64 Linux".into());
    }
    let home = crate::workspace_root().join("target/kernel");
    fs::create_dir_all(&home)?;
    let (image, symbols, stamp) = (home.join("vmlinuz"), home.join("vmlinux"), home.join("stamp"));
    // Two tasks may run at once: the second one waits and finds the work done.
    let lock = File::create(home.join("lock"))?;
    lock.lock()?;
    let found = fs::read_to_string(&stamp).unwrap_or_default();
    let has = |part: &str| found.lines().any(|line| line == part);
    let has_symbols = has(SYMBOLS) && symbols.is_file();
    if !(has(IMAGE) && image.is_file()) || with_symbols && !has_symbols {
        let _ = fs::remove_file(&stamp);
        step("fetch a kernel", || {
            let apt_home = home.join("apt");
            let apt = Apt::new(&apt_home, &[SUITE], None)?;
            // The package of this name contains nothing; it depends on the newest kernel.
            let newest = one(apt.download_alone(SUITE, &[NEWEST])?)?.depends_on()?;
            unpack(&one(apt.download_alone(SUITE, &[&newest])?)?, "./boot/vmlinuz-*", &image)?;
            let mut parts = format!("{newest}\n{IMAGE}\n");
            if with_symbols {
                let package = format!("{newest}-dbg");
                let package = one(apt.download_alone(SUITE, &[&package])?)?;
                unpack(&package, "./usr/lib/debug/boot/vmlinux-*", &symbols)?;
                parts += &format!("{SYMBOLS}\n");
            }
            fs::write(&stamp, parts)?;
            let _ = fs::remove_dir_all(&apt_home);
            eprintln!("   {newest}, in {}", home.display());
            Ok(())
        })?;
    }
    Ok(Kernel { image, symbols: (has_symbols || with_symbols).then_some(symbols) })
}

fn one(packages: Vec<Package>) -> Result<Package, Failure> {
    let [package] = <[Package; 1]>::try_from(packages)
        .map_err(|packages| format!("expected one package, found {}", packages.len()))?;
    Ok(package)
}

/// Unpacks the only file of a package that `pattern` names.
fn unpack(package: &Package, pattern: &str, to: &Path) -> Result<(), Failure> {
    let mut archive = package.contents().stdout(Stdio::piped()).spawn()?;
    let contents = archive.stdout.take().ok_or("no pipe from dpkg-deb")?;
    let unpacked = Command::new("tar")
        .args(["--extract", "--to-stdout", "--wildcards", pattern])
        .stdin(contents)
        .stdout(File::create(to)?)
        .status()?;
    let ended = archive.wait()?;
    if !unpacked.success() || !ended.success() || fs::metadata(to)?.len() == 0 {
        return Err(format!("{} has no {pattern}: dpkg-deb {ended}, tar {unpacked}", package.name).into());
    }
    Ok(())
}

const SUITE: &str = "bookworm";
const NEWEST: &str = "linux-image-cloud-amd64";
/// Passes the kernel to the tests.
const IMAGE_VARIABLE: &str = "MULTIFD_KERNEL";
/// Passes its symbols to the tests.
const SYMBOLS_VARIABLE: &str = "MULTIFD_VMLINUX";
/// Lines of the stamp.
const IMAGE: &str = "image";
const SYMBOLS: &str = "symbols";
