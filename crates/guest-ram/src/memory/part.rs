//! I/O vectors over private buffers and over guest memory.
//!
//! A system call reads a [`Part`] and writes a [`PartMut`]. Both borrow what they point to and cannot outlive it. Over
//! guest memory they are not references.
//!
//! UNSAFETY: pointer and length of a part come from a slice or a [`GuestSlice`] whose lifetime it carries.
#![expect(unsafe_code, reason = "in-memory links copy from and to parts")]

use std::marker::PhantomData;

use super::{GuestSlice, copy};

/// The greatest number of parts of one call: the pages of a packet without adjacent ones, a head before, a head after.
pub const MAX_PARTS: usize = 130;

/// Bytes to send: one vector of a gathering write.
#[repr(transparent)]
pub struct Part<'a>(libc::iovec, PhantomData<&'a [u8]>);

impl std::fmt::Debug for Part<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Part({:#x} bytes at {:p})", self.0.iov_len, self.0.iov_base)
    }
}

/// Space for bytes to receive: one vector of a scattering read.
#[repr(transparent)]
pub struct PartMut<'a>(libc::iovec, PhantomData<&'a mut [u8]>);

impl std::fmt::Debug for PartMut<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PartMut({:#x} bytes at {:p})", self.0.iov_len, self.0.iov_base)
    }
}

// SAFETY: a part borrows memory that may be read from any thread.
unsafe impl Send for Part<'_> {}
// SAFETY: a part borrows memory that may be written from any one thread at a time; guest memory from any.
unsafe impl Send for PartMut<'_> {}

impl<'a> From<&'a [u8]> for Part<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self(libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }, PhantomData)
    }
}

impl<'a> From<GuestSlice<'a>> for Part<'a> {
    fn from(slice: GuestSlice<'a>) -> Self {
        Self(libc::iovec { iov_base: slice.as_ptr().cast(), iov_len: slice.len() }, PhantomData)
    }
}

impl<'a> From<&'a mut [u8]> for PartMut<'a> {
    fn from(bytes: &'a mut [u8]) -> Self {
        Self(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }, PhantomData)
    }
}

impl<'a> From<GuestSlice<'a>> for PartMut<'a> {
    /// # Panics
    /// If the memory is mapped for reading only.
    fn from(slice: GuestSlice<'a>) -> Self {
        assert!(slice.is_writable(), "memory mapped for reading is not received into");
        Self(libc::iovec { iov_base: slice.as_ptr().cast(), iov_len: slice.len() }, PhantomData)
    }
}

impl Part<'_> {
    /// The length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "an empty part is as good as any")]
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// The start address, for a system call. In guest memory, the bytes there may change at any time.
    pub fn as_ptr(&self) -> *const u8 {
        self.0.iov_base.cast_const().cast()
    }

    /// Copies the first bytes out, as many as fit into `buffer` and the part has. Returns their number.
    pub fn copy_to(&self, buffer: &mut [u8]) -> usize {
        let len = buffer.len().min(self.0.iov_len);
        // SAFETY: the part is readable for `iov_len` bytes while it is borrowed, the buffer is as long as
        // `len`, and a private buffer overlaps neither guest memory nor a shared slice.
        unsafe { copy::read(self.0.iov_base.cast_const().cast(), buffer.as_mut_ptr(), len) };
        len
    }
}

impl PartMut<'_> {
    /// The length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "an empty part is as good as any")]
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// The start address, for a system call.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Copies bytes in, as many as `buffer` has and fit into the part. Returns their number.
    pub fn copy_from(&mut self, buffer: &[u8]) -> usize {
        let len = buffer.len().min(self.0.iov_len);
        // SAFETY: the part is writable for `iov_len` bytes while it is borrowed, the buffer is as long as
        // `len`, and nothing that is borrowed mutably overlaps it.
        unsafe { copy::write(buffer.as_ptr(), self.0.iov_base.cast(), len) };
        len
    }
}

impl PartMut<'_> {
    /// Copies bytes in from `offset` on, as many as `buffer` has and fit into the part there. Returns their number.
    pub fn copy_from_at(&mut self, offset: usize, buffer: &[u8]) -> usize {
        let offset = offset.min(self.0.iov_len);
        let len = buffer.len().min(self.0.iov_len - offset);
        // SAFETY: `offset` is at most the part's length, so the pointer stays inside what it borrows.
        let at = unsafe { self.0.iov_base.cast::<u8>().add(offset) };
        // SAFETY: as in `copy_from`, for the `len` bytes from `offset` on, which the part has.
        unsafe { copy::write(buffer.as_ptr(), at, len) };
        len
    }
}

macro_rules! advance {
    ($name:ident, $part:ident) => {
        /// Drops the first `done` bytes: whole parts are skipped, the next one is shortened.
        ///
        /// # Panics
        /// If the parts have fewer bytes: no system call moves more than it was given.
        pub fn $name<'p, 'a>(mut parts: &'p mut [$part<'a>], mut done: usize) -> &'p mut [$part<'a>] {
            while let [first, ..] = parts {
                let len = first.0.iov_len;
                if done < len {
                    // SAFETY: `done < len`, so the pointer stays inside what the part borrows.
                    first.0.iov_base = unsafe { first.0.iov_base.cast::<u8>().add(done) }.cast();
                    first.0.iov_len = len - done;
                    return parts;
                }
                done -= len;
                parts = &mut parts[1..];
            }
            assert_eq!(done, 0, "more bytes moved than the parts hold");
            parts
        }
    };
}
advance!(advance, Part);
advance!(advance_mut, PartMut);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advancing_drops_whole_parts_and_shortens_the_next() {
        let (a, b, c) = ([1_u8; 3], [2_u8; 4], [3_u8; 5]);
        let mut parts = [Part::from(&a[..]), Part::from(&b[..]), Part::from(&c[..])];
        let rest = advance(&mut parts, 5);
        assert_eq!(rest.iter().map(Part::len).collect::<Vec<_>>(), [2, 5]);
        let rest = advance(rest, 2);
        assert_eq!(rest.iter().map(Part::len).collect::<Vec<_>>(), [5]);
        assert!(advance(rest, 5).is_empty());
    }

    #[test]
    #[should_panic(expected = "more bytes moved")]
    fn advancing_past_the_end_is_a_bug() {
        advance(&mut [Part::from(&[0_u8; 3][..])], 4);
    }
}
