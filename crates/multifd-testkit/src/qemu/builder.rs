//! The command line of a machine.
//!
//! Two machines that are described with the same calls can be source and destination of a migration: they have the same
//! firmware, the same devices, the same RAM blocks.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::Command;

use super::{Error, Qemu, Vm};
use crate::guest::Guest;

/// A machine to be started: QEMU's own machine type, 96 MiB, one processor, no devices except a serial line.
#[derive(Debug, Clone)]
#[must_use]
pub struct VmBuilder {
    qemu: Qemu,
    machine: String,
    memory: u64,
    guest: Option<Guest>,
    arguments: Vec<OsString>,
    launcher: Vec<String>,
}

impl Qemu {
    /// Describes a machine on this QEMU.
    pub fn vm(&self) -> VmBuilder {
        VmBuilder::new(self.clone())
    }
}

impl VmBuilder {
    fn new(qemu: Qemu) -> Self {
        let machine = qemu.machine();
        Self { qemu, machine, memory: 96 << 20, guest: None, arguments: Vec::new(), launcher: Vec::new() }
    }

    /// Sets the machine type, including options after a comma; `pc-q35-7.2` runs on both QEMUs.
    pub fn machine(mut self, machine: &str) -> Self {
        self.machine = machine.to_owned();
        self
    }

    /// Sets RAM in bytes; rounded up to whole mebibytes.
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory = bytes;
        self
    }

    /// Sets the guest to boot. Source and destination need the same one, because its image is a RAM block.
    pub fn guest(mut self, guest: &Guest) -> Self {
        self.guest = Some(guest.clone());
        self
    }

    /// Starts it by another program, such as on a [host](crate::rough_network::Host), which must become QEMU's process.
    pub fn launcher(mut self, launcher: impl IntoIterator<Item = String>) -> Self {
        self.launcher = launcher.into_iter().collect();
        self
    }

    /// Makes the machine wait for a migration; [`Vm::migrate_incoming`] sets the address later.
    pub fn incoming(self) -> Self {
        self.args(["-incoming", "defer"])
    }

    /// Does not let the guest run before [`Vm::cont`]; as destination, not after the migration either.
    pub fn paused(self) -> Self {
        self.arg("-S")
    }

    /// Sets the machine's UUID, which multifd channels send.
    pub fn uuid(self, uuid: &str) -> Self {
        self.args(["-uuid", uuid])
    }

    /// Adds an argument, unchanged.
    pub fn arg(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Adds arguments, unchanged.
    pub fn args<A: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Starts it, and waits until its monitor answers.
    ///
    /// # Errors
    ///
    /// When the process cannot be started or ends at once; its standard error is in the text.
    pub fn start(self) -> Result<Vm, Error> {
        if let Some(guest) = &self.guest
            && guest.least_memory() > self.memory
        {
            let (need, have) = (guest.least_memory(), self.memory);
            return Err(Error::Unmet(format!(
                "expected RAM of {need:#x} bytes for the guest, found {have:#x}"
            )));
        }
        let folder = tempfile::Builder::new()
            .prefix("multifd-vm-")
            .tempdir()
            .map_err(Error::system("cannot make a temporary folder"))?;
        let command = self.command(folder.path())?;
        Vm::start(command, folder, self.qemu.series())
    }

    fn command(&self, folder: &Path) -> Result<Command, Error> {
        let path = |name: &str| folder.join(name).display().to_string();
        let mut command = match self.launcher.split_first() {
            Some((launcher, words)) => {
                let mut command = Command::new(launcher);
                command.args(words).arg(self.qemu.program());
                command
            }
            None => Command::new(self.qemu.program()),
        };
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]);
        command.arg("-machine").arg(&self.machine);
        command.arg("-m").arg(format!("{}M", self.memory.div_ceil(1 << 20)));
        command.arg("-chardev").arg(format!("socket,id=qmp,path={},server=on,wait=off", path(Vm::QMP)));
        command.args(["-mon", "chardev=qmp,mode=control"]);
        command.arg("-chardev").arg(format!("file,id=serial,path={}", path(Vm::SERIAL)));
        command.args(["-serial", "chardev:serial"]);
        if let Some(guest) = &self.guest {
            fs::write(folder.join(KERNEL), guest.image())
                .map_err(Error::system("cannot write the guest's image"))?;
            command.arg("-kernel").arg(path(KERNEL));
        }
        command.args(&self.arguments);
        Ok(command)
    }
}

const KERNEL: &str = "guest.bin";
