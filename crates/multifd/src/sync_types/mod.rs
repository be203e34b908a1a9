//! What threads meet at: locks, conditions, flags, the clock, and the threads themselves.
//!
//! These are the standard library's. The package `multifd-models` compiles the same sources with `cfg(shuttle)`, and
//! then they are those of a model checker, which decides at each of them who goes on; see `docs/develop/concurrency.md`. What
//! orders nothing, such as counters, is the standard library's there, too.

#[cfg(shuttle)]
pub(crate) mod model;

#[cfg(shuttle)]
pub(crate) use model::{
    AtomicBool, AtomicU64, Builder, Condvar, Instant, JoinHandle, Mutex, MutexGuard, OnceLock, panicking,
};
#[cfg(not(shuttle))]
pub(crate) use std::{
    sync::{
        Condvar, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicBool, AtomicU64},
    },
    thread::{Builder, JoinHandle, panicking},
    time::Instant,
};
