//! Why a verb did not do what was requested.

use std::error::Error;

/// Why a verb did not do what was requested.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It failed: exit code 1.
    Failed(Box<dyn Error + Send + Sync>),
    /// The command line requests something impossible: exit code 2.
    Usage(Box<dyn Error + Send + Sync>),
    /// The machine is stored, but its source did not get the confirmation and may be running it: exit code 3.
    SourceNotTold(Box<dyn Error + Send + Sync>),
    /// A comparison has found a difference, or a search nothing, and has reported it: exit code 1.
    Different,
    /// Ctrl-C: exit code 130.
    Interrupted,
}

impl<E: Into<Box<dyn Error + Send + Sync>>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

impl Failure {
    /// The exit code of the process.
    pub(crate) fn code(&self) -> u8 {
        match self {
            Self::Failed(_) | Self::Different => 1,
            Self::Usage(_) => 2,
            Self::SourceNotTold(_) => 3,
            Self::Interrupted => 130,
        }
    }

    /// A failure of a verb whose exit codes are those of `diff` and `grep`: 2.
    pub(crate) fn in_comparison(self) -> Self {
        match self {
            Self::Failed(error) => Self::Usage(error),
            other => other,
        }
    }

    /// Converts the error of a migration. A cancel means an interrupt, because nothing else cancels here. A usage error
    /// is caused by the command line.
    pub(crate) fn of(error: multifd::Error) -> Self {
        match error.kind() {
            multifd::Error::Cancelled => Self::Interrupted,
            multifd::Error::Usage(_) => Self::Usage(error.into()),
            _ => Self::Failed(error.into()),
        }
    }
}

/// An error that says what was being done; its source is the cause.
#[derive(Debug)]
pub(crate) struct While {
    doing: String,
    cause: Box<dyn Error + Send + Sync>,
}

impl While {
    pub(crate) fn new(doing: impl Into<String>, cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { doing: doing.into(), cause: cause.into() }
    }
}

impl std::fmt::Display for While {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.doing)
    }
}

impl Error for While {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&*self.cause)
    }
}
