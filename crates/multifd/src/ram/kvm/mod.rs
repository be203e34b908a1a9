//! The kernel's dirty logs of what vCPUs write. Feature `kvm`.
//!
//! ```text
//! vCPU ─ first write to a page ─▶ bitmap of the slot ─ KVM_GET_DIRTY_LOG (─ KVM_CLEAR_DIRTY_LOG) ─▶ KvmDirtyLog ─┐
//!                            or ─▶ ring of the vCPU ─── KvmDirtyRings (─ KVM_RESET_DIRTY_RINGS) ──▶ KvmRingLog ──┴▶ pending
//! ```
//!
//! The kernel's pages are the host's, and a block may lie in several memory slots: bits are turned into the block's
//! pages here. Logging costs the guest a fault for each page between two takes, so it is switched on when a log is made
//! and off when that is dropped.
//!
//! What the VMM itself writes to guest memory the kernel does not see: [merge](super::MergedLog) these logs with one of
//! the VMM's own.
//!
//! UNSAFETY: memory slots are set again as they were, but for the flag that switches logging; that they are described
//! truly is for the caller of `start` to see to.
#![expect(unsafe_code, reason = "memory slots are set")]

mod bitmap;
mod ring;
mod ring_of;

use std::io;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

pub use bitmap::{KvmDirtyLog, KvmProtect};
pub use ring::{KvmDirtyRings, KvmRingLog, KvmRingSize};
pub use ring_of::KvmRingError;

use super::{BlockIndex, BlockOffset, RamBlocks, granule::Granules};

/// A memory slot of the virtual machine, and where its memory lies in the blocks.
#[derive(Clone, Copy, Debug)]
pub struct KvmSlot {
    /// The slot, as it was given to `KVM_SET_USER_MEMORY_REGION`.
    pub region: kvm_userspace_memory_region,
    /// The block whose memory it is.
    pub block: BlockIndex,
    /// Where in the block it starts.
    pub offset: BlockOffset,
}

impl KvmSlot {
    /// What a bit of the slot's log stands for.
    fn granules(&self) -> Granules {
        Granules { start: self.offset, size: rustix::param::page_size() as u64 }
    }

    /// The number of its bits.
    fn bits(&self) -> u64 {
        self.region.memory_size / rustix::param::page_size() as u64
    }

    fn check(&self, blocks: &RamBlocks) -> io::Result<()> {
        let page = rustix::param::page_size() as u64;
        let block =
            blocks.block(self.block).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let (slot, size, start) = (self.region.slot, self.region.memory_size, self.offset.0);
        let end = start.checked_add(size).filter(|end| *end <= block.used_length().next_multiple_of(page));
        if end.is_some() && size > 0 && size.is_multiple_of(page) && start.is_multiple_of(page) {
            return Ok(());
        }
        let (name, used) = (block.name(), block.used_length());
        let why = format!(
            "memory slot {slot}: expected whole pages of {page} bytes within block {name:?} ({used:#x} bytes), met {size:#x} \
             bytes at offset {start:#x}"
        );
        Err(io::Error::new(io::ErrorKind::InvalidInput, why))
    }
}

/// Memory slots whose writes are logged, as long as it lives.
#[derive(Debug)]
struct Logging<'vm> {
    vm: &'vm VmFd,
    slots: Vec<KvmSlot>,
}

impl<'vm> Logging<'vm> {
    /// Has the kernel log the slots.
    ///
    /// # Safety
    /// Each region is what `vm` has in that slot, but for the flag, until the drop.
    unsafe fn start(vm: &'vm VmFd, slots: Vec<KvmSlot>, blocks: &RamBlocks) -> io::Result<Self> {
        slots.iter().try_for_each(|slot| slot.check(blocks))?;
        let mut logging = Self { vm, slots: Vec::with_capacity(slots.len()) };
        for slot in slots {
            let mut region = slot.region;
            region.flags |= KVM_MEM_LOG_DIRTY_PAGES;
            // In the list first: what has been switched on is switched off, whatever happens.
            logging.slots.push(slot);
            // SAFETY: the slot has this memory already, as the caller vouches.
            unsafe { vm.set_user_memory_region(region) }?;
        }
        Ok(logging)
    }

    /// The slots in `block`.
    fn of(&self, block: BlockIndex) -> impl Iterator<Item = &KvmSlot> {
        self.slots.iter().filter(move |slot| slot.block == block)
    }
}

impl Drop for Logging<'_> {
    fn drop(&mut self) {
        for slot in &self.slots {
            // SAFETY: the slot has this memory already, as the caller of `start` has vouched.
            if let Err(error) = unsafe { self.vm.set_user_memory_region(slot.region) } {
                tracing::warn!(slot = slot.region.slot, %error, "dirty logging stays switched on");
            }
        }
    }
}
