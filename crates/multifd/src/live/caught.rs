//! Catches panics in the embedder's callbacks: a panic ends a migration like an error.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{Error, Result};

/// Calls a callback of the embedder.
pub(super) fn caught<T>(call: &'static str, run: impl FnOnce() -> T) -> Result<T> {
    catch_unwind(AssertUnwindSafe(run)).map_err(|panic| panicked(Some(call), &*panic))
}

pub(super) fn panicked(call: Option<&'static str>, panic: &(dyn std::any::Any + Send)) -> Error {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
    Error::Panicked { call: call.unwrap_or("a part of this library"), text }
}
