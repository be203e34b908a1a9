//! A running QEMU: its monitor, its serial line, its standard error, its end.
//!
//! The process is killed and its files are removed when the [`Vm`] is dropped, on every path. If a test panics, the
//! last output is printed first. The process ends with the test run, even if the run is killed.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::qmp::Qmp;
use super::{Error, PATIENCE, wait_for};
use crate::child;
use crate::guest::Report;

/// A QEMU process.
#[derive(Debug)]
pub struct Vm {
    child: Child,
    qmp: Qmp,
    series: &'static str,
    // Removed when dropped, which happens after `drop` has waited for the process.
    folder: TempDir,
}

impl Vm {
    /// The monitor's socket, in the folder.
    pub(super) const QMP: &str = "qmp";
    /// The guest's serial output, in the folder.
    pub(super) const SERIAL: &str = "serial";
    const STDERR: &str = "stderr";

    pub(super) fn start(mut command: Command, folder: TempDir, series: &'static str) -> Result<Self, Error> {
        let stderr =
            File::create(folder.path().join(Self::STDERR)).map_err(Error::system("standard error"))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        let program = command.get_program().to_string_lossy().into_owned();
        let child = child::spawn(&mut command).map_err(Error::system(format!("cannot start {program}")))?;
        let mut starting = Starting(Some(child));
        let connected = wait_for("QEMU to open its monitor", PATIENCE, || {
            if let Some(status) = starting.ended()? {
                return Err(Error::Gone(format!("{program} ended at its start with {status}")));
            }
            Ok(UnixStream::connect(folder.path().join(Self::QMP)).ok())
        });
        let qmp = connected.and_then(Qmp::new).map_err(|e| e.with(&last_words(folder.path())))?;
        let child = starting.0.take().ok_or_else(|| Error::Gone("the process was lost".into()))?;
        Ok(Self { child, qmp, series, folder })
    }

