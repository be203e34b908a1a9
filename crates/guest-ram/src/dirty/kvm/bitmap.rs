//! The dirty log that reads the kernel's bitmap of each memory slot.
//!
//! `KVM_GET_DIRTY_LOG` write-protects again every page that it reports. It does this under one lock that vCPUs need as
//! well. With manual protection it only reports, and `KVM_CLEAR_DIRTY_LOG` protects one stretch of pages at a time. A
//! large guest is then delayed many times for a short time instead of once for a long time.
//!
//! A page that is written between the two calls is found by every thread that reads it after the second call. Every
//! take returns after the second call.
//!
//! UNSAFETY: an ioctl is given a pointer to bits that outlive the call.
#![expect(unsafe_code, reason = "an ioctl that the bindings do not wrap")]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use rustix::ioctl::{Opcode, Setter, ioctl, opcode};

use super::{KvmSlot, Logging};
use crate::{BlockIndex, DirtyLog, DirtyPages, PageBitmap, PageSize, RamBlocks};

/// Who write-protects pages again after they were reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvmProtect {
    /// The kernel, all pages at once when the log is read. Every kernel supports this.
    Automatic,
    /// The log, one stretch at a time (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`, Linux 5.0). If the kernel supports it
    /// (5.7), every page counts as written at first, so switching on takes no time.
    Manual,
}

/// The dirty log of memory slots (`KVM_GET_DIRTY_LOG`).
///
/// Logging is on from [`start`](Self::start) until the log is dropped. Do not use it for a virtual machine with
/// [rings](super::KvmDirtyRings): the kernel keeps no bitmap for such a machine.
#[derive(Debug)]
pub struct KvmDirtyLog<'vm> {
    logging: Logging<'vm>,
    page_size: PageSize,
    protect: KvmProtect,
    /// Bits that were put back, for each block.
    held: Vec<PageBitmap>,
}

impl<'vm> KvmDirtyLog<'vm> {
    /// Switches logging on, with manual protection if the kernel supports it. vCPUs may run.
    ///
    /// `slots` are regions as they were given to `KVM_SET_USER_MEMORY_REGION`. The block of each is found by its
    /// address.
    ///
    /// **Warning:** pages of blocks that are in no slot are never dirty. If another reader, such as the VMM's own
    /// snapshot, takes dirty bits of the same machine, the writes that it takes are missing here.
    ///
    /// **Warning:** who protects pages again is a setting of the whole virtual machine
    /// (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`). It keeps the value set here after the log is dropped, because the kernel
    /// does not report the previous value. A VMM that reads `KVM_GET_DIRTY_LOG` itself, for a display or its own
    /// snapshots, and expects that call to protect the pages, then finds the same pages written again and again. Such a
    /// VMM must use [`start_with`](Self::start_with) with the protection that it has set or expects.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if a slot is not whole pages of a block; [`io::ErrorKind::ResourceBusy`] if
    /// another log of this machine exists; the kernel's error if it refuses.
    ///
    /// # Safety
    /// Each region must be what `vm` has in that slot, and must stay so until the log is dropped.
    pub unsafe fn start(
        vm: &'vm VmFd,
        slots: Vec<kvm_userspace_memory_region>,
        blocks: &RamBlocks,
    ) -> io::Result<Self> {
        let manual = manual_flags(vm) != 0;
        let protect = if manual { KvmProtect::Manual } else { KvmProtect::Automatic };
        // SAFETY: the caller guarantees that the slots are as described.
        unsafe { Self::start_with(vm, slots, blocks, protect) }
    }

