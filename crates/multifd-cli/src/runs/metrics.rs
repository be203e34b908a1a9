//! The file of `--metrics`: written at the start, every few seconds, and at the end.
//!
//! A thread writes it, so a slow file system does not delay the migration. It ends when its handle is dropped. A file that
//! cannot be written at the start is an error; later it is a warning, because the guest matters more.

use std::{
    fs::{self, Permissions},
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread::{Builder, JoinHandle},
    time::Duration,
};

use super::{observed::Observed, page};
use crate::output::{outcome::While, outlet::shown};

/// Writes the metrics until its end.
pub(super) struct Metrics {
    file: Arc<Target>,
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Where the metrics of a run go.
struct Target {
    path: PathBuf,
    run: Arc<Observed>,
}

impl Metrics {
    /// Writes the first metrics of `run` to the file at `path`, and others in each period.
    ///
    /// # Errors
    /// If the file cannot be written, or the system cannot start a thread.
    pub(super) fn start(path: &Path, run: &Arc<Observed>) -> Result<Self, While> {
        let file = Arc::new(Target { path: path.to_owned(), run: run.clone() });
        let failed = |error: io::Error| While::new(file.unwritten(), error);
        file.write().map_err(failed)?;
        let (end, ended) = channel();
        let thread = Builder::new().name("metrics".into()).spawn({
            let file = file.clone();
            move || file.write_until(&ended)
        });
        let thread = Some(thread.map_err(failed)?);
        Ok(Self { file, end: Some(end), thread })
    }

    /// Writes the last metrics.
    pub(super) fn end(mut self) {
        self.stop();
        self.file.write_or_warn();
    }

    fn stop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Metrics {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Target {
    /// Nothing is ever sent: the wait ends when the other end is dropped.
    fn write_until(&self, ended: &Receiver<()>) {
        while ended.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
            if !self.write_or_warn() {
                return;
            }
        }
    }

    fn write_or_warn(&self) -> bool {
        let written = self.write();
        if let Err(error) = &written {
            tracing::warn!(%error, "{}", self.unwritten());
        }
        written.is_ok()
    }

    fn unwritten(&self) -> String {
        format!("cannot write the metrics to {}", shown(&self.path))
    }

    /// Replaces the file in one step. A collector usually runs as another user, so everybody can read it. It is not made
    /// durable, because the numbers of a machine that has crashed are of no use.
    fn write(&self) -> io::Result<()> {
        if fs::metadata(&self.path).is_ok_and(|found| !found.is_file()) {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "it is not a regular file"));
        }
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let mut prefix = std::ffi::OsString::from(".");
        prefix.push(self.path.file_name().unwrap_or_default());
        let mut new = tempfile::Builder::new()
            .prefix(&prefix)
            // A collector takes files that end in .prom.
            .suffix(".new")
            .permissions(Permissions::from_mode(READABLE))
            .tempfile_in(folder.unwrap_or(Path::new(".")))?;
        new.write_all(page::of(&self.run).as_bytes())?;
        new.persist(&self.path)?;
        Ok(())
    }
}

const EVERY: Duration = Duration::from_secs(5);
const READABLE: u32 = 0o644;
