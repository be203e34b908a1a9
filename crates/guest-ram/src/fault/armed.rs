//! Memory whose page faults are delivered, and the calls that end them.
//!
//! Each call may do a part of its work; it is then continued until something ends it, and the end is returned as a value. Only
//! what nobody can continue after is an error.

use std::{
    fmt, io,
    ops::Range,
    os::fd::{AsFd, BorrowedFd, IntoRawFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use linux_raw_sys::general as sys;
use rustix::io::{Errno, read};
use zerocopy::IntoBytes;

use crate::{BlockIndex, BlockOffset, RamBlocks};

use super::{
    FaultError, FaultEvent, Features, Modes, Region, Userfault,
    event::{MESSAGES, Message},
    kernel,
    memory::{mapping, refuse_contents, regions},
};

/// Memory that is armed: the accesses of its [modes](Modes) wait until they are served through this value. Its drop
/// ends that; waiting threads then continue.
///
/// **Warning:** a missing page that is accessed after the drop reads as zero. A [`Pager`](super::Pager) prevents that.
pub struct Armed {
    userfault: Userfault,
    modes: Modes,
    regions: Vec<Region>,
    /// The calls that all regions allow, one bit each.
    calls: u64,
    /// The memory, which must not be unmapped before it is no longer registered. `None` for memory of another process.
    blocks: Option<Arc<RamBlocks>>,
    /// Whether the drop has nothing to end. It orders nothing.
    is_disarmed: AtomicBool,
}

impl fmt::Debug for Armed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Armed")
            .field("modes", &self.modes)
            .field("regions", &self.regions)
            .field("is_own", &self.is_own())
            .finish_non_exhaustive()
    }
}

/// How far a call came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// The number of bytes that were placed, from the first on.
    pub bytes: u64,
    /// What ended the call.
    pub end: PlaceEnd,
}

/// What ended a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlaceEnd {
    /// Everything was placed.
    All,
    /// The next page exists already. Its waiting threads were not woken.
    Exists,
    /// Memory is being discarded. Its event must be read; then the call can be continued.
    Changing,
    /// The memory is no longer mapped, or no longer armed. In shared memory: the file has become shorter, or has no page.
    Gone,
}

/// What a protected page allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// A write waits.
    Protected,
    /// Writes are allowed. Waiting writers are woken.
    Writable,
}

impl Armed {
    /// Arms the memory of all mapped blocks that are not [ignored](crate::RamBlock::ignored). Pages that exist cause no
    /// faults of [missing](Modes::MISSING) pages.
    ///
    /// # Errors
    /// If the memory or the kernel does not allow this. Nothing is armed then.
    pub fn arm(userfault: Userfault, blocks: Arc<RamBlocks>, modes: Modes) -> Result<Self, FaultError> {
        let regions = regions(&blocks)?;
        Self::arm_regions(userfault, blocks, regions, modes)
    }

    /// Does the same with regions that were found before.
    pub(super) fn arm_regions(
        userfault: Userfault,
        blocks: Arc<RamBlocks>,
        regions: Vec<Region>,
        modes: Modes,
    ) -> Result<Self, FaultError> {
        for region in &regions {
            let lacking = userfault.features().lacking(modes.need(region.kind));
            if lacking != Features::NONE {
                return Err(FaultError::Lacks { lacking, since: lacking.since() });
            }
        }
        let blocks = Some(blocks);
        let mut armed = Self {
            userfault,
            modes,
            regions: Vec::new(),
            calls: u64::MAX,
            blocks,
            is_disarmed: AtomicBool::new(false),
        };
        for region in regions {
            // Regions are added one by one, so that the drop ends what was registered.
            armed.register(region)?;
        }
        Ok(armed)
    }

    /// Like [`arm`](Self::arm) for [missing](Modes::MISSING) pages of memory that is zero, so that each page causes a fault.
    /// Pages of zeros that were read or allocated are dropped first, because a page that exists causes no fault.
    ///
    /// **Warning:** nothing may write to the memory in the meantime.
    ///
    /// # Errors
    /// [`FaultError::NotEmpty`], or as [`arm`](Self::arm).
    pub fn arm_empty(userfault: Userfault, blocks: Arc<RamBlocks>) -> Result<Self, FaultError> {
        refuse_contents(&blocks)?;
        for region in regions(&blocks)? {
            kernel::drop_pages(&region.addresses, region.kind.is_private())
                .map_err(FaultError::system("drop pages of zeros"))?;
        }
        Self::arm(userfault, blocks, Modes::MISSING)
    }

