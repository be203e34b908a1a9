//! Why a delta cannot be read with its base.

use std::{error::Error as StdError, io};

use multifd::{
    Fault,
    ram::{Digest, PageSize},
};

/// Why the base of a delta cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BadBase {
    /// It cannot be opened.
    #[error("it cannot be opened: it was moved or removed after the delta was written")]
    Unreadable(#[source] io::Error),
    /// It is not a machine, or damaged.
    #[error("it is not valid")]
    Invalid {
        /// Who or what is at fault.
        fault: Fault,
        /// The [`Error`](super::Error) of the file.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// It is another machine, or another state of the machine.
    #[error(
        "it is another file than the delta was written for: expected the root {expected}, found {found}; it was replaced or changed \
         after the delta was written"
    )]
    Other {
        /// The root that the delta names.
        expected: Digest,
        /// The root of the file.
        found: Digest,
    },
    /// It has no digests.
    #[error("it has no digests, so it cannot be the file that the delta was written for")]
    NoDigests,
    /// It is a file of the chain already.
    #[error("it is one of the files that are read before it: the files name each other")]
    Loop,
    /// There are more files than a chain may have.
    #[error("it is one file too many: a delta and its bases can be at most {0} files; merge some of them")]
    TooMany(usize),
    /// Its pages have another size.
    #[error("it has pages of {found}, expected {expected}")]
    Pages {
        /// The size of the delta's pages.
        expected: PageSize,
        /// The size of the base's pages.
        found: PageSize,
    },
}

impl BadBase {
    pub(super) fn fault(&self) -> Fault {
        match self {
            Self::Unreadable(_) => Fault::System,
            Self::Invalid { fault, .. } => *fault,
            _ => Fault::Protocol,
        }
    }
}
