//! Guest memory that is mapped into this process.
//!
//! UNSAFETY: this file creates and removes mappings. A guest, a device thread or another channel may write to the
//! memory at any time, so no Rust reference to it is ever made: a [`GuestSlice`] is the only access to its bytes.
#![expect(unsafe_code, reason = "guest memory is reached through pointers alone")]

use std::{
    any::Any,
    fmt,
    fs::File,
    io,
    os::unix::fs::FileTypeExt,
    ptr::NonNull,
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::{
    fs::{SealFlags, fcntl_get_seals, fstatfs},
    mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap},
};

use super::{GuestSlice, backing::Backing};
use crate::Error;

/// The access mode of a mapping of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Pages are sent from it.
    Read,
    /// Pages are received into it.
    ReadWrite,
}

/// A range of guest memory mapped into this process.
///
/// It is unmapped when dropped, unless it was made [from raw parts](Mapping::from_raw).
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
    writable: bool,
    /// Whether somebody vouches for it that a page that is absent from the page table is zero. Otherwise the system is
    /// asked what is mapped there.
    absent_is_zero: bool,
    /// Whether this library has armed it, so that a page that is absent is not zero. It orders nothing: who asks for
    /// untouched pages while memory is being armed must order this anyway.
    filled: AtomicBool,
    /// The file of which this may be a mapping, if it can be asked what it contains.
    backing: Option<Backing>,
    may_shrink: bool,
    owner: Owner,
}

enum Owner {
    /// This number of bytes was mapped here; at least as many as requested.
    Mapped(usize),
    Foreign {
        _keep: Box<dyn Any + Send + Sync>,
    },
}

