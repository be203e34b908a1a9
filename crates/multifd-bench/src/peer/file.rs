//! A guest into a mapped-ram file, and out of it: QEMU alone, the engine alone, or QEMU with `multifd`.
//!
//! `multifd receive` ends when the file is on the disk; QEMU does not sync the file. So QEMU and the engine are
//! measured with an `fsync` afterwards and without one. A file that the engine has written is loaded and checked after
//! the measurement.

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
    cpu,
    engine::{EngineDestination, EngineSource},
    pair::{Destination, Source},
    qemu::{QemuDestination, QemuSource, check, completed, machine, prepare},
    warm::warm,
};
use crate::{
    Result,
    engine::{IntoFile, check_file},
};

/// `migrate file:` with mapped-ram and multifd.
pub(crate) struct QemuCapture {
    source: QemuSource<'static>,
    setting: Setting,
    path: PathBuf,
    into: IntoFile,
}

impl QemuCapture {
    pub(crate) fn new(qemu: &Qemu, setting: &Setting, folder: &Path, into: IntoFile) -> Self {
        let source = QemuSource::of_file(qemu, setting).direct_io(into.direct_io);
        Self { source, setting: *setting, path: folder.join("by-qemu"), into }
    }
}

impl Peer for QemuCapture {
    fn round(&mut self) -> Result<Sample> {
        self.source.ready()?;
        warm(&self.setting)?;
        let before = cpu(self.source.pid())?;
        let start = Instant::now();
        self.source.go(&self.setting, &format!("file:{}", self.path.display()))?;
        self.source.sent()?;
        if self.into.synced {
            File::open(&self.path)?.sync_all()?;
        }
        let seconds = start.elapsed().as_secs_f64();
        let used = cpu(self.source.pid())? - before;
        self.source.done();
        remove(&self.path)?;
        Ok(Sample { seconds, bytes: self.setting.ram, cpu: Some([used, 0.0]), ..Sample::default() })
    }
}

/// The engine's memory into a file.
pub(crate) struct EngineCapture {
    source: EngineSource<'static>,
    setting: Setting,
    path: PathBuf,
}

impl EngineCapture {
    pub(crate) fn new(program: &Path, setting: &Setting, folder: &Path, into: IntoFile) -> Result<Self> {
        let source = EngineSource::start(program, setting, None, None)?.into_file(into);
        Ok(Self { source, setting: *setting, path: folder.join("by-us") })
    }
}

impl Peer for EngineCapture {
    fn round(&mut self) -> Result<Sample> {
        self.source.ready()?;
        warm(&self.setting)?;
        let before = cpu(self.source.pid())?;
        let start = Instant::now();
        self.source.go(&self.setting, &self.path.display().to_string())?;
        self.source.sent()?;
        let seconds = start.elapsed().as_secs_f64();
        let used = cpu(self.source.pid())? - before;
        check_file(&self.path, self.setting.contents)?;
        remove(&self.path)?;
        Ok(Sample { seconds, bytes: self.setting.ram, cpu: Some([used, 0.0]), ..Sample::default() })
    }
}

/// A file into the engine's memory.
pub(crate) struct EngineRestore {
    pub(crate) program: PathBuf,
    pub(crate) setting: Setting,
    pub(crate) path: PathBuf,
}

impl Peer for EngineRestore {
    fn round(&mut self) -> Result<Sample> {
        let mut destination = EngineDestination::start_of_file(&self.program, &self.setting, &self.path)?;
        warm(&self.setting)?;
        let before = cpu(destination.pid())?;
        let start = Instant::now();
        destination.go()?;
        destination.loaded()?;
        let seconds = start.elapsed().as_secs_f64();
        let used = cpu(destination.pid())? - before;
        destination.beyond()?;
        destination.check()?;
        Ok(Sample { seconds, bytes: self.setting.ram, cpu: Some([0.0, used]), ..Sample::default() })
    }
}

/// QEMU into `multifd receive`.
pub(crate) struct OurCapture {
    source: QemuSource<'static>,
    setting: Setting,
    program: PathBuf,
    path: PathBuf,
    listen: String,
}

impl OurCapture {
    /// Over TCP.
    pub(crate) fn new(qemu: &Qemu, setting: &Setting, folder: &Path, program: PathBuf) -> Self {
        let source = QemuSource::new(qemu, setting, None);
        let listen = "tcp:127.0.0.1:0".into();
        Self { source, setting: *setting, program, path: folder.join("by-multifd"), listen }
    }

    /// The same over a unix socket.
    pub(crate) fn over_unix(self, folder: &Path) -> Self {
        Self { listen: format!("unix:{}", folder.join("socket").display()), ..self }
    }
}

impl Peer for OurCapture {
    fn round(&mut self) -> Result<Sample> {
        self.source.ready()?;
        let mut command = Command::new("sh");
        // The first line of its standard error is its address.
        command
            .args(["-c", "exec \"$0\" receive \"$1\" \"$2\" 2>&1"])
            .arg(&self.program)
            .arg(&self.listen)
            .arg(&self.path);
        let mut receive = Talker::start(&mut command)?;
        let line = receive.hear()?;
        let address = line
            .strip_prefix("listening on ")
            .ok_or_else(|| format!("expected an address, found {line:?}"))?;
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
        let before = cpu(vm.pid())?;
        let start = Instant::now();
        vm.migrate_incoming(&format!("file:{}", self.path.display()))?;
        completed(&mut vm)?;
        let seconds = start.elapsed().as_secs_f64();
        let used = cpu(vm.pid())? - before;
        check(&mut vm, &self.setting)?;
        Ok(Sample { seconds, bytes: self.setting.ram, cpu: Some([0.0, used]), ..Sample::default() })
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
