//! Catches panics in the embedder's callbacks: a panic ends a migration like an error.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::{
    channel::Callbacks,
    error::{Error, Result},
    outcome::Callback,
};

/// Calls what is not ours.
pub(super) fn caught<T>(calls: &Callbacks, call: Callback, run: impl FnOnce() -> T) -> Result<T> {
    let done = catch_unwind(AssertUnwindSafe(|| calls.call(call, run)));
    done.map_err(|panic| panicked(calls.panicked(), &*panic))
}

pub(super) fn panicked(call: Callback, panic: &(dyn std::any::Any + Send)) -> Error {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
    Error::Panicked { call, text }
}
