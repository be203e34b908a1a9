//! The end of the program: the exit code, and the chain of causes on standard error.

use std::{
    env,
    error::Error,
    ffi::OsStr,
    io::{self, IsTerminal, Write},
    process::ExitCode,
};

use multifd::error::chain;
use tracing_subscriber::EnvFilter;

/// Why a verb did not do what was requested.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It failed: exit code 1.
    Failed(Box<dyn Error + Send + Sync>),
    /// The command line requests something impossible: exit code 2.
    Usage(Box<dyn Error + Send + Sync>),
    /// The machine is stored, but its source did not get the confirmation and may be running it: exit code 3.
    SourceNotTold(Box<dyn Error + Send + Sync>),
    /// Ctrl-C: exit code 130.
    Interrupted,
}

impl<E: Into<Box<dyn Error + Send + Sync>>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

impl Failure {
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

/// Sends the libraries' events to standard error, as requested by `MULTIFD_LOG`: `debug`, `multifd=trace`. The default
/// is warnings, or nothing with `quiet`.
pub(crate) fn trace(quiet: bool) {
    let unasked = || EnvFilter::new(if quiet { "off" } else { "warn" });
    let chosen = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_env("MULTIFD_LOG").unwrap_or_else(|_| unasked()))
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal() && !no_color(env::var_os("NO_COLOR").as_deref()))
        // A failed write of a line would be reported on standard error, and a panic if that is closed.
        .log_internal_errors(false)
        .try_init();
    // Another call in this process has set up logging already.
    drop(chosen);
}

/// Whether the environment variable `NO_COLOR` asks for output without colours: if it is set to any text.
fn no_color(variable: Option<&OsStr>) -> bool {
    variable.is_some_and(|text| !text.is_empty())
}

/// Prints why it failed, and returns the process's exit code.
pub(crate) fn exit_code(ended: Result<(), Failure>) -> ExitCode {
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Failed(error)) => {
            tell(&*error);
            ExitCode::from(1)
        }
        Err(Failure::Usage(error)) => {
            tell(&*error);
            ExitCode::from(2)
        }
        Err(Failure::SourceNotTold(error)) => {
            tell(&*error);
            ExitCode::from(3)
        }
        Err(Failure::Interrupted) => {
            say("multifd: interrupted; the operation was cancelled");
            ExitCode::from(130)
        }
    }
}

fn tell(error: &(dyn Error + 'static)) {
    let causes = chain(error).skip(1).map(|cause| format!("\n  because: {cause}"));
    say(&format!("multifd: {error}{}", causes.collect::<String>()));
}

/// Prints a line for people. If standard error is closed, nobody wants it.
pub(crate) fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Prints a line of result. If the reader of standard output has closed it (`| head`), nobody wants it.
///
/// # Errors
/// If standard output is full.
pub(crate) fn print(line: &str) -> Result<(), While> {
    match write_line(line) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        printed => printed.map_err(|error| While::new("cannot write to standard output", error)),
    }
}

/// Prints a line that another process waits for.
///
/// # Errors
/// If standard output is closed or full.
pub(crate) fn reply(line: &str) -> Result<(), While> {
    write_line(line).map_err(|error| While::new("cannot write to standard output", error))
}

fn write_line(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush())
}
