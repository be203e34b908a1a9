//! A file that has become shorter than the blocks in it: what the system says then is made plain.

use std::io;

/// The end of a file where pages should be.
pub(crate) fn cut_short() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the file ends there: it has been cut shorter since it was opened, and a whole one is needed",
    )
}

/// An error of a read: that it met the end has one cause.
pub(super) fn explained(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::UnexpectedEof { cut_short() } else { error }
}