// SAFETY: the pointer is to memory that lives until the drop of the mapping or of what `owner` keeps, whichever thread
// does that; it is accessed through raw pointers only.
unsafe impl Send for Mapping {}
// SAFETY: as above; concurrent access is part of the contract and happens through raw copies only.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps new memory of `len` bytes, all zero: private, not reserved, in huge pages where the system provides them.
    /// It uses no memory until it is touched, so terabytes are fine. Pages that were never touched are zero. The page
    /// table lists them, so they are not read.
    ///
    /// **Warning:** register no `userfaultfd` for missing pages in it, and map nothing over it: pages that those would
    /// fill in count as zero and are lost. What this library arms (feature `fault`) is known to it. The embedder must map memory
    /// that is to be filled in another way itself and use [`from_raw`](Self::from_raw).
    ///
    /// # Errors
    /// If the system refuses the mapping.
    pub fn anonymous(len: u64) -> io::Result<Self> {
        let len = address_space(len)?;
        if len == 0 {
            return Ok(Self::empty());
        }
        // SAFETY: a null hint lets the kernel choose a range that nothing else uses.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                // An interpreter knows no others.
                if cfg!(miri) { MapFlags::PRIVATE } else { MapFlags::PRIVATE | MapFlags::NORESERVE },
            )
        }?;
        if !cfg!(miri) {
            // SAFETY: the range was mapped just now and this advice does not change its contents. A kernel without huge
            // pages refuses it, which only costs speed.
            let _ = unsafe { madvise(base, len, Advice::LinuxHugepage) };
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let owner = Owner::Mapped(len);
        Ok(Self {
            base,
            len,
            writable: true,
            absent_is_zero: true,
            filled: AtomicBool::new(false),
            backing: None,
            may_shrink: false,
            owner,
        })
    }

    /// Maps `len` bytes of `file` from `offset` on, shared with the file. The file may be a memfd or a file of huge
    /// pages that another process has passed as a descriptor (`File::from(OwnedFd)`), so that the engine runs beside
    /// the monitor and not in it.
    ///
    /// If the file is truncated while it is mapped, system calls on the lost part fail with `EFAULT`; the copies of
    /// [`GuestSlice`] would raise `SIGBUS` there. So pages of a file that others can access are moved by system calls
    /// only and never read by the engine: zero pages that are no holes are sent like any others, and such memory is not compressed and
    /// not sent over main. A memfd that is sealed against shrinking (`F_SEAL_SHRINK`) cannot be truncated.
    /// [`may_shrink`](Self::may_shrink) returns whether the file may become shorter; call
    /// [`never_shrinks`](Self::never_shrinks) to declare that it never will.
    ///
    /// Holes of the file are zero and are not read, because a read of a hole allocates memory in the file for good. The
    /// file is asked for them if it is a memfd or on tmpfs, ext4 or hugetlbfs; for this it is opened again through
    /// `/proc`. See [`RamBlock::touched`](crate::RamBlock::touched).
    ///
    /// # Errors
    /// If `offset` is not a multiple of the size of the file's pages, or the system refuses the mapping;
    /// [`Error::ShortFile`] within the error if the file ends before the mapping would.
    pub fn of_file(file: &File, offset: u64, len: u64, access: Access) -> io::Result<Self> {
        let len = address_space(len)?;
        if len == 0 {
            return Ok(Self::empty());
        }
        let protection = match access {
            Access::Read => ProtFlags::READ,
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        // Checked before the mapping is made: a seal is permanent, and a sealed file keeps the length that is checked
        // below.
        let may_shrink = may_shrink(file)?;
        // Huge pages are mapped and unmapped whole.
        let whole = len.checked_next_multiple_of(pages_of(file)?).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a null hint lets the kernel choose a range that nothing else uses.
        let base = unsafe { mmap(std::ptr::null_mut(), whole, protection, MapFlags::SHARED, file, offset) }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let (writable, owner) = (access == Access::ReadWrite, Owner::Mapped(whole));
        let backing = Backing::of(file);
        let mapping = Self {
            base,
            len,
            writable,
            absent_is_zero: false,
            filled: AtomicBool::new(false),
            backing,
            may_shrink,
            owner,
        };
        // Checked after the mapping is made: a writable mapping extends a file of huge pages to the needed length.
        within(file, offset, len as u64)?;
        Ok(mapping)
    }

    /// Wraps memory that the caller has mapped; `keep` is dropped with the mapping.
    ///
    /// # Safety
    /// `base .. base + len` must stay mapped, readable and writable until the mapping is dropped (dropping `keep` may
    /// unmap it), and no Rust reference to any of it may be alive while the mapping is. If it is not writable, the
    /// mapping must be made [`read_only`](Self::read_only) before it is used. Parts that nothing may access (`PROT_NONE`,
    /// as for memory that the guest has unplugged) are allowed if no access to them is made, and if they do not change
    /// during a migration: the blocks [list them](crate::RamBlocks::inaccessible).
    pub unsafe fn from_raw(base: NonNull<u8>, len: usize, keep: impl Any + Send + Sync) -> Self {
        let owner = Owner::Foreign { _keep: Box::new(keep) };
        Self {
            base,
            len,
            writable: true,
            absent_is_zero: false,
            filled: AtomicBool::new(false),
            backing: None,
            may_shrink: false,
            owner,
        }
    }

    /// Names the file of which all or parts of this memory are a mapping, for memory [from raw parts](Self::from_raw).
    /// The file is then asked for its holes, as with [`of_file`](Self::of_file). A wrong file does no harm: the system is
    /// asked whether it is the one that is mapped. The file may be closed afterwards.
    #[must_use]
    pub fn with_file(mut self, file: &File) -> Self {
        self.backing = Backing::of(file);
        self
    }

    /// Forbids receiving into the mapping: for memory that is mapped without write permission.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.writable = false;
        self
    }

    /// Declares that a page that is absent from the page table is zero. On Linux 6.7 or later, pages that the guest has
    /// never touched are then found through the page table and not read. For a guest that uses a part of its RAM this
    /// is most of the first pass. [`anonymous`](Self::anonymous) memory has this property from the beginning.
    ///
    /// This is seldom necessary: without it, the system is asked whether the memory is private and anonymous and no
    /// `userfaultfd` fills it ([`RamBlock::touched`](crate::RamBlock::touched)). The declaration saves this question,
    /// which costs about 40 ms per GiB of touched memory in pages of 4 KiB, once per migration, and works without
    /// `/proc/self/smaps`.
    ///
    /// # Safety
    /// **Warning:** if the declaration is false, guest memory is lost without an error. As long as the mapping exists,
    /// all of it must be private anonymous memory, and nothing may fill its pages when they are first touched: it must
    /// not be a mapping of a file or of a memfd, private or shared, and no `userfaultfd` may be registered for missing
    /// pages in it.
    #[must_use]
    pub unsafe fn assume_absent_is_zero(mut self) -> Self {
        self.absent_is_zero = true;
        self
    }

    /// Declares that nobody truncates the mapped file while it is mapped, although no seal prevents it. A file on a
    /// disk or of huge pages cannot be sealed.
    ///
    /// **Warning:** if the file is truncated nevertheless, `SIGBUS` ends this process when a page beyond the new end is
    /// read, compressed or encrypted.
    #[must_use]
    pub fn never_shrinks(mut self) -> Self {
        self.may_shrink = false;
        self
    }

    /// Whether another process may truncate the file: it is mapped by [`of_file`](Self::of_file), has no seal against
    /// shrinking (`F_SEAL_SHRINK`), and was not declared to [never shrink](Self::never_shrinks). Its pages are then
    /// moved by system calls only.
    #[inline]
    pub fn may_shrink(&self) -> bool {
        self.may_shrink
    }

    pub(crate) fn is_absent_zero(&self) -> bool {
        self.absent_is_zero && !self.filled.load(Ordering::Relaxed)
    }

    /// Notes that something fills pages when they are first touched, or no longer does.
    #[cfg(feature = "fault")]
    pub(crate) fn filled(&self, is_filled: bool) {
        self.filled.store(is_filled, Ordering::Relaxed);
    }

    /// The number of bytes from the first on that contain nothing but this memory: whole host pages if it was mapped here.
    #[cfg(feature = "fault")]
    pub(crate) fn owned_len(&self) -> u64 {
        match self.owner {
            Owner::Mapped(len) => len.next_multiple_of(rustix::param::page_size()) as u64,
            Owner::Foreign { .. } => self.len as u64,
        }
    }

    pub(crate) fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    fn empty() -> Self {
        let owner = Owner::Foreign { _keep: Box::new(()) };
        let base = NonNull::dangling();
        Self {
            base,
            len: 0,
            writable: true,
            absent_is_zero: false,
            filled: AtomicBool::new(false),
            backing: None,
            may_shrink: false,
            owner,
        }
    }

    /// The length in bytes.
    #[inline]
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether the mapping is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether pages can be received into it.
    #[inline]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// The `len` bytes at `offset`; `None` if they do not lie inside the mapping.
    #[inline]
    pub fn slice(&self, offset: u64, len: usize) -> Option<GuestSlice<'_>> {
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(len)?;
        if end > self.len {
            return None;
        }
        // SAFETY: `start <= end <= self.len`, so the result is inside the mapping or one past its end.
        let ptr = unsafe { self.base.add(start) };
        // SAFETY: they lie inside the mapping, which is borrowed for as long as the slice lives.
        Some(unsafe { GuestSlice::new(ptr, len, self.writable) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if let Owner::Mapped(len) = self.owner {
            // SAFETY: this range was mapped by us, and every slice of it has borrowed `self`, so none lives.
            let unmapped = unsafe { munmap(self.base.as_ptr().cast(), len) };
            debug_assert!(unmapped.is_ok(), "a range that was mapped whole is unmapped whole");
        }
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({:#x} bytes at {:p})", self.len, self.base)
    }
}

/// The size of the pages in which a file is mapped; 1 if it is the size of the host's pages.
fn pages_of(file: &File) -> io::Result<usize> {
    let stat = fstatfs(file)?;
    let huge = stat.f_type == libc::HUGETLBFS_MAGIC;
    Ok(if huge { usize::try_from(stat.f_bsize).unwrap_or(1).max(1) } else { 1 })
}

/// Whether nothing prevents others from truncating the file. Memory of a device has no length to truncate.
fn may_shrink(file: &File) -> io::Result<bool> {
    if file.metadata()?.file_type().is_char_device() {
        return Ok(false);
    }
    // A file that cannot be sealed is not sealed.
    Ok(!fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK)))
}

