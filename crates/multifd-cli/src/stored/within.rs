//! A part of a file, from an offset to its end, for readers of bytes at places.

use std::{fs::File, io};

use qemu_stream::recording::Bytes;

use crate::file_address::{FileAddress, open_regular};

/// A file from an offset on.
#[derive(Debug)]
pub(crate) struct Within {
    file: File,
    offset: u64,
}

impl Within {
    pub(crate) fn open(at: &FileAddress) -> io::Result<Self> {
        Ok(Self { file: open_regular(at.path())?, offset: at.offset() })
    }
}

impl Bytes for Within {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        Bytes::read_at(&self.file, into, self.offset.saturating_add(offset))
    }

    fn length(&self) -> io::Result<u64> {
        Ok(Bytes::length(&self.file)?.saturating_sub(self.offset))
    }
}
