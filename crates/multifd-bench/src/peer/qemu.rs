//! QEMU 10.0 as either end: a stopped guest whose RAM is filled from outside, through its process's memory.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::FileExt,
    path::Path,
    time::Duration,
};

use multifd_testkit::qemu::{Qemu, Vm, VmBuilder};
use serde_json::{Value, json};

use super::{
    Setting,
    pair::{Destination, Source},
};
use crate::{
    Result,
    contents::{Contents, PAGE},
};

/// A machine for this setting. It never runs.
pub(crate) fn machine(qemu: &Qemu, setting: &Setting, tls: Option<(&Path, &str)>) -> VmBuilder {
    let builder = qemu.vm().memory(setting.ram).paused();
    match tls {
        Some((folder, endpoint)) if setting.tls => builder.arg("-object").arg(format!(
            "tls-creds-x509,id=tls0,dir={},endpoint={endpoint},verify-peer=on",
            folder.display()
        )),
        _ => builder,
    }
}

/// Sets the capabilities and parameters that both ends need.
pub(crate) fn prepare(vm: &mut Vm, setting: &Setting) -> Result<()> {
    vm.set_capabilities(&[("multifd", true), ("events", true)])?;
    let mut parameters = json!({
        "multifd-channels": setting.channels,
        "multifd-compression": setting.method,
        "multifd-zlib-level": 1,
        "multifd-zstd-level": 1,
    });
    if setting.tls {
        parameters["tls-creds"] = json!("tls0");
    }
    Ok(vm.set_parameters(parameters)?)
}

/// Removes the limits of bandwidth and downtime, so that the migration takes one pass.
pub(crate) fn unlimited(vm: &mut Vm) -> Result<()> {
    Ok(vm.set_parameters(json!({ "max-bandwidth": 0, "downtime-limit": 2_000_000 }))?)
}

/// Waits for the event that the migration has completed.
pub(crate) fn completed(vm: &mut Vm) -> Result<()> {
    loop {
        let event = vm.wait_event("MIGRATION", PATIENCE)?;
        match event["data"]["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("failed" | "cancelled") => {
                let why = vm
                    .query_migrate()
                    .map_or_else(|error| error.to_string(), |told| told["error-desc"].to_string());
                return Err(format!("QEMU's migration failed: {why} {}", vm.stderr().trim()).into());
            }
            _ => {}
        }
    }
}

/// Fills the guest's RAM.
pub(crate) fn fill(vm: &mut Vm, setting: &Setting) -> Result<()> {
    if setting.contents == Contents::Untouched {
        return Ok(());
    }
    each_piece(vm, setting, true, |memory, first, at, bytes| {
        setting.contents.fill(first, bytes);
        Ok(memory.write_all_at(bytes, at)?)
    })
}

/// Fails unless RAM has the expected contents.
pub(crate) fn check(vm: &mut Vm, setting: &Setting) -> Result<()> {
    each_piece(vm, setting, false, |memory, first, at, bytes| {
        memory.read_exact_at(bytes, at)?;
        match setting.contents.wrong(first, bytes) {
            None => Ok(()),
            Some(page) => Err(format!("page {page} of {} is wrong", vm_name()).into()),
        }
    })
}

fn vm_name() -> &'static str {
    "QEMU's RAM"
}

fn each_piece(
    vm: &mut Vm,
    setting: &Setting,
    write: bool,
    mut with: impl FnMut(&File, u64, u64, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let memory = OpenOptions::new().read(true).write(write).open(format!("/proc/{}/mem", vm.pid()))?;
    let base = address(vm)?;
    let mut bytes = vec![0; PIECE];
    let (mut at, end) = (0, setting.ram);
    while at < end {
        let piece = &mut bytes[..usize::try_from(end - at)?.min(PIECE)];
        with(&memory, at / PAGE as u64, base + at, piece)?;
        at += piece.len() as u64;
    }
    Ok(())
}

/// The address of the guest's RAM in QEMU's address space. It is one block, although the guest sees it as two ranges.
fn address(vm: &mut Vm) -> Result<u64> {
    let told = vm.execute("human-monitor-command", json!({ "command-line": "gpa2hva 0" }))?;
    let text = told.as_str().unwrap_or_default();
    let number = text.rsplit_once("is 0x").map(|(_, number)| number.trim());
    let number = number.ok_or_else(|| format!("expected an address, found {told}"))?;
    Ok(u64::from_str_radix(number, 16)?)
}

/// A QEMU does not migrate a second time, so there is a new one for each round.
pub(crate) struct QemuSource<'a> {
    qemu: Qemu,
    setting: Setting,
    tls: Option<&'a Path>,
    capabilities: &'static [(&'static str, bool)],
    direct_io: bool,
    vm: Option<Vm>,
}

