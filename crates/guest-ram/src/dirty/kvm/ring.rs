//! The dirty rings of the vCPUs: each lists the pages that its vCPU has written (`KVM_CAP_DIRTY_LOG_RING`, Linux 5.11).
//!
//! ```text
//! vCPU 0 ─▶ ring ─┐            full: the vCPU's thread drains, too
//! vCPU 1 ─▶ ring ─┴─ drain ─▶ bits of the slots ─ take ─▶ pending
//! ```
//!
//! The cost of a take depends on the number of written pages, not on the size of memory. A vCPU whose ring is full
//! leaves the guest until the ring is drained. This slows down a guest that writes faster than its rings are drained.
//!
//! Some kernels let a vCPU continue to write with a full ring and overwrite entries; this was observed with kernels
//! that emulate the guest's instructions. The reserve at the end of a ring is normally never used, so a ring without a
//! free entry has overrun. There is no recovery: both [`KvmDirtyRings::drain`] and the take fail from then on.
//!
//! UNSAFETY: rings are mapped memory, shared with the kernel. Their words are accessed through atomics and raw reads.
//! The flags of an entry define which side may write it.
#![expect(unsafe_code, reason = "rings shared with the kernel")]

use std::{
    fmt, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn,
    kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::{
    io::{fcntl_dupfd_cloexec, retry_on_intr},
    ioctl::{NoArg, Opcode, ioctl, opcode},
    mm::{MapFlags, ProtFlags, mmap, munmap},
};

use super::{KvmRingError, KvmSlot, Logging, ring_of};
use crate::{BlockIndex, DirtyLog, DirtyPages, PageBitmap, PageIndex, PageSize, RamBlocks};

/// The dirty rings of all vCPUs of a virtual machine. Clones share the same rings.
///
/// 1. Call [`enable`](Self::enable) before the machine has a vCPU.
/// 2. Call [`new`](Self::new) with all its vCPUs. [Add](Self::add) a vCPU that is plugged in later before it runs.
/// 3. The thread of each vCPU calls [`drain`](Self::drain) whenever `KVM_RUN` returns [`RING_FULL`](Self::RING_FULL),
///    and then continues.
/// 4. Call [`start`](Self::start) for each migration.
///
/// **Warning:** writes of a vCPU whose ring is not registered here are in no log and do not migrate. The kernel does
/// not report how many vCPUs a machine has, so this cannot be detected. The only sign is that the vCPU returns
/// [`RING_FULL`](Self::RING_FULL) again and again.
#[derive(Clone, Debug)]
pub struct KvmDirtyRings(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    vm: OwnedFd,
    size: KvmRingSize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    rings: Vec<Ring>,
    /// The pages of each slot that is logged.
    logged: Vec<(u32, PageBitmap)>,
}

/// The number of entries of each ring, as set in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvmRingSize(u32);

impl KvmDirtyRings {
    /// `KVM_EXIT_DIRTY_RING_FULL`, the exit reason. `kvm-ioctls` returns it as `VcpuExit::Unsupported`.
    pub const RING_FULL: u32 = 31;

    /// Gives every future vCPU of `vm` a ring of `entries` entries of 16 bytes each. `entries` is a power of two, at
    /// least about 128. The kernel keeps no bitmap from then on. With 65,536 entries a vCPU can write 256 MiB between
    /// two drains.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] if the kernel has no rings; another error if the number is not a power of two or
    /// out of bounds, or if the machine has a vCPU already.
    pub fn enable(vm: &VmFd, entries: u32) -> io::Result<KvmRingSize> {
        let caps = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING];
        let cap = caps.into_iter().find(|cap| vm.check_extension_raw((*cap).into()) > 0);
        let Some(cap) = cap else { return Err(io::ErrorKind::Unsupported.into()) };
        let mut enable = kvm_enable_cap { cap, ..Default::default() };
        enable.args[0] = u64::from(entries) * size_of::<kvm_dirty_gfn>() as u64;
        vm.enable_cap(&enable)?;
        Ok(KvmRingSize(entries))
    }

    /// Maps the rings of `vcpus`, which must be all vCPUs of `vm`. `size` is the result of [`enable`](Self::enable).
    ///
    /// # Errors
    /// If a ring cannot be mapped; [`KvmRingError`] within the error if a vCPU is given twice, or if its ring has a
    /// different size because it belongs to another machine.
    pub fn new<'a>(
        vm: &VmFd,
        vcpus: impl IntoIterator<Item = &'a VcpuFd>,
        size: KvmRingSize,
    ) -> io::Result<Self> {
        // SAFETY: the machine is borrowed, so its descriptor is open.
        let vm = unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) };
        let state = Mutex::new(State { rings: Vec::new(), logged: Vec::new() });
        let rings = Self(Arc::new(Inner { vm: fcntl_dupfd_cloexec(vm, 0)?, size, state }));
        vcpus.into_iter().try_for_each(|vcpu| rings.add(vcpu))?;
        Ok(rings)
    }

    /// Adds the ring of a vCPU that was plugged in later. This is possible at any time, also while a log is on. The
    /// next take finds what the vCPU wrote before, if its ring was not full in the meantime. So add the ring before the
    /// vCPU runs.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn add(&self, vcpu: &VcpuFd) -> io::Result<()> {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        let ring = Ring::map(vcpu, self.0.size.0, state.rings.len() as u64)?;
        if state.rings.iter().any(|other| other.vcpu == ring.vcpu) {
            return Err(KvmRingError::Twice { vcpu: ring.vcpu }.into());
        }
        state.rings.push(ring);
        Ok(())
    }

    /// Empties all rings and makes the kernel protect their pages again.
    ///
    /// # Errors
    /// If the kernel refuses; [`KvmRingError::RanOver`] within the error if a ring has overrun. Its vCPU cannot
    /// continue then: `KVM_RUN` would return at once every time.
    pub fn drain(&self) -> io::Result<()> {
        self.drained().map(drop)
    }

    /// Switches logging on. vCPUs may run. `slots` are regions as they were given to `KVM_SET_USER_MEMORY_REGION`. The
    /// block of each is found by its address.
    ///
    /// # Errors
    /// If a slot is not whole pages of a block, logging is on already, or the kernel refuses.
    ///
    /// # Safety
    /// Each region must be what `vm` has in that slot, and must stay so until the log is dropped; `vm` must be the
    /// machine of the rings.
    pub unsafe fn start<'vm>(
        &self,
        vm: &'vm VmFd,
        slots: Vec<kvm_userspace_memory_region>,
        blocks: &RamBlocks,
    ) -> io::Result<KvmRingLog<'vm>> {
        {
            let mut state = self.drained()?;
            if !state.logged.is_empty() {
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, "the rings are read by another log"));
            }
            // Set before the kernel fills the rings, so that the slot of every entry is known.
            state.logged =
                slots.iter().map(|region| (region.slot, PageBitmap::new(super::bits(region)))).collect();
        }
        let held = blocks.iter().map(|(_, block)| PageBitmap::new(block.pages())).collect();
        let reading = Reading(self.clone());
        // SAFETY: the caller guarantees that the slots are as described.
        let logging = unsafe { Logging::start(vm, slots, blocks) }?;
        Ok(KvmRingLog { logging, reading, page_size: blocks.page_size(), held })
    }

    fn drained(&self) -> io::Result<MutexGuard<'_, State>> {
        // A poisoned lock is fine: the bit of an entry is set as soon as the entry is taken out, even if the thread
        // panics afterwards.
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { rings, logged } = &mut *state;
        let mut found = 0;
        for ring in rings {
            found += ring.drain(|slot, page| {
                // The slot may no longer be logged: such entries are from before the end of the last log.
                let bits = logged.iter().find(|(logged, _)| *logged == slot);
                if let Some((_, bits)) = bits.filter(|(_, bits)| page < bits.pages()) {
                    bits.set(PageIndex(page));
                }
            });
        }
        if found > 0 {
            // A signal, such as one that kicks the vCPU of this thread, may interrupt the call. The next call resets
            // the rest.
            retry_on_intr(|| {
                // SAFETY: this number takes no argument.
                let reset = unsafe { NoArg::<RESET_DIRTY_RINGS>::new() };
                // SAFETY: as above; the descriptor is a virtual machine's.
                unsafe { ioctl(self.0.vm.as_fd(), reset) }
            })?;
        }
        if let Some(ring) = state.rings.iter().find(|ring| ring.ran_over) {
            return Err(KvmRingError::RanOver { vcpu: ring.vcpu, rings: state.rings.len() }.into());
        }
        Ok(state)
    }
}

