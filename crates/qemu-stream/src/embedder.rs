//! An embedder's machine in the words of the format: its block list, and its devices as one part.
//!
//! In comes what the engine knows of a machine, out goes what a stream or a file says of it.

use multifd::{
    live,
    ram::{RamBlock, RamBlocks},
};

use crate::{
    error::CallerMistake,
    format::{BlockEntry, BlockList, Device, DevicePart, SectionId, SectionName},
};

/// The list of these blocks, in their order.
pub(crate) fn list_of(blocks: &RamBlocks) -> Result<BlockList, CallerMistake> {
    let entry = |block: &RamBlock| BlockEntry::new(block.name().clone(), block.used_length());
    BlockList::new(blocks.iter().map(|(_, block)| entry(block)).collect(), blocks.page_size())
}

/// The part of these devices, numbered from the RAM section's number on.
pub(crate) fn devices_of(
    devices: Vec<live::DeviceSection>,
    page_size: usize,
    ram: SectionId,
) -> Result<DevicePart, CallerMistake> {
    let device = |device: live::DeviceSection| {
        let name = SectionName::new(&device.name).ok_or_else(|| CallerMistake::Value {
            what: "name of a device",
            why: format!("{:?} has not 1 to 255 bytes without NUL", device.name),
        })?;
        Ok(Device { name, instance: device.instance_id, version: device.version, state: device.data })
    };
    let devices: Vec<Device> = devices.into_iter().map(device).collect::<Result<_, CallerMistake>>()?;
    let page_size = u32::try_from(page_size).unwrap_or(u32::MAX);
    DevicePart::build(&devices, page_size, SectionId(ram.0.wrapping_add(1)))
}
