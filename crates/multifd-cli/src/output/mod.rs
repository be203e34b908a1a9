//! What the program says, and how it ends.
//!
//! ```text
//! progress ─▶ display   while it runs: how far it is, as a bar or as lines on standard error
//! report                at the end: what was moved, as text or as JSON
//! outcome               errors with their causes, and the exit code
//! ```

pub(crate) mod display;
pub(crate) mod outcome;
pub(crate) mod progress;
pub(crate) mod report;
