//! Restores a machine whose guest runs before its memory is there.
//!
//! ```text
//! MappedRamFile ── FileSource ── Pager ◀─ page faults of the guest
//!       │              │           └── prefetch
//!       └── devices    └── each page is compared with its digest before it is placed
//! ```
//!
//! The pages are read through the page cache, unless the restore bypasses it. This cache is all that several restores from one file have
//! in common.

use std::{fmt, sync::Arc};

use multifd::ram::{
    Armed, BlockIndex, BlockName, FaultError, FaultsFrom, LoadError, Memory, PageBitmap, PageRun, PageSource,
    Pager, PagerError, PagerOptions, RamBlock, RamBlocks, Userfault,
};

use super::Restore;

/// Why a machine cannot be restored lazily. Its guest must not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LazyError {
    /// The file cannot be read.
    #[error(transparent)]
    File(#[from] multifd::Error),
    /// A block of the machine and the file do not fit together.
    #[error("block {name:?}: {why}")]
    Block {
        /// The block.
        name: BlockName,
        /// The difference.
        why: String,
    },
    /// Page faults cannot be delivered, or not of this memory.
    #[error("page faults of the guest's memory cannot be served")]
    Fault(#[from] FaultError),
    /// The pager cannot start.
    #[error("the pager cannot start")]
    Pager(#[from] PagerError),
}

impl Restore<'_> {
    /// Restores into `blocks` while the guest runs: the guest may be started at once, out of the file's
    /// [devices](super::StoredMachine::devices). Each page is loaded when it is first accessed, or before that. Keep the
    /// [`Pager`] until [`Pager::finish`] has returned: it waits until everything is there. Of the options of this restore,
    /// [`direct_io`](Self::direct_io) is used: a page that the guest waits for is then read from the disk each time, also if the page cache
    /// has it. The number of threads is that of the [`PagerOptions`].
    ///
    /// The blocks are mapped ones with the file's [names and lengths](super::StoredMachine::blocks), in any order, and their memory is
    /// zero: newly mapped, private, of a memory file, or of huge pages. Blocks that were left out of the file are
    /// [ignored](RamBlock::ignored) ones here, too.
    ///
    /// If the file has digests, each page is compared with its digest before the guest gets it. A page that differs, or cannot be read,
    /// is decided about by the [judge](PagerOptions::judge). The default is [poison](multifd::ram::Decision::Poison): the guest gets an
    /// error where it accesses the page, and everything else continues.
    ///
    /// **Warning:** nothing may change the file until everything is there. Without digests, such a change is not found.
    ///
    /// # Errors
    /// If this process may not serve page faults, with the remedy; if the kernel lacks something (Linux 6.7 has everything); if
    /// the blocks do not fit, or are not empty. Nothing is armed then.
    pub fn lazy(&self, blocks: &Arc<RamBlocks>, options: PagerOptions) -> Result<Pager, LazyError> {
        let source = FileSource::new(self, blocks)?;
        let userfault = Userfault::open(Pager::NEEDS, FaultsFrom::Everything)?;
        let armed = Armed::arm_empty(userfault, blocks.clone())?;
        Ok(Pager::start(armed, Arc::new(source), options)?)
    }
}

/// The pages of a file, for the blocks of a machine.
struct FileSource {
    file: RamBlocks,
    /// For each block of the machine, its index in the file.
    order: Vec<Option<BlockIndex>>,
}

impl fmt::Debug for FileSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileSource").field("blocks", &self.file.len()).finish_non_exhaustive()
    }
}

impl FileSource {
    fn new(restore: &Restore<'_>, blocks: &RamBlocks) -> Result<Self, LazyError> {
        let file = restore.blocks()?;
        let order = blocks.iter().map(|(_, block)| {
            let refused = |why: &str| LazyError::Block { name: block.name().clone(), why: why.to_owned() };
            let index = file.find(block.name().as_bytes());
            let in_file = index
                .and_then(|index| file.get(index))
                .ok_or_else(|| refused("the file has no such block"))?;
            match (block.is_ignored(), in_file.is_ignored()) {
                (true, true) => return Ok(None),
                (false, true) => {
                    return Err(refused(
                        "its memory is not in the file (x-ignore-shared), so it must be an ignored block",
                    ));
                }
                (true, false) => {
                    return Err(refused("its memory is in the file, so it must not be an ignored block"));
                }
                (false, false) => {}
            }
            same(block, in_file).map_err(|why| refused(&why))?;
            Ok(index)
        });
        let order = order.collect::<Result<Vec<_>, _>>()?;
        if let Some((_, missing)) =
            file.iter().find(|(_, block)| blocks.find(block.name().as_bytes()).is_none())
        {
            let why = "it is in the file, and the machine has no such block".to_owned();
            return Err(LazyError::Block { name: missing.name().clone(), why });
        }
        Ok(Self { file, order })
    }

    fn block(&self, block: BlockIndex) -> Result<&RamBlock, LoadError> {
        let index = self.order.get(block.0).copied().flatten();
        index.and_then(|index| self.file.get(index)).ok_or_else(|| "the file has no such block".into())
    }
}

impl PageSource for FileSource {
    fn contents(&self, block: BlockIndex) -> Result<Option<PageBitmap>, LoadError> {
        let block = self.block(block)?;
        let contents = PageBitmap::new(block.pages());
        contents.merge(block.present_words());
        Ok(Some(contents))
    }

    fn load(&self, run: PageRun, into: &mut [u8]) -> Result<(), LoadError> {
        let block = self.block(run.block)?;
        let pages = usize::try_from(run.count)? * block.page_size().bytes();
        let into = into.get_mut(..pages).ok_or("the buffer is too short")?;
        Ok(block.load_direct(run.first, run.count, into)?)
    }
}

fn same(block: &RamBlock, in_file: &RamBlock) -> Result<(), String> {
    if !matches!(block.memory(), Memory::Mapped(_)) {
        return Err("it is not in mapped memory".to_owned());
    }
    if block.page_size() != in_file.page_size() {
        return Err(format!("it has pages of {}, in the file of {}", block.page_size(), in_file.page_size()));
    }
    if block.used_length() != in_file.used_length() {
        let (here, there) = (block.used_length(), in_file.used_length());
        return Err(format!("it has {here:#x} bytes, in the file {there:#x}"));
    }
    Ok(())
}
