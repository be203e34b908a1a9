use std::{
    error::Error as StdError,
    fs::{self, File},
    path::Path,
    sync::Arc,
};

use multifd::{
    SendOptions, Sender,
    channel::Stop,
    live::{MigrateOptions, Migration},
    ram::{Mapping, Memory, RamBlock, RamBlocks},
};
use qemu_stream::{
    format::{BlockEntry, Configuration, MachineType},
    mapped_ram::{Capture, CaptureOptions, MappedRamFile, Restore},
};

use crate::machine::Machine;

type Result<T> = std::result::Result<T, Box<dyn StdError + Send + Sync>>;

/// Saves the machine to a file. The guest runs meanwhile and is stopped when this returns `Ok`: resume it, or drop it.
pub fn save(machine: &mut Machine, path: &Path, stop: &Stop) -> Result<()> {
    // 1. A file with a temporary name until it is complete.
    let unfinished = path.with_extension("unfinished");
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&unfinished)?;
    let configuration = Configuration::new(MachineType::new("my-vmm-1")?);
    let options = CaptureOptions::new().durable(true); // on the disk when it is complete
    let blocks = machine.blocks.clone();
    let mut capture = Capture::of_guest(file, configuration, &blocks, &options)?;

    // 2. The channels. They have no peer: they copy.
    let mut sender = Sender::new(SendOptions::new().channels(4), blocks, stop.clone())?;
    sender.set_up_into(capture.blocks().clone())?;

    // 3. Like a migration, with the file instead of the main connection.
    let mut log = machine.writes.reader()?;
    Migration::new(MigrateOptions::new(), sender)?.run(&mut capture, &mut log, machine)?;

    // 4. The final name. The entry in the folder must be on the disk, too.
    fs::rename(unfinished, path)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok(File::open(folder)?.sync_all()?)
}

/// Restores the machine from a file. It does not run yet.
pub fn load(path: &Path, stop: &Stop) -> Result<Machine> {
    let file = MappedRamFile::open(File::open(path)?, 0)?; // everything but the pages is checked
    let list = file.blocks();
    let block = |entry: &BlockEntry| -> Result<RamBlock> {
        let memory = Memory::Mapped(Mapping::anonymous(entry.used_length)?);
        Ok(RamBlock::new(entry.name.clone(), entry.used_length, list.page_size(), memory)?)
    };
    let blocks = Arc::new(RamBlocks::new(list.entries().iter().map(block).collect::<Result<_>>()?)?);
    Restore::new(&file).channels(4).run(&blocks, stop)?;

    let counter = file.devices().find("counter", 0).filter(|(section, _)| section.version == 1);
    let (_, state) = counter.ok_or("expected a counter of version 1")?;
    let count = u64::from_be_bytes(state.try_into()?);
    Ok(Machine::new(blocks, count))
}
