//! The end of the program: the exit code, and the chain of causes on standard error.

use std::{error::Error, iter, process::ExitCode};

use multifd::error::chain;

pub(crate) use super::failure::{Failure, While};
use super::outlet::{say, say_lines};

/// Prints why it failed, and returns the process's exit code.
pub(crate) fn exit_code(ended: Result<(), Failure>) -> ExitCode {
    let Err(failure) = ended else { return ExitCode::SUCCESS };
    match &failure {
        Failure::Failed(error) | Failure::Usage(error) | Failure::SourceNotTold(error) => tell(&**error),
        Failure::Different => {}
        Failure::Interrupted => say("multifd: interrupted; the operation was cancelled"),
    }
    ExitCode::from(failure.code())
}

fn tell(error: &(dyn Error + 'static)) {
    say_lines(&lines("multifd", error));
}

/// An error and its causes, a line each; the first one begins with `who`.
pub(crate) fn lines(who: &str, error: &(dyn Error + 'static)) -> Vec<String> {
    let causes = chain(error).skip(1).map(|cause| format!("  because: {cause}"));
    iter::once(format!("{who}: {error}")).chain(causes).collect()
}