    /// Memory of another process.
    pub(super) fn elsewhere(userfault: Userfault, modes: Modes, calls: u64, regions: Vec<Region>) -> Self {
        Self { userfault, modes, regions, calls, blocks: None, is_disarmed: AtomicBool::new(false) }
    }

    fn register(&mut self, region: Region) -> Result<(), FaultError> {
        let calls = kernel::register(self.userfault.fd(), &region.addresses, self.modes.bits());
        let calls = calls.map_err(|error| match error {
            Errno::BUSY => FaultError::Watched { name: region.name.clone() },
            Errno::INVAL => FaultError::Unsuitable {
                name: region.name.clone(),
                why: "the kernel does not deliver faults of this kind of memory".to_owned(),
            },
            error => FaultError::system("register memory")(error),
        })?;
        let name = region.name.clone();
        // Protection fills nothing: an untouched page is zero then.
        let fills = self.modes.contains(Modes::MISSING) || self.modes.contains(Modes::MINOR);
        if let Some(mapping) = self.blocks.as_ref().and_then(|all| mapping(all.get(region.block)?)) {
            mapping.filled(fills);
        }
        self.regions.push(region);
        self.calls &= calls;
        if calls & self.modes.calls() == self.modes.calls() {
            return Ok(());
        }
        let why = format!(
            "the kernel cannot serve its faults: expected the calls {:#x}, found {calls:#x}",
            self.modes.calls()
        );
        Err(FaultError::Unsuitable { name, why })
    }

    /// The armed memory of each block.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The armed memory of a block.
    pub fn region(&self, block: BlockIndex) -> Option<&Region> {
        self.regions.iter().find(|region| region.block == block)
    }

    /// Which accesses cause faults.
    pub fn modes(&self) -> Modes {
        self.modes
    }

    /// The features that can be used.
    pub fn features(&self) -> Features {
        self.userfault.features()
    }

    /// Whether it is memory of this process, which this value keeps mapped.
    pub fn is_own(&self) -> bool {
        self.blocks.is_some()
    }

    /// The blocks, if it is memory of this process.
    pub fn blocks(&self) -> Option<&Arc<RamBlocks>> {
        self.blocks.as_ref()
    }

    /// Reads what has happened, without waiting: adds it to `events`. The descriptor [is readable](AsFd) when there is
    /// something.
    ///
    /// # Errors
    /// If the system cannot read.
    pub fn read_events(&self, events: &mut Vec<FaultEvent>) -> Result<(), FaultError> {
        self.read_some(MESSAGES, events)
    }

    /// Reads at most `most` messages.
    pub(super) fn read_some(&self, most: usize, events: &mut Vec<FaultEvent>) -> Result<(), FaultError> {
        let mut messages = [Message::empty(); MESSAGES];
        let most = most.min(MESSAGES) * size_of::<Message>();
        let bytes = match read(self.userfault.fd(), &mut messages.as_mut_bytes()[..most]) {
            Ok(bytes) => bytes,
            // Nothing, or another thread has read it.
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(error) => return Err(FaultError::system("read page faults")(error)),
        };
        for message in messages.iter().take(bytes / size_of::<Message>()) {
            message.read(&self.regions, events);
        }
        Ok(())
    }

    /// Places missing pages with these bytes, whole host pages, and wakes the threads that wait for them. With
    /// [`Protection::Protected`], the pages are protected against writing from the beginning.
    ///
    /// # Errors
    /// If the bytes are not whole host pages, or the system fails.
    pub fn copy(
        &self,
        block: BlockIndex,
        offset: BlockOffset,
        bytes: &[u8],
        protection: Protection,
    ) -> Result<Placed, FaultError> {
        let range = self.range(block, offset, bytes.len() as u64)?;
        let protect = protection == Protection::Protected;
        self.place(&range, "place a page", |fd, rest| {
            let done = usize::try_from(rest.start - range.start).unwrap_or(usize::MAX);
            kernel::copy(fd, rest.start, bytes.get(done..).unwrap_or_default(), protect)
        })
    }

