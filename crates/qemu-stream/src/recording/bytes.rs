//! Where the bytes of a recording are: a file, or memory.

use std::{fs::File, io, os::unix::fs::FileExt};

/// Bytes that can be read at any place, by several readers at once.
pub trait Bytes: Send + Sync {
    /// Reads at `offset`; returns how many bytes, 0 at the end.
    ///
    /// # Errors
    /// If the system cannot read.
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize>;

    /// The number of bytes.
    ///
    /// # Errors
    /// If the system cannot report it.
    fn length(&self) -> io::Result<u64>;
}

impl Bytes for File {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        loop {
            match FileExt::read_at(self, into, offset) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    fn length(&self) -> io::Result<u64> {
        self.metadata().map(|found| found.len())
    }
}

impl Bytes for &[u8] {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        let rest = usize::try_from(offset).ok().and_then(|from| self.get(from..)).unwrap_or_default();
        let count = rest.len().min(into.len());
        if let (Some(into), Some(rest)) = (into.get_mut(..count), rest.get(..count)) {
            into.copy_from_slice(rest);
        }
        Ok(count)
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}