impl<'a> QemuSource<'a> {
    pub(crate) fn new(qemu: &Qemu, setting: &Setting, tls: Option<&'a Path>) -> Self {
        let capabilities = &[("return-path", true)];
        Self { qemu: qemu.clone(), setting: *setting, tls, capabilities, direct_io: false, vm: None }
    }

    /// One that writes mapped-ram files.
    pub(crate) fn of_file(qemu: &Qemu, setting: &Setting) -> Self {
        Self { capabilities: &[("mapped-ram", true)], ..Self::new(qemu, setting, None) }
    }

    /// Sets direct I/O.
    pub(crate) fn direct_io(self, on: bool) -> Self {
        Self { direct_io: on, ..self }
    }

    fn vm(&mut self) -> Result<&mut Vm> {
        Ok(self.vm.as_mut().ok_or("the source is not ready")?)
    }
}

impl Source for QemuSource<'_> {
    fn ready(&mut self) -> Result<()> {
        self.vm = None;
        let setting = self.setting;
        let mut vm = machine(&self.qemu, &setting, self.tls.map(|folder| (folder, "client"))).start()?;
        prepare(&mut vm, &setting)?;
        vm.set_capabilities(self.capabilities)?;
        unlimited(&mut vm)?;
        if setting.tls {
            vm.set_parameters(json!({ "tls-hostname": "localhost" }))?;
        }
        if self.direct_io {
            vm.set_parameters(json!({ "direct-io": true }))?;
        }
        fill(&mut vm, &setting)?;
        self.vm = Some(vm);
        Ok(())
    }

    fn go(&mut self, _: &Setting, address: &str) -> Result<()> {
        Ok(self.vm()?.migrate(address)?)
    }

    fn sent(&mut self) -> Result<(u64, Option<u64>)> {
        let vm = self.vm()?;
        completed(vm)?;
        let told: Value = vm.query_migrate()?;
        let transferred = told["ram"]["transferred"].as_u64();
        Ok((transferred.ok_or("QEMU does not report the transferred bytes")?, None))
    }

    fn pid(&self) -> u32 {
        self.vm.as_ref().map_or(0, Vm::pid)
    }

    fn done(&mut self) {
        self.vm = None;
    }
}

pub(crate) struct QemuDestination {
    vm: Vm,
    address: String,
    setting: Setting,
}

impl QemuDestination {
    pub(crate) fn start(qemu: &Qemu, setting: &Setting, tls: Option<&Path>) -> Result<Self> {
        let mut vm = machine(qemu, setting, tls.map(|folder| (folder, "server"))).incoming().start()?;
        prepare(&mut vm, setting)?;
        vm.set_capabilities(&[("return-path", true)])?;
        let address = vm.migrate_incoming("tcp:127.0.0.1:0")?;
        Ok(Self { vm, address, setting: *setting })
    }
}

impl Destination for QemuDestination {
    fn address(&self) -> String {
        self.address.clone()
    }

    fn loaded(&mut self) -> Result<()> {
        completed(&mut self.vm)
    }

    fn beyond(&mut self) -> Result<Option<u64>> {
        Ok(None)
    }

    fn pid(&self) -> u32 {
        self.vm.pid()
    }

    fn check(&mut self) -> Result<()> {
        check(&mut self.vm, &self.setting)
    }
}

/// Bytes read or written at once.
const PIECE: usize = 1 << 20;
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
