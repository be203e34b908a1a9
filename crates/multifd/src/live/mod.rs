//! Live migration.
mod status;
pub use status::Status;
pub(crate) use status::StatusCell;
