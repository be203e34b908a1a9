//! What a QEMU's machine is, and how it differs from the one in a file.

use std::collections::BTreeSet;

use indicatif::BinaryBytes;
use multifd::wire::VmUuid;
use qemu_stream::mapped_ram::StoredMachine;
use serde_json::{Value, json};

use super::connection::{Qmp, QmpError};

/// What a QEMU reports about its machine.
#[derive(Debug)]
pub(crate) struct Machine {
    /// The concrete type, such as pc-q35-10.0.
    machine_type: Option<String>,
    /// The UUID; nil without `-uuid`.
    pub(crate) uuid: VmUuid,
    pub(crate) processors: Option<usize>,
    /// The name (`-name`).
    pub(crate) name: Option<String>,
    /// The PCI devices on the first bus, by slot and function.
    devices: Option<BTreeSet<(u64, u64)>>,
    /// RAM in bytes, of `-m`.
    ram: Option<u64>,
}

impl Machine {
    /// Asks a QEMU. What it does not report, because it is too old or has no PCI, is not compared.
    ///
    /// # Errors
    /// If the connection ended.
    pub(crate) fn of(qmp: &mut Qmp) -> Result<Self, QmpError> {
        let mut ask = |command: &str, arguments: Value| match qmp.execute(command, arguments) {
            Ok(told) => Ok(Some(told)),
            Err(QmpError::Refused { .. }) => Ok(None),
            Err(error) => Err(error),
        };
        let kind = ask("qom-get", json!({ "path": "/machine", "property": "type" }))?;
        let uuid = ask("query-uuid", json!({}))?;
        let uuid = uuid.as_ref().and_then(|told| told.get("UUID")?.as_str()?.parse().ok());
        let name = ask("query-name", json!({}))?;
        let ram = ask("query-memory-size-summary", json!({}))?;
        let part = |name: &str| ram.as_ref()?.get(name)?.as_u64();
        Ok(Self {
            machine_type: kind.as_ref().and_then(Value::as_str).map(|kind| {
                match kind.strip_suffix("-machine") {
                    Some(kind) => kind.to_owned(),
                    None => kind.to_owned(),
                }
            }),
            uuid: uuid.unwrap_or(VmUuid::NIL),
            processors: ask("query-cpus-fast", json!({}))?.as_ref().and_then(Value::as_array).map(Vec::len),
            name: name.as_ref().and_then(|told| Some(told.get("name")?.as_str()?.to_owned())),
            devices: ask("query-pci", json!({}))?.as_ref().and_then(on_first_bus),
            ram: part("base-memory").map(|base| base + part("plugged-memory").unwrap_or(0)),
        })
    }

    /// What differs from the machine in the file, one text for each difference; empty if nothing is known to differ.
    pub(crate) fn differences(&self, file: &StoredMachine) -> Vec<String> {
        let mut found = Vec::new();
        let stored = file.configuration().map(|configuration| configuration.machine.to_string());
        if let (Some(here), Some(there)) = (&stored, &self.machine_type)
            && here != there
        {
            found.push(format!("machine type: {here} in the file, {there} in QEMU (-machine)"));
        }
        let ram = file.blocks().iter().find(|(_, entry)| MAIN_RAM.contains(&entry.name.to_string().as_str()));
        if let (Some((_, entry)), Some(there)) = (ram, self.ram)
            && entry.used_length != there
        {
            let (here, there) = (BinaryBytes(entry.used_length), BinaryBytes(there));
            found.push(format!("RAM: {here} in the file, {there} in QEMU (-m)"));
        }
        let sections = file.devices().sections();
        let processors = sections.iter().filter(|device| device.name.to_string() == "cpu_common").count();
        if let Some(there) = self.processors
            && processors > 0
            && processors != there
        {
            found.push(format!("processors: {processors} in the file, {there} in QEMU (-smp)"));
        }
        if let Some(there) = &self.devices {
            let mut seen = BTreeSet::new();
            for device in sections {
                if let Some(place) = place(&device.name.to_string())
                    && !there.contains(&place)
                    && seen.insert(place)
                {
                    found.push(format!("device {} is in the file and not in QEMU (-device)", device.name));
                }
            }
        }
        found
    }
}

/// The places of the devices on the first bus.
fn on_first_bus(told: &Value) -> Option<BTreeSet<(u64, u64)>> {
    let buses = told.as_array()?;
    let first = buses.iter().find(|bus| bus.get("bus").and_then(Value::as_u64) == Some(0))?;
    let devices = first.get("devices")?.as_array()?;
    Some(
        devices
            .iter()
            .filter_map(|d| Some((d.get("slot")?.as_u64()?, d.get("function")?.as_u64()?)))
            .collect(),
    )
}

/// The place of a device on the first bus, from the name of its section: `0000:00:05.0/virtio-net`.
fn place(name: &str) -> Option<(u64, u64)> {
    let (place, _) = name.strip_prefix("0000:00:")?.split_once('/')?;
    // A device behind a bridge has further parts.
    let (slot, function) = place.split_once('.')?;
    Some((u64::from_str_radix(slot, 16).ok()?, function.parse().ok()?))
}

/// The block of `-m` without a memory backend of the user's, on the machines that this project tests.
const MAIN_RAM: [&str; 6] =
    ["pc.ram", "mach-virt.ram", "s390.ram", "ppc_spapr.ram", "riscv_virt_board.ram", "loongarch.ram"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn place_of_a_device_is_read_from_its_name_and_only_on_the_first_bus() {
        assert_eq!(place("0000:00:1f.2/ich9_ahci"), Some((0x1f, 2)));
        for other in ["0000:00:02.0:00.0/virtio-net", "0000:01:02.0/e1000", "ram", "0000:00:zz.0/e1000"] {
            assert_eq!(place(other), None, "{other}");
        }
    }
}
