//! A file by positions: writes of pieces, direct I/O, how much of it is data, and the errors of the system.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, MetadataExt},
    sync::Arc,
};

use multifd::ram::{DirectFile, file_size_limit, with_file_size_errors};

use crate::error::{Error, Place, StreamKind, Usage};

/// Writes all of `bytes`. A limit of the file's size is an error of the write.
pub(super) fn write_at(file: &File, bytes: &[u8], at: u64, doing: &'static str) -> Result<(), Error> {
    with_file_size_errors(|| file.write_all_at(bytes, at)).map_err(|source| io_error(source, at, doing))
}

/// The error of the system at this position of the file.
pub(super) fn io_error(source: io::Error, offset: u64, doing: &'static str) -> Error {
    Error::Io { at: Place { stream: StreamKind::File, offset }, doing, source }
}

/// The number of bytes of the file that are data and no holes. A file system that counts no data at all does not count: then
/// there is no limit.
pub(super) fn data_in(file: &File) -> io::Result<u64> {
    let data = file.metadata()?.blocks();
    Ok(if data == 0 { u64::MAX } else { data.saturating_mul(SECTOR) })
}

/// The unit in which the system counts a file's data.
const SECTOR: u64 = 512;

/// Refuses a size that `RLIMIT_FSIZE` does not allow.
pub(super) fn within_limit(size: u64) -> Result<(), Usage> {
    match file_size_limit() {
        Some(limit) if size > limit => Err(Usage::FileSize { limit, size }),
        _ => Ok(()),
    }
}

/// Direct I/O for the file, if it is supported.
pub(super) fn direct(file: &File) -> Option<Arc<DirectFile>> {
    let told = |error: io::Error| tracing::warn!(%error, "direct-io: pages go through the page cache");
    DirectFile::of(file).map_err(told).ok().map(Arc::new)
}