/// The dirty log that reads the rings.
///
/// Logging is on from [`start`](KvmDirtyRings::start) until the log is dropped. A take fails with
/// [`KvmRingError::RanOver`] within its error if a ring has overrun.
///
/// **Warning:** after the guest has stopped, all its vCPUs must have left `KVM_RUN` before the last take. Only then are
/// all writes in the rings. A vCPU that was asked to stop but not waited for keeps its last writes in the processor's
/// own buffer, and these pages do not migrate. So the code that stops the guest must return only after the thread of
/// each vCPU has left `KVM_RUN`.
#[derive(Debug)]
pub struct KvmRingLog<'vm> {
    logging: Logging<'vm>,
    // Declared after `logging`, so it is dropped later: the bits are discarded when the kernel no longer logs.
    reading: Reading,
    page_size: PageSize,
    /// Bits that were put back, for each block.
    held: Vec<PageBitmap>,
}

/// The exclusive right of one log to read the rings.
#[derive(Debug)]
struct Reading(KvmDirtyRings);

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.0.state.lock().unwrap_or_else(PoisonError::into_inner).logged.clear();
    }
}

impl DirtyLog for KvmRingLog<'_> {
    fn begin(&mut self, blocks: &RamBlocks) -> io::Result<()> {
        self.logging.of.check(blocks)
    }

    fn take(&mut self, block: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()> {
        into.take_from(&self.held[block.0]);
        let taken: Vec<_> = {
            let state = self.reading.0.drained()?;
            let bits = |slot: &KvmSlot| state.logged.iter().find(|(logged, _)| *logged == slot.region.slot);
            let moved = |(_, bits): &(u32, PageBitmap)| {
                let taken = PageBitmap::new(bits.pages());
                bits.take(&taken);
                taken
            };
            self.logging
                .in_block(block)
                .filter_map(|slot| Some((slot.coarse(), moved(bits(slot)?))))
                .collect()
        };
        // The rings are unlocked here, free for the threads of the vCPUs.
        for (granules, bits) in taken {
            granules.mark(into.bits(), self.page_size, bits.words());
        }
        Ok(())
    }

    fn put_back(&mut self, block: BlockIndex, from: &PageBitmap) {
        self.held[block.0].merge(from.words());
    }
}

