//! A private buffer with the alignment of direct I/O.

use std::ops::{Deref, DerefMut};

/// The alignment of private buffers in bytes: sufficient for every disk.
const BORDER: usize = 4 << 10;

/// A private buffer that is aligned for direct I/O.
#[derive(Debug, Default)]
pub struct AlignedBuffer {
    bytes: Box<[u8]>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    /// Creates a buffer of `len` zeros.
    pub fn new(len: usize) -> Self {
        let bytes = vec![0; len + BORDER].into_boxed_slice();
        let start = bytes.as_ptr().addr().next_multiple_of(BORDER) - bytes.as_ptr().addr();
        Self { bytes, start, len }
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..][..self.len]
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..][..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffer_begins_at_a_page_and_has_its_length() {
        for len in [0, 1, 4096, 512 << 10] {
            let buffer = AlignedBuffer::new(len);
            assert_eq!(buffer.len(), len);
            assert!(buffer.as_ptr().addr().is_multiple_of(BORDER));
        }
    }
}