    /// Like [`copy`](Self::copy), for private memory of this process, but moves the pages of `bytes` instead of copying them, as far as it
    /// comes; they read as zero then. `None` if the kernel cannot move these pages: then they may be copied.
    pub(super) fn take(&self, block: BlockIndex, offset: BlockOffset, bytes: &mut [u8]) -> Option<Placed> {
        let range = self.range(block, offset, bytes.len() as u64).ok()?;
        let (done, result) = kernel::take(self.userfault.fd(), range.start, bytes);
        let end = match result {
            Ok(()) => return Some(Placed { bytes: bytes.len() as u64, end: PlaceEnd::All }),
            Err(Errno::EXIST) => PlaceEnd::Exists,
            Err(Errno::AGAIN) => PlaceEnd::Changing,
            // A part was done: the next call says why it was not more.
            Err(_) if done > 0 => PlaceEnd::All,
            Err(error) => {
                tracing::debug!(error = %io::Error::from(error), "pages are copied, because they cannot be moved");
                return None;
            }
        };
        Some(Placed { bytes: done, end })
    }

    /// Whether pages can be [taken](Self::take).
    pub(super) fn takes(&self) -> bool {
        self.is_own() && self.features().contains(Features::MOVE)
    }

    /// Places pages of zeros, and wakes the threads that wait for them. Where the kernel has no such call, as for huge pages,
    /// zeros are copied.
    ///
    /// # Errors
    /// If the bytes are not whole host pages, or the system fails.
    pub fn zero(&self, block: BlockIndex, offset: BlockOffset, len: u64) -> Result<Placed, FaultError> {
        let range = self.range(block, offset, len)?;
        if self.calls & (1 << sys::_UFFDIO_ZEROPAGE) != 0 {
            return self.place(&range, "place a page of zeros", kernel::zero);
        }
        let host_page = self.region(block).map_or(0, |region| region.host_page);
        let zeros = vec![0; usize::try_from(host_page).unwrap_or(0)];
        self.place(&range, "place a page of zeros", |fd, rest| {
            match kernel::copy(fd, rest.start, &zeros, false) {
                // There is more.
                (bytes, Ok(())) if rest.end - rest.start > bytes => (bytes, Err(Errno::AGAIN)),
                done => done,
            }
        })
    }

    /// Maps pages that are in the file, for a fault of kind [`Minor`](super::FaultKind::Minor), and wakes its threads.
    ///
    /// # Errors
    /// If the bytes are not whole host pages, or the system fails.
    pub fn resume(&self, block: BlockIndex, offset: BlockOffset, len: u64) -> Result<Placed, FaultError> {
        let range = self.range(block, offset, len)?;
        self.place(&range, "map a page of the file", kernel::resume)
    }

    /// Makes missing pages inaccessible for good, and wakes the threads that wait for them. A thread that accesses such a
    /// page gets `SIGBUS`, a system call `EFAULT`. A vCPU leaves the guest: with `SIGBUS` (`BUS_MCEERR_AR`, to be injected as a
    /// machine check) or `EFAULT`. **Warning:** if the kernel emulates the instruction, it reports an MMIO access to the address
    /// instead. A monitor must treat that as an error where the guest has RAM, and must not answer it with bytes.
    ///
    /// # Errors
    /// [`FaultError::Lacks`] without [`Features::POISON`]; if the bytes are not whole host pages, or the system fails.
    pub fn poison(&self, block: BlockIndex, offset: BlockOffset, len: u64) -> Result<Placed, FaultError> {
        let lacking = self.features().lacking(Features::POISON);
        if lacking != Features::NONE {
            return Err(FaultError::Lacks { lacking, since: lacking.since() });
        }
        let range = self.range(block, offset, len)?;
        self.place(&range, "poison a page", kernel::poison)
    }