/// The ring of one vCPU, mapped.
struct Ring {
    /// The number of its vCPU.
    vcpu: u64,
    base: NonNull<kvm_dirty_gfn>,
    entries: u32,
    next: u32,
    /// Entries have been overwritten.
    ran_over: bool,
}

// SAFETY: the mapping is the ring's own until its drop, whichever thread does that; entries are accessed through raw
// pointers, only by the holder of a mutable reference to the ring.
unsafe impl Send for Ring {}

impl Ring {
    /// Maps the ring of a vCPU. `place` serves as the vCPU's number if the kernel does not report it.
    fn map(vcpu: &VcpuFd, entries: u32, place: u64) -> io::Result<Self> {
        // SAFETY: the vCPU is borrowed, so its descriptor is open.
        let vcpu = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let number = ring_of::number(vcpu).unwrap_or(place);
        let page = rustix::param::page_size() as u64;
        if !ring_of::has_pages(vcpu, Self::len(entries) as u64 / page)? {
            return Err(KvmRingError::Size { vcpu: number, entries }.into());
        }
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * page;
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a null hint lets the kernel choose a range that nothing else uses.
        let base = unsafe {
            mmap(std::ptr::null_mut(), Self::len(entries), rights, MapFlags::SHARED, vcpu, offset)
        }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { vcpu: number, base, entries, next: 0, ran_over: false })
    }

    fn len(entries: u32) -> usize {
        entries as usize * size_of::<kvm_dirty_gfn>()
    }

    /// Calls `found` with slot and page of every entry that the kernel has filled, and returns the entries to the
    /// kernel. Returns their number.
    fn drain(&mut self, mut found: impl FnMut(u32, u64)) -> u32 {
        let mut count = 0;
        while count < self.entries && self.hand_back(&mut found) {
            count += 1;
        }
        self.ran_over |= count == self.entries;
        count
    }

    fn entry(&self) -> *mut kvm_dirty_gfn {
        let index = (self.next % self.entries) as usize;
        // SAFETY: the index is below the number of entries, which the mapping has.
        unsafe { self.base.add(index) }.as_ptr()
    }

    /// Reads the next entry and returns it to the kernel, if the kernel has filled it.
    fn hand_back(&mut self, found: &mut impl FnMut(u32, u64)) -> bool {
        let entry = self.entry();
        // SAFETY: the entry is mapped, and its flags are its first field; the kernel writes them as an atomic.
        let flags = unsafe { AtomicU32::from_ptr(entry.cast()) };
        // Pairs with the kernel's release: slot and offset of a dirty entry are complete, and so is the page.
        if flags.load(Ordering::Acquire) & DIRTY == 0 {
            return false;
        }
        // SAFETY: mapped and aligned; the kernel does not touch an entry from dirty to reset.
        let kvm_dirty_gfn { slot, offset, .. } = unsafe { entry.read_volatile() };
        found(slot, offset);
        // Pairs with the kernel's acquire: it takes the entry only after we have read it.
        flags.store(RESET, Ordering::Release);
        self.next = self.next.wrapping_add(1);
        true
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: this range was mapped by us, and nothing points into it any more.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), Self::len(self.entries)) };
        debug_assert!(unmapped.is_ok(), "a range that was mapped whole is unmapped whole");
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ring(vCPU {}, {} entries at {:p})", self.vcpu, self.entries, self.base)
    }
}

/// Flags of an entry: the kernel has filled it; we have read it.
const DIRTY: u32 = 1;
const RESET: u32 = 2;
const RESET_DIRTY_RINGS: Opcode = opcode::none(0xae, 0xc7);
