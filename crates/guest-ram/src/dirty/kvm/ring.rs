//! The rings of the vCPUs: each lists the pages that it has written (`KVM_CAP_DIRTY_LOG_RING`, Linux 5.11).
//!
//! ```text
//! vCPU 0 ─▶ ring ─┐            full: the vCPU's thread drains, too
//! vCPU 1 ─▶ ring ─┴─ drain ─▶ bits of the slots ─ take ─▶ pending
//! ```
//!
//! What a take costs goes by the pages that were written, not by the memory there is. A vCPU whose ring is full leaves
//! the guest until somebody drains it: that slows a guest down that writes faster than its writes are looked at.
//!
//! A kernel that lets a vCPU write on past a full ring overwrites what it has listed: kernels that emulate the guest's
//! instructions have been seen to. The reserve at a ring's end is there to be never used, so a ring without a free entry
//! has run over. Nothing can mend that: both [`KvmDirtyRings::drain`] and the take fail from then on.
//!
//! UNSAFETY: rings are mapped memory, shared with the kernel. Their words are reached through atomics and raw reads;
//! which side may write an entry is told by its flags.
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

/// The rings of all vCPUs of a virtual machine. Clones are the same.
///
/// 1. [`enable`](Self::enable) for the machine that has no vCPU yet.
/// 2. [`new`](Self::new) with all its vCPUs. One that is plugged in later is [added](Self::add) before it runs.
/// 3. The thread of each vCPU calls [`drain`](Self::drain) whenever `KVM_RUN` comes back with
///    [`RING_FULL`](Self::RING_FULL), and goes on.
/// 4. For each migration, [`start`](Self::start).
///
/// **Warning:** what a vCPU writes whose ring is not here is in no log, and does not migrate. The kernel does not tell how
/// many vCPUs a machine has, so this cannot be noticed, unless the vCPU comes back with
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

/// The entries of each ring, as the kernel has been told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvmRingSize(u32);

impl KvmDirtyRings {
    /// `KVM_EXIT_DIRTY_RING_FULL`, the reason of an exit: `kvm-ioctls` gives it as `VcpuExit::Unsupported`.
    pub const RING_FULL: u32 = 31;

