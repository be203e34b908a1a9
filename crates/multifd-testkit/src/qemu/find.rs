//! Finds the QEMU programs, and skips a test that lacks one.
//!
//! The search order is: the launcher that `cargo xtask test` sets in `MULTIFD_QEMU_7_2` or `MULTIFD_QEMU_10_0`; the one
//! that `cargo xtask qemu` left under `target/qemu`; `$MULTIFD_QEMU` or `qemu-system-x86_64` of `PATH`, if its version
//! can replace it.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::skip;

/// A QEMU that can be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qemu {
    program: PathBuf,
    series: &'static str,
}

/// A series that the tests use, and the result of the one search per process.
struct Series {
    name: &'static str,
    variable: &'static str,
    newest: bool,
    found: OnceLock<Result<PathBuf, String>>,
}

static V7_2: Series =
    Series { name: "7.2", variable: "MULTIFD_QEMU_7_2", newest: false, found: OnceLock::new() };
static V10_0: Series =
    Series { name: "10.0", variable: "MULTIFD_QEMU_10_0", newest: true, found: OnceLock::new() };

impl Qemu {
    /// QEMU 7.2. `None` means that the test must return: it was listed as skipped.
    ///
    /// # Panics
    ///
    /// If there is none and `CI` or `MULTIFD_REQUIRE_QEMU` is set.
    pub fn v7_2() -> Option<Self> {
        V7_2.find()
    }

    /// QEMU 10.0. `None` means that the test must return: it was listed as skipped.
    ///
    /// # Panics
    ///
    /// If there is none and `CI` or `MULTIFD_REQUIRE_QEMU` is set.
    pub fn v10_0() -> Option<Self> {
        V10_0.find()
    }

    /// Both, oldest first; for tests that need the pair.
    ///
    /// # Panics
    ///
    /// If one is missing and `CI` or `MULTIFD_REQUIRE_QEMU` is set.
    pub fn both() -> Option<[Self; 2]> {
        Some([Self::v7_2()?, Self::v10_0()?])
    }

    /// The series that it represents: `7.2` or `10.0`.
    pub fn series(&self) -> &'static str {
        self.series
    }

    /// Its own machine type: `pc-q35-7.2` or `pc-q35-10.0`.
    pub fn machine(&self) -> String {
        format!("pc-q35-{}", self.series)
    }

    /// The program to start.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// The emulator of another guest architecture next to this one, for example `qemu-system-aarch64`. `None` means
    /// that the test must return: it was listed as skipped.
    ///
    /// # Panics
    ///
    /// If there is none and `CI` or `MULTIFD_REQUIRE_QEMU` is set.
    pub fn emulator(&self, program: &str) -> Option<Self> {
        let other = Self { program: self.program.with_file_name(program), series: self.series };
        match version_of(&other.program) {
            Ok(version) if numbers(&version) == numbers(self.series) => Some(other),
            Ok(version) => {
                skip(&format!("no {program} of QEMU {}: it is {version}", self.series));
                None
            }
            Err(reason) => {
                skip(&format!("no {program} of QEMU {}: {reason}", self.series));
                None
            }
        }
    }
}

impl Series {
    fn find(&self) -> Option<Qemu> {
        match self.found.get_or_init(|| self.look()) {
            Ok(program) => Some(Qemu { program: program.clone(), series: self.name }),
            Err(reason) => {
                skip(&format!("no QEMU {}: {reason}", self.name));
                None
            }
        }
    }

    fn look(&self) -> Result<PathBuf, String> {
        if !cfg!(target_arch = "x86_64") {
            return Err("the guest's program is assembled on x86-64 only".into());
        }
        if let Some(program) = env::var_os(self.variable).filter(|value| !value.is_empty()) {
            return Ok(program.into());
        }
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let fetched = workspace.join("target/qemu").join(self.name);
        if fetched.join("stamp").exists() {
            return Ok(fetched.join(PROGRAM));
        }
        let program = env::var_os("MULTIFD_QEMU").map_or_else(|| PROGRAM.into(), PathBuf::from);
        let version = version_of(&program)
            .map_err(|reason| format!("not fetched (`cargo xtask qemu` does), and {reason}"))?;
        let (have, want) = (numbers(&version), numbers(self.name));
        if have == want || (self.newest && have > want) {
            Ok(program)
        } else {
            Err(format!("not fetched, and {} is {version}, which cannot stand in", program.display()))
        }
    }
}

fn version_of(program: &Path) -> Result<String, String> {
    let output = Command::new(program)
        .arg("--version")
        .output()
        .map_err(|cause| format!("{} cannot be started: {cause}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut words = text.split_ascii_whitespace().skip_while(|word| *word != "version");
    words.nth(1).map(str::to_owned).ok_or_else(|| format!("{} tells no version", program.display()))
}

fn numbers(version: &str) -> Vec<u32> {
    version.split('.').map_while(|part| part.parse().ok()).take(2).collect()
}

const PROGRAM: &str = "qemu-system-x86_64";
