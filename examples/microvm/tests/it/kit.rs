//! The program's processes, and commands to them.

use std::{
    fs::{self, OpenOptions},
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Output, Stdio},
    time::{Duration, Instant},
};

use multifd_testkit::rough_network::Host;
use tempfile::TempDir;

/// A folder for control sockets; `None` if there is no KVM.
pub(crate) fn folder() -> Option<TempDir> {
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        multifd_testkit::skip(&format!("/dev/kvm cannot be opened: {error}"));
        return None;
    }
    Some(tempfile::tempdir().expect("a folder"))
}

/// A machine in a separate process, which is killed at the end.
pub(crate) struct Machine {
    child: Child,
    out: BufReader<ChildStdout>,
    control: PathBuf,
}

impl Machine {
    /// A running guest of 64 MiB.
    pub(crate) fn run(folder: &TempDir, name: &str) -> Self {
        Self::run_at(folder, name, "40MB")
    }

    /// A guest that rewrites `rate` bytes per second.
    pub(crate) fn run_at(folder: &TempDir, name: &str, rate: &str) -> Self {
        let mut machine = Self::start(folder, name, &["run", "--size", "64MiB", "--rate", rate]);
        assert!(machine.line().starts_with("running"));
        machine
    }

    /// A running guest of 64 MiB, in memory that can be handed over.
    pub(crate) fn run_shared(folder: &TempDir, name: &str) -> Self {
        let size = ["run", "--shared", "--size", "64MiB", "--rate", "40MB"];
        let mut machine = Self::start(folder, name, &size);
        assert!(machine.line().starts_with("running"));
        machine
    }

    /// One that waits for memory that is handed over, and where.
    pub(crate) fn incoming_local(folder: &TempDir, name: &str) -> (Self, String) {
        let address = format!("unix:{}.memory", folder.path().join(name).display());
        let mut machine = Self::start(folder, name, &["incoming", "--local", &address]);
        assert!(machine.line().starts_with("listening"));
        (machine, address)
    }

    /// One that waits, and where.
    pub(crate) fn incoming(folder: &TempDir, name: &str) -> (Self, String) {
        Self::incoming_with(folder, name, &[])
    }

    /// One that waits, with `flags`, and where.
    pub(crate) fn incoming_with(folder: &TempDir, name: &str, flags: &[&str]) -> (Self, String) {
        let args: Vec<_> = ["incoming"].iter().chain(flags).chain(&["tcp:127.0.0.1:0"]).copied().collect();
        let mut machine = Self::start(folder, name, &args);
        let line = machine.line();
        let address = line.strip_prefix("listening at ").expect("an address").to_owned();
        (machine, address)
    }

    /// One that waits, and runs its guest before the memory is there; and where.
    pub(crate) fn incoming_early(folder: &TempDir, name: &str) -> (Self, String) {
        Self::incoming_with(folder, name, &["--postcopy"])
    }

    /// A machine out of a file.
    pub(crate) fn restored(folder: &TempDir, name: &str, file: &Path, flags: &[&str]) -> Self {
        let file = file.to_str().expect("text");
        let args: Vec<_> = ["restore"].iter().chain(flags).chain(&[file]).copied().collect();
        let mut machine = Self::start(folder, name, &args);
        assert!(machine.line().starts_with("running"));
        machine
    }

    /// Captures it to a file.
    pub(crate) fn snapshot(&self, file: &Path) -> Output {
        program().arg("snapshot").arg(file).arg("--control").arg(&self.control).output().expect("asked")
    }

    /// Captures what differs from a file.
    pub(crate) fn snapshot_since(&self, base: &Path, file: &Path) -> Output {
        let mut command = program();
        command.args(["snapshot", "--base"]).arg(base).arg(file).arg("--control").arg(&self.control);
        command.output().expect("asked")
    }

    /// Captures it to a file as it is at one moment.
    pub(crate) fn snapshot_moment(&self, file: &Path) -> Output {
        let mut command = program();
        command.args(["snapshot", "--moment"]).arg(file).arg("--control").arg(&self.control);
        command.output().expect("asked")
    }

