//! Explains errors of a file that has become shorter than the blocks in it.

use std::io;

/// The error for a file that ends where pages should be.
pub fn truncated() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the file ends there: it was made shorter after it was opened; use a complete file",
    )
}

/// Replaces the error of a read that reached the end of the file, which has only this one cause.
pub(crate) fn explained(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::UnexpectedEof { truncated() } else { error }
}