/// Refuses a part of a file that reaches beyond its end, where an access would raise `SIGBUS`.
fn within(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let found = file.metadata()?;
    // Only regular files report their length this way.
    if !found.is_file() || offset.checked_add(len).is_some_and(|end| end <= found.len()) {
        return Ok(());
    }
    let short = Error::ShortFile { offset, len, size: found.len() };
    Err(io::Error::new(io::ErrorKind::InvalidInput, short))
}

fn address_space(len: u64) -> io::Result<usize> {
    usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_outside_the_mapping_does_not_exist() {
        let mapping = Mapping::anonymous(8192).expect("8 KiB");
        assert!(mapping.slice(0, 8192).is_some());
        assert!(mapping.slice(8192, 0).is_some());
        assert!(mapping.slice(1, 8192).is_none());
        assert!(mapping.slice(u64::MAX, 2).is_none());
    }

    #[test]
    fn one_set_bit_anywhere_makes_a_page_not_zero() {
        let mapping = Mapping::anonymous(4096 + 3).expect("memory");
        for len in [4096, 4096 + 3] {
            let slice = mapping.slice(0, len).expect("inside");
            assert!(slice.is_zero());
            for at in [0, 7, 8, 63, 64, 4095, len - 1] {
                mapping.slice(at as u64, 1).expect("inside").copy_from(&[1]);
                assert!(!slice.is_zero(), "byte {at} of {len}");
                mapping.slice(at as u64, 1).expect("inside").clear();
            }
        }
    }

    #[test]
    fn terabytes_that_nobody_touches_cost_nothing() {
        let mapping = Mapping::anonymous(4 << 40).expect("4 TiB, not reserved");
        let last = mapping.slice((4 << 40) - 4096, 4096).expect("inside");
        last.copy_from(&[7; 4096]);
        assert!(!last.is_zero());
    }

    #[test]
    #[should_panic(expected = "mapped for reading")]
    fn memory_mapped_for_reading_is_not_written_to() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(4096).expect("sized");
        let mapping = Mapping::of_file(&file, 0, 4096, Access::Read).expect("mapped");
        mapping.slice(0, 1).expect("inside").copy_from(&[1]);
    }

    fn memfd(bytes: u64) -> File {
        let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
        let memory = File::from(rustix::fs::memfd_create("guest", flags).expect("a memfd"));
        memory.set_len(bytes).expect("sized");
        memory
    }

    /// Regression: the mapping was made, and the first access to it ended the process.
    #[test]
    fn file_that_ends_before_the_mapping_is_refused_with_both_lengths() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(8192 + 1).expect("sized");
        for file in [file, memfd(8192 + 1)] {
            for access in [Access::Read, Access::ReadWrite] {
                assert!(Mapping::of_file(&file, 4096, 4096 + 1, access).is_ok());
                for (offset, len) in [(0, 8192 + 2), (4096, 8192), (8192, 2), (12288, 1)] {
                    let refused = Mapping::of_file(&file, offset, len, access).expect_err("too long");
                    let usage = refused.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
                    assert_eq!(usage, Some(&Error::ShortFile { offset, len, size: 8193 }));
                }
            }
        }
        let empty = memfd(0);
        assert!(Mapping::of_file(&empty, 0, 1 << 20, Access::ReadWrite).is_err());
        assert!(Mapping::of_file(&empty, 0, 0, Access::ReadWrite).is_ok());
    }

    #[test]
    fn file_may_shrink_unless_it_is_sealed_or_somebody_vouches_for_it() {
        let map = |file: &File| Mapping::of_file(file, 0, 4096, Access::ReadWrite).expect("mapped");
        let memory = memfd(4096);
        assert!(map(&memory).may_shrink());
        assert!(!map(&memory).never_shrinks().may_shrink());
        rustix::fs::fcntl_add_seals(&memory, SealFlags::GROW).expect("sealed");
        assert!(map(&memory).may_shrink());
        rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK).expect("sealed");
        assert!(!map(&memory).may_shrink());
        let file = tempfile::tempfile().expect("a file");
        file.set_len(4096).expect("sized");
        assert!(map(&file).may_shrink());
        assert!(!Mapping::anonymous(4096).expect("memory").may_shrink());
        let zero = File::options().read(true).write(true).open("/dev/zero").expect("a device");
        assert!(!map(&zero).may_shrink());
    }

    #[test]
    fn foreign_memory_is_kept_alive_and_not_unmapped() {
        let mut memory = vec![3_u8; 4096].into_boxed_slice();
        let base = NonNull::new(memory.as_mut_ptr()).expect("not null");
        // SAFETY: the box is kept by the mapping and not used otherwise.
        let mapping = unsafe { Mapping::from_raw(base, 4096, memory) };
        let mut byte = [0];
        mapping.slice(4095, 1).expect("inside").copy_to(&mut byte);
        assert_eq!(byte, [3]);
    }
}
