//! The kernel's dirty logs of what vCPUs write. Feature `kvm`.
//!
//! ```text
//! vCPU ─ first write to a page ─▶ bitmap of the slot ─ KVM_GET_DIRTY_LOG (─ KVM_CLEAR_DIRTY_LOG) ─▶ KvmDirtyLog ─┐
//!                            or ─▶ ring of the vCPU ─── KvmDirtyRings (─ KVM_RESET_DIRTY_RINGS) ──▶ KvmRingLog ──┴▶ pending
//! ```
//!
//! The kernel counts in host pages, and a block may lie in several memory slots. This module converts the bits to the
//! block's pages. Logging costs the guest one fault per written page between two takes. So it is switched on when a log
//! is made and off when the log is dropped.
//!
//! The kernel does not see what the VMM itself writes to guest memory. [Merge](super::MergedLog) these logs with a log
//! of the VMM.
//!
//! UNSAFETY: memory slots are set again as they were, except for the flag that switches logging. The caller of `start`
//! guarantees that they are described correctly.
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

use super::{coarse::CoarseBits, sole_reader::SoleReader};
use crate::{BlockIndex, BlockOffset, Identity, PageIndex, RamBlock, RamBlocks};

/// A memory slot of the virtual machine, and the position of its memory in the blocks.
#[derive(Clone, Copy, Debug)]
struct KvmSlot {
    /// The slot, as it was given to `KVM_SET_USER_MEMORY_REGION`.
    region: kvm_userspace_memory_region,
    /// The block whose memory it is.
    block: BlockIndex,
    /// The offset in the block at which the slot starts.
    offset: BlockOffset,
}

impl KvmSlot {
    /// Finds the block by the address of the slot's memory.
    fn find(region: kvm_userspace_memory_region, blocks: &RamBlocks) -> io::Result<Self> {
        let page = rustix::param::page_size() as u64;
        let (slot, size, start) = (region.slot, region.memory_size, region.userspace_addr);
        let within = |(index, block): (BlockIndex, &RamBlock)| {
            let base = block.slice(PageIndex(0), 0)?.as_ptr().addr() as u64;
            let offset = start.checked_sub(base)?;
            let end = offset.checked_add(size)?;
            (end <= block.used_length().next_multiple_of(page)).then_some((index, BlockOffset(offset)))
        };
        let whole = size > 0 && size.is_multiple_of(page) && start.is_multiple_of(page);
        let found = blocks.iter().filter(|_| whole).find_map(within);
        let (block, offset) = found.ok_or_else(|| {
            let why = format!(
                "memory slot {slot}: expected whole pages of {page} bytes within a block, found {size:#x} bytes at address \
                 {start:#x}"
            );
            io::Error::new(io::ErrorKind::InvalidInput, why)
        })?;
        Ok(Self { region, block, offset })
    }

    /// The bytes that the bits of the slot's log cover.
    fn coarse(&self) -> CoarseBits {
        CoarseBits { start: self.offset, size: rustix::param::page_size() as u64 }
    }

    /// The number of bits in the slot's log.
    fn bits(&self) -> u64 {
        bits(&self.region)
    }
}

/// The number of bits of a slot's log.
fn bits(region: &kvm_userspace_memory_region) -> u64 {
    region.memory_size / rustix::param::page_size() as u64
}

/// Memory slots whose writes are logged while this value exists.
#[derive(Debug)]
struct Logging<'vm> {
    vm: &'vm VmFd,
    slots: Vec<KvmSlot>,
    /// The blocks whose memory it is.
    of: Identity,
    _sole_reader: SoleReader,
}

impl<'vm> Logging<'vm> {
    /// Makes the kernel log writes to the slots.
    ///
    /// # Safety
    /// Each region must be what `vm` has in that slot, except for the logging flag, until the drop.
    unsafe fn start(
        vm: &'vm VmFd,
        slots: Vec<kvm_userspace_memory_region>,
        blocks: &RamBlocks,
    ) -> io::Result<Self> {
        let slots: Vec<_> =
            slots.into_iter().map(|region| KvmSlot::find(region, blocks)).collect::<io::Result<_>>()?;
        // The machine is borrowed, so no other machine has its address.
        let sole_reader = SoleReader::of(std::ptr::from_ref(vm).addr())?;
        let (of, room) = (blocks.identity(), slots.len());
        let mut logging = Self { vm, slots: Vec::with_capacity(room), of, _sole_reader: sole_reader };
        for slot in slots {
            let mut region = slot.region;
            region.flags |= KVM_MEM_LOG_DIRTY_PAGES;
            // The slot enters the list first, so that logging is switched off on every path after it was switched on.
            logging.slots.push(slot);
            // SAFETY: the slot has this memory already, as the caller guarantees.
            unsafe { vm.set_user_memory_region(region) }?;
        }
        Ok(logging)
    }

    /// The slots in `block`.
    fn in_block(&self, block: BlockIndex) -> impl Iterator<Item = &KvmSlot> {
        self.slots.iter().filter(move |slot| slot.block == block)
    }
}

impl Drop for Logging<'_> {
    fn drop(&mut self) {
        for slot in &self.slots {
            // SAFETY: the slot has this memory already, as the caller of `start` guarantees.
            if let Err(error) = unsafe { self.vm.set_user_memory_region(slot.region) } {
                tracing::warn!(slot = slot.region.slot, %error, "dirty logging stays switched on");
            }
        }
    }
}
