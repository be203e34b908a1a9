//! The log of writes through this process's page table. Finding a written page and protecting it again is one step.
//!
//! When the log is made, every page of the blocks is protected against writing. The first write to a page causes a
//! fault, in which the kernel itself lifts the protection. A take asks for the pages that are not protected. The kernel
//! protects each page again as it reports it, under the lock of its page table entry. So a write is found by this take,
//! or causes another fault and is found by the next take.

use std::{fs, fs::File, io, ops::Range, sync::Arc};

use super::{
    Refused, addresses,
    kernel::{Userfault, WRITTEN},
};
use crate::{
    BlockIndex, DirtyLog, DirtyPages, PageBitmap, RamBlock, RamBlocks,
    dirty::mark,
    memory::residency::{PAGEMAP, REGIONS, Regions},
};

/// The dirty log of writes through this process's page table (`PAGEMAP_SCAN`, Linux 6.7): by any of its threads, by
/// system calls that fill memory, by vCPUs. Writers need no changes.
///
/// ```
/// # use std::{error::Error, sync::Arc};
/// use guest_ram::{
///     BlockIndex, BlockName, DirtyBitmaps, DirtyLog, DirtyPages, Mapping, Memory, MergedLog, PageBitmap, PageIndex, PageSize,
///     PagemapLog, RamBlock, RamBlocks, SoftDirtyLog,
/// };
///
/// # fn main() -> Result<(), Box<dyn Error>> {
/// let memory = Memory::Mapped(Mapping::anonymous(1 << 20)?);
/// let name = BlockName::new("pc.ram").ok_or("a name")?;
/// let blocks = Arc::new(RamBlocks::new(vec![RamBlock::new(name, 1 << 20, PageSize::KIB_4, memory)?])?);
///
/// // For one migration: logging is on from here until the drop.
/// let threads: Box<dyn DirtyLog + Send> = match PagemapLog::start(blocks.clone()) {
///     Ok(log) => Box::new(log),
///     // An older kernel. Writers must be paused while `sweep` runs; this example has none.
///     Err(old) if old.kind() == std::io::ErrorKind::Unsupported => {
///         match SoftDirtyLog::start(blocks.clone(), |sweep| sweep()) {
///             Ok(log) => Box::new(log),
///             Err(neither) => return Ok(eprintln!("{old}; {neither}")),
///         }
///     }
///     Err(error) => return Err(error.into()),
/// };
/// // Devices that write by physical address bypass the page table and mark pages.
/// let devices = DirtyBitmaps::new(&blocks);
/// let mut log = MergedLog::new().with("the threads", threads).with("the devices", devices.reader()?);
///
/// blocks.block(BlockIndex(0))?.store(PageIndex(7), &[42; 4096])?;
/// devices.mark(BlockIndex(0), PageIndex(9));
/// let dirty = PageBitmap::new(256);
/// log.take(BlockIndex(0), &mut DirtyPages::new(&dirty))?;
/// assert!(dirty.contains(PageIndex(7)) && dirty.contains(PageIndex(9)));
/// # Ok(())
/// # }
/// ```
///
/// Memory may be private or shared, anonymous, from a memfd or from a file, in pages of any size. Writes that do not go
/// through this process's page table are not seen: by another process that shares the memory, through a second mapping,
/// by devices that write by physical address. Discarding memory (`MADV_DONTNEED`, a hole in a file) does not count as a
/// write either: the code that discards must mark the pages.
///
/// Logging is on from [`start`](Self::start) until the log is dropped. It needs no privilege and costs one fault for
/// each page that is written between two takes. The first write to a transparent huge page splits it, and the kernel
/// makes no new ones while the log is on. A take walks the page table of the block, so its cost depends on the size of
/// the memory.
#[derive(Debug)]
pub struct PagemapLog {
    userfault: Userfault,
    pagemap: File,
    regions: Regions,
    blocks: Arc<RamBlocks>,
    watched: Vec<Watched>,
}

#[derive(Debug)]
struct Watched {
    /// The protected addresses, if any. They end with the block's last page, or with the page of memory that contains
    /// its end.
    range: Option<Range<u64>>,
    /// Bits that were put back.
    held: PageBitmap,
}