    /// The series of this QEMU: `7.2` or `10.0`.
    pub fn series(&self) -> &'static str {
        self.series
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A path in this machine's temporary folder, for sockets and files of the test.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs a QMP command and returns its result.
    ///
    /// # Errors
    ///
    /// When QEMU refuses it, has ended, or does not answer in time.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Error> {
        let outcome = self.qmp.execute(command, arguments);
        outcome.map_err(|error| self.explain(error))
    }

    /// Waits for a QMP event and drops the events before it.
    ///
    /// # Errors
    ///
    /// When it does not arrive in time, or QEMU has ended.
    pub fn wait_event(&mut self, name: &str, patience: Duration) -> Result<Value, Error> {
        let outcome = self.qmp.wait_event(name, patience);
        outcome.map_err(|error| self.explain(error))
    }

    /// Stops the guest.
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute).
    pub fn stop(&mut self) -> Result<(), Error> {
        self.execute("stop", json!({})).map(drop)
    }

    /// Starts or resumes the guest.
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute).
    pub fn cont(&mut self) -> Result<(), Error> {
        self.execute("cont", json!({})).map(drop)
    }

    /// The state of the guest, with QEMU's names: `running`, `paused`, `postmigrate`, …
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute).
    pub fn run_state(&mut self) -> Result<String, Error> {
        Ok(self.execute("query-status", json!({}))?["status"].as_str().unwrap_or_default().to_owned())
    }

    /// Reads `length` bytes of guest-physical memory. Stop the guest first if the bytes must be consistent.
    ///
    /// This is the processor's view: from 640 KiB to 1 MiB it may differ from RAM.
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute).
    pub fn pmemsave(&mut self, address: u64, length: u64) -> Result<Vec<u8>, Error> {
        let path = self.path("pmemsave");
        self.execute(
            "pmemsave",
            json!({ "val": address, "size": length, "filename": path.display().to_string() }),
        )?;
        let bytes = fs::read(&path).map_err(Error::system("what pmemsave wrote"))?;
        fs::remove_file(&path).map_err(Error::system("what pmemsave wrote"))?;
        Ok(bytes)
    }

    /// The guest's serial output, whole lines only.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn serial(&self) -> Result<Vec<Report>, Error> {
        let bytes = fs::read(self.path(Self::SERIAL)).map_err(Error::system("the serial line's file"))?;
        let text = String::from_utf8_lossy(&bytes);
        Ok(text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')).map(Report::parse).collect())
    }

    /// The last round that the guest has reported here.
    ///
    /// # Errors
    ///
    /// When the guest has found a wrong word; its line is in the text.
    pub fn round(&self) -> Result<Option<u32>, Error> {
        let mut last = None;
        for report in self.serial()? {
            match report {
                Report::Round(round) => last = Some(round),
                Report::Bad(line) => {
                    let text = format!("the guest on QEMU {} found a wrong word: {line}", self.series);
                    return Err(Error::Unmet(text));
                }
                Report::Other(_) => {}
            }
        }
        Ok(last)
    }

    /// Waits until the guest has done round `least`, and returns the round that it has done.
    ///
    /// # Errors
    ///
    /// When the guest finds a wrong word, does not get there in time, or QEMU has ended.
    pub fn wait_round(&mut self, least: u32, patience: Duration) -> Result<u32, Error> {
        let what = format!("round {least} of the guest on QEMU {}", self.series);
        wait_for(&what, patience, || {
            if let Some(status) = self.ended()? {
                return Err(Error::Gone(format!("QEMU {} ended with {status}", self.series)));
            }
            Ok(self.round()?.filter(|round| *round >= least))
        })
        .map_err(|error| self.explain(error))
    }

    /// The exit status of the process, if it has ended.
    ///
    /// # Errors
    ///
    /// When the system does not report it.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>, Error> {
        self.child.try_wait().map_err(Error::system("wait for QEMU"))
    }

    /// Waits for the process to end by itself.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub fn wait_end(&mut self, patience: Duration) -> Result<ExitStatus, Error> {
        wait_for("QEMU to end", patience, || self.ended()).map_err(|error| self.explain(error))
    }

    /// Asks QEMU to end, and waits for it.
    ///
    /// # Errors
    ///
    /// When it does not end.
    pub fn quit(mut self) -> Result<ExitStatus, Error> {
        self.execute("quit", json!({}))?;
        self.wait_end(PATIENCE)
    }

    /// Kills the process, as a power cut would.
    ///
    /// # Errors
    ///
    /// When the system refuses.
    pub fn kill(&mut self) -> Result<(), Error> {
        self.child.kill().and_then(|()| self.child.wait()).map(drop).map_err(Error::system("kill QEMU"))
    }

    /// QEMU's standard error.
    pub fn stderr(&self) -> String {
        fs::read_to_string(self.path(Self::STDERR)).unwrap_or_default()
    }

    /// Adds QEMU's own output to an error.
    pub(super) fn explain(&mut self, error: Error) -> Error {
        let end = match self.child.try_wait() {
            Ok(Some(status)) => format!("\nQEMU {} has ended with {status}", self.series),
            _ => String::new(),
        };
        error.with(&(end + &last_words(self.folder.path())))
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // If the process has ended by itself, there is nothing to kill.
        let _ = self.child.kill();
        let status = self.child.wait();
        if std::thread::panicking() {
            let words = last_words(self.folder.path());
            let text = format!("QEMU {} (process {}, {status:?}){words}\n", self.series, self.child.id());
            let _ = std::io::stderr().write_all(text.as_bytes());
        }
    }
}

/// A process whose monitor has not answered yet; killed when dropped.
struct Starting(Option<Child>);

impl Starting {
    fn ended(&mut self) -> Result<Option<ExitStatus>, Error> {
        self.0.as_mut().map_or(Ok(None), Child::try_wait).map_err(Error::system("wait for QEMU"))
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The ends of standard error and serial line, for the reader.
fn last_words(folder: &Path) -> String {
    let mut words = String::new();
    for name in [Vm::STDERR, Vm::SERIAL] {
        let text = fs::read(folder.join(name)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        for line in &lines[lines.len().saturating_sub(LAST_LINES)..] {
            words.push_str(&format!("\n  {name}: {line}"));
        }
    }
    words
}

const LAST_LINES: usize = 6;
