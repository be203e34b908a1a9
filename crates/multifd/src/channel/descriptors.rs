//! Explains errors about missing descriptors: which limit was reached, and what to do about it.
//!
//! A connection takes one descriptor, and one more while it is opened. By default a process may have 1024. So this
//! error occurs in an embedder with many open files, or in a program with a low limit.

use std::{error::Error, fmt, io};

use rustix::{
    io::Errno,
    process::{Resource, getrlimit},
};

/// Replaces the error by an explanation if the process or the system has no descriptors left.
pub(super) fn explained(error: io::Error) -> io::Error {
    let whose = match Errno::from_io_error(&error) {
        Some(Errno::MFILE) => Whose::Process(getrlimit(Resource::Nofile).current),
        Some(Errno::NFILE) => Whose::System,
        _ => return error,
    };
    io::Error::new(error.kind(), NoneLeft { whose, cause: error })
}

/// Whether the process or the system has no descriptors left.
pub(crate) fn are_none_left(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<NoneLeft>())
}

#[derive(Debug)]
struct NoneLeft {
    whose: Whose,
    cause: io::Error,
}

#[derive(Debug)]
enum Whose {
    /// The process; with its limit, if it has one.
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
                    "no descriptors are left: the limit of open files (RLIMIT_NOFILE, `ulimit -n`) is {limit}; every \
                     channel needs one, and a second one while it connects; raise the limit, or use fewer channels \
                     (multifd-channels)"
                )
            }
            Whose::System => f.write_str(
                "the system has no descriptors left (sysctl fs.file-max): end programs that use many, or raise this limit",
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
        assert!(are_none_left(&error) && !are_none_left(&explained(Errno::CONNREFUSED.into())));
    }

    #[test]
    fn other_errors_stay_as_they_are() {
        assert_eq!(
            explained(Errno::CONNREFUSED.into()).raw_os_error(),
            Some(Errno::CONNREFUSED.raw_os_error())
        );
    }
}
