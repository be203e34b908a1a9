//! Identifies the ring of a vCPU: what can be checked before the ring is mapped, and what can be wrong with it.
//!
//! If a ring is mapped with a wrong length, the process is killed (`SIGBUS`) or reads at wrong positions. So the length
//! is queried first: the kernel refuses a private mapping of a page that belongs to a ring, and of no other page.
//!
//! UNSAFETY: a page is mapped and unmapped again; nothing accesses it.
#![expect(unsafe_code, reason = "a page is mapped to see whether it can be")]

use std::{
    error::Error,
    fmt, io,
    os::fd::{AsRawFd, BorrowedFd},
};

use kvm_bindings::KVM_DIRTY_LOG_PAGE_OFFSET;
use rustix::{
    io::Errno,
    mm::{MapFlags, ProtFlags, mmap, munmap},
};

/// What is wrong with the dirty ring of a vCPU. It is inside the [`io::Error`] of
/// [`KvmDirtyRings`](super::KvmDirtyRings) and [`KvmRingLog`](super::KvmRingLog); [`io::Error::get_ref`] returns it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KvmRingError {
    /// The ring has overrun: some pages that the vCPU has written are unknown. There is no recovery.
    RanOver {
        /// The vCPU's number.
        vcpu: u64,
        /// The number of vCPUs whose rings are registered.
        rings: usize,
    },
    /// The vCPU's ring is registered already.
    Twice {
        /// The vCPU's number.
        vcpu: u64,
    },
    /// The vCPU's ring has a different size than was enabled, or it has no ring: it belongs to another machine.
    Size {
        /// The vCPU's number.
        vcpu: u64,
        /// The number of entries that was enabled.
        entries: u32,
    },
}

impl fmt::Display for KvmRingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RanOver { vcpu, rings } => write!(
                f,
                "the dirty ring of vCPU {vcpu} (of {rings} with rings) overflowed, so writes are lost: the kernel did not \
                 stop the vCPU in time; use larger rings, or the bitmap and no rings"
            ),
            Self::Twice { vcpu } => {
                write!(f, "the dirty ring of vCPU {vcpu} was passed twice: pass each ring once")
            }
            Self::Size { vcpu, entries } => write!(
                f,
                "expected vCPU {vcpu} to have the dirty ring of {entries} entries that was enabled, but it has a \
                 different one or none: vCPU and ring size belong to two machines, or the machine had vCPUs before its \
                 rings were enabled"
            ),
        }
    }
}

impl Error for KvmRingError {}

impl From<KvmRingError> for io::Error {
    fn from(error: KvmRingError) -> Self {
        let kind = match error {
            KvmRingError::RanOver { .. } => io::ErrorKind::Other,
            KvmRingError::Twice { .. } | KvmRingError::Size { .. } => io::ErrorKind::InvalidInput,
        };
        Self::new(kind, error)
    }
}

/// The number with which the vCPU was created, from the name that the kernel gives its descriptor.
pub(super) fn number(vcpu: BorrowedFd<'_>) -> Option<u64> {
    let name = std::fs::read_link(format!("/proc/self/fd/{}", vcpu.as_raw_fd())).ok()?;
    name.to_str()?.rsplit_once("kvm-vcpu:")?.1.parse().ok()
}

/// Whether the vCPU's ring has exactly `pages` pages.
///
/// # Errors
/// If the system cannot map a page.
pub(super) fn has_pages(vcpu: BorrowedFd<'_>, pages: u64) -> io::Result<bool> {
    Ok(has_page(vcpu, 0)? && has_page(vcpu, pages.saturating_sub(1))? && !has_page(vcpu, pages)?)
}

fn has_page(vcpu: BorrowedFd<'_>, page: u64) -> io::Result<bool> {
    let size = rustix::param::page_size();
    let offset = (u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) + page) * size as u64;
    // SAFETY: a null hint lets the kernel choose a range that nothing else uses.
    let mapped =
        unsafe { mmap(std::ptr::null_mut(), size, ProtFlags::READ, MapFlags::PRIVATE, vcpu, offset) };
    match mapped {
        Ok(base) => {
            // SAFETY: the page was mapped just now, and nothing else uses it.
            unsafe { munmap(base, size) }?;
            Ok(false)
        }
        Err(Errno::INVAL) => Ok(true),
        Err(error) => Err(error.into()),
    }
}
