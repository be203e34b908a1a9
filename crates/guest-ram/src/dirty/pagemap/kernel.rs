//! The system calls of the log: `userfaultfd` protects; a [scan](crate::memory::residency) finds written pages and
//! protects them again.
//!
//! With asynchronous protection, a write to a protected page notifies nobody: the kernel lifts the protection and the
//! writer continues. So these calls never change the contents of memory or who may write to it, and no fault waits for
//! a handler.
//!
//! UNSAFETY: ioctls are given pointers to structures that outlive the call. The addresses they act on are only looked
//! up in the page table.
#![expect(unsafe_code, reason = "ioctls that no crate wraps")]

use std::{io, ops::Range, os::fd::OwnedFd};

use linux_raw_sys::general::{
    _UFFDIO_WRITEPROTECT, PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING, UFFD_API,
    UFFD_FEATURE_WP_ASYNC, UFFD_FEATURE_WP_HUGETLBFS_SHMEM, UFFD_FEATURE_WP_UNPOPULATED, UFFD_USER_MODE_ONLY,
    UFFDIO_REGISTER_MODE_WP, uffdio_api, uffdio_range, uffdio_register, uffdio_writeprotect,
};
use rustix::{
    io::Errno,
    ioctl::{Opcode, Setter, Updater, ioctl, opcode},
    mm::{UserfaultfdFlags, userfaultfd},
};

use super::Refused;
use crate::memory::residency::Wanted;

/// A `userfaultfd` that protects asynchronously.
#[derive(Debug)]
pub(super) struct Userfault(OwnedFd);

impl Userfault {
    /// Opens a `userfaultfd`. It needs no privilege: faults inside the kernel, which an unprivileged `userfaultfd`
    /// cannot handle, need no handler here.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] if the kernel lacks this feature, [`io::ErrorKind::PermissionDenied`] if a
    /// seccomp filter forbids it.
    pub(super) fn open() -> io::Result<Self> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::from_bits_retain(UFFD_USER_MODE_ONLY);
        // SAFETY: nothing is registered yet, and the descriptor stays inside this value: what is registered is
        // protected asynchronously, which no access to memory can notice.
        let userfault = unsafe { userfaultfd(flags) }.map_err(|error| match error {
            // Before Linux 5.11 this flag did not exist, and neither did this protection.
            Errno::NOSYS | Errno::INVAL => unsupported(error),
            _ => Refused::because("userfaultfd cannot be opened", error.into()),
        })?;
        let mut api = uffdio_api { api: UFFD_API.into(), features: FEATURES.into(), ioctls: 0 };
        // SAFETY: the structure belongs to this ioctl number.
        let shake_hands = unsafe { Updater::<API, _>::new(&mut api) };
        // SAFETY: the descriptor is a userfaultfd.
        unsafe { ioctl(&userfault, shake_hands) }.map_err(|error| match error {
            Errno::INVAL => unsupported(error),
            _ => Refused::because("userfaultfd refuses its first call", error.into()),
        })?;
        Ok(Self(userfault))
    }

    /// Protects the range while it is mapped. Protection lasts until [`leave`](Self::leave), or until the drop at the
    /// latest.
    ///
    /// # Errors
    /// The kernel's error: `InvalidInput` if the range is not whole pages of its memory, `ResourceBusy` if another
    /// `userfaultfd` has it.
    pub(super) fn watch(&self, range: &Range<u64>) -> io::Result<()> {
        let mut register =
            uffdio_register { range: of(range), mode: UFFDIO_REGISTER_MODE_WP.into(), ioctls: 0 };
        // SAFETY: the structure belongs to this ioctl number.
        let request = unsafe { Updater::<REGISTER, _>::new(&mut register) };
        // SAFETY: the descriptor is a userfaultfd.
        unsafe { ioctl(&self.0, request) }?;
        if register.ioctls & (1 << _UFFDIO_WRITEPROTECT) == 0 {
            self.leave(range)?;
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut protect = uffdio_writeprotect { range: of(range), mode: PROTECT };
        // SAFETY: the structure belongs to this ioctl number.
        let request = unsafe { Updater::<WRITEPROTECT, _>::new(&mut protect) };
        // SAFETY: the descriptor is a userfaultfd.
        let protected = unsafe { ioctl(&self.0, request) };
        protected.or_else(|error| self.leave(range).and(Err(error.into())))
    }

    /// Lifts the protection permanently.
    ///
    /// # Errors
    /// If the range is no longer registered.
    pub(super) fn leave(&self, range: &Range<u64>) -> io::Result<()> {
        // SAFETY: the structure belongs to this ioctl number.
        let request = unsafe { Setter::<UNREGISTER, _>::new(of(range)) };
        // SAFETY: the descriptor is a userfaultfd.
        unsafe { ioctl(&self.0, request) }?;
        Ok(())
    }
}

fn of(range: &Range<u64>) -> uffdio_range {
    uffdio_range { start: range.start, len: range.end - range.start }
}

fn unsupported(error: Errno) -> io::Error {
    let why =
        "the kernel has no asynchronous write protection (userfaultfd with UFFD_FEATURE_WP_ASYNC, Linux 6.7)";
    Refused::with_kind(io::ErrorKind::Unsupported, why, error.into())
}

/// Pages that were never touched are protected as well, by a mark in the page table. The same applies to shared memory
/// that has no page at the moment.
const FEATURES: u32 = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_HUGETLBFS_SHMEM;

/// Selects pages that were written. Each is protected again in the step that reports it. If part of the range is not
/// watched, the scan is refused; some pages may then be protected without having been reported.
pub(super) const WRITTEN: Wanted = Wanted {
    flags: (PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC) as u64,
    inverted: 0,
    all_of: PAGE_IS_WRITTEN as u64,
    any_of: 0,
};

/// `UFFDIO_WRITEPROTECT_MODE_WP`: protect instead of release.
const PROTECT: u64 = 1;

const GROUP: u8 = 0xaa;
const API: Opcode = opcode::read_write::<uffdio_api>(GROUP, 0x3f);
const REGISTER: Opcode = opcode::read_write::<uffdio_register>(GROUP, 0);
const UNREGISTER: Opcode = opcode::read::<uffdio_range>(GROUP, 1);
const WRITEPROTECT: Opcode = opcode::read_write::<uffdio_writeprotect>(GROUP, 6);
