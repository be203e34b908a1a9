//! The output of the program, and its exit code.
//!
//! ```text
//! progress ─▶ display   while it runs: the progress, as a bar or as lines on standard error
//! report                at the end: what was transferred, as text or as JSON
//! failure, outcome      errors with their causes, and the exit code
//! outlet, log           the only way to standard output and error: what others chose is escaped
//! ```

pub(crate) mod display;
mod failure;
pub(crate) mod log;
pub(crate) mod outcome;
pub(crate) mod outlet;
pub(crate) mod progress;
pub(crate) mod report;
