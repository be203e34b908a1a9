//! Memory of a guest, in small or in huge pages.

use std::{fs, fs::File, path::Path, sync::Arc};

use multifd::ram::{
    Access, BlockIndex, BlockName, Mapping, Memory, PageIndex, PageSize, RamBlock, RamBlocks,
};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::{Result, free};

/// A kind of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A memory file in pages of 4 KiB.
    Small,
    /// Anonymous, in which the kernel uses huge pages where it can.
    Anonymous,
    /// A memory file of huge pages of 2 MiB.
    Huge,
}

impl Kind {
    pub(super) const ALL: [Self; 3] = [Self::Small, Self::Anonymous, Self::Huge];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Small => "pages of 4 KiB",
            Self::Anonymous => "anonymous",
            Self::Huge => "huge pages",
        }
    }
}

/// Memory, and the huge pages that were set aside for it.
pub(super) struct Ram {
    pub(super) blocks: Arc<RamBlocks>,
    _reserved: Option<Reserved>,
}

impl Ram {
    /// New memory in which nothing was written. `Err` is the reason why this system cannot provide it.
    pub(super) fn new(kind: Kind, bytes: u64) -> Result<Self> {
        match kind {
            Kind::Small => {
                let file = File::from(memfd_create("ram", MemfdFlags::CLOEXEC)?);
                file.set_len(bytes)?;
                let mapping = Mapping::of_file(&file, 0, bytes, Access::ReadWrite)?;
                Ok(Self { blocks: blocks(bytes, mapping)?, _reserved: None })
            }
            Kind::Anonymous => {
                let mapping = Mapping::anonymous(bytes)?;
                Ok(Self { blocks: blocks(bytes, mapping)?, _reserved: None })
            }
            Kind::Huge => {
                let reserved = Reserved::new(bytes / HUGE)?;
                let flags = MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB | MemfdFlags::CLOEXEC;
                let file = File::from(memfd_create("ram", flags)?);
                file.set_len(bytes)?;
                let mapping = Mapping::of_file(&file, 0, bytes, Access::ReadWrite)?;
                Ok(Self { blocks: blocks(bytes, mapping)?, _reserved: Some(reserved) })
            }
        }
    }

    /// Memory whose pages all differ, and are not zero.
    pub(super) fn filled(kind: Kind, bytes: u64) -> Result<Self> {
        let ram = Self::new(kind, bytes)?;
        fill(ram.block())?;
        Ok(ram)
    }

    pub(super) fn block(&self) -> &RamBlock {
        block(&self.blocks)
    }
}

pub(super) fn block(blocks: &RamBlocks) -> &RamBlock {
    blocks.block(BlockIndex(0)).expect("each machine here has one block")
}

pub(super) fn blocks(bytes: u64, mapping: Mapping) -> Result<Arc<RamBlocks>> {
    let name = BlockName::new("ram").ok_or("a name")?;
    let block = RamBlock::new(name, bytes, PageSize::KIB_4, Memory::Mapped(mapping))?;
    Ok(Arc::new(RamBlocks::new(vec![block])?))
}

pub(super) fn fill(block: &RamBlock) -> Result<()> {
    for page in 0..block.pages() {
        block.store(PageIndex(page), &(page + 1).to_be_bytes().repeat(512))?;
    }
    Ok(())
}

/// Checks that this system has as much memory.
pub(super) fn enough(bytes: u64) -> Result<()> {
    let (available, needed) = (free::available()?, bytes + (1 << 30));
    if available < needed {
        return Err(
            format!("it needs {} MiB of memory, and {} are free", needed >> 20, available >> 20).into()
        );
    }
    Ok(())
}

/// Drops the page cache of a file, which is on the disk then.
pub(super) fn chill(path: &Path) -> Result<()> {
    let file = File::open(path)?;
    file.sync_all()?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    Ok(())
}

/// Huge pages that are set aside. The old number is restored at the drop.
struct Reserved {
    before: u64,
}

impl Reserved {
    fn new(pages: u64) -> Result<Self> {
        let before = number()?;
        let wanted = before + pages;
        fs::write(NUMBER, wanted.to_string())
            .map_err(|error| format!("cannot write to {NUMBER}: {error}"))?;
        let reserved = Self { before };
        let found = number()?;
        if found < wanted {
            return Err(format!("expected {wanted} huge pages, and this system provides {found}").into());
        }
        Ok(reserved)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let _ = fs::write(NUMBER, self.before.to_string());
    }
}

fn number() -> Result<u64> {
    let text = fs::read_to_string(NUMBER).map_err(|error| format!("cannot read {NUMBER}: {error}"))?;
    Ok(text.trim().parse()?)
}

const NUMBER: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
const HUGE: u64 = 2 << 20;
