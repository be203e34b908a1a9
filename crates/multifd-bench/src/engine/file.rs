//! The engine between memory and a mapped-ram file, without a peer.

use std::{
    fs::{File, OpenOptions},
    path::Path,
    sync::Arc,
};

use multifd::{
    SendOptions, Sender,
    channel::Stop,
    live::{Main, Migration},
    ram::{NeverDirty, RamBlocks},
};
use qemu_stream::{
    format::{Configuration, MachineType},
    mapped_ram::{Capture, CaptureOptions, MappedRamFile, Restore},
};

use super::{
    IntoFile, Sent,
    beyond::peak_beyond,
    blocks::wrong,
    one_pass::{Stopped, one_pass},
};
use crate::{Result, contents::Contents};

/// Captures RAM into a new file.
pub(super) fn capture(path: &str, into: IntoFile, channels: u8, blocks: &Arc<RamBlocks>) -> Result<Sent> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
    let configuration = Configuration::new(MachineType::new("multifd-bench")?);
    let options = CaptureOptions::new().direct_io(into.direct_io).durable(into.synced);
    let mut capture = Capture::of_guest(file, configuration, blocks, &options)?;
    let stop = Stop::new();
    let mut sender = Sender::new(SendOptions::new().channels(channels), blocks.clone(), stop.clone())?;
    sender.set_up_into(capture.blocks().clone())?;
    into_file(sender, &mut capture, blocks)
}

/// Sends all of RAM into the sender's file.
fn into_file(sender: Sender, main: &mut dyn Main, blocks: &Arc<RamBlocks>) -> Result<Sent> {
    let migration = Migration::new(one_pass(), sender)?;
    let info = migration.run(main, &mut NeverDirty, &mut Stopped)?;
    Ok(Sent { transferred: info.ram.transferred, beyond: peak_beyond(blocks)? })
}

/// The machine in a file, in fresh memory.
pub(super) fn restore(path: &Path, channels: u8) -> Result<Arc<RamBlocks>> {
    let machine = MappedRamFile::open(File::open(path)?, 0)?;
    let blocks = Arc::new(machine.blocks().in_new_memory()?);
    Restore::new(&machine).channels(channels).run(&blocks, &Stop::new())?;
    Ok(blocks)
}

/// Fails unless the machine in the file has the expected RAM.
pub(crate) fn check_file(path: &Path, contents: Contents) -> Result<()> {
    match wrong(&*restore(path, 2)?, contents)? {
        None => Ok(()),
        Some(page) => Err(format!("page {page} in the file is wrong").into()),
    }
}