    /// Gives every vCPU that `vm` will have a ring of `entries`, a power of two from 128 on or so, of 16 bytes each. No
    /// bitmap is kept from then on. 65,536 entries let a vCPU write 256 MiB between two looks.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] if the kernel has no rings; if the number is no power of two or out of its bounds, or
    /// the machine has a vCPU already.
    pub fn enable(vm: &VmFd, entries: u32) -> io::Result<KvmRingSize> {
        let caps = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING];
        let cap = caps.into_iter().find(|cap| vm.check_extension_raw((*cap).into()) > 0);
        let Some(cap) = cap else { return Err(io::ErrorKind::Unsupported.into()) };
        let mut enable = kvm_enable_cap { cap, ..Default::default() };
        enable.args[0] = u64::from(entries) * size_of::<kvm_dirty_gfn>() as u64;
        vm.enable_cap(&enable)?;
        Ok(KvmRingSize(entries))
    }

    /// The rings of `vcpus`, which are all that `vm` has, of the size that [`enable`](Self::enable) has set.
    ///
    /// # Errors
    /// If a ring cannot be mapped; [`KvmRingError`] within the error if a vCPU is given twice, or its ring has not this size
    /// because it is another machine's.
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

    /// Adds the ring of a vCPU that was plugged in later, at any time, also while a log is on. What it has written before is
    /// found by the next take, if its ring has not been full meanwhile; so it is best added before it runs.
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

    /// Empties all rings and has the kernel protect their pages again.
    ///
    /// # Errors
    /// If the kernel refuses; [`KvmRingError::RanOver`] within the error if a ring ran over: then its vCPU cannot go on, for it
    /// would be sent back for ever.
    pub fn drain(&self) -> io::Result<()> {
        self.drained().map(drop)
    }

    /// Switches logging on. vCPUs may run. `slots` are regions as they were given to `KVM_SET_USER_MEMORY_REGION`; the block
    /// of each is found by its address.
    ///
    /// # Errors
    /// If a slot is not whole pages of a block, logging is on already, or the kernel refuses.
    ///
    /// # Safety
    /// Each region is what `vm` has in that slot, and stays so until the log is dropped; `vm` is the machine of the rings.
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
            // Before the kernel fills the rings, so that no entry meets a slot that is not known.
            state.logged =
                slots.iter().map(|region| (region.slot, PageBitmap::new(super::bits(region)))).collect();
        }
        let held = blocks.iter().map(|(_, block)| PageBitmap::new(block.pages())).collect();
        let reading = Reading(self.clone());
        // SAFETY: the caller vouches for the slots.
        let logging = unsafe { Logging::start(vm, slots, blocks) }?;
        Ok(KvmRingLog { logging, reading, page_size: blocks.page_size(), held })
    }

    fn drained(&self) -> io::Result<MutexGuard<'_, State>> {
        // Drained is drained: an entry that was taken out has its bit, whatever panicked behind it.
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { rings, logged } = &mut *state;
        let mut found = 0;
        for ring in rings {
            found += ring.drain(|slot, page| {
                // A slot that is not logged any more: entries from before the last log's end.
                let bits = logged.iter().find(|(logged, _)| *logged == slot);
                if let Some((_, bits)) = bits.filter(|(_, bits)| page < bits.pages()) {
                    bits.set(PageIndex(page));
                }
            });
        }
        if found > 0 {
            // A signal, such as one that kicks the vCPU of this thread, may end the call early; the next one resets the rest.
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
/// A take fails if a ring ran over: [`KvmRingError::RanOver`] within its error.
///
/// It is on from [`start`](KvmDirtyRings::start) to its drop.
///
/// **Warning:** when the guest has stopped, all its vCPUs must have left `KVM_RUN` before the last take: only then is
/// everything in the rings. A vCPU that was told to stop and not waited for keeps its last writes in the processor's own
/// buffer, and they do not migrate. So what stops the guest returns when each vCPU's thread is out of
/// `KVM_RUN`, and not before.
#[derive(Debug)]
pub struct KvmRingLog<'vm> {
    logging: Logging<'vm>,
    // Behind the field above: the bits are forgotten when the kernel does not log any more.
    reading: Reading,
    page_size: PageSize,
    /// Bits put back, of each block.
    held: Vec<PageBitmap>,
}

/// One log's turn at the rings.
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
        // With the rings free again for the vCPUs' threads.
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
    /// Its vCPU's number.
    vcpu: u64,
    base: NonNull<kvm_dirty_gfn>,
    entries: u32,
    next: u32,
    /// Entries have been overwritten.
    ran_over: bool,
}

// SAFETY: the mapping is the ring's own until its drop, whichever thread does that; entries are reached through raw
// pointers, by whoever has the ring mutably.
unsafe impl Send for Ring {}

impl Ring {
    /// The ring of a vCPU, which is the one at `place` if the kernel does not tell its number.
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

    /// Gives slot and page of every entry that the kernel has filled, and hands the entries back; says how many.
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

    /// Reads the next entry and hands it back, if the kernel has filled it.
    fn hand_back(&mut self, found: &mut impl FnMut(u32, u64)) -> bool {
        let entry = self.entry();
        // SAFETY: the entry is mapped, and its flags are its first field; the kernel writes them as an atomic.
        let flags = unsafe { AtomicU32::from_ptr(entry.cast()) };
        // Pairs with the kernel's release: slot and offset of an entry that is dirty are whole, and so is the page.
        if flags.load(Ordering::Acquire) & DIRTY == 0 {
            return false;
        }
        // SAFETY: mapped and aligned; the kernel leaves an entry alone from dirty to reset.
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
