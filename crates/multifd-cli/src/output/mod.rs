//! The output of the program, and its exit code.
//!
//! ```text
//! progress ─▶ display   while it runs: the progress, as a bar or as lines on standard error
//! report                at the end: what was transferred, as text or as JSON
//! outcome               errors with their causes, and the exit code
//! ```

pub(crate) mod display;
pub(crate) mod outcome;
pub(crate) mod progress;
pub(crate) mod report;
