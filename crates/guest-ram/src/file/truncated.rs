//! A file that has become shorter than the blocks in it: what the system says then is made plain.

use std::io;

/// The end of a file where pages should be.
pub fn truncated() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the file ends there: it has been cut shorter since it was opened, and a whole one is needed",
    )
}

/// An error of a read: that it met the end has one cause.
pub(crate) fn explained(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::UnexpectedEof { truncated() } else { error }
}