    /// A guest of 64 MiB that rewrites `rate` bytes per second, on a host.
    pub(crate) fn run_on(host: &Host, folder: &TempDir, name: &str, rate: &str) -> Self {
        let args = ["run", "--size", "64MiB", "--rate", rate];
        let mut machine = Self::start_by(program_on(host), folder, name, &args);
        assert!(machine.line().starts_with("running"));
        machine
    }

    /// One that waits on a host, and runs its guest before the memory is there; and where.
    pub(crate) fn incoming_early_on(host: &Host, folder: &TempDir, name: &str) -> (Self, String) {
        let args = ["incoming", "--postcopy", "tcp:127.0.0.1:0"];
        let mut machine = Self::start_by(program_on(host), folder, name, &args);
        let line = machine.line();
        let address = line.strip_prefix("listening at ").expect("an address").to_owned();
        (machine, address)
    }

    fn start(folder: &TempDir, name: &str, args: &[&str]) -> Self {
        Self::start_by(program(), folder, name, args)
    }

    fn start_by(mut command: Command, folder: &TempDir, name: &str, args: &[&str]) -> Self {
        let control = folder.path().join(name);
        let mut child = command
            .args(args)
            .arg("--control")
            .arg(&control)
            .stdout(Stdio::piped())
            .spawn()
            .expect("started");
        let out = BufReader::new(child.stdout.take().expect("its output"));
        Self { child, out, control }
    }

    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).expect("a line");
        line.trim_end().to_owned()
    }

    /// Starts its migration; returns the client's process.
    pub(crate) fn migrate(&self, address: &str, max_bandwidth: &str) -> Child {
        self.migrate_with(address, &["--max-bandwidth", max_bandwidth])
    }

    /// Starts its migration with `flags`.
    pub(crate) fn migrate_with(&self, address: &str, flags: &[&str]) -> Child {
        let mut client = program();
        client.arg("migrate").args(flags).args([address, "--control"]).arg(&self.control);
        client.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("started")
    }

    pub(crate) fn ask(&self, question: &str) -> Output {
        program().args(["ask", question, "--control"]).arg(&self.control).output().expect("asked")
    }

    /// The number of batches of its guest; fails if the guest has found an error.
    pub(crate) fn batches(&self) -> u64 {
        number(&self.ask("status"), "batches")
    }

    /// Asserts that its guest runs, and that every byte of its memory is right.
    pub(crate) fn assert_well(&self) {
        let before = self.batches();
        let deadline = Instant::now() + TIMEOUT;
        while self.batches() < before + 10 {
            assert!(Instant::now() < deadline, "the guest does not run");
        }
        let verified = self.ask("verify");
        assert_eq!(number(&verified, "wrong"), 0, "{verified:?}");
        assert!(number(&verified, "of") > 60 << 20);
    }

    /// Waits until `bytes` bytes of it are in memory.
    pub(crate) fn wait_resident(&self, bytes: u64) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it lives");
            let resident =
                status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
            if resident.and_then(|kib| kib.parse::<u64>().ok()).expect("resident memory") << 10 > bytes {
                return;
            }
            assert!(Instant::now() < deadline, "no memory arrived");
        }
    }

    /// Waits for its end; returns whether it ended by itself.
    pub(crate) fn wait(mut self) -> bool {
        self.child.wait().expect("waited for").success()
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("waited for");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The number after a name in an answer.
pub(crate) fn number(output: &Output, name: &str) -> u64 {
    let text = String::from_utf8_lossy(&output.stdout);
    let value = text.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {name} in {output:?}"))
}

pub(crate) fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_microvm"));
    command.stdin(Stdio::null());
    command
}

fn program_on(host: &Host) -> Command {
    let [first, rest @ ..] = host.launcher();
    let mut command = Command::new(first);
    command.args(rest).arg(env!("CARGO_BIN_EXE_microvm")).stdin(Stdio::null());
    command
}

const TIMEOUT: Duration = Duration::from_secs(60);