    /// Like [`start`](Self::start), with the protection `protect`. Pass the protection that the VMM has already set, if
    /// any. It is set again. This changes nothing in that case, with one exception: if the VMM has set manual
    /// protection without `KVM_DIRTY_LOG_INITIALLY_SET`, that flag is now set, and every page counts as written at
    /// first.
    ///
    /// # Errors
    /// As [`start`](Self::start); also if the kernel has no manual protection.
    ///
    /// # Safety
    /// As [`start`](Self::start).
    pub unsafe fn start_with(
        vm: &'vm VmFd,
        slots: Vec<kvm_userspace_memory_region>,
        blocks: &RamBlocks,
        protect: KvmProtect,
    ) -> io::Result<Self> {
        let flags = match (protect, manual_flags(vm)) {
            (KvmProtect::Manual, 0) => return Err(io::ErrorKind::Unsupported.into()),
            (KvmProtect::Manual, flags) => Some(flags),
            // The machine may have been set to manual protection before.
            (KvmProtect::Automatic, 0) => None,
            (KvmProtect::Automatic, _) => Some(0),
        };
        if let Some(flags) = flags {
            let mut cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
            cap.args[0] = u64::from(flags);
            vm.enable_cap(&cap)?;
        }
        // SAFETY: the caller guarantees that the slots are as described.
        let logging = unsafe { Logging::start(vm, slots, blocks) }?;
        let held = blocks.iter().map(|(_, block)| PageBitmap::new(block.pages())).collect();
        Ok(Self { logging, page_size: blocks.page_size(), protect, held })
    }

    /// Who protects pages again.
    pub fn protect(&self) -> KvmProtect {
        self.protect
    }

    fn bits(&self, slot: &KvmSlot) -> io::Result<Vec<u64>> {
        let size = usize::try_from(slot.region.memory_size).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let mut bits = self.logging.vm.get_dirty_log(slot.region.slot, size)?;
        if self.protect == KvmProtect::Manual {
            self.clear(slot, &mut bits)?;
        }
        Ok(bits)
    }

    /// Protects the pages whose bits are set, one stretch at a time.
    fn clear(&self, slot: &KvmSlot, bits: &mut [u64]) -> io::Result<()> {
        let pages = slot.bits();
        // SAFETY: the machine is borrowed, so its descriptor stays open.
        let vm = unsafe { BorrowedFd::borrow_raw(self.logging.vm.as_raw_fd()) };
        for (index, stretch) in bits.chunks_mut(STRETCH).enumerate() {
            let Some(first) = stretch.iter().position(|word| *word != 0) else { continue };
            let last = stretch.iter().rposition(|word| *word != 0).unwrap_or(first);
            let first_page = ((index * STRETCH + first) * WORD) as u64;
            let length = ((last + 1 - first) * WORD) as u64;
            let num_pages = u32::try_from(length.min(pages - first_page)).unwrap_or(u32::MAX);
            let dirty_bitmap = stretch[first..=last].as_mut_ptr().cast();
            let request = kvm_clear_dirty_log {
                slot: slot.region.slot,
                num_pages,
                first_page,
                __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap },
            };
            // SAFETY: the kernel is given this structure by this number, and reads `num_pages` bits, which lie in
            // `stretch` and outlive the call.
            let clear = unsafe { Setter::<CLEAR_DIRTY_LOG, _>::new(request) };
            // SAFETY: as above; the descriptor is a virtual machine's.
            unsafe { ioctl(vm, clear) }?;
        }
        Ok(())
    }
}

impl DirtyLog for KvmDirtyLog<'_> {
    fn begin(&mut self, blocks: &RamBlocks) -> io::Result<()> {
        self.logging.of.check(blocks)
    }

    fn take(&mut self, block: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()> {
        into.take_from(&self.held[block.0]);
        for slot in self.logging.in_block(block) {
            slot.coarse().mark(into.bits(), self.page_size, self.bits(slot)?);
        }
        Ok(())
    }

    fn put_back(&mut self, block: BlockIndex, from: &PageBitmap) {
        self.held[block.0].merge(from.words());
    }
}

/// The flags of manual protection that `vm` supports; 0 if it has none.
fn manual_flags(vm: &VmFd) -> u32 {
    let known = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
    let known = u32::try_from(known).unwrap_or(0);
    match known & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE {
        0 => 0,
        _ => known & (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET),
    }
}

const WORD: usize = u64::BITS as usize;
/// Words per call: 128 MiB of pages of 4 KiB. The kernel requires stretches to start and end at a word boundary, except
/// at the slot's end.
const STRETCH: usize = 512;
const CLEAR_DIRTY_LOG: Opcode = opcode::read_write::<kvm_clear_dirty_log>(0xae, 0xc0);
