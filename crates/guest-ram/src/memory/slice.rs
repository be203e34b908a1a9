//! A part of guest memory, and the only access to its bytes.
//!
//! UNSAFETY: this file copies between guest memory and private buffers. A slice is a pointer and a length that lie
//! inside the mapping they borrow. A guest, a device thread or another channel may write there at any time, so no Rust
//! reference is ever made, and no access is one that may not race ([`copy`]). Bytes that are read may be torn; callers decide from bytes they have copied, or send the
//! page again.
#![expect(unsafe_code, reason = "guest memory is reached through pointers alone")]

use std::{fmt, marker::PhantomData, ptr::NonNull};

use super::{copy, zero};

/// A part of a [`Mapping`](crate::Mapping): a pointer and a length, never a reference.
#[derive(Clone, Copy)]
pub struct GuestSlice<'a> {
    ptr: NonNull<u8>,
    len: usize,
    writable: bool,
    life: PhantomData<&'a ()>,
}

impl fmt::Debug for GuestSlice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GuestSlice({:#x} bytes at {:p})", self.len, self.ptr)
    }
}

// SAFETY: it borrows a mapping, which is `Sync`, and gives no reference to the memory.
unsafe impl Send for GuestSlice<'_> {}

impl<'a> GuestSlice<'a> {
    /// Creates a slice of the `len` bytes at `ptr`.
    ///
    /// # Safety
    /// The bytes must be mapped for all of `'a`, for writing if `writable`, and no reference to them may be alive
    /// during `'a`.
    pub(super) unsafe fn new(ptr: NonNull<u8>, len: usize, writable: bool) -> Self {
        Self { ptr, len, writable, life: PhantomData }
    }

    /// The length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a slice is asked for by its length")]
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The start address. The bytes there may change at any time.
    #[inline]
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// Whether the memory may be written to.
    #[inline]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// The slice without its first `count` bytes.
    ///
    /// # Panics
    /// If there are fewer.
    #[inline]
    pub(crate) fn after(self, count: usize) -> Self {
        let len = self.len.checked_sub(count).expect("no more than the slice has");
        // SAFETY: `count <= self.len`, so the result is inside the slice or one past its end.
        let ptr = unsafe { self.ptr.add(count) };
        Self { ptr, len, ..self }
    }

    /// The first `count` bytes, or all if there are fewer.
    #[inline]
    pub(crate) fn up_to(self, count: usize) -> Self {
        Self { len: self.len.min(count), ..self }
    }

    /// Copies the bytes into a private buffer. Other threads may copy into and out of the same memory at the same time:
    /// each byte is then the old or the new one, in any mixture.
    ///
    /// # Panics
    /// If `buffer` has a different length.
    pub fn copy_to(&self, buffer: &mut [u8]) {
        assert_eq!(buffer.len(), self.len, "a copy has the length of its source");
        // SAFETY: both are valid for `len` bytes (the slice lies inside its mapping, the lengths are equal),
        // and a private buffer cannot overlap guest memory, to which no reference exists.
        unsafe { copy::read(self.ptr.as_ptr(), buffer.as_mut_ptr(), self.len) };
    }

    /// Copies a private buffer into the memory. Other threads may access it at the same time, as in
    /// [`copy_to`](Self::copy_to).
    ///
    /// # Panics
    /// If `buffer` has a different length, or the memory is mapped for reading only.
    pub fn copy_from(&self, buffer: &[u8]) {
        assert!(self.writable, "memory mapped for reading is not written to");
        assert_eq!(buffer.len(), self.len, "a copy has the length of its target");
        // SAFETY: as in `copy_to`; that the mapping is writable is checked above.
        unsafe { copy::write(buffer.as_ptr(), self.ptr.as_ptr(), self.len) };
    }

    /// Writes zeros.
    ///
    /// # Panics
    /// If the memory is mapped for reading only.
    pub fn clear(&self) {
        assert!(self.writable, "memory mapped for reading is not written to");
        // SAFETY: the slice lies inside its mapping, which is writable.
        unsafe { copy::clear(self.ptr.as_ptr(), self.len) };
    }

    /// Whether every byte is zero at the moment it is read.
    ///
    /// The guest may write at the same time. The answer is valid for a page whose dirty bit was taken before, because a
    /// later write sets the bit again.
    pub fn is_zero(&self) -> bool {
        // SAFETY: the slice lies inside the mapping that it borrows.
        unsafe { zero::is_zero(self.ptr.as_ptr(), self.len) }
    }
}
