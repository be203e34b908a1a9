//! A guest into a mapped-ram file, and out of it: QEMU by itself, or with `multifd` beside it.
//!
//! `multifd receive` ends when the file is on the disk; QEMU leaves that to whoever cares. So QEMU is measured alone, and
//! with an `fsync` behind it.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use multifd_testkit::qemu::Qemu;

use super::{
    Peer, Sample, Setting,
    child::Talker,
    pair::{Destination, Source},
    qemu::{QemuDestination, QemuSource, check, completed, machine, prepare},
    warm::warm,
};
use crate::Result;

/// `migrate file:` with mapped-ram and multifd.
pub(crate) struct QemuCapture {
    source: QemuSource<'static>,
    setting: Setting,
    path: PathBuf,
    sync: bool,
}

impl QemuCapture {
    pub(crate) fn new(qemu: &Qemu, setting: &Setting, folder: &Path, sync: bool) -> Self {
        let source = QemuSource::of_file(qemu, setting);
        let path = folder.join(if sync { "by-qemu-synced" } else { "by-qemu" });
        Self { source, setting: *setting, path, sync }
    }
}

impl Peer for QemuCapture {
    fn round(&mut self) -> Result<Sample> {
        self.source.ready()?;
        warm(&self.setting)?;
        let start = Instant::now();
        self.source.go(&self.setting, &format!("file:{}", self.path.display()))?;
        self.source.sent()?;
        if self.sync {
            File::open(&self.path)?.sync_all()?;
        }
        let seconds = start.elapsed().as_secs_f64();
        self.source.done();
        remove(&self.path)?;
        Ok(Sample { seconds, bytes: self.setting.ram, ..Sample::default() })
    }
}

/// QEMU into `multifd receive`.
pub(crate) struct OurCapture {
    source: QemuSource<'static>,
    setting: Setting,
    program: PathBuf,
    path: PathBuf,
}

impl OurCapture {
    pub(crate) fn new(qemu: &Qemu, setting: &Setting, folder: &Path, program: PathBuf) -> Self {
        let source = QemuSource::new(qemu, setting, None);
        Self { source, setting: *setting, program, path: folder.join("by-multifd") }
    }
}

impl Peer for OurCapture {
    fn round(&mut self) -> Result<Sample> {
        self.source.ready()?;
        let mut command = Command::new("sh");
        // Its first line of standard error is where it listens.
        command
            .args(["-c", "exec \"$0\" receive tcp:127.0.0.1:0 \"$1\" 2>&1"])
            .arg(&self.program)
            .arg(&self.path);
        let mut receive = Talker::start(&mut command)?;
        let line = receive.hear()?;
        let address =
            line.strip_prefix("listening on ").ok_or_else(|| format!("expected an address, met {line:?}"))?;
        warm(&self.setting)?;
        let start = Instant::now();
        self.source.go(&self.setting, address)?;
        receive.end()?;
        let seconds = start.elapsed().as_secs_f64();
        let (wire, _) = self.source.sent()?;
        self.source.done();
        remove(&self.path)?;
        Ok(Sample { seconds, bytes: self.setting.ram, wire: Some(wire), ..Sample::default() })
    }
}

/// `-incoming file:` with mapped-ram and multifd.
pub(crate) struct QemuRestore {
    pub(crate) qemu: Qemu,
    pub(crate) setting: Setting,
    pub(crate) path: PathBuf,
}

impl Peer for QemuRestore {
    fn round(&mut self) -> Result<Sample> {
        let mut vm = machine(&self.qemu, &self.setting, None).incoming().start()?;
        prepare(&mut vm, &self.setting)?;
        vm.set_capabilities(&[("mapped-ram", true)])?;
        warm(&self.setting)?;
        let start = Instant::now();
        vm.migrate_incoming(&format!("file:{}", self.path.display()))?;
        completed(&mut vm)?;
        let seconds = start.elapsed().as_secs_f64();
        check(&mut vm, &self.setting)?;
        Ok(Sample { seconds, bytes: self.setting.ram, ..Sample::default() })
    }
}

/// `multifd send` into a QEMU.
pub(crate) struct OurRestore {
    pub(crate) qemu: Qemu,
    pub(crate) setting: Setting,
    pub(crate) path: PathBuf,
    pub(crate) program: PathBuf,
}

impl Peer for OurRestore {
    fn round(&mut self) -> Result<Sample> {
        let mut destination = QemuDestination::start(&self.qemu, &self.setting, None)?;
        warm(&self.setting)?;
        let start = Instant::now();
        let mut send = Command::new(&self.program);
        send.args(["send", "--quiet", &format!("--multifd-channels={}", self.setting.channels)]);
        let send = Talker::start(send.arg(&self.path).arg(destination.address()))?;
        destination.loaded()?;
        let seconds = start.elapsed().as_secs_f64();
        send.end()?;
        destination.check()?;
        Ok(Sample { seconds, bytes: self.setting.ram, ..Sample::default() })
    }
}

fn remove(path: &Path) -> Result<()> {
    Ok(std::fs::remove_file(path)?)
}
