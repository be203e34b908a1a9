//! Converts an embedder's machine to the format: its block list, and its devices as one part.
//!
//! The input is the engine's description of a machine. The output is what a stream or a file contains.

use multifd::{
    live::{self, RunState},
    ram::{RamBlock, RamBlocks},
};

use crate::{
    error::Usage,
    format::{BlockEntry, BlockList, Device, DevicePart, SectionId, SectionName, limits, run_state},
};

/// The list of these blocks, in order.
pub(crate) fn list_of(blocks: &RamBlocks) -> Result<BlockList, Usage> {
    let entry = |block: &RamBlock| BlockEntry::new(block.name().clone(), block.used_length());
    BlockList::new(blocks.iter().map(|(_, block)| entry(block)).collect(), blocks.page_size())
}

/// The part with these devices and the guest's run state, numbered from the RAM section's number on.
pub(crate) fn devices_of(
    devices: Vec<live::DeviceSection>,
    guest: RunState,
    page_size: usize,
    ram: SectionId,
) -> Result<DevicePart, Usage> {
    let device = |device: live::DeviceSection| {
        let name = SectionName::from(&device.name);
        Ok(Device { name, instance: device.instance_id, version: device.version, state: device.data })
    };
    let devices = devices.into_iter().map(device);
    let devices: Vec<Device> =
        devices.chain([Ok(run_state::section(guest))]).collect::<Result<_, Usage>>()?;
    let page_size = u32::try_from(page_size).unwrap_or(u32::MAX);
    DevicePart::build(&devices, page_size, SectionId(ram.0.wrapping_add(1)))
}

/// Refuses devices that [`devices_of`] would refuse, or whose state is too large for a destination of this library,
/// before there is any state.
pub(crate) fn check_devices(
    devices: &[live::DeviceInfo],
    page_size: usize,
    ram: SectionId,
) -> Result<(), Usage> {
    let mut empty = Vec::new();
    let mut most: u64 = 0;
    for device in devices {
        if device.name.as_str() == run_state::NAME {
            let why = format!("{:?} is the section of the guest's run state", device.name);
            return Err(Usage::Value { what: "name of a device", why });
        }
        let (name, instance_id) = (device.name.clone(), device.instance_id);
        empty.push(live::DeviceSection { name, instance_id, version: 0, data: Vec::new() });
        most = most.saturating_add(device.most_bytes);
    }
    let rest = devices_of(empty, RunState::Running, page_size, ram)?.as_bytes().len() as u64;
    let (found, most) = (most.saturating_add(rest), limits::DEVICE_PART as u64 / 2);
    if found > most {
        let why = format!(
            "up to {found:#x} bytes with their heads and description, but a destination accepts at most \
                           {most:#x}"
        );
        return Err(Usage::Value { what: "state of all devices", why });
    }
    Ok(())
}