impl PagemapLog {
    /// Protects the pages of all blocks. Writers may run.
    ///
    /// Blocks in a file, ignored blocks and blocks that are mapped for reading only are never dirty.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] if the kernel lacks the feature; [`io::ErrorKind::PermissionDenied`] if a seccomp
    /// filter forbids `userfaultfd`. If a block's memory cannot be protected, the error names the block: it starts
    /// inside a page ([`io::ErrorKind::InvalidInput`]), or another `userfaultfd`, such as that of another log, has it
    /// ([`io::ErrorKind::ResourceBusy`]).
    pub fn start(blocks: Arc<RamBlocks>) -> io::Result<Self> {
        let userfault = Userfault::open()?;
        let pagemap = File::open(PAGEMAP)
            .map_err(|error| Refused::because(format!("{PAGEMAP} cannot be opened"), error))?;
        let watched = Vec::with_capacity(blocks.len());
        let mut log =
            Self { userfault, pagemap, regions: Regions::new(REGIONS), blocks: blocks.clone(), watched };
        for (_, block) in blocks.iter() {
            // Blocks enter the log one by one, so that what has been protected is released on every path.
            let range = log.watch(block)?;
            log.watched.push(Watched { range, held: PageBitmap::new(block.pages()) });
        }
        Ok(log)
    }

    fn watch(&self, block: &RamBlock) -> io::Result<Option<Range<u64>>> {
        let Some(pages) = addresses(block)? else { return Ok(None) };
        let mut first = None;
        // Memory is protected in whole pages, and no call reports their size. A size that is too small is refused if
        // the block ends inside a page. The first size that is accepted is the memory's own or divides it.
        for size in page_sizes() {
            let range = pages.start..pages.end.next_multiple_of(size);
            match self.userfault.watch(&range) {
                Ok(()) => return Ok(Some(range)),
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => first = first.or(Some(error)),
                Err(error) => return Err(unwatched(block, error)),
            }
        }
        Err(unwatched(block, first.unwrap_or_else(|| io::ErrorKind::InvalidInput.into())))
    }
}

impl DirtyLog for PagemapLog {
    fn begin(&mut self, blocks: &RamBlocks) -> io::Result<()> {
        self.blocks.identity().check(blocks)
    }

    /// # Errors
    /// If the block's memory is no longer what it was when the log was made. All its pages then count as written.
    fn take(&mut self, block: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()> {
        let Watched { range, held } = &self.watched[block.0];
        into.take_from(held);
        let Some(range) = range else { return Ok(()) };
        let page_size = self.blocks.page_size();
        let found =
            |run: Range<u64>| mark(into.bits(), page_size, run.start - range.start..run.end - range.start);
        self.regions.scan(&self.pagemap, range, &WRITTEN, found).map_err(|error| {
            // It is unknown what the scan had found before the error.
            held.fill();
            match self.blocks.block(block) {
                Ok(block) => {
                    Refused::named(block, "the written pages cannot be read from the page table", error)
                }
                Err(_) => error,
            }
        })
    }

    fn put_back(&mut self, block: BlockIndex, from: &PageBitmap) {
        self.watched[block.0].held.merge(from.words());
    }
}

impl Drop for PagemapLog {
    fn drop(&mut self) {
        // Closing the descriptor would do the same, but a child process may hold it, too.
        for range in self.watched.iter().filter_map(|watched| watched.range.as_ref()) {
            if let Err(error) = self.userfault.leave(range) {
                tracing::warn!(start = format_args!("{:#x}", range.start), %error, "write protection stays until exit");
            }
        }
    }
}

fn unwatched(block: &RamBlock, error: io::Error) -> io::Error {
    let why = match error.kind() {
        io::ErrorKind::ResourceBusy => "another userfaultfd watches its memory",
        _ => "its memory cannot be protected against writing",
    };
    Refused::named(block, why, error)
}

/// The possible sizes of pages of memory, ascending.
fn page_sizes() -> Vec<u64> {
    let huge = fs::read_dir(HUGE_PAGES).into_iter().flatten().flatten().filter_map(|entry| {
        let name = entry.file_name();
        let kib: u64 = name.to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
        Some(kib << 10)
    });
    let mut sizes: Vec<u64> = std::iter::once(rustix::param::page_size() as u64).chain(huge).collect();
    sizes.sort_unstable();
    sizes
}

/// The folder with one folder for each size of huge pages.
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages";
