//! Memory that is filled in place at first, and by faults later: what is out of date is dropped, then the rest is armed.
//!
//! ```text
//! prepare ─ pages are written in place ─ discard … ─ arm ─▶ Armed ─▶ Pager::pushed
//! ```
//!
//! A kernel may make a huge page of ordinary ones by itself, and fills what is missing with zeros. After `discard` that would hide a
//! missing page, so it is forbidden from the beginning, and allowed again at the drop, where it was.

use std::{fmt, ops::Range, sync::Arc};

use crate::{BlockIndex, BlockOffset, PageIndex, RamBlocks};

use super::{Armed, FaultError, FaultsFrom, Modes, Pager, Region, Userfault, kernel, memory::regions_and};

/// Memory in which a guest will run before all of its pages have arrived. Keep it until they have.
///
/// Other processes that share the memory are not armed: they read zeros where pages are missing. Do not use such memory.
pub struct Landing {
    blocks: Arc<RamBlocks>,
    regions: Vec<Region>,
    /// Opened at the beginning, so that a missing privilege is not found out when the guest is stopped.
    userfault: Option<Userfault>,
    /// Memory of which the kernel made huge pages by itself.
    huge: Vec<Range<u64>>,
}

impl fmt::Debug for Landing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Landing").field("regions", &self.regions).finish_non_exhaustive()
    }
}

impl Landing {
    /// Prepares the memory of all mapped blocks that are not [ignored](crate::RamBlock::ignored). Nothing is armed yet.
    ///
    /// # Errors
    /// If the memory cannot be armed, or this process may not receive its faults.
    pub fn prepare(blocks: Arc<RamBlocks>, from: FaultsFrom) -> Result<Self, FaultError> {
        let userfault = Some(Userfault::open(Pager::NEEDS, from)?);
        let mut huge = Vec::new();
        let regions = regions_and(&blocks, |areas| {
            let default = |(range, area): &(Range<u64>, Option<&crate::memory::areas::Area>)| {
                area.is_some_and(|area| area.huge.is_none()).then(|| range.clone())
            };
            huge = areas.iter().filter_map(default).collect();
        })?;
        let landing = Self { blocks, regions, userfault, huge };
        for Region { addresses, kind, .. } in &landing.regions {
            if matches!(kind, super::MemoryKind::Huge { .. }) {
                continue;
            }
            match kernel::advise_huge(addresses, false) {
                // A kernel that makes no huge pages.
                Ok(()) | Err(rustix::io::Errno::INVAL) => {}
                Err(error) => return Err(FaultError::system("forbid huge pages")(error)),
            }
        }
        Ok(landing)
    }

    /// The blocks.
    pub fn blocks(&self) -> &Arc<RamBlocks> {
        &self.blocks
    }

    /// The number of pages in a host page of a block; 1 if it is not armed later.
    pub fn host_page(&self, block: BlockIndex) -> u64 {
        self.regions.iter().find(|region| region.block == block).map_or(1, |region| region.shape().host_page)
    }

    /// Drops pages that are out of date: they are missing from now on. Not after [`arm`](Self::arm). Memory that is not armed later is
    /// left as it is.
    ///
    /// # Errors
    /// If the pages are not whole host pages of their block, or the system refuses.
    pub fn discard(&self, block: BlockIndex, first: PageIndex, count: u64) -> Result<(), FaultError> {
        let Some(region) = self.regions.iter().find(|region| region.block == block) else { return Ok(()) };
        let end = first.0.saturating_add(count);
        let unit = region.page * region.shape().host_page;
        let offset = first.0.saturating_mul(region.page);
        let len = match end {
            end if end == region.pages => (end * region.page).next_multiple_of(unit).saturating_sub(offset),
            _ => count.saturating_mul(region.page),
        };
        let range = region.range(BlockOffset(offset), len).ok_or_else(|| FaultError::Unsuitable {
            name: region.name.clone(),
            why: format!("pages {} to {end} are not whole host pages of it, and cannot be dropped", first.0),
        })?;
        kernel::drop_pages(&range, region.kind.is_private())
            .map_err(FaultError::system("drop pages that are out of date"))
    }

    /// Arms the memory. From now on each access to a missing page waits.
    ///
    /// # Errors
    /// If it was armed before, or the system refuses.
    pub fn arm(&mut self) -> Result<Armed, FaultError> {
        let userfault = self.userfault.take().ok_or(FaultError::ArmedBefore)?;
        Armed::arm_regions(userfault, self.blocks.clone(), self.regions.clone(), Modes::MISSING)
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        for range in &self.huge {
            // There is no advice that only takes the other one back. This one makes huge pages likelier than before.
            if let Err(error) = kernel::advise_huge(range, true) {
                tracing::debug!(%error, "huge pages are not allowed again");
            }
        }
    }
}