    /// Protects pages against writing, or ends that. Pages that do not exist are protected with
    /// [`Features::PROTECT_UNPOPULATED`] only.
    ///
    /// # Errors
    /// If the bytes are not whole host pages, or the system fails.
    pub fn protect(
        &self,
        block: BlockIndex,
        offset: BlockOffset,
        len: u64,
        protection: Protection,
    ) -> Result<Placed, FaultError> {
        let range = self.range(block, offset, len)?;
        // This call reports no part: it is repeated as a whole.
        self.place(&range, "protect memory against writing", |fd, rest| {
            (0, kernel::protect(fd, rest, protection == Protection::Protected))
        })
        .map(|placed| match placed.end {
            PlaceEnd::All => Placed { bytes: len, ..placed },
            _ => placed,
        })
    }

    /// Wakes the threads that wait for these pages. They try again, and cause another fault if nothing has changed.
    ///
    /// # Errors
    /// If the bytes are not whole host pages, or the system fails.
    pub fn wake(&self, block: BlockIndex, offset: BlockOffset, len: u64) -> Result<(), FaultError> {
        let range = self.range(block, offset, len)?;
        kernel::wake(self.userfault.fd(), &range)
            .map_err(FaultError::system("wake the threads that wait for a page"))
    }

    /// Ends the armament before the drop, also of memory of another process. Waiting threads continue, and missing pages read as
    /// zero. Errors go to the log.
    pub fn disarm(&self) {
        self.is_disarmed.store(true, Ordering::Relaxed);
        for region in &self.regions {
            // Closing the descriptor is not enough: another process may have it, too.
            if let Err(error) = kernel::unregister(self.userfault.fd(), &region.addresses) {
                let error = io::Error::from(error);
                tracing::warn!(block = ?region.name, %error, "memory stays armed until it is unmapped");
            }
            // The kernel wakes only those that wait for missing pages. After the call above, no thread begins to wait.
            if let Err(error) = kernel::wake(self.userfault.fd(), &region.addresses) {
                let error = io::Error::from(error);
                tracing::warn!(block = ?region.name, %error, "threads that wait for the memory were not woken");
            }
            if let Some(mapping) = self.blocks.as_ref().and_then(|all| mapping(all.get(region.block)?)) {
                mapping.filled(false);
            }
        }
    }

    /// Leaves the memory armed until this process ends or unmaps it: who accesses a missing page waits without end.
    pub(super) fn stay_armed(&self) {
        self.is_disarmed.store(true, Ordering::Relaxed);
        // The kernel disarms memory when its last descriptor is closed.
        match rustix::io::fcntl_dupfd_cloexec(self.userfault.fd(), 0) {
            Ok(kept) => drop(kept.into_raw_fd()),
            Err(error) => tracing::error!(error = %io::Error::from(error), "missing pages read as zero"),
        }
    }

    fn range(&self, block: BlockIndex, offset: BlockOffset, len: u64) -> Result<Range<u64>, FaultError> {
        let range = self.region(block).and_then(|region| region.range(offset, len));
        range.ok_or(FaultError::Outside { block: block.0, offset, len })
    }

    /// Repeats a call that does a part of `range`, from where it stopped.
    fn place(
        &self,
        range: &Range<u64>,
        what: &'static str,
        call: impl Fn(BorrowedFd<'_>, &Range<u64>) -> kernel::Done,
    ) -> Result<Placed, FaultError> {
        let mut rest = range.clone();
        let end = loop {
            let (bytes, result) = call(self.userfault.fd(), &rest);
            rest.start = rest.start.saturating_add(bytes).min(rest.end);
            match result {
                Ok(()) => {
                    rest.start = rest.end;
                    break PlaceEnd::All;
                }
                // A part was done.
                Err(_) if bytes > 0 && rest.start < rest.end => {}
                Err(Errno::INTR) => {}
                Err(Errno::EXIST) => break PlaceEnd::Exists,
                Err(Errno::AGAIN) => break PlaceEnd::Changing,
                // The last is what a shared page beyond the end of its file, or without contents, is called.
                Err(Errno::NOENT | Errno::FAULT) => break PlaceEnd::Gone,
                Err(error) => return Err(FaultError::system(what)(error)),
            }
        };
        Ok(Placed { bytes: rest.start - range.start, end })
    }

    pub(super) fn calls(&self) -> u64 {
        self.calls
    }
}

impl AsFd for Armed {
    /// The descriptor: readable when there are events.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.userfault.fd()
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        if self.is_own() && !self.is_disarmed.load(Ordering::Relaxed) {
            self.disarm();
        }
    }
}
