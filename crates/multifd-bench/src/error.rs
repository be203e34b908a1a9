//! The error type: one readable text.

/// Any error; its chain of causes is printed at the end.
pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;
/// The result type.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;
