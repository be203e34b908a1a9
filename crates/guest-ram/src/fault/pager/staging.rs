//! A buffer whose pages the kernel can move into the guest's memory instead of copying them: a huge page, where the system has them.
//!
//! UNSAFETY: the mapping belongs to this value alone, from its creation to its drop. The kernel takes pages out of it only in calls that
//! have it mutably; what was taken reads as zero.
#![expect(unsafe_code, reason = "a mapping of its own")]

use std::{
    io,
    ops::{Deref, DerefMut},
    ptr::NonNull,
    slice,
};

use crate::AlignedBuffer;

/// The bytes of a huge page that small pages of private memory can become.
pub(super) const HUGE: usize = 2 << 20;

/// A buffer for loads.
pub(super) enum LoadBuffer {
    /// Any length.
    Aligned(AlignedBuffer),
    /// One huge page, for loads that are not longer; and for others.
    Staged(Staging, AlignedBuffer),
}

impl LoadBuffer {
    pub(super) fn aligned() -> Self {
        Self::Aligned(AlignedBuffer::default())
    }

    /// With a huge page, if there is memory for it.
    pub(super) fn staged() -> Self {
        match Staging::new() {
            Ok(staging) => Self::Staged(staging, AlignedBuffer::default()),
            Err(error) => {
                tracing::debug!(%error, "pages are copied, because there is no memory to move them from");
                Self::aligned()
            }
        }
    }

    /// `len` bytes that begin at a page boundary; at a huge one, if possible.
    pub(super) fn bytes(&mut self, len: usize) -> &mut [u8] {
        let longer = match self {
            Self::Staged(staging, _) if len <= HUGE => return staging.get_mut(..len).unwrap_or_default(),
            Self::Staged(_, longer) | Self::Aligned(longer) => longer,
        };
        if longer.len() < len {
            *longer = AlignedBuffer::new(len);
        }
        longer.get_mut(..len).unwrap_or_default()
    }
}

/// A private mapping, at the beginning of which is a boundary of huge pages.
pub(super) struct Staging {
    mapped: NonNull<u8>,
    start: NonNull<u8>,
}

impl Staging {
    fn new() -> io::Result<Self> {
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a null hint lets the kernel choose a range that nothing else uses. These calls are those of the C library, so that a
        // sanitizer sees that an address is used again.
        let mapped = unsafe { libc::mmap(std::ptr::null_mut(), 2 * HUGE, rights, flags, -1, 0) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mapped = NonNull::new(mapped.cast::<u8>()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let before = mapped.addr().get().next_multiple_of(HUGE) - mapped.addr().get();
        // SAFETY: less than the length of a huge page is skipped, of two that are mapped.
        let start = unsafe { mapped.add(before) };
        // SAFETY: the range was mapped just now, and the advice does not change its contents. A kernel without huge pages refuses it.
        let _ = unsafe { libc::madvise(start.as_ptr().cast(), HUGE, libc::MADV_HUGEPAGE) };
        Ok(Self { mapped, start })
    }
}

// SAFETY: the mapping belongs to the value, whichever thread has it.
unsafe impl Send for Staging {}

impl Deref for Staging {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: so many bytes are mapped from there on, zero at first, and this value borrows them.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), HUGE) }
    }
}

impl DerefMut for Staging {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and nobody else has the value.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), HUGE) }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // SAFETY: it was mapped by `new` with this length, and no slice of it lives longer than the value.
        let _ = unsafe { libc::munmap(self.mapped.as_ptr().cast(), 2 * HUGE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_has_its_length_and_begins_at_a_boundary() {
        for mut buffer in [LoadBuffer::aligned(), LoadBuffer::staged()] {
            for len in [4096, HUGE, HUGE + 4096, 8192] {
                let bytes = buffer.bytes(len);
                assert!(bytes.len() == len && bytes.as_ptr().addr().is_multiple_of(4096));
                bytes.fill(7);
            }
        }
        let mut staged = LoadBuffer::staged();
        assert!(staged.bytes(4096).as_ptr().addr().is_multiple_of(HUGE));
    }
}
