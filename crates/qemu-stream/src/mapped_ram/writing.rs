//! Writes pieces of a file at their places.

use std::{fs::File, io, os::unix::fs::FileExt};

use multifd::ram::with_file_size_errors;

use crate::error::{Error, Place, StreamKind};

/// Writes all of `bytes`. A limit of the file's size is an error of the write.
pub(super) fn write_at(file: &File, bytes: &[u8], at: u64, doing: &'static str) -> Result<(), Error> {
    with_file_size_errors(|| file.write_all_at(bytes, at)).map_err(|source| io_error(source, at, doing))
}

/// The error of the system at this position of the file.
pub(super) fn io_error(source: io::Error, offset: u64, doing: &'static str) -> Error {
    Error::Io { at: Place { stream: StreamKind::File, offset }, doing, source }
}
