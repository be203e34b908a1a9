use std::{error::Error as StdError, fs::File, path::Path, sync::Arc, time::Duration};

use multifd::ram::{Decision, Mapping, Memory, Pager, PagerOptions, RamBlock, RamBlocks, TroubleKind};
use qemu_stream::{
    format::BlockEntry,
    mapped_ram::{MappedRamFile, Restore},
};

use crate::machine::Machine;

type Result<T> = std::result::Result<T, Box<dyn StdError + Send + Sync>>;

/// Restores the machine from a file. It can run at once; its memory follows until `Pager::finish` has returned.
pub fn load_lazily(path: &Path) -> Result<(Machine, Pager)> {
    // 1. New memory: a page that exists causes no fault.
    let file = MappedRamFile::open(File::open(path)?, 0)?;
    let list = file.blocks();
    let block = |entry: &BlockEntry| -> Result<RamBlock> {
        let memory = Memory::Mapped(Mapping::anonymous(entry.used_length)?);
        Ok(RamBlock::new(entry.name.clone(), entry.used_length, list.page_size(), memory)?)
    };
    let blocks = Arc::new(RamBlocks::new(list.entries().iter().map(block).collect::<Result<_>>()?)?);

    // 2. What happens to pages that do not come. It is asked again after each `silence`, and after each failure.
    let options = PagerOptions::new().silence(Duration::from_secs(5)).judge(|trouble| match trouble.kind {
        TroubleKind::Silent if trouble.decided < 12 => Decision::Wait, // a minute
        TroubleKind::Silent => Decision::Stop,
        _ => Decision::Poison, // damaged, or the disk cannot read it
    });

    // 3. From here on, accesses to missing pages wait until they come.
    let pager = Restore::new(&file).lazy(&blocks, options)?;

    // 4. The devices are in the file already.
    let counter = file.devices().find("counter", 0).filter(|(section, _)| section.version == 1);
    let (_, state) = counter.ok_or("expected a counter of version 1")?;
    Ok((Machine::new(blocks, u64::from_be_bytes(state.try_into()?)), pager))
}
