//! What went wrong, as one text for a person.

/// Any error; its chain of causes is printed at the end.
pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;
/// What may go wrong.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;
