//! No descriptors left: which limit was met, and what to do about it.
//!
//! A connection takes one descriptor, and one more while it is opened. A process has 1024 at most unless told otherwise, so
//! the one that finds out is an embedder with many files open, or a program under a low limit.

use std::{error::Error, fmt, io};

use rustix::{
    io::Errno,
    process::{Resource, getrlimit},
};

/// The same error, or, if it is of a process or a system without descriptors, one that says so.
pub(super) fn explained(error: io::Error) -> io::Error {
    let whose = match Errno::from_io_error(&error) {
        Some(Errno::MFILE) => Whose::Process(getrlimit(Resource::Nofile).current),
        Some(Errno::NFILE) => Whose::System,
        _ => return error,
    };
    io::Error::new(error.kind(), NoneLeft { whose, cause: error })
}

#[derive(Debug)]
struct NoneLeft {
    whose: Whose,
    cause: io::Error,
}

#[derive(Debug)]
enum Whose {
    /// With its limit, if it has one.
    Process(Option<u64>),
    System,
}

impl fmt::Display for NoneLeft {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.whose {
            Whose::Process(limit) => {
                let limit = limit.map_or_else(|| "without bound".into(), |limit| limit.to_string());
                write!(
                    f,
                    "no descriptors are left: the limit of open files (RLIMIT_NOFILE, `ulimit -n`) is {limit}, and every \
                     channel takes one, and another one while it connects; raise it, or use fewer channels (multifd-channels)"
                )
            }
            Whose::System => f.write_str(
                "the system has no descriptors left (sysctl fs.file-max): end what holds so many, or raise it",
            ),
        }
    }
}

impl Error for NoneLeft {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.cause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limit_and_remedy_are_told_and_the_cause_is_kept() {
        let error = explained(Errno::MFILE.into());
        let text = error.to_string();
        assert!(text.contains("RLIMIT_NOFILE") && text.contains("multifd-channels"), "{text}");
        let cause = error.get_ref().and_then(|inner| inner.source()).map(ToString::to_string);
        assert_eq!(cause, Some(io::Error::from(Errno::MFILE).to_string()));
        assert!(explained(Errno::NFILE.into()).to_string().contains("fs.file-max"));
    }

    #[test]
    fn other_errors_stay_as_they_are() {
        assert_eq!(
            explained(Errno::CONNREFUSED.into()).raw_os_error(),
            Some(Errno::CONNREFUSED.raw_os_error())
        );
    }
}
