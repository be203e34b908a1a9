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

/// Keeps the machine in a file. Its guest runs meanwhile, and stands when this returns `Ok`: let it run on, or drop it.
pub fn save(machine: &mut Machine, path: &Path, stop: &Stop) -> Result<()> {
    // 1. A file that has another name until it is whole.
    let unfinished = path.with_extension("unfinished");
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&unfinished)?;
    let configuration = Configuration::new(MachineType::new("my-vmm-1")?);
    let options = CaptureOptions::new().durable(true); // on the disk when all is done
    let blocks = machine.blocks.clone();
    let mut capture = Capture::of_guest(file, configuration, &blocks, &options)?;

    // 2. The channels, which have nobody to connect to: they copy.
    let mut sender = Sender::new(SendOptions::new().channels(4), blocks, stop.clone())?;
    sender.set_up_into(capture.blocks().clone())?;

    // 3. As a migration: the file in the place of main.
    let mut log = machine.writes.reader()?;
    Migration::new(MigrateOptions::new(), sender)?.run(&mut capture, &mut log, machine)?;

    // 4. The name, and its entry in the folder, which has to get to the disk as the file has.
    fs::rename(unfinished, path)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok(File::open(folder)?.sync_all()?)
}

/// The machine in a file. It does not run yet.
pub fn load(path: &Path, stop: &Stop) -> Result<Machine> {
    let file = MappedRamFile::open(File::open(path)?, 0)?; // checked, but for its pages
    let list = file.blocks();
    let block = |entry: &BlockEntry| -> Result<RamBlock> {
        let memory = Memory::Mapped(Mapping::anonymous(entry.used_length)?);
        Ok(RamBlock::new(entry.name.clone(), entry.used_length, list.page_size(), memory)?)
    };
    let blocks = Arc::new(RamBlocks::new(list.entries().iter().map(block).collect::<Result<_>>()?)?);
    Restore::new(&file).channels(4).run(&blocks, stop)?;

    let devices = file.devices();
    let counter = devices.sections().iter().find(|section| section.name.as_bytes() == b"counter");
    let state = counter.filter(|counter| counter.version == 1).and_then(|counter| devices.body(counter));
    let count = u64::from_be_bytes(state.ok_or("expected a counter of version 1")?.try_into()?);
    Ok(Machine::new(blocks, count))
}
